"""Exports that are killed or find no room, at any time: one whole model is there, and the next export puts all in order."""

import itertools
import json
import os
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from geomreg.integrations.recipes import checkpoint, export, files, head
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.files import read_json, writing
from geomreg.integrations.recipes.head import load_head


class KilledError(BaseException):
    """Nothing that is done afterwards is done."""


def exported(folder, value):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    start = torch.nn.Linear(2, 2)
    return to_open_clip(model, {"model_cfg": {}, "value": value}, folder, head=(model, start, ("owl", "fox")), check=False)


def value_of(folder):
    """Of a whole export, by each of its files."""
    assert {path.name for path in folder.iterdir()} == {
        "open_clip_model.safetensors",
        "open_clip_config.json",
        "head.safetensors",
        "classes.json",
        "checksums.json",
    }
    found = {json.loads((folder / "open_clip_config.json").read_text())["value"]}
    found |= {load_file(folder / name)["weight"][0, 0].item() for name in ("open_clip_model.safetensors", "head.safetensors")}
    (value,) = found
    return value


def kill_at(patch, call):
    """At the call of this number, and at all that follow, of what changes the disk."""
    counter = itertools.count()

    def deadly(function):
        def killed(*args, **options):
            if next(counter) >= call:
                raise KilledError
            return function(*args, **options)

        return killed

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "chmod"):
        patch.setattr(os, name, deadly(getattr(os, name)))
    for module in (export, head):
        patch.setattr(module, "save_file", deadly(module.save_file))
    patch.setattr(Path, "write_text", deadly(Path.write_text))


@pytest.mark.parametrize("before", [False, True])
def test_killed_at_each_change_of_the_disk(tmp_path, monkeypatch, before):
    for call in range(100):
        folder = tmp_path / str(call) / "model"
        if before:
            exported(folder, 1.0)
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                exported(folder, 2.0)
            except KilledError:
                done = False
            else:
                done = True
        beside = [path for path in folder.parent.glob("*") if path != folder and path.name.endswith("-old")]
        if before:  # the old one or the new one is there, by its name or aside
            (there,) = [folder] if folder.exists() else beside
            assert value_of(there) in (1.0, 2.0)
        elif folder.exists():
            assert value_of(folder) == 2.0
        exported(folder, 3.0)
        assert value_of(folder) == 3.0
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if done:
            assert call > (15 if before else 6)
            return
    raise AssertionError("100 changes were not enough")


def test_what_was_put_aside_comes_back(tmp_path, monkeypatch):
    """Also where the next export fails."""
    folder = exported(tmp_path / "model", 1.0)
    os.replace(folder, tmp_path / ".model.geomreg-old")
    monkeypatch.setattr(export, "save_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError("I/O error")))
    with pytest.raises(OSError, match=r"^export: expected to write \S*/model, got: I/O error\. Free some space or look at the folder, and"):
        exported(folder, 2.0)
    assert value_of(folder) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_half_an_export_is_replaced_and_neighbours_stay(tmp_path):
    folder = exported(tmp_path / "model", 1.0)
    (folder / "open_clip_config.json").unlink()
    others = [".model-old", ".model-settings", "model-old", ".model-b.geomreg-12345678"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".model.geomreg-12345678").mkdir()
    exported(folder, 2.0)
    assert value_of(folder) == 2.0
    assert {path.name for path in tmp_path.iterdir()} == {"model", *others}


def test_export_follows_a_link(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    for value in (1.0, 2.0):
        exported(tmp_path / "model", value)
    assert (tmp_path / "model").is_symlink()
    assert value_of(tmp_path / "disk" / "model") == 2.0


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = exported(tmp_path / "model", 1.0)
        partial = checkpoint.begin(tmp_path, 1)
        checkpoint.write(partial, "state", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    for path in (folder, partial):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~mask}


def small_files(work):
    """Call it where files can have 2000 bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_space_is_one_error_with_the_path(tmp_path):
    folder = exported(tmp_path / "model", 1.0)
    large = torch.nn.Linear(100, 100)
    advice = r"Free some space or look at the folder, and give the same command again: a run goes on from its last checkpoint\.$"
    with pytest.raises(OSError, match=rf"^export: expected to write \S*/model, got: .*File too large.*\. {advice}"):
        small_files(lambda: to_open_clip(large, {"model_cfg": {}}, folder, check=False))
    assert value_of(folder) == 1.0
    for name, value in (("tensors.safetensors", torch.zeros(1000)), ("text.json", ["x" * 5000])):
        with pytest.raises(OSError, match=rf"^finetune: expected to write \S*/{name}, got: .*File too large.*\. {advice}"):
            small_files(lambda name=name, value=value: checkpoint.write(tmp_path, name.partition(".")[0], value))


def test_damaged_head(tmp_path):
    """Of an export without checksums, as older versions wrote them."""
    folder = exported(tmp_path / "model", 1.0)
    (folder / "checksums.json").unlink()
    shutil.copytree(folder, tmp_path / "other")
    content = (folder / "head.safetensors").read_bytes()
    for damage in (content[:-8], content[:4], b"", content.replace(b"start.bias", b"start.bits")):
        (folder / "head.safetensors").write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"^load_head: expected a head in \S*/head\.safetensors, got a damaged file \(.*Export the model anew"
        ):
            load_head(folder)
    for damage in ("[", "{}", None):
        file = tmp_path / "other" / "classes.json"
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(ValueError, match=r"^load_head: expected names of classes in \S*/classes\.json, got .*Export the model anew"):
            load_head(tmp_path / "other")


def test_writing_and_reading(tmp_path):
    with pytest.raises(OSError, match=r"^test: expected to write \S*/x, got: Permission denied\. Free"), writing("test", tmp_path / "x"):
        raise PermissionError(13, "Permission denied", "y")
    (tmp_path / "x").write_text('{"a": 1}')
    assert read_json("test", tmp_path / "x", dict, "", "") == {"a": 1}
    with pytest.raises(ValueError, match=r"^test: expected names in \S*/x, got dict\. Mend it\.$"):
        read_json("test", tmp_path / "x", list, "names", "Mend it.")


def test_a_checkpoint_of_the_same_step_is_put_in_place_whole(tmp_path, monkeypatch):
    for call in range(2):
        folder = checkpoint.begin(tmp_path, 7)
        checkpoint.write(folder, "state", {"call": call})
        with monkeypatch.context() as patch:
            if call:
                patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KilledError))
                with pytest.raises(KilledError):
                    checkpoint.publish(folder)
            else:
                checkpoint.publish(folder)
        assert checkpoint.read(checkpoint.latest(tmp_path), "state") == {"call": 0}
    checkpoint.publish(folder)
    assert checkpoint.read(checkpoint.latest(tmp_path), "state") == {"call": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000007"]
