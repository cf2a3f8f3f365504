"""Caches as older versions wrote them."""

import hashlib
import json

import numpy as np

from geomreg.cache_build import published
from geomreg.shards import Shard, read_json, write_index, write_json, write_shard


def forget_texts(path, zeros=None):
    """The text table knows nothing of padding, and does not know what it embedded; or by ``zeros``, hashes of samples by number."""
    folder = path / published(path)["text"]
    description = read_json(folder / "table.json")
    numbers = [entry["number"] for entry in description["shards"]]
    for number in numbers:
        shard = Shard(folder, number)
        rows = np.empty((len(shard), shard.width), np.dtype(shard.dtype))
        shard.read(np.arange(len(shard)), rows, np.arange(len(shard)))
        write_shard(folder, number, shard.ids(), rows, None if zeros is None else zeros(shard.ids()))
    write_index(folder, numbers, _older(description))


def forget_loading(path):
    """The image table does not say how files were read, and is named without it."""
    tables = published(path)
    folder = path / tables["image"]
    description = _older(read_json(folder / "table.json"))
    description["fingerprint"].pop("loading")
    numbers = [int(file.stem) for file in folder.glob("0*.safetensors")]
    write_index(folder, numbers, description)
    key = {name: description[name] for name in ("modality", "fingerprint", "dtype", "shard_rows")}
    name = f"image-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"
    folder.rename(path / name)
    write_json(path / "cache.json", {"tables": {**tables, "image": name}})


def _older(description):
    return {key: value for key, value in description.items() if key not in ("padding", "format", "crc32")}
