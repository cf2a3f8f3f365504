#!/usr/bin/env bash
# open_clip_torch 3.3.0: a CoCa that is made without pre-trained weights has decoder parameters that nothing ever initialised.
#
# The output projection of CoCa's caption decoder (width x vocabulary, 25 million numbers in coca_ViT-B-32) is made by torch.empty, and the
# method that would fill it is not called by its constructor. What it holds is what the memory held: zeros in a fresh process, the numbers
# of tensors that were freed before, or NaN. So the captions' loss of a CoCa that is trained from scratch depends on what ran before in the
# process, and a seed does not fix it. torch can fill new memory with NaN (use_deterministic_algorithms), which shows the parameter.
#
# Output seen:
#   ViT-B-32: 0 entries are left as the memory was
#   coca_ViT-B-32: text_decoder.text_projection (512, 49408) is left as the memory was
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 timm==1.0.31
venv/bin/python - <<'PYTHON'
import logging
import warnings

import open_clip
import torch

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")
torch.use_deterministic_algorithms(True)  # new memory is NaN


def left(name: str) -> dict[str, tuple[int, ...]]:
    state = open_clip.create_model(name).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if value.is_floating_point() and value.isnan().any()}


plain, coca = left("ViT-B-32"), left("coca_ViT-B-32")
print(f"ViT-B-32: {len(plain)} entries are left as the memory was")
for name, shape in coca.items():
    print(f"coca_ViT-B-32: {name} {shape} is left as the memory was")
assert plain == {}
assert coca == {"text_decoder.text_projection": (512, 49408)}, "CoCa's decoder is initialised otherwise now"
PYTHON
