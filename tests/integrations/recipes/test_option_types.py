"""Options of readers and terms have the types that their constructors declare."""

import datetime
import inspect
from pathlib import Path

import pytest

import geomreg
from geomreg.integrations.recipes.config import READERS, Config, DataConfig, MethodConfig, TermConfig, TrainConfig
from geomreg.integrations.recipes.data import RandomTexts
from geomreg.integrations.recipes.models import ModelConfig
from geomreg.integrations.recipes.option_types import typed

OWNERS = [*READERS.values(), RandomTexts, *filter(inspect.isclass, map(geomreg.regularizers.__dict__.get, geomreg.regularizers.__all__))]


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("csv", {"image_key": False}, "image_key as text or null, got False, which YAML makes of yes, no, on and off, here in quotes too."),
        ("csv", {"caption_key": datetime.date(2024, 1, 2)}, "caption_key as text or null, got datetime.date"),
        ("csv", {"strict": "false"}, "strict as true or false, got 'false', a value of type str. Mend it."),  # which is true in Python
        ("csv", {"strict": 1}, "strict as true or false, got 1, a value of type int."),
        ("folder", {"templates": "a {}."}, "templates as a list of texts, got 'a {}.', a value of type str."),
        ("folder", {"templates": ["a {}.", 3]}, "templates as a list of texts, got ['a {}.', 3], a value of type list."),
        ("coco", {"root": ["x"]}, "root as text, got ['x'], a value of type list."),
    ],
)
def test_of_another_type(kind, options, told):
    with pytest.raises(ValueError, match=r"^options of ") as caught:
        DataConfig(kind, "x", {"root": "y", **options} if kind == "coco" else options)
    assert str(caught.value).startswith(f"options of {kind}: expected {told}")


def test_of_terms():
    for owner, key, value in (
        (geomreg.DiVE, "normalize", "no"),
        (geomreg.DiVE, "decay", "0.9"),
        (geomreg.DiVE, "decay", True),
        (geomreg.RelationalAngle, "max_triplets", 10.0),
        (geomreg.FeatureDistillation, "modalities", "image"),
    ):
        with pytest.raises(ValueError, match=rf"^keep: expected {key} as "):
            typed("keep", {key: value}, owner)


@pytest.mark.parametrize("owner", OWNERS)
def test_defaults_fit(owner):
    """A type that this does not know would be taken whatever it is."""
    parameters = inspect.signature(owner).parameters.values()
    typed("x", {one.name: one.default for one in parameters if one.default is not one.empty}, owner)


@pytest.mark.parametrize("name", [False, 2024, 1.5, None])
def test_names_of_entries(name):
    """`no:` and `2024:` are no texts in YAML."""
    data, term = DataConfig("folder", "x"), TermConfig("DiVE", 1.0)
    train = TrainConfig(steps=1)
    for what, build in (
        ("an evaluation", lambda: Config(ModelConfig("x"), DataConfig("csv", "x"), train, Path("x"), evaluation={name: data})),
        ("a term", lambda: MethodConfig("x", {name: term})),
        ("a term", lambda: MethodConfig("x", target_terms={name: term})),
    ):
        with pytest.raises(
            ValueError, match=rf"^expected the name of {what} as text, got {name!r}, which is none in YAML\. Put it in quotes\."
        ):
            build()


def test_numbers_are_the_text_that_was_written():
    """In quotes or not: jsonargparse reads what is in quotes once more where every type goes."""
    options = {"image_key": 2024, "caption_key": "a", "root": 2024.5}
    assert DataConfig("csv", "x", options).options == {"image_key": "2024", "caption_key": "a", "root": "2024.5"}
    assert typed("x", {"decay": 1}, geomreg.DiVE) == {"decay": 1}


def test_what_fits():
    typed("x", {"image_key": "a", "root": Path("x"), "separator": None}, READERS["csv"])
    typed("x", {"templates": ["a", "b"], "class_names": {"a": "b"}, "strict": True}, READERS["folder"])
    typed("x", {"decay": 1, "normalize": False}, geomreg.DiVE)
    typed("x", {"modalities": ("image",)}, geomreg.FeatureDistillation)
