"""Views of drawings: what the model is trained on and tested on, seeded, whole batches at once."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["CORRUPTIONS", "fixed_views", "random_views"]


def random_views(drawings: Tensor, *, size: int, generator: Generator) -> Tensor:
    """One random view of each drawing: small turns, shifts and changes of scale on white or a light colour.

    Args:
        drawings: ``(B, 4, S, S)`` uint8, RGBA with premultiplied alpha.
        size: side of the views in pixels.
        generator: all randomness comes from it.

    Returns:
        ``(B, 3, size, size)`` floats in [0, 1].
    """
    batch = drawings.shape[0]

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    angle, scale = uniform(low=-1, high=1) * math.radians(12), uniform(low=0.8, high=1.1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([cos, -sin, torch.zeros(batch), sin, cos, torch.zeros(batch)], dim=1).view(batch, 2, 3)
    theta[:, :, 2] = uniform(2, low=-0.1, high=0.1)
    tint = 1 - uniform(3, 1, 1, low=0, high=0.35) * (uniform(1, 1, 1, low=0, high=1) < 0.5)
    small = F.interpolate(drawings.float() / 255, size=size, mode="bilinear", antialias=True)
    grid = F.affine_grid(theta, list(small.shape), align_corners=False)
    x = F.grid_sample(small, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (x[:, :3] + (1 - x[:, 3:]) * tint).clamp(0, 1)


def fixed_views(drawings: Tensor, *, size: int, copies: int, seed: int) -> Tensor:
    """``copies`` views of each drawing that depend on ``seed`` alone, ``(copies * B, 3, size, size)``, copy by copy."""
    generator = Generator().manual_seed(seed)
    return torch.cat([random_views(drawings, size=size, generator=generator) for _ in range(copies)])


def _noise(x: Tensor, generator: Generator) -> Tensor:
    return x + 0.2 * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, generator: Generator) -> Tensor:
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    weight = (kernel[:, None] * kernel[None, :]).expand(3, 1, 5, 5)
    for _ in range(2):
        x = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), weight, groups=3)
    return x


def _contrast(x: Tensor, generator: Generator) -> Tensor:
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + 0.25 * (x - mean)


def _pixelate(x: Tensor, generator: Generator) -> Tensor:
    coarse = F.interpolate(x, scale_factor=1 / 3, mode="area")
    return F.interpolate(coarse, size=x.shape[-2:], mode="nearest")


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "pixelate": _pixelate,
}
