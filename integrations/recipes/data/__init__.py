"""Readers of image-text data as map-style data sets of ``{"id", "image", "text", ...}``."""

from geomreg.integrations.recipes.data.collate import collate
from geomreg.integrations.recipes.data.folder import LabelledFolder
from geomreg.integrations.recipes.data.pairs import CsvPairs

__all__ = ["CsvPairs", "LabelledFolder", "collate"]
