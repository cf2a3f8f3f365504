"""Strong augmentation of drawings for pre-training: whole batches at once, in torch, on premultiplied RGBA."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["augment"]


def augment(images: Tensor, line_art: Tensor, *, size: int, generator: Generator) -> Tensor:
    """Random views of ``(B, 4, S, S)`` uint8 drawings as ``(B, 3, size, size)`` floats in [0, 1].

    Args:
        images: RGBA with premultiplied alpha.
        line_art: ``(B,)`` bool, drawings of black lines: they get no dark background and thicker strokes at times.
    """
    batch = images.shape[0]

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(batch, generator=generator) < probability

    x = images.float() / 255
    thick = line_art & chance(0.35)  # strokes one pixel wider on either side
    if thick.any():
        alpha = F.max_pool2d(x[thick, 3:], 3, stride=1, padding=1)
        ink = -F.max_pool2d(-(x[thick, :3] + 1 - x[thick, 3:]), 3, stride=1, padding=1)
        x[thick] = torch.cat([(ink - (1 - alpha)).clamp(min=0), alpha], dim=1)

    # geometry: scale, aspect, rotation, shear, shift, mirror, and smooth bending
    scale, aspect = uniform(low=0.6, high=1.12), torch.exp(uniform(low=-0.15, high=0.15))
    angle, shear = uniform(low=-1, high=1) * math.radians(20), uniform(low=-0.2, high=0.2)
    mirror = torch.where(chance(0.35), -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * cos / (scale * aspect), (-sin + shear) / scale
    theta[:, 1, 0], theta[:, 1, 1] = mirror * sin / scale, cos * aspect / scale
    theta[:, :, 2] = uniform(2, low=-1, high=1) * (0.12 + (1 - scale).clamp(min=0))[:, None] * 0.8
    grid = F.affine_grid(theta, [batch, 4, size, size], align_corners=False)
    bend = uniform(1, 1, 1, low=0, high=0.08) * torch.randn(batch, 2, 5, 5, generator=generator)  # another artist's hand
    grid = grid + F.interpolate(bend, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    color, alpha = x[:, :3], x[:, 3:]

    # colour: hue rotation about the grey axis, saturation, channel order, grey
    hue = torch.where(chance(0.5), uniform(low=-1, high=1) * math.pi, torch.zeros(batch))
    saturation = torch.where(chance(0.2), torch.zeros(batch), uniform(low=0.4, high=1.4))
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = torch.cos(hue)[:, None, None] * (torch.eye(3) - grey) + torch.sin(hue)[:, None, None] * cross
    color = torch.einsum("bij,bjhw->bihw", saturation[:, None, None] * turn + grey, color)
    contrast, brightness = uniform(low=0.6, high=1.2), uniform(low=-0.15, high=0.2)
    color = (color * contrast[:, None, None, None] + brightness[:, None, None, None] * alpha).clamp(0, 1)
    color = torch.minimum(color, alpha.clamp(min=0))

    # background: white, one colour, a gradient or coarse noise; light behind line art
    first, second = uniform(3, 1, 1), uniform(3, 1, 1)
    ramp = torch.linspace(0, 1, size)
    direction = uniform(1, 1, 1)
    ramp = direction * ramp[None, None, :, None] + (1 - direction) * ramp[None, None, None, :]
    gradient = first * (1 - ramp) + second * ramp
    coarse = F.interpolate(torch.rand(batch, 3, 6, 6, generator=generator), size=size, mode="bilinear")
    kind = torch.rand(batch, generator=generator)[:, None, None, None]
    background = torch.where(kind < 0.65, first.expand_as(gradient), torch.where(kind < 0.85, gradient, coarse))
    light = (line_art | chance(0.5))[:, None, None, None]
    background = torch.where(light, 0.6 + 0.4 * background, background)
    background = torch.where(kind < 0.4, torch.ones_like(background), background)
    x = color + (1 - alpha) * background

    # random textures: a convolution of random weights, mixed with the picture (RandConv, arXiv 2007.13003)
    textured = ~line_art & chance(0.15)
    if textured.any():
        flat = x[textured]
        count = len(flat)
        kernel = torch.randn(count * 3, 3, 3, 3, generator=generator) / math.sqrt(27)
        random = F.conv2d((flat - 0.5).reshape(1, count * 3, size, size), kernel, padding=1, groups=count).view_as(flat) + 0.5
        x[textured] = torch.lerp(flat, random, torch.rand(count, 1, 1, 1, generator=generator)).clamp(0, 1)

    # our own line art: local contrast of the picture as dark strokes on white
    sketch = ~line_art & chance(0.1)
    if sketch.any():
        flat = color[sketch] + (1 - alpha[sketch])
        edges = (F.max_pool2d(flat, 3, 1, 1) + F.max_pool2d(-flat, 3, 1, 1)).amax(dim=1, keepdim=True)
        x[sketch] = (1 - 1.6 * edges).clamp(0, 1).expand(-1, 3, -1, -1)
    negative = chance(0.06)
    x[negative] = 1 - x[negative]

    soft = chance(0.15)
    if soft.any():
        x[soft] = F.avg_pool2d(F.pad(x[soft], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.where(chance(0.3), uniform(high=0.12), torch.zeros(batch))
    x = x + amount[:, None, None, None] * torch.randn(x.shape, generator=generator)
    position = torch.arange(size)
    for _ in range(2):  # random erasing, up to two patches
        height, width = uniform(low=0.1, high=0.4) * size, uniform(low=0.1, high=0.4) * size
        top, left = uniform() * (size - height), uniform() * (size - width)
        rows = (position >= top[:, None]) & (position < (top + height)[:, None])
        columns = (position >= left[:, None]) & (position < (left + width)[:, None])
        patch = (rows[:, None, :, None] & columns[:, None, None, :]) & chance(0.2)[:, None, None, None]
        x = torch.where(patch, uniform(3, 1, 1), x)
    return x.clamp(0, 1)
