"""Images from files and from their content, and a reason for each that cannot be loaded."""

import os

import pytest
import torch
from PIL import Image
from samples import DAMAGES, damage, to_tensor, write_image
from torchvision.datasets.folder import pil_loader

from geomreg.integrations.recipes.data.images import image_sample, load_rgb
from geomreg.integrations.recipes.data.rgb import ImageConfig


@pytest.mark.parametrize(
    ("mode", "color", "suffix"),
    [
        ("RGB", (250, 130, 10), "jpg"),
        ("L", 100, "png"),
        ("1", 1, "png"),
        ("I;16", 3000, "png"),
        ("LA", (100, 50), "png"),
        ("RGBA", (250, 130, 10, 40), "png"),
        ("P", 3, "gif"),
        ("CMYK", (10, 200, 30, 40), "jpg"),
        ("RGB", (250, 130, 10), "webp"),
    ],
)
def test_same_pixels_as_torchvision(mode, color, suffix, tmp_path):
    path = str(write_image(tmp_path / f"x.{suffix}", color, mode=mode))
    for images in (None, ImageConfig(loader="open_clip")):
        assert load_rgb(path, images=images).mode == "RGB"
        content = (tmp_path / f"x.{suffix}").read_bytes()
        assert torch.equal(to_tensor(load_rgb("nowhere", content, images)), to_tensor(load_rgb(path, images=images)))
        if images is not None or mode not in ("I;16", "LA", "RGBA"):
            assert torch.equal(to_tensor(load_rgb(path, images=images)), to_tensor(pil_loader(path)))


def test_exif_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (6, 2)), Image.Exif()
    exif[0x0112] = 6  # quarter turn
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_rgb(str(tmp_path / "x.jpg")).size == (2, 6)
    assert load_rgb(str(tmp_path / "x.jpg"), images=ImageConfig(loader="open_clip")).size == (6, 2)


@pytest.mark.parametrize("kind", DAMAGES)
def test_broken_images(kind, tmp_path):
    path = write_image(tmp_path / "x.jpg")
    damage(path, kind)
    sample = image_sample("reader", "one", str(path), to_tensor, strict=False)
    assert sample.keys() == {"id", "broken"}
    assert sample["id"] == "one"
    prefix, _, reason = sample["broken"].partition(": ")
    assert prefix == str(path)
    assert len(reason.splitlines()) == 1
    with pytest.raises(
        ValueError, match=rf"^reader: expected an image, got .*x\.jpg: {DAMAGES[kind]}.* \(line 3\)\. Repair it, or pass strict="
    ):
        image_sample("reader", "one", str(path), to_tensor, strict=True, where=" (line 3)")


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "png"])
def test_broken_content(kind, tmp_path):
    path = write_image(tmp_path / "x.jpg")
    damage(path, kind)
    assert load_rgb("nowhere", path.read_bytes()) == load_rgb(str(path))
    assert image_sample("reader", "one", "in/x", to_tensor, strict=False, data=path.read_bytes())["broken"].startswith("in/x: ")


def test_decompression_bomb(tmp_path, monkeypatch):
    path = str(write_image(tmp_path / "x.png", size=20))
    assert not isinstance(load_rgb(path), str)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_rgb(path).startswith("Image size (400 pixels) exceeds limit of 200 pixels")


def test_unreadable_names_and_files(tmp_path):
    assert load_rgb("a\0b") == "embedded null byte"
    if os.geteuid():
        path = write_image(tmp_path / "x.png")
        path.chmod(0)
        assert load_rgb(str(path)) == "Permission denied"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_matter_of_the_file_is_raised(error, tmp_path, monkeypatch):
    def convert(self, mode):
        raise error

    path = str(write_image(tmp_path / "x.png"))
    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(error):
        load_rgb(path)


def test_mistakes_of_the_transform_are_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        image_sample("reader", "one", str(write_image(tmp_path / "x.png")), lambda image: 1 / 0, strict=False)
