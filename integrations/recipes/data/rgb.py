"""What is in an image file as eight bits of red, green and blue: upright, on a background, scaled from more bits."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from geomreg.checks import check_positive

__all__ = ["KINDS", "ImageConfig", "Preprocessing", "described_loading", "to_rgb"]

KINDS = ("oriented", "blended", "scaled", "cmyk")
"""What :func:`to_rgb` may have done to an image."""
VERSION = 1  # of the pixels that :func:`to_rgb` gives for the same options; raised when one of them changes

_ORIENTATION, _METADATA = 0x0112, ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 339  # tags of TIFF


@dataclass(frozen=True)
class ImageConfig:
    """How image files are read: alike for student, teacher, evaluation, probe and caches.

    open_clip and torchvision read all files by PIL's ``convert("RGB")``: transparency is dropped, so that whatever colour lies under it
    shows, often black; the EXIF orientation is ignored, so that many photographs lie on their side; and what has 16 bits or floats is cut
    off at 255, so that it is white, or black for floats up to 1. The defaults here read such files as viewers show them; every other
    file gives the same pixels. Of files with several pictures the first counts. CMYK, palettes and 1 bit are read as PIL reads them, and
    16 bits of red, green and blue keep the higher 8, which PIL does itself; colour profiles are not looked at.

    Attributes:
        loader: ``geomreg``, as the options below say, or ``open_clip``: ``convert("RGB")`` and nothing else, bit for bit open_clip's.
        orientation: of EXIF, or of XMP if there is no EXIF: ``applied`` or ``ignored``. TIFF files are turned by PIL itself either way.
        background: what transparency is blended on: a colour by any name that PIL knows, ``white`` or ``#rrggbb`` say; ``model``, the
            ``fill_color`` of the model's preprocessing, black for most; or ``none``: the colours under the transparency show.
        deep: more than 8 bits of grey: ``scaled``, or ``clipped`` at 255. Unsigned integers of 16 and 12 bits are scaled by the full range
            of their type, and signed ones of 16 bits by its positive half. Of integers of 32 bits and floats the type does not say what
            is white: in floats from 0 to 1 it is 1, in other values from 0 to 255 it is 255, and in other integers from 0 to 65535 it is
            65535. All others, NaN among them, make a broken sample.
        white: value that is white in integers of 32 bits and floats, with 0 as black; values beyond are cut off. None: as above.
    """

    loader: Literal["geomreg", "open_clip"] = "geomreg"
    orientation: Literal["applied", "ignored"] = "applied"
    background: str = "white"
    deep: Literal["scaled", "clipped"] = "scaled"
    white: float | None = None

    def __post_init__(self) -> None:
        if self.loader == "open_clip" and (others := _changed(self, "loader")):
            raise ValueError(f"ImageConfig: expected no {others[0]} with loader=open_clip, got {getattr(self, others[0])}. Leave it out.")
        if self.white is not None:
            check_positive("ImageConfig", "white", self.white)
            if self.deep == "clipped":
                raise ValueError(f"ImageConfig: expected no white with deep=clipped, got {self.white}. Leave it out.")
        if self.background not in ("model", "none"):
            try:
                known = len(ImageColor.getrgb(self.background)) == 3
            except ValueError:
                known = False
            if not known:
                raise ValueError(
                    f"ImageConfig: expected background as a colour without transparency, model or none, got {self.background!r}. "
                    "Write white or '#ffffff', say."
                )

    def resolved(self, fill_color: int | Sequence[int]) -> "ImageConfig":
        """With the colour itself in the place of ``model``."""
        if self.background != "model":
            return self
        color = (fill_color,) * 3 if isinstance(fill_color, int) else tuple(fill_color)
        return dataclasses.replace(self, background="#{:02x}{:02x}{:02x}".format(*color))


def _changed(options: ImageConfig, *among: str) -> list[str]:
    """Names of the options that are not at their defaults, but for those among ``among``."""
    fields = (field for field in dataclasses.fields(options) if field.name not in among)
    return [field.name for field in fields if getattr(options, field.name) != field.default]


class Preprocessing:
    """A transform together with how the images that it gets are read.

    Readers look at ``images``; a transform without it gets images by the defaults of :class:`ImageConfig`. A cache of embeddings knows
    both, so that one built by other options is refused.

    Args:
        transform: PIL image in RGB to tensor.
        images: how files are read.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], images: ImageConfig) -> None:
        self.transform, self.images = transform, images

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor of an image as ``PIL.Image.open`` gives it, or of one in RGB."""
        return self.transform(to_rgb(image, self.images)[0])

    def __repr__(self) -> str:
        changed = (f"{option}={getattr(self.images, option)}" for option in _changed(self.images))
        return f"Preprocessing({', '.join([*changed, str(self.transform)])})"


def described_loading(transform: object) -> str:
    """In words how the image files that a transform gets are read; the same where they give the same pixels."""
    images = transform.images if isinstance(transform, Preprocessing) else ImageConfig()
    if images.loader == "open_clip":
        return "open_clip's loader"
    options = (f"{option} {value}" for option, value in dataclasses.asdict(images).items() if option != "loader" and value is not None)
    return f"geomreg's loader {VERSION}: {', '.join(options)}"


def to_rgb(image: Image.Image, options: ImageConfig) -> tuple[Image.Image, tuple[str, ...]]:
    """The image in RGB, and which of :data:`KINDS` it took; nothing is said of what PIL reads as it is.

    Args:
        image: as ``PIL.Image.open`` gives it.
        options: what is wanted.

    Raises:
        ValueError: numbers of which it is not known what is white; a background that is not resolved.
    """
    if options.loader == "open_clip":
        return image.convert("RGB"), ()
    stored = _Stored(image)
    image.load()
    color, kinds = image, []
    if options.background != "none":
        color, alpha = _parted(image, stored)
    else:
        alpha = None
    if options.deep == "scaled" and color.mode[:1] in "IF":
        color = Image.fromarray(_scaled(color, stored, options.white))
        kinds.append("scaled")
    if color.mode == "CMYK":
        kinds.append("cmyk")
    if color.mode != "RGB" or image.format != "JPEG":  # the pixels of a JPEG file in RGB are needed nowhere else: no copy
        color = color.convert("RGB")
    if alpha is not None:
        if options.background == "model":
            raise ValueError("to_rgb: expected the colour of the background, got model. Call resolved() with the model's fill_color.")
        canvas = Image.new("RGB", color.size, options.background)
        canvas.paste(color, mask=alpha)
        canvas.info = {key: value for key, value in image.info.items() if key != "transparency"}
        color = canvas
        kinds.append("blended")
    if options.orientation == "applied" and (turn := _turn(image)) is not None:
        color = color.transpose(turn)
        color.info = {key: value for key, value in color.info.items() if key not in _METADATA}  # so that none turns it again
        kinds.append("oriented")
    return color, tuple(sorted(kinds, key=KINDS.index))


class _Stored:
    """What a file says of its numbers, which PIL forgets when it loads them."""

    def __init__(self, image: Image.Image) -> None:
        tile, tags = getattr(image, "tile", None), getattr(image, "tag_v2", {})
        found = tile[0][3] if tile else None
        raw = found[0] if isinstance(found, tuple) and found else found
        self.format, self.raw = image.format, raw if isinstance(raw, str) else ""
        self.bits, self.signed = _first(tags.get(_BITS)), _first(tags.get(_SAMPLES)) == 2
        self.inverted = tags.get(_PHOTOMETRIC) == 0  # 0 is white; PIL knows it for 8 bits alone


def _first(value: Any) -> Any:
    """Of a tag with a number for each channel."""
    return value[0] if isinstance(value, tuple) and value else value


def _parted(image: Image.Image, stored: _Stored) -> tuple[Image.Image, Image.Image | None]:
    """The colours, not multiplied by any alpha, and the alpha as ``L``; None where all is opaque."""
    key, palette = image.info.get("transparency"), image.palette
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "PA" or (image.mode == "P" and (key is not None or (palette is not None and palette.mode.endswith("A")))):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
    elif key is None or (mask := _keyed(image, key, stored)) is None:
        return image, None
    else:
        alpha = Image.fromarray(np.where(mask, np.uint8(0), np.uint8(255)))
    return image, None if alpha.getextrema()[0] == 255 else alpha


def _keyed(image: Image.Image, key: Any, stored: _Stored) -> NDArray[np.bool_] | None:
    """Where an image has the one colour that stands for transparency; it is written in the bits of the file."""
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        wanted = np.array(key) >> 8 if ";16" in stored.raw else np.array(key)
        return np.asarray((np.asarray(image) == wanted).all(axis=2))
    if not isinstance(key, int):
        return None
    if image.mode in ("1", "L"):
        depth = {"L;2": 85, "L;4": 17}.get(stored.raw, 1)
        return np.asarray(np.asarray(image.convert("L")) == key * depth)
    return np.asarray(np.asarray(image) == key) if image.mode[:1] == "I" else None


def _scaled(image: Image.Image, stored: _Stored, white: float | None) -> NDArray[np.uint8]:
    """Grey in 8 bits."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        white = 4095 if stored.bits == 12 else 65535
    elif white is None:
        white = _white(values, stored)
    elif not np.isfinite(values).all():
        raise ValueError("values that are NaN or infinite")
    scaled = np.rint(np.clip(values.astype(np.float64) * (255 / white), 0, 255)).astype(np.uint8)
    return 255 - scaled if stored.inverted else scaled


def _white(values: NDArray[Any], stored: _Stored) -> float:
    """Of integers and floats of 32 bits, as :class:`ImageConfig` says."""
    kind = "floats" if values.dtype.kind == "f" else "integers"
    if not np.isfinite(values).all():
        raise ValueError("values that are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    if kind == "integers" and low >= 0:
        if stored.bits == 16:
            return 32767.0 if stored.signed else 65535.0
        if stored.format == "PPM" or ";16" in stored.raw:
            return 65535.0  # PIL has scaled what a PGM file says to this; PNG of 16 bits in its older versions
    for white in (1.0, 255.0) if kind == "floats" else (255.0, 65535.0):
        if low >= 0 and high <= white:
            return white
    raise ValueError(
        f"{kind} from {low:g} to {high:g}, of which nothing says what is white; say it by the option images.white, or save 8 or 16 bits"
    )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright; None if it is, or nothing says."""
    if not any(key in image.info for key in _METADATA):
        return None
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # PIL raises many kinds on damaged EXIF, which says nothing of the orientation
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None
