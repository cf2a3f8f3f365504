"""What tests of several gloo processes on this machine have in common."""

import os
import socket

import torch


def free_port() -> int:
    """That nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def announce(rank: int, ranks: int, port: int) -> None:
    """Say who this process is, as torchrun does, for accelerate to join the others; one thread each."""
    torch.set_num_threads(1)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in address.items()})
