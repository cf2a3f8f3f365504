"""The files of a run are JSON whatever its numbers are, and are read back."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from geomreg import Embeddings
from geomreg.integrations.recipes import monitor as monitor_module
from geomreg.integrations.recipes.config import Config, DataConfig, ModelConfig, MonitorConfig, TrainConfig
from geomreg.integrations.recipes.data import CsvPairs, LabelledFolder, RandomTexts
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.monitor import RunMonitor
from geomreg.integrations.recipes.records import Log, as_json, check_folder, claim, release


def strict(line):
    """As other languages read it."""

    def refuse(word):
        raise AssertionError(f"no JSON: {word} in {line}")

    return json.loads(line, parse_constant=refuse)


def lines(file):
    return [strict(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_numbers_that_are_not_finite_are_null():
    entry = {"step": 3, "loss": 0.5, "ratio": math.nan, "stopped": False, "id": {"accuracy": math.inf, "broken": 0.0}, "alarm": "x is nan"}
    expected = {**entry, "ratio": None, "id": {"accuracy": None, "broken": 0.0}}
    assert strict(as_json(entry)) == expected
    assert strict(as_json({"least": -math.inf})) == {"least": None}


def test_metrics_with_nan_are_json_and_a_run_goes_on_from_them(tmp_path):
    config, accelerator = SimpleNamespace(output=tmp_path, trackers=()), Accelerator(cpu=True)
    entries = [{"step": step, "loss": 1.0, "gradient_ratio": math.nan, "regularizer": math.inf} for step in (1, 2, 3)]
    states = [None]
    for steps in (entries, entries[1:]):  # the second run makes steps 2 and 3 again
        log = Log(config, 3, accelerator)
        if states[0] is not None:
            log.load_state_dict(states[1])
        for entry in steps:
            log.add(entry)
            states.append(log.state_dict())
        log.end()
        states[0] = "there"
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": step, "loss": 1.0, "gradient_ratio": None, "regularizer": None} for step in (1, 2, 3)
    ]


@pytest.mark.parametrize("stop", [True, False])
def test_drift_of_a_broken_run_is_json_and_is_read_back(tmp_path, monkeypatch, stop):
    """The alarm that NaN raises, too."""
    points = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    found = {"image": points, "classes": torch.eye(3, 6)}
    monkeypatch.setattr(monitor_module, "embed_images", lambda model, images: found["image"])
    monkeypatch.setattr(monitor_module, "zero_shot_head", lambda model, tokens: found["classes"])
    dataset = [{"id": str(k), "image": torch.zeros(1), "label": k % 3} for k in range(12)]
    options = MonitorConfig(samples=12, every=2, max_zero_shot_drop=50.0, stop=stop)
    model = torch.nn.Linear(1, 1)
    monitor = RunMonitor(lambda: model, dataset, torch.zeros(1, 3, 4), options, tmp_path, Accelerator(cpu=True))
    monitor.monitor.update(Embeddings(points), Embeddings(points))
    monitor.after({"step": 2, "gradient_ratio": math.nan})
    assert monitor.last_step is None
    found["image"] = points * math.nan
    monitor.after({"step": 4})
    monitor.after({"step": 4})  # made again
    first, second = lines(tmp_path / "drift.jsonl")
    assert (first["step"], first["gradient_ratio"], first["probe/zero_shot_drop"]) == (2, None, 0.0)
    assert first["image/rsa"] == pytest.approx(1.0)
    assert "alarm" not in first
    assert [second[f"probe/{key}"] for key in ("zero_shot", "zero_shot_drop", "rsa", "mean_shift")] == [None] * 4
    assert second["alarm"] == "probe/zero_shot_drop is nan, beyond the limit 50"
    assert (second["stopped"], monitor.stopped, monitor.last_step) == ((True, True, 5) if stop else (False, False, None))


# the folder of a run


@pytest.fixture(autouse=True)
def _released():
    yield
    release()


def config(output, data="data/pairs.csv", **changes):
    target = DataConfig("csv", str(data))
    return dataclasses.replace(Config(ModelConfig("emojiclip"), target, TrainConfig(steps=4), output), **changes)


def pairs(folder, rows=96):
    folder.mkdir(exist_ok=True)
    (folder / "0.png").write_bytes(b"an image")
    (folder / "pairs.csv").write_text("\n".join(["filepath,title", *(f"{row}.png,picture {row}" for row in range(rows))]))
    return CsvPairs(folder / "pairs.csv", transform=lambda image: image, tokenizer=lambda texts: texts)


def test_the_data_of_a_run_may_move_but_not_change(tmp_path):
    one, accelerator = config(tmp_path / "run"), Accelerator(cpu=True)
    before = {"target": pairs(tmp_path / "data"), "evaluation.id": labelled(tmp_path / "classes")}
    claim(one, accelerator, before)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = config(tmp_path / "run", tmp_path / "moved" / "pairs.csv")
    for _ in range(2):
        check_folder(moved)
        claim(moved, accelerator, {**before, "target": pairs(tmp_path / "moved")})
    with pytest.raises(
        ValueError, match=r"to go on with the 96 samples of target that it began with, got 77\. Restore them, or use another"
    ):
        claim(moved, accelerator, {**before, "target": pairs(tmp_path / "moved", 77)})
    pairs(tmp_path / "moved")
    file = tmp_path / "moved" / "pairs.csv"
    file.write_text(file.read_text().replace("picture 5\n", "photo 5\n"))
    changed = CsvPairs(file, transform=lambda image: image, tokenizer=lambda texts: texts)
    with pytest.raises(ValueError, match=r"96 samples of target that it began with, got as many of other ids or texts \(text\)\."):
        claim(moved, accelerator, {**before, "target": changed})
    others = labelled(tmp_path / "classes", names={"a": "owl", "b": "fox"})
    with pytest.raises(ValueError, match=r"the 2 samples of evaluation\.id that it began with, got as many of other .* \(classes\)\."):
        claim(moved, accelerator, {**before, "evaluation.id": others})
    file = tmp_path / "run" / "data.json"
    whole = file.read_text()
    for content in ("[]", "{", whole.replace("target", "tarhet"), whole.replace("samples", "sampler"), None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.warns(UserWarning, match=r"expected digests of .* in \S*/data\.json, got .*\. They are written anew"):
            claim(moved, accelerator, {**before, "target": changed})  # its checkpoints compare them too
        assert json.loads(file.read_text()).keys() == before.keys()


def test_metrics_that_a_checkpoint_knows(tmp_path):
    """Damage in the lines before it is found; lines after it are cut off, whatever they are; a lost file begins again."""
    config, accelerator = SimpleNamespace(output=tmp_path, trackers=()), Accelerator(cpu=True)
    log, file = Log(config, 3, accelerator), tmp_path / "metrics.jsonl"
    log.add({"step": 1, "loss": 1.5})
    state, whole = log.state_dict(), file.read_bytes()
    log.add({"step": 2, "loss": 2.5})
    for damage in (b"{}\x00\xff", b'{"step": 2'):
        file.write_bytes(whole + damage)
        again = Log(config, 3, accelerator)
        again.load_state_dict(state)
        again.add({"step": 2, "loss": 3.5})
        assert lines(file) == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 3.5}]
    for damage in (whole.replace(b"1.5", b"1.7"), whole[:-3], b""):
        file.write_bytes(damage)
        with pytest.raises(
            ValueError, match=rf"expected the first {len(whole)} bytes of {file} as they were written, got others\. Restore"
        ):
            Log(config, 3, accelerator).load_state_dict(state)
    file.unlink()
    again = Log(config, 3, accelerator)
    with pytest.warns(UserWarning, match=rf"expected {file}, got none"):
        again.load_state_dict(state)
    again.add({"step": 2, "loss": 3.5})
    assert lines(file) == [{"step": 2, "loss": 3.5}]


def labelled(folder, names=None):
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "0.png").write_bytes(b"an image")
    return LabelledFolder(folder, transform=lambda image: image, class_names=names)


def test_data_without_files(tmp_path):
    texts = RandomTexts(load("emojiclip").tokenizer, size=50)
    for _ in range(2):
        claim(config(tmp_path / "run"), Accelerator(cpu=True), {"texts": texts})
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"texts": {"samples": 50}}


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers": True},
        {"ensemble": None},
        {"model": ModelConfig("emojiclip", learning_rates=(1e-6, 1e-5))},
        {"train": TrainConfig(steps=4, workers=0, save_every=7)},
        {"device": "cpu"},
        {"target": DataConfig("csv", "elsewhere/pairs.csv", {"root": "elsewhere"})},
    ],
)
def test_what_changes_no_result_may_differ(tmp_path, changes):
    claim(config(tmp_path / "run", target=DataConfig("csv", "pairs.csv", {"root": "data"})), Accelerator(cpu=True), {})
    check_folder(config(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(steps=4, seed=1)}, "train.seed 0, got 1"),
        ({"target": DataConfig("tar", "data/pairs.csv")}, "target.kind 'csv', got 'tar'"),
        ({"target": DataConfig("csv", "data/pairs.csv", {"caption_key": "title"})}, "target.options.caption_key None, got 'title'"),
        ({"probe": DataConfig("folder", "data")}, "probe None, got {'kind': 'folder'"),
        ({"evaluation": {"id": DataConfig("folder", "data")}}, "evaluation.id None, got {'kind': 'folder'"),
        ({"model": ModelConfig("ViT-B-32")}, "model.name 'emojiclip', got 'ViT-B-32'"),
    ],
)
def test_what_changes_results_may_not(tmp_path, changes, message):
    claim(config(tmp_path / "run"), Accelerator(cpu=True), {})
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        check_folder(config(tmp_path / "run", **changes))
    assert f"to go on with {message}" in str(raised.value)


def test_a_model_may_be_spelled_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    claim(config(tmp_path / "run", model=ModelConfig("model")), Accelerator(cpu=True), {})
    for name in ("./model", str(tmp_path / "model"), "model/"):
        check_folder(config(Path("run"), model=ModelConfig(name)))


def holding(output, ready, end):
    claim(config(output), Accelerator(cpu=True), {})
    if os.fork() > 0:  # the other stays for a while after a kill, as a loading process does
        ready.set()
    while not end.exists():
        time.sleep(0.05)
    os._exit(0)


@pytest.mark.slow
def test_one_command_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), tmp_path / "end"
    process = context.Process(target=holding, args=(tmp_path / "run", ready, end))
    process.start()
    try:
        assert ready.wait(60)
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        message = (
            rf"^finetune: expected {tmp_path}/run for this command alone, got another one that is at work there\. Wait for its end, or use"
        )
        with pytest.raises(RuntimeError, match=message):
            claim(config(tmp_path / "run"), Accelerator(cpu=True), {})
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        claim(config(tmp_path / "another"), Accelerator(cpu=True), {})
        process.kill()
        process.join()
        claim(config(tmp_path / "run"), Accelerator(cpu=True), {})
    finally:
        end.touch()
        process.kill()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        OSError, match=rf"^finetune: expected to write {tmp_path}/file/run/\.lock, got: Not a directory\. Free some space or"
    ):
        claim(config(tmp_path / "file" / "run"), Accelerator(cpu=True), {})


def test_runs_of_one_process_follow_one_another(tmp_path):
    for output in ("run", "run", "another", "run"):
        claim(config(tmp_path / output), Accelerator(cpu=True), {})
