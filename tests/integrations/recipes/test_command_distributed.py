"""``geomreg finetune`` in two gloo processes, each with all weights (DDP) or a part (FSDP2), against the same command in one."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from processes import announce, free_port

from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes import cli
from geomreg.integrations.recipes import finetune as finetune_module
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.models import load

DEVICE = "cpu" if torch.accelerator.is_available() else "auto"  # which must join the processes too

pytestmark = pytest.mark.slow
CLI = ["-m", "geomreg.integrations.recipes.cli"]
IN_FP64 = [str(Path(__file__).with_name("command_in_fp64.py"))]
SHARDED = {"all weights": [], "shards": ["--train.shard", "true"]}
DIVE = ["--config", "method/dive", "--reference.kind", "csv", "--reference.path", "pairs.tsv"]
CHEAP = ["--train.chunk_size", "3", "--train.clip_norm", "0.5", "--model.max_logit_scale", "90"]
METHODS = {"flyp": [], "dive": DIVE, "dive in chunks": [*DIVE, *CHEAP]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty pictures in class folders and as pairs in a table."""
    folder = tmp_path_factory.mktemp("data")
    generator, lines = np.random.default_rng(0), ["filepath\ttitle"]
    for row in range(40):
        path = folder / "classes" / ("owl", "red_fox")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path.relative_to(folder)}\tpicture number {row}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(data, output, method, *options):
    """Of the command; adaptive crops, templates, an evaluation now and then."""
    evaluation = {"id": {"kind": "folder", "path": str(data / "classes")}}
    train = {"steps": 6, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 1, "workers": 0, "save_every": 100, "evaluate_every": 4}
    given = ["finetune", "--model.name", str(model_folder()), "--target.kind", "folder", "--target.path", str(data / "classes")]
    given += [part for key, value in train.items() for part in (f"--train.{key}", str(value))]
    given += ["--evaluation", json.dumps(evaluation), "--best", "id", "--device", DEVICE, "--output", str(output)]
    return given + [str(data / part) if part == "pairs.tsv" else part for part in METHODS[method]] + list(options)


def environment(**changes):
    here = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**here, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}


