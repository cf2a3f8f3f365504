#!/usr/bin/env bash
# open_clip_torch 3.3.0: weights by tag bring the preprocessing that they were trained with; the same weights from a file get CLIP's.
#
# create_model_and_transforms(NAME, pretrained=TAG) takes mean, std, interpolation and resize mode from the tag's entry. With a path in the
# place of the tag there is no entry, and OpenAI's mean and standard deviation, bicubic, are taken whatever the architecture: no warning.
# MobileCLIP's tags say mean 0, std 1, bilinear. SigLIP, CLIPA and PE-Core have other values than CLIP too. Shown here: MobileCLIP-S1 with
# random weights, saved and loaded as a user with a downloaded file would.
#
# Output seen:
#   the tags say   mean (0.0, 0.0, 0.0) std (1.0, 1.0, 1.0) bilinear
#   the file gets  mean (0.48145466, 0.4578275, 0.40821073) std (0.26862954, 0.26130258, 0.27577711) bicubic
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 timm==1.0.31
venv/bin/python - <<'PYTHON'
import open_clip
import torch

NAME = "MobileCLIP-S1"
FIELDS = ("mean", "std", "interpolation")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic")


def taken(preprocess: dict) -> tuple:
    return tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in (preprocess[field] for field in FIELDS))


tags = {taken(open_clip.get_pretrained_cfg(NAME, tag)) for tag in open_clip.list_pretrained_tags_by_model(NAME)}
torch.save(open_clip.create_model(NAME).state_dict(), "weights.pt")
model, _, _ = open_clip.create_model_and_transforms(NAME, pretrained="weights.pt")
of_file = taken(open_clip.get_model_preprocess_cfg(model))
for mean, std, interpolation in tags:
    print(f"the tags say   mean {mean} std {std} {interpolation}")
print("the file gets  mean {} std {} {}".format(*of_file))
assert tags == {((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")}, "the tags of MobileCLIP-S1 say something else now"
assert of_file == CLIP, "weights from a file no longer get CLIP's preprocessing"
PYTHON
