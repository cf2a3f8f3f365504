"""The files of a run are JSON whatever its numbers are, and are read back."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from geomreg import Embeddings
from geomreg.integrations.recipes import monitor as monitor_module
from geomreg.integrations.recipes.config import MonitorConfig
from geomreg.integrations.recipes.monitor import RunMonitor
from geomreg.integrations.recipes.records import Log, as_json


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
    for steps in (entries, entries[1:]):  # the second run makes steps 2 and 3 again
        log = Log(config, 3, accelerator)
        for entry in steps:
            log.add(entry)
        log.end()
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
