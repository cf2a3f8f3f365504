"""An export is what was written, or it is refused in one line; open_clip and older exports know nothing of that."""

import json
import os

import open_clip
import pytest
import torch

from geomreg.integrations.recipes.checksums import check_export, difference, write_checksums
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.head import load_head
from geomreg.integrations.recipes.models import load

CONFIG = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
FILES = ("classes.json", "head.safetensors", "open_clip_config.json", "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder and contents of an export with a head; a test may damage what it finds there."""
    torch.manual_seed(0)
    head = (torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), ("owl", "fox", "cat"))
    folder = to_open_clip(open_clip.CLIP(**CONFIG["model_cfg"]), CONFIG, tmp_path_factory.mktemp("run") / "model", head=head, check=False)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(exported):
    """The export, whole."""
    folder, contents = exported
    for path in folder.iterdir():
        path.unlink()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "other", "checksums"])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_refused(folder, name, damage):
    """A bit that leaves a number a number and a name a name, too."""
    file = folder / (name if damage != "checksums" else "checksums.json")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        place = content.index(name.encode()) if damage == "checksums" else len(content) - 4
        bit = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes({"cut": content[:-1], "other": b"{}"}.get(damage, bit))
    for reader, read in (("load", lambda: load(str(folder))), ("load_head", lambda: load_head(folder))):
        with pytest.raises(ValueError, match=rf"^{reader}: expected the model in \S*/model as it was written, got [^\n]*$") as caught:
            read()
        assert file.name in str(caught.value)
        assert f"If you changed it on purpose, delete {folder / 'checksums.json'}: nothing is compared then." in str(caught.value)


def test_what_is_whole_loads(folder):
    assert {path.name for path in folder.iterdir()} == {*FILES, "checksums.json"}
    (folder / "README.md").write_text("a card of the user's own")
    state = load(str(folder)).model.state_dict()
    found = open_clip.create_model(f"local-dir:{folder}").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())
    assert load_head(folder)[2] == ["owl", "fox", "cat"]


def test_changed_on_purpose(folder):
    """The line says how, and it works; so do exports of versions that wrote no checksums."""
    (folder / "classes.json").write_text(json.dumps(["owl", "red fox", "cat"]))
    with pytest.raises(ValueError, match=r"got another content of classes\.json"):
        load_head(folder)
    (folder / "checksums.json").unlink()
    assert load_head(folder)[2] == ["owl", "red fox", "cat"]
    load(str(folder))


def test_folders_within_and_files_that_are_not_listed(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("a.bin", "tokenizer/vocab.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path, "a.bin")
    (tmp_path / "notes.txt").write_text("others")
    assert difference(tmp_path) is None
    write_checksums(tmp_path)
    assert difference(tmp_path) is None
    (tmp_path / "tokenizer" / "vocab.json").write_text("others")
    assert difference(tmp_path) == "another content of tokenizer/vocab.json"
    for content in ("[]", '{"files": {}}', "", "\xff"):
        (tmp_path / "checksums.json").write_text(content, encoding="latin-1")
        assert difference(tmp_path) == "a damaged checksums.json"
    (tmp_path / "checksums.json").unlink()
    assert difference(tmp_path) == "no checksums.json (an older geomreg wrote none)"
    check_export("test", tmp_path)


def test_files_are_read_once(folder, monkeypatch):
    """As long as their sizes and times stay: large models are loaded, and their heads, without reading them again."""
    assert difference(folder) is None
    with monkeypatch.context() as patch:
        patch.setattr("geomreg.integrations.recipes.checksums._digest", lambda path: pytest.fail(f"read {path}"))
        assert difference(folder) is None
    os.utime(folder / "classes.json", (0, 0))
    (folder / "classes.json").write_text("[]")
    assert difference(folder) == "another content of classes.json"


def test_a_link_that_leads_nowhere_is_a_file_more(folder):
    (folder / "notes").symlink_to(folder / "gone")
    load(str(folder))
    (folder / "notes").unlink()
