"""Class names in templates."""

import pytest

from geomreg.integrations.recipes.data.texts import check_templates, fill


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        ("a photo of a {}.", "sea_lion", "a photo of a sea_lion."),
        ("{} and {}", "cat", "cat and cat"),
        ("a photo of {a}.", "sea_lion", "a photo of a sea lion."),
        ("{a}: {}", "air_bag", "an air bag: air_bag"),
        ("{a}", "Aardvark", "an Aardvark"),
        ("no place", "cat", "no place"),
    ],
)
def test_fill(template, name, text):
    assert fill(template, name) == text


def test_templates_need_a_place():
    assert check_templates("reader", ["{}", "{a}"]) == ("{}", "{a}")
    with pytest.raises(
        ValueError, match=r"^reader: expected templates as a tuple of texts with \{\} for the class name, got \('\{b\}',\)\."
    ):
        check_templates("reader", ("{b}",))
