"""Drawings of the same emoji by several artists, from the icon sets that Iconify publishes on npm.

The sets are fetched with ``npm pack`` into the user's cache and rendered there; no drawing is committed.
Styles: ``color`` as the artist drew it; ``outline`` the same with black outlines; ``line`` white shapes with black outlines;
``wire`` outlines alone. The last three are our rendering of the same paths, so that pre-training sees more hands than artists.
"""

import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

from geomreg.integrations.quickstart.data import Drawings, cached_drawings, concepts, default_cache_dir

VERSIONS = {  # pinned: the pixels, and so the checkpoint, depend on them
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "emojione": "1.2.3",
    "emojione-monotone": "1.2.1",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
}
PRETRAINING = (
    "noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast",
    "emojione", "emojione-monotone", "fxemoji", "streamline-emojis",
)  # fmt: skip
MONOCHROME = ("fluent-emoji-high-contrast", "emojione-monotone")
_SHAPES = {"path", "circle", "ellipse", "rect", "polygon", "polyline", "line", "g", "use"}
_SVG = "http://www.w3.org/2000/svg"


def artist_drawings(artist: str, style: str = "color", *, cache_dir: Path | None = None) -> Drawings:
    """All concepts that ``artist`` drew, in ``style``, rasterised once into the cache."""
    icons = _icons(artist)
    by_code = {code: name for code, name in _names(artist).items() if name in icons["icons"]}
    codes = [code for code in concepts() if code in by_code]

    def svg(code: str) -> str:
        icon = icons["icons"][by_code[code]]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        side = max(width, height)  # a few icons are wider than high
        box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
        body = icon["body"] if style == "color" else _outlined(icon["body"], side, style)
        return f'<svg xmlns="{_SVG}" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'

    return cached_drawings(
        f"{artist}-{style}", codes, svg, key={"artist": artist, "version": VERSIONS[artist], "style": style}, cache_dir=cache_dir
    )


def _outlined(body: str, side: float, style: str) -> str:
    """The same paths with black strokes, their fill kept (``outline``), white (``line``) or none (``wire``); no translucent shading."""
    root = ElementTree.fromstring(f'<g xmlns="{_SVG}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}</g>')
    fill = {"line": "#fff", "wire": "none"}.get(style)

    def restyle(element: ElementTree.Element) -> None:
        tag = element.tag.rpartition("}")[2]
        if tag not in _SHAPES:
            return  # definitions, clip paths, masks and gradients keep their own fills
        translucent = float(element.get("opacity", 1)) * float(element.get("fill-opacity", 1)) < 1
        if tag != "g" and translucent:
            element.set("display", "none")
        for attribute in ("style", "filter", "opacity", "fill-opacity", "stroke", "stroke-width"):
            element.attrib.pop(attribute, None)
        if fill is not None and element.get("fill") not in (None, "none"):
            element.set("fill", fill)
        for child in element:
            restyle(child)

    restyle(root)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    inner = ElementTree.tostring(root, encoding="unicode")
    filled = "" if fill is None else f'fill="{fill}" '
    return f'<g {filled}stroke="#000" stroke-width="{side * 0.025}" stroke-linejoin="round">{inner}</g>'


@cache
def _package(artist: str) -> Path:
    """Folder of the unpacked npm package, fetched on first use."""
    folder = default_cache_dir() / "npm" / f"{artist}-{VERSIONS[artist]}"
    if not (folder / "package" / "icons.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            command = ["npm", "pack", f"@iconify-json/{artist}@{VERSIONS[artist]}", "--silent", "--pack-destination", temporary]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(temporary).glob("*.tgz")
            with tarfile.open(archive) as tar:
                tar.extractall(Path(temporary) / "out", filter="data")
            (Path(temporary) / "out").rename(folder)
    return folder / "package"


@cache
def _icons(artist: str) -> dict:
    return json.loads((_package(artist) / "icons.json").read_text(encoding="utf-8"))


def _names(artist: str) -> dict[str, str]:
    """Icon name by code point.

    From the tables of Noto, OpenMoji, the flat set and the artist's own; icons that none of them knows by the emoji's
    English or Unicode name (the Firefox and the Streamline drawings).
    """
    icons = _icons(artist)["icons"]
    table: dict[str, str] = {}
    known = _codes_by_name()
    for name in reversed(icons):  # of "robot-1", "robot-2" the first
        code = known.get(_squashed(re.sub(r"-\d+$", "", name)))
        if code is not None:
            table[code] = name
    for source in ("openmoji", "noto", "fluent-emoji-flat", artist):
        path = _package(source) / "chars.json"
        if path.is_file():
            for characters, name in json.loads(path.read_text(encoding="utf-8")).items():
                code = "-".join(part.upper().zfill(4) for part in re.split("-", characters) if part != "fe0f")
                if name in icons:
                    table[code] = name
    return table


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _codes_by_name() -> dict[str, str]:
    """Code by name without spaces and signs: the emoji's English name, else the name of its Unicode character."""
    codes = {_squashed(concept.name): code for code, concept in concepts().items()}
    for code in concepts():
        if "-" not in code:
            codes.setdefault(_squashed(unicodedata.name(chr(int(code, 16)), code)), code)
    return codes
