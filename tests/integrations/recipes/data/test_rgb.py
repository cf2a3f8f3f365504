"""What is in an image file as RGB: every mode and format, orientation, transparency, more than 8 bits, and open_clip's loader."""

import io
import itertools
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import to_tensor, tokenize
from torch.utils.data import DataLoader

from geomreg.cache_build import described
from geomreg.integrations.recipes.data import ImageConfig, LabelledFolder, Preprocessing, TarPairs, collate
from geomreg.integrations.recipes.data.counted import Counted, conversions
from geomreg.integrations.recipes.data.images import image_sample, load_rgb
from geomreg.integrations.recipes.data.rgb import to_rgb

GENERATOR = np.random.default_rng(0)
COLORS = GENERATOR.integers(0, 256, (6, 9, 3), dtype=np.uint8)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "F", "I;16", "I;16B", "I;16L")
FORMATS = {
    "PNG": {},
    "TIFF": {},
    "JPEG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "TGA": {},
    "JPEG2000": {},
    "SGI": {},
}
OPEN_CLIP = ImageConfig(loader="open_clip")


def picture(mode, seed=0):
    """Six rows of nine random pixels."""
    generator = np.random.default_rng(seed)
    if mode.startswith("I;16"):
        values = generator.integers(0, 65536, (6, 9)).astype({"I;16B": ">u2"}.get(mode, "<u2"))
        return Image.frombytes(mode, (9, 6), values.tobytes())
    if mode == "I":
        return Image.fromarray(generator.integers(0, 65536, (6, 9)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(generator.random((6, 9)).astype(np.float32))
    if mode in ("P", "PA", "1"):
        image = Image.fromarray(COLORS).convert("1" if mode == "1" else "P")
        return image.convert("PA") if mode == "PA" else image
    bands = Image.new(mode, (1, 1)).getbands()
    return Image.merge(mode, [Image.fromarray(generator.integers(0, 256, (6, 9), dtype=np.uint8)) for _ in bands])


def written(image, kind, **options):
    """The file's content; None where the format cannot hold it."""
    file = io.BytesIO()
    try:
        image.save(file, kind, **FORMATS.get(kind, {}), **options)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def loaded(content, options=None):
    return load_rgb("nowhere", content, options)


def array(content, options=None):
    found = loaded(content, options)
    assert not isinstance(found, str), found
    assert found.mode == "RGB"
    return np.asarray(found)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


FILES = {(mode, kind): content for mode, kind in itertools.product(MODES, FORMATS) if (content := written(picture(mode), kind)) is not None}


def test_there_are_files_of_most_kinds():
    assert len(FILES) > 60
    assert {opened(content).mode for content in FILES.values()} >= set(MODES) - {"RGBX", "I;16L"}


@pytest.mark.parametrize(("mode", "kind"), FILES)
def test_open_clips_loader_is_one_of_them(mode, kind):
    content = FILES[mode, kind]
    for other in (content, written(opened(content), kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")):
        if other is None:
            continue
        expected = opened(other).convert("RGB")
        found = loaded(other, OPEN_CLIP)
        assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())
        assert "converted" not in image_sample("", "", "", Preprocessing(to_tensor, OPEN_CLIP), strict=True, data=other)


@pytest.mark.parametrize(("mode", "kind"), FILES)
def test_every_mode_and_format(mode, kind):
    """What has neither alpha nor more than 8 bits gives the pixels of PIL's conversion; the others what its numbers say."""
    content = FILES[mode, kind]
    image = opened(content)
    found, kinds = to_rgb(opened(content), ImageConfig())
    deep, alpha = image.mode[:1] in "IF", image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if deep:
        values = np.asarray(image).astype(float)
        white = 255 if image.mode == "F" and values.max() > 1 else 1 if image.mode == "F" else 65535
        expected = grey(np.rint(values * 255 / white))
    elif alpha:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
        expected = np.rint(255 + (rgba[..., :3] - 255) * rgba[..., 3:] / 255)
    else:
        expected = np.asarray(opened(content).convert("RGB"))
    assert np.abs(np.asarray(found).astype(float) - expected).max() <= (1 if alpha else 0)
    blended = alpha and bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())
    wanted = {"scaled": deep, "blended": blended, "cmyk": image.mode == "CMYK"}
    assert set(kinds) == {kind for kind, there in wanted.items() if there}


# orientation ----------------------------------------------------------------------------------------------------------

UPRIGHT = {  # of each value of EXIF: what is stored, made upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def exif(value):
    found = Image.Exif()
    found[0x112] = value
    return found.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("value", UPRIGHT)
def test_orientation(kind, value):
    content = written(Image.fromarray(COLORS), kind, exif=exif(value))
    plain = np.asarray(opened(written(Image.fromarray(COLORS), kind)))
    assert np.array_equal(array(content), UPRIGHT[value](plain))
    image, kinds = to_rgb(opened(content), ImageConfig())
    assert kinds == (("oriented",) if value > 1 and kind != "TIFF" else ())  # PIL itself turns TIFF
    assert np.array_equal(np.asarray(to_rgb(image, ImageConfig())[0]), UPRIGHT[value](plain))  # once is enough
    if kind != "TIFF":
        assert np.array_equal(array(content, ImageConfig(orientation="ignored")), plain)


def test_orientation_in_xmp_alone():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = written(Image.fromarray(COLORS), "JPEG", xmp=xmp)
    assert array(content).shape == (9, 6, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damaged", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", exif(0), exif(9), exif(60000)])
def test_damaged_exif_says_nothing(damaged):
    content = written(Image.fromarray(COLORS), "JPEG", exif=damaged)
    assert np.array_equal(array(content), np.asarray(opened(content).convert("RGB")))


# transparency ---------------------------------------------------------------------------------------------------------


def png(values, depth, kind, **chunks):
    """A PNG file of ``(H, W)`` or ``(H, W, 3)`` numbers of some bits, with further chunks before the pixels."""
    height, width = values.shape[:2]
    if depth < 8:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1)
        rows = np.packbits(bits, axis=1)
    else:
        rows = values.astype(">u2" if depth == 16 else "u1").reshape(height, -1).view(np.uint8)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    for name, data in {"IHDR": header, **chunks, "IDAT": zlib.compress(pixels), "IEND": b""}.items():
        body = name.encode() + data
        content += struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    return content


@pytest.mark.parametrize("color", ["white", "#102030", "none"])
def test_cut_outs(color):
    """Whatever colour lies under the transparency, it is not seen."""
    alpha = np.full((6, 9), 255, np.uint8)
    alpha[:2], alpha[2] = 0, 51
    for under in (0, 255, COLORS):
        rgb = np.where(alpha[..., None] > 0, COLORS, under).astype(np.uint8)
        found = array(written(Image.fromarray(np.dstack([rgb, alpha])), "PNG"), ImageConfig(background=color)).astype(int)
        if color == "none":
            assert np.array_equal(found, rgb)
            continue
        background = np.array([255] * 3 if color == "white" else [16, 32, 48])
        assert (found[:2] == background).all()
        assert np.abs(found[2] - (0.8 * background + 0.2 * COLORS[2])).max() <= 1
        assert np.array_equal(found[3:], COLORS[3:])


def test_opaque_alpha_is_nothing():
    image = Image.fromarray(COLORS)
    for mode in ("RGBA", "PA"):
        content = written((image if mode == "RGBA" else image.convert("P")).convert(mode), "TIFF")
        assert np.array_equal(array(content), np.asarray(opened(content).convert("RGB")))
        assert to_rgb(opened(content), ImageConfig())[1] == ()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey(depth):
    """The key is written in the bits of the file, PIL's pixels are in 8."""
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, (6, 9))
    for key in (top, 0):
        values[0, :4] = key
        found = array(png(values, depth, 0, tRNS=struct.pack(">H", key)))
        expected = np.where(values == key, 255, np.rint(values * (255 / top)))
        assert np.array_equal(found, grey(expected))


