"""Damage to each kind of file that is read: one line that names the file and says what to do, or the file is made anew, or nothing changes.

Files are damaged in many more ways by ``benchmarks/reliability/corruptions.py``, with the same readers.
"""

import copy
import json
import random
import re

import pytest
from damaging import ERRORS, LINE, Damaged, damages, every_key
from files_read import KINDS, of_folder

from geomreg.integrations.recipes.models import load

FINE = {"refused", "made anew", "harmless"}
NO_CHECKSUM = {"other data", "warned", "refused, naming the option"}  # where files are those of users


COSTLY = {"model's folder", "weights", "unfinished cache", "YAML"}  # which build models, caches or parsers for each damage


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in COSTLY else ()) for name in sorted(KINDS)])
def kind(request, tmp_path):
    return request.param, Damaged(KINDS[request.param], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_damage_is_named_or_mended(kind):
    name, files = kind
    generator, more = random.Random(name), set() if files.kind.checked else NO_CHECKSUM
    for file in files.kind.files:
        others = [content for path, content in files.kept.items() if path in files.kind.files and content != files.kept[file]]
        for damage in damages(file):
            content = files.damaged(file, damage, generator, generator.choice(others or [b"{}"]))
            outcome, said = files.outcome(file, content)
            if name == "metrics" and damage == "gone":
                assert (outcome, "The lines of earlier steps are lost." in said) == ("warned", True)
            else:
                assert outcome in FINE | more, (file.name, damage, outcome, said)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - COSTLY))
@pytest.mark.filterwarnings("ignore")
def test_every_key_of_every_json(name, tmp_path):
    """Renamed, and lost."""
    files = Damaged(KINDS[name], tmp_path)
    for file in files.kind.files:
        for changed in every_key(json.loads(files.kept[file])) if file.suffix == ".json" else ():
            outcome, said = files.outcome(file, json.dumps(changed, indent=1).encode())
            assert outcome in FINE | (set() if files.kind.checked else NO_CHECKSUM), (file.name, changed, outcome, said)


@pytest.mark.parametrize(
    "name", ["checkpoint", "drift and evaluations", "drawings", pytest.param("unfinished cache", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_what_can_be_made_anew_is(name, tmp_path):
    """Whatever the damage, the content is the same afterwards."""
    files = Damaged(KINDS[name], tmp_path)
    for file in files.kind.files:
        for damage in ("bit", "header bit", "cut", "gone"):
            outcome, said = files.outcome(file, files.damaged(file, damage, random.Random(damage)))
            assert outcome in ("made anew", "harmless"), (file.name, damage, outcome, said)


def test_an_index_of_tar_files_is_made_anew(tmp_path):
    """A bit in each of its bytes; but a file that does not call itself an index is not overwritten."""
    files = Damaged(KINDS["tar index"], tmp_path)
    (file,) = files.kind.files
    content, generator = files.kept[file], random.Random(0)
    for place in [*range(0, len(content), 23), *range(len(content) - 3, len(content))]:
        outcome, said = files.outcome(file, content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :])
        assert outcome == "made anew" or "expected index as a file that TarPairs wrote" in said, (place, outcome, said)


IMPOSSIBLE = [
    ("model_cfg.embed_dim", None),
    ("model_cfg.vision_cfg.width", -16),
    ("model_cfg.vision_cfg.layers", "1"),
    ("model_cfg.vision_cfg.head_width", 5),
    ("model_cfg.vision_cfg.head_width", 0),
    ("model_cfg.vision_cfg.image_size", -16),
    ("model_cfg.vision_cfg.image_size", "16"),
    ("model_cfg.vision_cfg.pool_type", "x"),
    ("model_cfg.vision_cfg.timm_model_name", "nonsense"),
    ("model_cfg.vision_cfg", [1]),
    ("model_cfg.text_cfg.layers", -1),
    ("model_cfg.text_cfg.context_length", -1),
    ("model_cfg.text_cfg.vocab_size", 10**12),
    ("model_cfg", None),
    ("preprocess_cfg.size", -3),
    ("preprocess_cfg.mean", [0.5, 0.5]),
    ("preprocess_cfg.mean", ["a", 0.5, 0.5]),
    ("preprocess_cfg.std", [0, 1, 1]),
    ("preprocess_cfg.std", None),
    ("preprocess_cfg.mode", "CMYK"),
    ("preprocess_cfg.resize_mode", "bicubic"),
    ("preprocess_cfg.interpolation", 3),
    ("preprocess_cfg.fill_color", "white"),
    ("preprocess_cfg", "x"),
    ("images", {"background": "whit"}),
    ("images", {"x": 1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impossible")
    of_folder(folder)
    content = (folder / "model" / "open_clip_config.json").read_text()
    return folder / "model", json.loads(content)


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=str)
def test_impossible_configurations(folder, name, value):
    """Of a model: one line with the file."""
    folder, config = folder
    file, changed = folder / "open_clip_config.json", copy.deepcopy(config)
    *above, last = name.split(".")
    part = changed
    for one in above:
        part = part[one]
    part[last] = value
    file.write_text(json.dumps(changed))
    with pytest.raises(ERRORS) as caught:
        load(str(folder))
    line = " ".join(str(caught.value).split())
    assert LINE.fullmatch(line), line
    assert re.search(r"open_clip_config\.json", line), line
    assert str(folder) in line
