"""Readers of image-text data as map-style data sets of ``{"id", "image", "text", ...}``."""

from geomreg.integrations.recipes.data.captioned import Captioned
from geomreg.integrations.recipes.data.coco import CocoCaptions
from geomreg.integrations.recipes.data.collate import collate
from geomreg.integrations.recipes.data.flickr8k import Flickr8k
from geomreg.integrations.recipes.data.folder import LabelledFolder
from geomreg.integrations.recipes.data.imagenet import ImageNet
from geomreg.integrations.recipes.data.pairs import CsvPairs, LabelledPairs
from geomreg.integrations.recipes.data.random_texts import RandomTexts
from geomreg.integrations.recipes.data.rgb import ImageConfig, Preprocessing
from geomreg.integrations.recipes.data.subset import Subset
from geomreg.integrations.recipes.data.tar import TarPairs
from geomreg.integrations.recipes.data.wilds import FMoW, IWildCam

__all__ = [
    "Captioned",
    "CocoCaptions",
    "CsvPairs",
    "FMoW",
    "Flickr8k",
    "IWildCam",
    "ImageConfig",
    "ImageNet",
    "LabelledFolder",
    "LabelledPairs",
    "Preprocessing",
    "RandomTexts",
    "Subset",
    "TarPairs",
    "collate",
]