@pytest.mark.parametrize("depth", [8, 16])
def test_one_transparent_color(depth):
    values = COLORS.astype(int) * (257 if depth == 16 else 1)
    content = png(values, depth, 2, tRNS=struct.pack(">HHH", *values[2, 3].tolist()))
    expected = COLORS.copy()
    expected[(COLORS[2, 3] == COLORS).all(axis=2)] = 255
    assert np.array_equal(array(content), expected)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_entries_of_palettes(kind):
    image = Image.fromarray(COLORS).quantize(16)
    index = int(np.asarray(image)[0, 0])
    plain, gone = np.asarray(image.convert("RGB")), np.asarray(image) == index
    found = array(written(image, kind, transparency=index))
    assert (found[gone] == 255).all()
    assert np.array_equal(found[~gone], plain[~gone])
    if kind == "PNG":
        alphas = bytes([255] * index + [51] + [255] * (15 - index))
        found = array(written(image, kind, transparency=alphas))
        assert np.abs(found[gone] - (0.8 * 255 + 0.2 * plain[gone].astype(float))).max() <= 1
        assert np.array_equal(found[~gone], plain[~gone])


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_colors_that_are_multiplied_by_alpha(mode):
    whole = picture({"RGBa": "RGBA", "La": "LA"}[mode])
    found, kinds = to_rgb(whole.convert(mode), ImageConfig())
    expected, _ = to_rgb(whole, ImageConfig())
    assert kinds == ("blended",)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 2