def launched(program, given, *, processes):
    """The command, to its end."""
    ahead = [sys.executable]
    if processes > 1:
        ahead += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(free_port()),
        ]
    done = subprocess.run([*ahead, *program, *given], env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def records(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].state_dict()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders of finished runs, by program, method, and how many processes hold what; each is made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(program, method, held):
        key = (" ".join(program), method, held)
        if key not in made:
            output = folder / str(len(made))
            options = SHARDED.get(held, [])
            launched(program, arguments(data, output, method, *options), processes=1 if held == "one" else 2)
            made[key] = output
        return made[key]

    return run


@pytest.mark.parametrize("held", SHARDED)
@pytest.mark.parametrize("method", ["flyp", "dive in chunks"])
def test_two_processes_equal_one(runs, method, held):
    """In fp64: order, crops, templates, losses and gradients do not depend on the number of processes."""
    one, two = (runs(IN_FP64, method, which) for which in ("one", held))
    assert len(records(one)) == len(records(two)) == 6
    assert records(one)[5].keys() >= ({"loss"} if method == "flyp" else {"loss", "dive"})
    for before, after in zip(records(one), records(two), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-12)
    assert records(one, "evaluation.jsonl") == records(two, "evaluation.jsonl")
    start = load(str(model_folder())).model.double().state_dict()  # its logit scale is 100.03
    for name in ("model", "best"):
        first, second = weights(one / name), weights(two / name)
        assert (second["logit_scale"].exp() < 90.001) == (method != "flyp")
        assert any((value - start[key]).abs().max() > 1e-4 for key, value in second.items())
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("held", SHARDED)
@pytest.mark.parametrize("method", ["flyp", "dive"])
def test_two_processes_equal_one_in_single_precision(runs, method, held):
    """The losses to 1e-5. Weights differ where the gradient vanishes but for rounding (key biases, rare tokens), which Adam scales up to
    a full update; the embeddings depend on these little, but DiVE measures shifts that are themselves small."""
    one, two = (runs(CLI, method, which) for which in ("one", held))
    for before, after in zip(records(one), records(two), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        if method == "dive":
            assert after["dive"] == pytest.approx(before["dive"], rel=1e-5 if before["step"] < 3 else 1e-3, abs=1e-12)
    tokens = load(str(model_folder())).tokenizer([f"a picture of number {k}" for k in range(20)])
    images = torch.randn(20, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = []
    for folder in (model_folder(), one / "model", two / "model"):
        model = load(str(folder)).model
        with torch.no_grad():
            found.append(torch.cat([model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)]))
    start, first, second = found
    assert (first - start).norm() > 0.1
    assert (first - second).norm() < 1e-3 * (first - start).norm()


def together(given):
    """The command in two processes, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *CLI, *given], env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)), **options)
        for rank in range(2)
    ]


def wait_for_step(folder, step, processes):
    until = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < step:
        assert time.monotonic() < until
        assert all(one.poll() is None for one in processes), [one.communicate()[1][-2000:] for one in processes]
        time.sleep(0.01)


@pytest.mark.parametrize("held", SHARDED)
def test_stopped_killed_and_resumed_is_bitwise_the_same(data, tmp_path, held):
    """SIGTERM to one of the two saves the run; SIGKILL loses what came after the last checkpoint."""
    more = ["--train.steps", "12", "--train.save_every", "2", *SHARDED[held]]
    launched(CLI, arguments(data, tmp_path / "whole", "dive in chunks", *more), processes=2)
    folder = tmp_path / "run"
    given = arguments(data, folder, "dive in chunks", *more)

    stopped = together(given)
    wait_for_step(folder, 2, stopped)
    stopped[1].send_signal(signal.SIGTERM)
    errors = [one.communicate(timeout=100)[1] for one in stopped]
    assert [one.returncode for one in stopped] == [143, 143]
    assert all("geomreg: finetune: stopped after step" in error for error in errors)
    reached = len(records(folder))
    assert reached < 8
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{reached:09d}"]

    killed = together(given)
    wait_for_step(folder, reached + 3, killed)
    for one in killed:
        one.kill()
    for one in killed:
        one.communicate(timeout=100)

    launched(CLI, given, processes=2)
    assert records(folder) == records(tmp_path / "whole")
    assert records(folder, "evaluation.jsonl") == records(tmp_path / "whole", "evaluation.jsonl")
    for name in ("model", "best"):
        ends = [(one / name / "open_clip_model.safetensors").read_bytes() for one in (folder, tmp_path / "whole")]
        assert ends[0] == ends[1], name


def command_on_rank(rank, port, given, victim, when, errors):
    """The command; the victim is killed in a step, or while the main process evaluates, which takes it long."""
    announce(rank, 2, port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    stderr = os.open(errors / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    whole, long = finetune_module._Evaluation.after, finetune_module._Evaluation._evaluate_alone

    def after(self, step, **options):
        if rank == victim and (step == 3 if when == "step" else step == 4 and rank == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, step, **options)

    def evaluate(self, model, step):
        if when == "evaluation" and step == 4:
            if victim == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        long(self, model, step)

    finetune_module._Evaluation.after, finetune_module._Evaluation._evaluate_alone = after, evaluate
    sys.exit(cli.main(given))


def contents(folder):
    """Every file of a run, without its random name."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, keys in {"environment.json": ["run", "checksum"], "config.json": ["output"]}.items():
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in keys}
    return found


def test_one_that_is_killed_ends_the_other_and_the_run_goes_on(data, tmp_path):
    """Within seconds, with one line; in a step, in the midst of the main process's work, or the main process itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "geomreg.integrations.recipes.finetune", "geomreg.integrations.recipes.cli"])

    def command(output, victim=None, when=None):
        given = (free_port(), arguments(data, tmp_path / output, "dive", "--train.save_every", "2"), victim, when, tmp_path)
        both = [context.Process(target=command_on_rank, args=(rank, *given)) for rank in range(2)]
        for one in both:
            one.start()
        try:
            if victim is not None:
                both[victim].join(120)
                killed = time.monotonic()
            for one in both:
                one.join(120)
            assert victim is None or time.monotonic() < killed + 30
            return [one.exitcode for one in both]
        finally:
            for one in both:
                one.kill()

    assert command("whole") == [0, 0]
    for victim, when in ((1, "step"), (1, "evaluation"), (0, "evaluation")):
        assert command("run", victim, when) == ([-signal.SIGKILL, 2] if victim == 0 else [2, -signal.SIGKILL])
        line = (tmp_path / f"{1 - victim}.txt").read_text().splitlines()[-1]
        start = f"geomreg: finetune: expected all processes to go on, got none any more on rank {victim}: it was killed. Start the same"
        assert line.startswith(start)
    assert command("run") == [0, 0]
    found, whole = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []


def test_dry_run_in_two_processes(data, tmp_path):
    launched(CLI, arguments(data, tmp_path / "run", "dive", "--dry_run", "true", *SHARDED["shards"]), processes=2)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    """A small CoCa, whose caption decoder no loss on embeddings reaches."""
    folder = tmp_path_factory.mktemp("coca")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1, "attentional_pool": True}
    config = {"embed_dim": 32, "vision_cfg": vision | {"attn_pooler_heads": 2, "output_tokens": True}, "multimodal_cfg": text}
    config |= {"text_cfg": text | {"embed_cls": True, "output_tokens": True}, "custom_text": True}
    torch.manual_seed(0)
    model = open_clip.coca_model.CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
    torch.nn.init.normal_(model.text_decoder.text_projection)  # which open_clip leaves as the memory was
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    return to_open_clip(model, {"model_cfg": config, "preprocess_cfg": preprocess}, folder / "model")


def test_a_caption_decoder_stays_as_it_is_in_one_process_and_two(coca, data, tmp_path):
    """Nobody waits for its gradients, and weight decay does not move it."""
    start = weights(coca)
    for held in ("one", *SHARDED):
        given = arguments(data, tmp_path / held, "flyp", *SHARDED.get(held, []), "--train.steps", "3")
        given[given.index("--model.name") + 1] = str(coca)
        launched(IN_FP64, given, processes=1 if held == "one" else 2)
        ends = weights(tmp_path / held / "model")
        assert all(torch.equal(value, start[name]) for name, value in ends.items() if name.startswith("text_decoder."))
        assert any(not torch.equal(value, start[name]) for name, value in ends.items())
        for before, after in zip(records(tmp_path / "one"), records(tmp_path / held), strict=True):
            assert after == pytest.approx(before, rel=1e-5, abs=1e-12)
