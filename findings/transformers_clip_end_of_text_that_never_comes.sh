#!/usr/bin/env bash
# transformers 5.24.0: a CLIPModel whose eos_token_id does not occur in the texts gives all texts one embedding, without a word.
#
# CLIP takes a text's embedding at its end-of-text token. CLIPModel looks for config.text_config.eos_token_id; where a text does not hold
# it, the search falls to position 0, the beginning-of-text token, which sees nothing but itself in a causal tower. Whoever exports a CLIP
# with a grown vocabulary and writes vocab_size - 1 as the end of text therefore gets a model that loads, runs, and finds all captions
# equal. Shown here: a tiny random CLIPModel, three different texts that end in token 41, once with eos_token_id 41 and once with 59.
#
# Output seen:
#   eos_token_id 41: largest difference of the three texts' embeddings 1.0020
#   eos_token_id 59: largest difference of the three texts' embeddings 0.0000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 transformers==5.24.0
venv/bin/python - <<'PYTHON'
import torch
from transformers import CLIPConfig, CLIPModel

TEXTS = torch.tensor([[40, 5, 6, 7, 41, 0, 0, 0], [40, 9, 41, 0, 0, 0, 0, 0], [40, 20, 21, 22, 23, 24, 41, 0]])
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def difference(eos: int) -> float:
    torch.manual_seed(0)
    words = {"vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 40, "eos_token_id": eos}
    config = CLIPConfig(projection_dim=8, text_config=TOWER | words, vision_config=TOWER | {"image_size": 8, "patch_size": 4})
    with torch.no_grad():
        found = CLIPModel(config).eval().get_text_features(input_ids=TEXTS).pooler_output
    return float((found - found[0]).abs().max())


present, absent = difference(41), difference(59)
print(f"eos_token_id 41: largest difference of the three texts' embeddings {present:.4f}")
print(f"eos_token_id 59: largest difference of the three texts' embeddings {absent:.4f}")
assert present > 0.1, "the texts were expected to differ"
assert absent == 0.0, "CLIPModel no longer gives equal embeddings for an end of text that does not occur"
PYTHON