def test_the_models_color():
    content = written(picture("RGBA"), "PNG")
    for fill, color in ((0, "black"), (255, "white"), ([1, 2, 3], "#010203")):
        resolved = ImageConfig(background="model").resolved(fill)
        assert np.array_equal(array(content, resolved), array(content, ImageConfig(background=color)))
    with pytest.raises(ValueError, match=r"^to_rgb: expected the colour of the background, got model"):
        to_rgb(opened(content), ImageConfig(background="model"))


# more than 8 bits -----------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 54).reshape(6, 9)


def tiff(values, *, bits, kind=1, photometric=1, order="<"):
    """An uncompressed TIFF file of one channel."""
    height, width = values.shape
    if bits == 12:
        flat = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:].reshape(height, -1)
        data = np.packbits(flat, axis=1).tobytes()
    else:
        data = values.astype(f"{order}{'uif'[kind - 1]}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data)) + data
    content += struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        content += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return content + struct.pack(f"{order}I", 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("bits", "kind", "white", "values"),
    [
        (16, 1, 65535, RAMP),
        (16, 1, 65535, RAMP / 400),  # dark, and no other scale for that
        (16, 2, 32767, RAMP / 2),
        (32, 2, 65535, RAMP),
        (32, 2, 255, RAMP / 257),
        (32, 3, 1, RAMP / 65535),
        (32, 3, 255, RAMP / 257),
    ],
)
def test_kinds_of_numbers(bits, kind, white, values, order):
    values = values if kind == 3 else np.floor(values)
    content = tiff(values, bits=bits, kind=kind, order=order)
    found = array(content)
    assert np.abs(found - grey(values * 255 / white)).max() <= 0.5 + 1e-4
    assert to_rgb(opened(content), ImageConfig())[1] == ("scaled",)
    clipped = opened(content)
    assert clipped.mode[:1] in "IF"
    if clipped.mode != "I;16B":
        assert np.array_equal(array(content, ImageConfig(deep="clipped")), np.asarray(clipped.convert("RGB")))


def test_twelve_bits_and_white_as_zero():
    values = np.floor(RAMP / 16)[:, :8]
    assert np.array_equal(array(tiff(values, bits=12)), grey(np.rint(values * 255 / 4095)))
    values = np.floor(RAMP)
    expected = 255 - np.rint(values * 255 / 65535)
    assert np.array_equal(array(tiff(values, bits=16, photometric=0)), grey(expected))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (RAMP - 5, 3, "floats from -5 to 65530, of which nothing says what is white; say it by the option images.white"),
        (RAMP / 200, 3, r"floats from 0 to 327.675, of which"),
        (RAMP - 1, 2, "integers from -1 to 65534, of which"),
        (RAMP * 2, 2, "integers from 0 to 131070, of which"),
        (np.where(RAMP > 9, np.nan, 0), 3, "values that are NaN or infinite"),
        (np.where(RAMP > 9, np.inf, 0), 3, "values that are NaN or infinite"),
    ],
)
def test_numbers_that_say_nothing_of_white_are_broken(values, kind, message, tmp_path):
    content = tiff(values, bits=32, kind=kind)
    sample = image_sample("reader", "one", "in/x.tif", to_tensor, strict=False, data=content)
    assert sample["broken"].startswith(f"in/x.tif: {message}")
    if "NaN" in message:
        assert loaded(content, ImageConfig(white=1000.0)) == message
    else:
        expected = np.rint(np.clip(values.astype("f4" if kind == 3 else "i4") * (255 / 1000.0), 0, 255))
        assert np.array_equal(array(content, ImageConfig(white=1000.0)), grey(expected))


def test_portable_greymaps_of_more_than_8_bits():
    values = np.floor(RAMP / 65.536)
    content = b"P5 9 6 1000\n" + values.astype(">u2").tobytes()
    assert np.abs(array(content) - grey(values * 255 / 1000)).max() <= 0.6


# altogether -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA", "I;16"]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    value=st.sampled_from([None, *UPRIGHT]),
    color=st.tuples(*[st.integers(0, 255)] * 3),
    seed=st.integers(0, 9),
)
def test_any_picture(mode, size, value, color, seed):
    """Everything together equals one after the other, computed in numbers."""
    generator = np.random.default_rng(seed)
    shape = (*size, len(Image.new(mode, (1, 1)).getbands()))
    values = generator.integers(0, 65536 if mode == "I;16" else 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values[..., 0] if shape[2] == 1 else values)
    content = written(image, "PNG", **({} if value is None else {"exif": exif(value)}))
    found, kinds = to_rgb(opened(content), ImageConfig(background="#{:02x}{:02x}{:02x}".format(*color)))
    colors = np.rint(values / 257) if mode == "I;16" else values.astype(float)
    alpha = colors[..., -1:] / 255 if mode in ("LA", "RGBA") else 1.0
    colors = colors[..., :3] if mode.startswith("RGB") else np.repeat(colors[..., :1], 3, axis=2)
    expected = UPRIGHT[value or 1](np.array(color) * (1 - alpha) + colors * alpha)
    assert found.size == expected.shape[1::-1]
    assert np.abs(np.asarray(found) - expected).max() <= (1 if mode in ("LA", "RGBA") else 0)
    wanted = {"oriented": (value or 1) > 1, "scaled": mode == "I;16", "blended": bool(np.any(np.less(alpha, 1)))}
    assert set(kinds) == {kind for kind, there in wanted.items() if there}


