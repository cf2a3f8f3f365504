#!/usr/bin/env bash
# transformers 5.24.0: CLIPImageProcessor crops one pixel beside where torchvision and open_clip crop, for one image in four.
#
# After the shorter edge is resized, a margin is left of the longer one. torchvision's CenterCrop starts at round(margin / 2), CLIPImageProcessor at
# floor(margin / 2). Python rounds halves to even numbers, so the two differ where margin % 4 is 3, and there alone. The pictures of both
# are otherwise equal to 0.01 of 255 levels. So a CLIP that was trained with open_clip and is used with transformers sees one image in four
# moved by a pixel, without a warning, and tests with square pictures or even margins never show it.
#
# Output seen:
#   margin  8: 0.00 levels, shifted by one pixel 6.36
#   margin  9: 0.00 levels, shifted by one pixel 6.36
#   margin 10: 0.00 levels, shifted by one pixel 6.36
#   margin 11: 6.33 levels, shifted by one pixel 0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 timm==1.0.31 transformers==5.24.0
venv/bin/python - <<'PYTHON'
import numpy as np
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessor

SIDE, HALF = 64, (0.5, 0.5, 0.5)
ours = image_transform_v2(PreprocessCfg((SIDE, SIDE), mean=HALF, std=HALF, interpolation="bicubic", resize_mode="shortest"), False)
theirs = CLIPImageProcessor(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=3, image_mean=list(HALF), image_std=list(HALF)
)
for margin in range(8, 12):
    y, x = np.mgrid[0:SIDE, 0 : SIDE + margin]  # of the model's height, so that nothing is resized
    waves = np.stack([127.5 + 100 * np.sin(0.05 * (channel + 1) * x + 0.03 * y) for channel in range(3)], axis=-1)
    picture = Image.fromarray(waves.astype(np.uint8))
    a, b = ours(picture), theirs(picture, return_tensors="pt")["pixel_values"][0]
    equal = float((a - b).abs().mean()) * 127.5
    shifted = float((a[..., :-1] - b[..., 1:]).abs().mean()) * 127.5
    print(f"margin {margin:2}: {equal:.2f} levels, shifted by one pixel {shifted:.2f}")
    assert (equal < 0.01) == (margin % 4 != 3), "the crops differ elsewhere now"
    assert (shifted < 0.01) == (margin % 4 == 3)
PYTHON
