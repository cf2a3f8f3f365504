"""A CLIP of 1.8 million parameters with random weights, for runs whose numbers do not matter: EmojiCLIP costs three times as much."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

VISION = {"image_size": 48, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SEEN = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


@functools.cache
def small_clip() -> Path:
    """Its folder in open_clip's layout, the same weights each time, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="small-clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(64, VISION, TEXT)
    described = {"model_cfg": {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": SEEN}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder
