"""States of torch's random numbers, on the CPU and on the accelerators in use."""

import torch
from torch import Tensor

__all__ = ["random_state", "same_random_state", "set_random_state"]

State = tuple[Tensor, list[Tensor]]


def random_state(devices: list[torch.device]) -> State:
    """That of the CPU, and of each device."""
    return torch.get_rng_state(), [torch.get_device_module(device).get_rng_state(device.index or 0) for device in devices]


def set_random_state(state: State, devices: list[torch.device]) -> None:
    """Random numbers go on from ``state``, which is of these devices."""
    torch.set_rng_state(state[0])
    for device, of_device in zip(devices, state[1], strict=True):
        torch.get_device_module(device).set_rng_state(of_device, device.index or 0)


def same_random_state(one: State, other: State) -> bool:
    """Whether nothing was drawn in between."""
    return all(torch.equal(first, second) for first, second in zip((one[0], *one[1]), (other[0], *other[1]), strict=True))