def folder_of_all(path):
    """A file of each mode and format that there is, in class folders and in a shard."""
    with tarfile.open(path / "shard.tar", "w") as tar:
        for number, ((_, kind), content) in enumerate(FILES.items()):
            suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}.get(kind)
            if suffix is None:
                continue
            file = path / "data" / "things" / f"{number:03d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            for name, data in ((file.name, content), (f"{number:03d}.txt", b"a thing")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "MPO", "TIFF", "PNG"])
def test_the_first_of_several_pictures(kind):
    more = [Image.fromarray(255 - COLORS)]
    content = written(Image.fromarray(COLORS), kind, save_all=True, append_images=more)
    single = written(Image.fromarray(COLORS), "JPEG" if kind == "MPO" else kind)
    assert opened(content).n_frames == 2
    assert np.array_equal(array(content), array(single))


@pytest.mark.parametrize("images", [ImageConfig(), OPEN_CLIP, ImageConfig(background="black", orientation="ignored")], ids=str)
def test_readers_are_alike(tmp_path, images):
    folder_of_all(tmp_path)
    transform = Preprocessing(to_tensor, images)
    extensions = ("jpg", "png", "webp", "tif", "bmp", "ppm")
    tar = TarPairs(tmp_path / "shard.tar", transform=transform, tokenizer=tokenize, image_extensions=extensions)
    folder = LabelledFolder(tmp_path / "data", transform=transform)
    assert len(tar) == len(folder) > 40
    for one, other in zip(tar, folder, strict=True):
        assert one.get("converted") == other.get("converted")
        if "broken" in one:
            assert one["broken"].rpartition(": ")[2] == other["broken"].rpartition(": ")[2]
        else:
            assert torch.equal(one["image"], other["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_is_counted_once(tmp_path, workers):
    for row in range(6):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        content = written(picture("RGBA" if row < 3 else "RGB"), "PNG", **({"exif": exif(6)} if row % 2 else {"exif": exif(1)}))
        (tmp_path / "data" / "a" / f"{row}.png").write_bytes(content)
    (tmp_path / "data" / "a" / "6.png").write_bytes(b"nothing")
    (tmp_path / "data" / "a" / "7.png").write_bytes(FILES["I;16", "PNG"])
    (tmp_path / "data" / "a" / "8.jpg").write_bytes(FILES["CMYK", "JPEG"])
    pad = Preprocessing(lambda image: torch.zeros(1), ImageConfig(background="#ff0000"))
    data = Counted(LabelledFolder(tmp_path / "data", transform=pad))
    assert data.classes == ("a",)
    assert conversions(data) == ""
    for _ in range(2):
        for batch in DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate):
            assert batch.keys() == {"id", "broken", "image", "label"}
    assert conversions(data) == (
        "3 of 8 pictures had transparency and were blended on #ff0000, 3 were turned upright by their orientation in EXIF, "
        "1 had more than 8 bits of grey and were scaled to 8, 1 were in CMYK and became RGB"
    )
    assert conversions(data.dataset) == ""
    other = np.zeros(9, np.uint8)
    other[5] = data.notes[0]
    assert conversions(data, [other]).startswith("4 of 8 pictures")


def test_what_a_cache_knows_of_a_preprocessing():
    seen = {described(Preprocessing(to_tensor, images)) for images in (ImageConfig(), OPEN_CLIP, ImageConfig(white=1.0))}
    assert len(seen | {described(to_tensor)}) == 4
    assert Preprocessing(to_tensor, ImageConfig())(opened(FILES["RGBA", "PNG"])).shape == (3, 6, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "whit"}, r"expected background as a colour without transparency, model or none, got 'whit'\. Write"),
        ({"background": "#ffffff00"}, "expected background as a colour without transparency"),
        ({"loader": "open_clip", "background": "black"}, "expected no background with loader=open_clip, got black. Leave it out."),
        ({"deep": "clipped", "white": 1.0}, "expected no white with deep=clipped"),
        ({"white": 0.0}, "expected white"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=f"^ImageConfig: {message}"):
        ImageConfig(**options)
