"""Tiny image files, a transform and a tokenizer for the tests of readers."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

__all__ = ["DAMAGES", "damage", "forbidden", "to_tensor", "tokenize", "untokenize", "write_image"]


def tokenize(texts: list[str]) -> Tensor:
    """Code points, padded to 12."""
    return torch.stack([torch.tensor([ord(letter) for letter in text[:12].ljust(12, "\0")]) for text in texts])


def untokenize(tokens: Tensor) -> str:
    return "".join(map(chr, tokens.tolist())).rstrip("\0")


def forbidden(*_: object) -> Tensor:
    raise AssertionError("called")


def write_image(path: Path, color: tuple[int, ...] | int = (255, 0, 0), *, mode: str = "RGB", size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), color).save(path)
    return path


def damage(path: Path, kind: str) -> None:
    """Make of the image file one that cannot be decoded."""
    if kind == "truncated":
        Image.effect_noise((64, 64), 90).convert("RGB").save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:-600])
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "png":  # a wrong checksum: PIL raises SyntaxError
        Image.new("RGB", (4, 4)).save(path, "PNG")
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    else:
        raise ValueError(kind)


DAMAGES = {
    "truncated": "image file is truncated",
    "text": "not an image that PIL knows",
    "empty": "empty file",
    "png": ".+",
    "folder": "Is a directory",
    "missing": "No such file or directory",
}
