"""The recipes' command with models and pictures in fp64: a program of its own, for processes that a test starts."""

import dataclasses
import sys

from geomreg.integrations.recipes import finetune
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.models import load


def doubled(*given, **options):
    """A loaded model in fp64, and its pictures."""
    loaded = load(*given, **options)

    def in_double(transform):
        return lambda image: transform(image).double()

    transforms = {name: in_double(getattr(loaded, name)) for name in ("train_transform", "transform")}
    return dataclasses.replace(loaded, model=loaded.model.double(), **transforms)


if __name__ == "__main__":
    finetune.load = doubled
    raise SystemExit(main(sys.argv[1:]))
