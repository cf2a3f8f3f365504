"""What a run began with, kept in its checkpoints: weights, configuration of the model, cached teacher, data."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Identity", "digest_of_weights"]


class Identity:
    """Digests of what a run is made of; a checkpoint is refused where they differ.

    Args:
        folder: of the run, for messages.
        parts: name of each part to its digest, or to a dictionary of digests.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Any]) -> None:
        self.folder, self.parts = folder, json.loads(json.dumps(parts, default=str))

    def state_dict(self) -> dict[str, Any]:
        return {"parts": json.dumps(self.parts, sort_keys=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: a part is another one than when the run began.
        """
        before = json.loads(state["parts"])
        for name in sorted(before.keys() | self.parts.keys()):
            if before.get(name) != self.parts.get(name):
                raise ValueError(
                    f"finetune: expected the run in {self.folder} to go on with the {name} that it began with, got another. Restore it, "
                    "or use another output folder."
                )


def digest_of_weights(model: nn.Module) -> str:
    """Over names and values of all weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
