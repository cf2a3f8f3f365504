"""``geomreg finetune`` on small files of every kind: what is learned, kept, logged, resumed and exported."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import tarfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from killing import killed_until_done
from PIL import Image
from small import small_clip

from geomreg import Embeddings
from geomreg.integrations.recipes import cli, records, streams
from geomreg.integrations.recipes import evaluate as evaluate_module
from geomreg.integrations.recipes import finetune as finetune_module
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.config import Config, DataConfig, MethodConfig, MonitorConfig, TermConfig, TrainConfig
from geomreg.integrations.recipes.data import LabelledFolder
from geomreg.integrations.recipes.embed import Options, embed_data
from geomreg.integrations.recipes.evaluate import evaluate
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.finetune import finetune_from
from geomreg.integrations.recipes.head import load_head
from geomreg.integrations.recipes.models import Lora, ModelConfig, compile_blocks, load
from geomreg.integrations.recipes.train import RECORDED, encode
from geomreg.metrics import rsa

CONFIGS = Path(__file__).parents[3] / "integrations" / "recipes" / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").iterdir())
EMOJI = ModelConfig("emojiclip")  # which is no plain ViT
DIVE = MethodConfig("dive", {"dive": TermConfig("DiVE", 300.0)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty pictures as pairs in a table, in class folders, and in tar shards."""
    folder = tmp_path_factory.mktemp("data")
    generator, lines = np.random.default_rng(0), ["filepath\ttitle"]
    (folder / "shards").mkdir()
    for row in range(40):
        path = folder / "classes" / ("owl", "red_fox")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path.relative_to(folder)}\tpicture number {row}")
        (folder / "caption").write_text(f"picture number {row}")
        with tarfile.open(folder / "shards" / f"{row // 20:05d}.tar", "a") as tar:
            tar.add(path, f"{row:04d}.png")
            tar.add(folder / "caption", f"{row:04d}.txt")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    paths = [path.relative_to(folder / "classes") for path in (folder / "classes").rglob("*.png")]
    (folder / "captions.csv").write_text("\n".join(["id,caption", *(f"{path},seen {path.stem}" for path in paths)]))
    return folder


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    """accelerate keeps one state, and its precision, for the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def config(data, output, *, method=DIVE, kind="csv", **changes):
    train = {"steps": 4, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 1, "workers": 0, "save_every": 2}
    paths = {"csv": data / "pairs.tsv", "folder": data / "classes", "tar": data / "shards" / "*.tar"}
    model = changes.pop("model", ModelConfig(str(small_clip())))
    others = {key: changes.pop(key) for key in ("evaluation", "best", "texts", "ensemble", "trackers") if key in changes}
    train = TrainConfig(**{**train, **changes})
    reference = DataConfig("csv", str(data / "pairs.tsv")) if method.terms else None
    return Config(model, DataConfig(kind, str(paths[kind])), train, output, method, reference, device="cpu", **others)


def weights(folder):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


START = weights(small_clip())


@pytest.mark.parametrize("kind", ["csv", "folder", "tar"])
def test_every_kind_of_target(data, tmp_path, kind):
    out = finetune_from(config(data, tmp_path / "run", kind=kind))
    assert (weights(out) - START).norm() > 0.01
    log = logged(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[0]["dive"] < 1e-9 < log[3]["dive"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "data.json",
        "environment.json",
        ".lock",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "ensemble",
    }
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["betas"] == [0.9, 0.999]


def shipped(data, output, method, **train):
    """The run of a method's file on class folders, with what the method needs beside it."""
    captured = []
    described = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())["method"]
    arguments = ["--config", "data/your-imagefolder", "--config", f"method/{method}", "--model.name", "emojiclip"]
    arguments += ["--target.path", str(data / "classes"), "--evaluation", "{}", "--best", "null", "--train.epochs", "null"]
    if described.get("terms"):
        arguments += ["--reference.kind", "csv", "--reference.path", str(data / "pairs.tsv")]
    if described.get("caption_weight"):
        arguments += ["--target.captions", str(data / "captions.csv")]
    train = {"steps": 20, "batch_size": 8, "warmup_steps": 1, "workers": 0, "learning_rate": 1e-4, **train}
    if method == "zscl":
        train["average_every"] = 5
    arguments += [part for key, value in train.items() for part in (f"--train.{key}", str(value))]
    with mock.patch.object(finetune_module, "finetune_from", captured.append):
        assert main(["finetune", *arguments, "--output", str(output), "--device", "cpu"]) == 0
    return dataclasses.replace(captured[0], ensemble=None)


@pytest.mark.slow
def test_any_two_methods_end_at_different_weights(data, tmp_path):
    """After 20 steps on EmojiCLIP from its file; and every term pulls at an encoder."""
    ends = {}
    for method in METHODS:
        one = shipped(data, tmp_path / method, method)
        ends[method] = weights(finetune_from(one))
        for name, term in {**one.method.terms, **one.method.target_terms}.items():
            assert all(entry[name] == entry[name] for entry in logged(tmp_path / method))
            assert pull(one, name, term, weights_of=tmp_path / method / "model") > 0, (method, name)
    for one, other in itertools.combinations(ends, 2):
        assert (ends[one] - ends[other]).norm() > 1e-4, (one, other)


def pull(one, name, term, *, weights_of):
    """Norm of the gradient of a term alone with respect to the encoders, where the run has ended."""
    run = finetune_module._Run(dataclasses.replace(one, output=one.output / "none"), finetune_module.Accelerator(cpu=True))
    reference = name in one.method.terms
    regularizer = run.regularizer if reference else run.target_regularizer
    state = open_clip.create_model_and_transforms(f"local-dir:{weights_of}")[0].state_dict()
    run.model.load_state_dict(state, strict=False)
    batch = next(run.streams["reference" if reference else "target"].batches(0))
    student, known = (encode(run.model, batch), run.teacher(batch) if run.teacher is not None else None)
    inputs = {"logit_scale": run.model.logit_scale.exp()} | ({} if run.texts is None else {"texts": next(run.texts(0))})
    taken = getattr(regularizer.regularizers[name], "inputs", ())
    value = regularizer.regularizers[name](student, known, **{key: inputs[key] for key in taken})
    encoders = [parameter for key, parameter in run.model.named_parameters() if parameter.requires_grad and "logit" not in key]
    gradients = torch.autograd.grad(value, encoders, allow_unused=True)
    return sum(gradient.norm() for gradient in gradients if gradient is not None)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"unique_texts": True}])
def test_savings_change_nothing(data, tmp_path, options):
    ends = []
    for name, changes in (("whole", {}), ("cheap", options)):
        finetune_from(config(data, tmp_path / name, kind="folder", **changes))
        ends.append([entry["loss"] for entry in logged(tmp_path / name)])
    assert ends[0] == pytest.approx(ends[1], rel=5e-3)  # Adam amplifies rounding where gradients vanish


@pytest.mark.slow
def test_cached_teacher_is_the_frozen_one(data, tmp_path):
    embed_data(Options(str(small_clip()), data / "pairs.tsv", tmp_path / "cache", device="cpu", workers=0))
    cached = dataclasses.replace(DIVE, teacher="cached", cache=tmp_path / "cache")
    one, two = (logged_after(data, tmp_path / name, method) for name, method in (("frozen", DIVE), ("cached", cached)))
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=5e-3)
    finetune_from(config(data, tmp_path / "moved"))
    with pytest.raises(ValueError, match="to be built with weights"):
        finetune_from(config(data, tmp_path / "wrong", method=cached, model=ModelConfig(str(tmp_path / "moved" / "model"))))


@pytest.mark.slow
def test_cached_teacher_of_images_alone(data, tmp_path):
    """The cache has both, the run asks for one; the term takes what it is given."""
    embed_data(Options(str(small_clip()), data / "pairs.tsv", tmp_path / "cache", device="cpu", workers=0))
    method = MethodConfig("fd", {"fd": TermConfig("FeatureDistillation", 100.0)}, teacher="cached", cache=tmp_path / "cache")
    logs = []
    for name, one in (("cached", method), ("frozen", dataclasses.replace(method, teacher="frozen", cache=None))):
        run = config(data, tmp_path / name, method=one)
        finetune_from(dataclasses.replace(run, reference=dataclasses.replace(run.reference, modalities=("image",)), ensemble=None))
        logs.append([entry["fd"] for entry in logged(tmp_path / name)])
    assert logs[0][1:] == pytest.approx(logs[1][1:], rel=5e-3)


def logged_after(data, output, method):
    finetune_from(config(data, output, method=method))
    return logged(output)


def test_adapters_are_merged_in_the_export(data, tmp_path):
    method = dataclasses.replace(DIVE, teacher="adapters_off")
    vit = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 1}
    text = {"context_length": 10, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
    torch.manual_seed(0)
    plain = open_clip.CLIP(16, vit, text)
    described = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vit, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    folder = to_open_clip(plain, described, tmp_path / "vit")
    model = ModelConfig(str(folder), lora=Lora(rank=2), logit_scale="frozen")
    out = finetune_from(config(data, tmp_path / "run", method=method, model=model, learning_rate=1e-2))
    before, after = (open_clip.create_model_and_transforms(f"local-dir:{one}")[0].state_dict() for one in (folder, out))
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all("c_fc.weight" in key or "c_proj.weight" in key for key in moved)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"max_logit_scale": 50.0}, {"logit_scale": "frozen"}, {"frozen": ("text",)}])
def test_parts_of_the_model(data, tmp_path, model):
    out = finetune_from(config(data, tmp_path / "run", model=ModelConfig(str(small_clip()), **model)))
    before, after = (open_clip.create_model_and_transforms(f"local-dir:{one}")[0] for one in (small_clip(), out))
    if "max_logit_scale" in model:
        assert after.logit_scale.exp().item() <= 50.01
    elif "logit_scale" in model:
        assert torch.equal(before.logit_scale, after.logit_scale)
    else:
        assert torch.equal(before.token_embedding.weight, after.token_embedding.weight)


# classification


HEAD = MethodConfig("vanilla", loss="classification", head="zero_shot")
PROBE = MethodConfig("lp-ft", loss="classification", head="linear_probe")
TEXTS = MethodConfig("zscl", loss="classification", head="text_encoder", label_smoothing=0.2)


@pytest.mark.parametrize("method", [HEAD, PROBE], ids=["zero-shot", "probe"])
def test_head_is_exported_evaluated_and_mixed(data, tmp_path, method, capsys):
    evaluation = {
        "id": DataConfig("folder", str(data / "classes")),
        "other": DataConfig("folder", str(data / "classes"), {"class_names": NAMES}),
    }
    options = {"kind": "folder", "evaluation": evaluation, "best": "id", "learning_rate": 1e-3}
    out = finetune_from(config(data, tmp_path / "run", method=method, **options))
    head, start, classes = load_head(out)
    assert classes == ["owl", "red fox"]
    final = load(str(out))
    folder = LabelledFolder(data / "classes", transform=final.transform)
    entries = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert entries[1]["id"].pop("by") == "head"
    assert entries[1]["id"] == pytest.approx(evaluate(final.model, folder, final.tokenizer, head=head))
    named = LabelledFolder(data / "classes", transform=final.transform, class_names=NAMES)
    assert entries[1]["other"].pop("by") == "zero_shot"
    assert entries[1]["other"] == pytest.approx(evaluate(final.model, named, final.tokenizer))  # other classes: zero-shot
    base = load(str(small_clip()))
    assert torch.equal(base.model.token_embedding.weight, final.model.token_embedding.weight)
    assert torch.equal(base.model.logit_scale, final.model.logit_scale)
    texts = torch.nn.functional.normalize(
        base.model.encode_text(base.tokenizer(["a photo of a owl.", "a photo of a red fox."]), normalize=True), dim=1
    )
    torch.testing.assert_close(start.weight, base.model.logit_scale.exp() * texts, rtol=1e-4, atol=1e-4)
    assert (head.weight - start.weight).abs().max() > 1e-4
    zero_shot = evaluate(base.model, LabelledFolder(data / "classes", transform=base.transform), base.tokenizer)
    assert entries[0]["id"]["accuracy"] == zero_shot["accuracy"]  # of the base model, whatever head was learned before the first step
    printed = capsys.readouterr().out
    assert re.search(rf"^id: {zero_shot['accuracy']:.1f} % -> .*; n = 40$", printed, re.MULTILINE)
    assert ("linear_probe" in entries[0]["id"]) == (method is PROBE)
    assert "linear_probe" not in entries[0]["other"]  # whose classes it does not know
    if method is PROBE:
        assert entries[0]["id"]["linear_probe"] > 90  # pictures of noise, fitted: chance for a zero-shot head
        assert f"; linear probe {entries[0]['id']['linear_probe']:.1f} %;" in printed
    mixed, before, _ = load_head(tmp_path / "run" / "ensemble" / "alpha-0.50")
    torch.testing.assert_close(mixed.weight, (start.weight + head.weight) / 2)
    torch.testing.assert_close(mixed.bias, (start.bias + head.bias) / 2)
    assert torch.equal(before.weight, start.weight)
    assert load_head(tmp_path / "run" / "best")[2] == classes


NAMES = {"owl": "night bird", "red_fox": "fox"}


def test_the_head_is_used_where_it_knows_the_classes(data, tmp_path, capsys):
    """In any order, or some of them: by the columns of these classes; so is the mixture, and a class more means zero-shot."""
    three = tmp_path / "three"
    for row, name in enumerate(["owl", "red_fox", "yak"] * 8):
        (three / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "classes" / ("owl", "red_fox")[row % 2] / f"{row}.png", three / name)
    some, turned, more = (tmp_path / name for name in ("some", "turned", "more"))
    for folder, names in ((some, ("owl", "yak")), (turned, ("red_fox", "yak", "owl")), (more, ("owl", "red_fox", "yak", "zebu"))):
        for k, name in enumerate(names):
            shutil.copytree(three / ("owl" if name == "zebu" else name), folder / f"{k}")
        (tmp_path / f"{folder.name}.json").write_text(json.dumps({str(k): name.replace("_", " ") for k, name in enumerate(names)}))
    evaluation = {
        name: DataConfig("folder", str(tmp_path / name), {"class_names": str(tmp_path / f"{name}.json")})
        for name in ("some", "turned", "more")
    }
    one = config(data, tmp_path / "run", method=PROBE, kind="folder", evaluation=evaluation)
    finetune_from(dataclasses.replace(one, target=DataConfig("folder", str(three))))
    *_, end, mixed = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    for entry, folder in ((end, tmp_path / "run" / "model"), (mixed, tmp_path / "run" / "ensemble" / "alpha-0.50")):
        assert {name: entry[name]["by"] for name in evaluation} == {"some": "head", "turned": "head", "more": "zero_shot"}
        loaded, (head, _, classes) = load(str(folder)), load_head(folder)
        for name in ("some", "turned"):
            images = LabelledFolder(tmp_path / name, transform=loaded.transform, class_names=evaluation[name].options["class_names"])
            columns = [classes.index(one) for one in images.classes]
            with torch.no_grad():
                logits = head(loaded.model.encode_image(torch.stack([sample["image"] for sample in images]), normalize=True))[:, columns]
            right = logits.argmax(dim=1) == torch.tensor(images.labels)
            assert entry[name]["accuracy"] == pytest.approx(100 * right.double().mean().item())
    printed = capsys.readouterr().out
    assert re.search(r"^some: .*; ensemble .* %; by the head; linear probe .* %; n = 16$", printed, re.MULTILINE)
    assert re.search(r"^more: .*; ensemble .* %; zero-shot; n = 32$", printed, re.MULTILINE)


def test_classes_of_one_name_take_their_columns_in_order():
    assert finetune_module._columns(("b", "a", "b"), ("a", "b", "c", "b")) == [1, 0, 3]
    assert finetune_module._columns(("b",), ("a", "b", "c", "b")) == [1]
    assert finetune_module._columns(("b", "b"), ("a", "b")) is None


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [(HEAD, {"chunk_size": 3}), (TEXTS, {"chunk_size": 3}), (TEXTS, {"unique_texts": True})])
def test_savings_change_no_classification(data, tmp_path, method, options):
    ends = []
    for name, changes in (("whole", {}), ("cheap", options)):
        finetune_from(config(data, tmp_path / name, kind="folder", method=method, **changes))
        ends.append([entry["loss"] for entry in logged(tmp_path / name)])
    assert ends[0] == pytest.approx(ends[1], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [PROBE, TEXTS], ids=["probe", "texts"])
def test_killed_classification_is_bitwise_the_same(data, tmp_path, method):
    method = dataclasses.replace(method, target_terms=ENERGY)
    texts = DataConfig("random_texts", options={"length": 4})
    options = {"kind": "folder", "method": method, "texts": texts, "steps": 10, "save_every": 1, "average_every": 3}
    whole = finetune_from(config(data, tmp_path / "whole", **options))
    assert killed_until_done(killed, config(data, tmp_path / "run", **options), first=0.8, more=0.41) >= 1
    for file in sorted(whole.glob("*.safetensors")):
        assert (tmp_path / "run" / "model" / file.name).read_bytes() == file.read_bytes()
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_captions_as_classes(data, tmp_path):
    """Each caption of a table is a class."""
    out = finetune_from(config(data, tmp_path / "run", method=HEAD))
    assert load_head(out)[2] == [f"picture number {row}" for row in range(40)]
    with pytest.raises(ValueError, match="expected classes as target of vanilla, got tar"):
        config(data, tmp_path / "run", method=HEAD, kind="tar")


# what terms need


ENERGY = {"energy": TermConfig("TextEnergy", 1.0)}
CYCLIC = {"c": TermConfig("CyclicConsistency", 1.0)}
KL = TermConfig("SimilarityKL", 1.0, {"against": "texts", "directions": ["rows"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "reference", "logs"),
    [
        ({"fd": TermConfig("FeatureDistillation", 100.0)}, DataConfig("target"), "fd"),
        ({"dive": TermConfig("DiVE", 100.0)}, DataConfig("target"), "dive"),
        ({"fd": TermConfig("FeatureDistillation", 100.0, {"modalities": ["text"]})}, DataConfig("random_texts"), "fd"),
        ({"fd": TermConfig("FeatureDistillation", 100.0)}, "image", "fd"),
        ({"fd": TermConfig("FeatureDistillation", 100.0)}, "text", "fd"),
        ({"kl": KL}, "image", "kl"),
    ],
    ids=["images and texts of the target", "pairs of the target", "random texts", "images", "captions", "images and a bank"],
)
def test_other_references(data, tmp_path, terms, reference, logs):
    """The student sees the teacher's numbers before it has moved, and others after."""
    if isinstance(reference, str):
        reference = DataConfig("csv", str(data / "pairs.tsv"), modalities=(reference,))
    one = config(data, tmp_path / "run", kind="folder", method=MethodConfig("m", terms))
    one = dataclasses.replace(one, reference=reference, texts=DataConfig("csv", str(data / "pairs.tsv")) if "kl" in terms else None)
    finetune_from(one)
    log = logged(tmp_path / "run")
    assert abs(log[0][logs]) < 1e-6 < log[3][logs]
    assert all(entry["gradient_ratio"] > 0 for entry in log[1:])


def test_the_target_as_reference_is_seen_without_crops(data, tmp_path):
    one = dataclasses.replace(config(data, tmp_path / "run", kind="folder"), reference=DataConfig("target"))
    run = finetune_module._Run(one, finetune_module.Accelerator(cpu=True))
    target, reference = (next(run.streams[name].batches(0)) for name in ("target", "reference"))
    plain = {sample["id"]: sample["image"] for sample in run.streams["reference"].dataset}
    assert all(torch.equal(image, plain[name]) for name, image in zip(reference["id"], reference["image"], strict=True))
    assert not all(torch.equal(image, plain[name]) for name, image in zip(target["id"], target["image"], strict=True))
    assert target["id"] != reference["id"]  # drawn by themselves


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (DIVE, {"reference": ("image",)}, r"expected reference data that the term dive can use, got image alone \(.*text"),
        (MethodConfig("m", {"kl": KL}), {"reference": ("image",)}, r"expected captions for the terms' bank of texts, got none"),
        (
            dataclasses.replace(HEAD, target_terms={"c": TermConfig("CyclicConsistency", 1.0)}),
            {},
            r"expected target data that the term c can",
        ),
        (MethodConfig("m", {"s": TermConfig("SelectiveDistillation", 1.0)}), {}, r"s: expected a term of what a run has, got .* previous"),
        (MethodConfig("m", {"r": TermConfig("ContrastiveReplay", 1.0, {"form": "sigmoid"})}), {}, r"r: expected a model with a logit bias"),
        (MethodConfig("m", target_terms=ENERGY, bank="contexts"), {"kind": "csv"}, r"expected labelled target data for bank=contexts"),
        (
            MethodConfig("m", {"p": TermConfig("ProjectionOrthogonality", 1.0)}),
            {"model": EMOJI},
            r"p: expected a CLIP with linear projections",
        ),
        (MethodConfig("m", {"w": TermConfig("WeightAnchor", 1.0)}), {}, r"got only such on weights \(w\)\. Make them method.target_terms"),
        (
            dataclasses.replace(HEAD, terms={"f": TermConfig("FeatureDistillation", 1.0)}),
            {"reference": ("text",)},
            r"through which the term f moves what is trained, got text of a frozen tower\.",
        ),
    ],
)
def test_what_a_term_lacks_is_said_before_training(data, tmp_path, method, changes, message):
    one = config(
        data, tmp_path / "run", **{"method": method, "kind": "folder"} | {key: changes[key] for key in ("kind", "model") if key in changes}
    )
    if "reference" in changes:
        one = dataclasses.replace(one, reference=dataclasses.replace(one.reference, modalities=changes["reference"]))
    with pytest.raises(ValueError, match=message):
        finetune_from(one)
    assert not (tmp_path / "run").exists()


def test_one_class_and_a_trained_scale_are_refused(data, tmp_path):
    shutil.copytree(data / "classes" / "owl", tmp_path / "classes" / "owl")
    one = config(data, tmp_path / "run", kind="folder", method=HEAD)
    with pytest.raises(ValueError, match="expected at least 2 classes to tell apart, got owl alone"):
        finetune_from(dataclasses.replace(one, target=DataConfig("folder", str(tmp_path / "classes"))))
    with pytest.raises(ValueError, match=r"expected model.logit_scale=frozen with method.teacher=adapters_off, got trained"):
        config(
            data, tmp_path / "run", method=dataclasses.replace(DIVE, teacher="adapters_off"), model=ModelConfig("emojiclip", lora=Lora())
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_options_that_nothing_looks_at_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"expected a probe for the options of monitor, got none"):
        dataclasses.replace(config(data, tmp_path / "run"), monitor=MonitorConfig(max_zero_shot_drop=2.0))
    with pytest.raises(ValueError, match=r"expected texts for a term that takes a bank of them, got none in dive"):
        finetune_from(config(data, tmp_path / "run", texts=DataConfig("random_texts")))
    assert not (tmp_path / "run").exists()


CONTEXT = {"context": TermConfig("ContextKL", 1.0)}
FOLDER = DataConfig("folder", "x")
COLUMNS = DataConfig("csv", "x")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"reference_batch_size": 4}}, "expected reference data for train.reference_batch_size=4, got none in flyp"),
        ({"train": {"regularize_every": 2}}, "expected terms on reference data for train.regularize_every=2, got none in flyp"),
        (
            {"train": {"unique_texts": True}, "method": HEAD},
            "expected a target loss with texts for train.unique_texts=True, got none in van",
        ),
        ({"model": {"max_logit_scale": 100.0}, "method": HEAD}, "expected a trained logit scale for model.max_logit_scale=100.0, got none"),
        ({"model": {"max_logit_scale": 100.0, "logit_scale": "frozen"}}, "expected no max_logit_scale with logit_scale=frozen, got 100.0"),
        ({"method": {"teacher_decay": 0.9}}, "expected no teacher_decay with teacher=frozen, got 0.9"),
        ({"method": {"head": "text_encoder"}}, "expected no head with loss=contrastive, got text_encoder"),
        ({"method": {"bank": "contexts", "bank_size": 3}}, "expected no bank_size with bank=contexts, got 3"),
        ({"method": {"target_terms": CONTEXT, "bank": "contexts"}, "texts": COLUMNS}, "expected no texts with method.bank=contexts"),
    ],
)
def test_options_that_do_nothing(tmp_path, parts, message):
    """Are refused when they are given."""

    def made():
        method, train = parts.get("method", {}), TrainConfig(steps=1, **parts.get("train", {}))
        method = MethodConfig(**method) if isinstance(method, dict) else method
        Config(ModelConfig("emojiclip", **parts.get("model", {})), FOLDER, train, tmp_path, method, texts=parts.get("texts"))

    with pytest.raises(ValueError, match=re.escape(message)):
        made()


def test_contexts_where_the_target_has_one_template(data, tmp_path):
    """Over one context nothing could change."""
    method = dataclasses.replace(HEAD, target_terms=CONTEXT, bank="contexts")
    one = config(data, tmp_path / "run", kind="folder", method=method, learning_rate=1e-3)
    run = finetune_module._Run(one, finetune_module.Accelerator(cpu=True))
    assert next(run.texts(0)).shape[0] == len(streams.CONTEXTS) == 5
    finetune_from(one)
    log = [json.loads(line) for line in (one.output / "metrics.jsonl").read_text().splitlines()]
    assert log[-1][next(iter(CONTEXT))] > 0 < log[-1]["gradient_ratio"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank": "contexts"}, "expected a term that takes a bank with method.bank or bank_size, got none in m"),
        ({"bank_size": 3}, "expected a term that takes a bank with method.bank or bank_size, got none in m"),
        ({"teacher": "averaged"}, "expected a term that needs a teacher with teacher=averaged, got none in m"),
        ({"teacher": "cached", "cache": True}, "expected a term that needs a teacher with teacher=cached, got none in m"),
    ],
)
def test_options_without_a_term_for_them(data, tmp_path, options, message):
    if "cache" in options:
        embed_data(Options(str(small_clip()), data / "pairs.tsv", tmp_path / "cache", device="cpu", workers=0))
        options = {**options, "cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match=message):
        finetune_from(config(data, tmp_path / "run", kind="folder", method=MethodConfig("m", **options)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["step", "loss", "learning_rate", "stop", "task_square", "dive/weighted", "a.b"])
def test_names_of_terms_that_the_records_have(name):
    with pytest.raises(ValueError, match=rf"expected a name for a term that is .* none of the records' own \(step, .*, got '{name}'"):
        MethodConfig("m", {name: TermConfig("DiVE", 1.0)})


def test_no_gradient_ratio_of_weights(data, tmp_path):
    """Nothing of them is measured at the embeddings; all other numbers have reserved names."""
    for name, terms in (("anchor", ()), ("both", ("cyclic",))):
        anchor = {"anchor": TermConfig("WeightAnchor", 1.0)}
        method = MethodConfig("m", target_terms={**anchor, **{one: TermConfig("CyclicConsistency", 1.0) for one in terms}})
        finetune_from(config(data, tmp_path / name, method=method, ensemble=None))
        entry = logged(tmp_path / name)[1]
        assert ("gradient_ratio" in entry) == bool(terms)
        assert {key for key in entry if "/" not in key} - {"anchor", *terms} < set(RECORDED)


def test_small_data_sets_are_named(data, tmp_path):
    for changes, message in (
        ({"batch_size": 41}, "got 40 of the target. Lower train.batch_size."),
        ({"reference_batch_size": 41}, "got 40 of the reference. Lower train.reference_batch_size."),
        ({"method": MethodConfig("m", {"kl": KL}, bank_size=41)}, "got 40 of the texts. Lower method.bank_size."),
    ):
        with pytest.raises(
            ValueError, match="finetune: expected at least 41 samples for a batch of 41 in 1 processes, " + re.escape(message)
        ):
            finetune_from(config(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_no_sample_has_is_said_before_there_is_a_folder(data, tmp_path):
    """Captions of shards, samples of a cache."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row in range(8):
            tar.add(data / "classes" / ("owl", "red_fox")[row % 2] / f"{row}.png", f"{row}.png")
    one = config(data, tmp_path / "run", method=MethodConfig(), kind="tar")
    with pytest.raises(ValueError, match=r"expected samples that can be read, got .*: no \.txt"):
        finetune_from(dataclasses.replace(one, target=DataConfig("tar", str(tmp_path / "0.tar"))))
    shutil.copytree(data / "classes" / "owl", tmp_path / "other" / "owl")
    embed_data(Options(str(small_clip()), tmp_path / "other", tmp_path / "cache", device="cpu", workers=0))
    cached = dataclasses.replace(DIVE, teacher="cached", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"EmbeddingCache: expected ids of .*, got 16 of 16 that it lacks"):
        finetune_from(config(data, tmp_path / "run", method=cached))
    assert not (tmp_path / "run").exists()


def test_bank_of_the_targets_own_texts(data, tmp_path):
    one = config(data, tmp_path / "run", kind="csv", method=MethodConfig("kl", {"kl": KL}), texts=DataConfig("target"))
    run = finetune_module._Run(one, finetune_module.Accelerator(cpu=True))
    known = {tuple(run.loaded.tokenizer([f"picture number {row}"])[0].tolist()) for row in range(40)}
    assert {tuple(text.tolist()) for text in next(run.streams["texts"].batches(0))["text"]} <= known


def test_captions_and_anchors(data, tmp_path):
    """ARF: further captions of the target images, and the reference pairs of a list."""
    anchors = [f"classes/owl/{row}.png" for row in range(0, 20, 2)]
    (tmp_path / "ids.txt").write_text("\n".join(anchors))
    method = MethodConfig("arf", {"replay": TermConfig("ContrastiveReplay", 1.0)}, caption_weight=1.0)
    plain = config(data, tmp_path / "plain", kind="folder", method=dataclasses.replace(method, caption_weight=0.0))
    plain = dataclasses.replace(plain, reference=dataclasses.replace(plain.reference, subset=tmp_path / "ids.txt"))
    target = dataclasses.replace(plain.target, captions=data / "captions.csv")
    one = dataclasses.replace(plain, method=method, target=target, output=tmp_path / "run")
    run = finetune_module._Run(one, finetune_module.Accelerator(cpu=True))
    assert sorted(run.streams["reference"].dataset.ids) == sorted(anchors)
    batch = next(run.streams["target"].batches(0))
    wanted = run.loaded.tokenizer([f"seen {Path(name).stem}" for name in batch["id"]])
    assert torch.equal(batch["caption"], wanted)
    finetune_from(one)
    finetune_from(plain)
    assert logged(tmp_path / "run")[0]["loss"] > logged(tmp_path / "plain")[0]["loss"] + 0.5  # one loss more
    with pytest.raises(ValueError, match=r"expected target.captions with method.caption_weight"):
        config(data, tmp_path / "run", method=method)


@pytest.mark.slow
def test_a_high_learning_rate_warns(data, tmp_path):
    model = ModelConfig(str(small_clip()), learning_rates=(1e-6, 1e-5))
    with pytest.warns(UserWarning, match="the learning rate 0.001 is far above what is usual for .*, 1e-06 to 1e-05"):
        finetune_from(dataclasses.replace(config(data, tmp_path / "run", model=model, learning_rate=1e-3, steps=1), ensemble=None))
    with pytest.warns(
        UserWarning, match="the learning rate 1e-07 is far below what is usual for .*, 1e-06 to 1e-05.* raise train.learning"
    ):
        finetune_from(dataclasses.replace(config(data, tmp_path / "low", model=model, learning_rate=1e-7, steps=1), ensemble=None))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate.*")
        finetune_from(dataclasses.replace(config(data, tmp_path / "usual", model=model, learning_rate=1e-5, steps=1), ensemble=None))


@pytest.mark.slow
def test_a_warm_up_longer_than_the_run_warns(data, tmp_path):
    with pytest.warns(UserWarning, match="the warm-up of 5 steps does not end in the 4 steps of the run, whose learning rate stays below"):
        finetune_from(config(data, tmp_path / "run", warmup_steps=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        finetune_from(config(data, tmp_path / "other", warmup_steps=4))


def test_tensorboard(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = config(data, tmp_path / "run", trackers=("tensorboard",))
    finetune_from(one)
    events = EventAccumulator(str(tmp_path / "run" / "geomreg"))
    events.Reload()
    log = logged(tmp_path / "run")
    for key in ("loss", "dive/weighted", "gradient_ratio"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4]
        assert [event.value for event in events.Scalars(key)] == pytest.approx([entry[key] for entry in log])


def test_a_tracker_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected wandb to be installed for its tracker, got none\. Run pip install wandb"):
        finetune_from(config(data, tmp_path / "run", trackers=("wandb",)))


def test_a_tracker_that_does_not_start(data, tmp_path, monkeypatch):
    def broken(*args):
        raise KeyError("no login.")

    monkeypatch.setattr(finetune_module.Accelerator, "init_trackers", broken)
    with pytest.raises(RuntimeError, match=r"expected tensorboard to start, got 'no login\.' Mend that"):
        finetune_from(config(data, tmp_path / "run", trackers=("tensorboard",)))


@pytest.fixture
def vit(tmp_path):
    """A small ViT with random weights, and with a bias of the logits, as SigLIP has it."""

    def exported(bias):
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
        text = {"context_length": 10, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
        described = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text} | ({"init_logit_bias": -10.0} if bias else {})
        torch.manual_seed(0)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
        return to_open_clip(open_clip.CLIP(**described), {"model_cfg": described, "preprocess_cfg": preprocess}, tmp_path / f"vit-{bias}")

    return exported


@pytest.mark.slow
def test_siglip(data, tmp_path, vit):
    """Its loss on target and replayed pairs; the bias learns, or stays with the scale."""
    for kind in ("trained", "frozen"):
        model = ModelConfig(str(vit(True)), logit_scale=kind)
        method = MethodConfig("replay", {"replay": TermConfig("ContrastiveReplay", 1.0)})
        out = finetune_from(config(data, tmp_path / kind, model=model, method=method, learning_rate=1e-2))
        before, after = (open_clip.create_model_and_transforms(f"local-dir:{one}")[0] for one in (vit(True), out))
        assert (abs(after.logit_bias - before.logit_bias).item() > 1e-3) == (kind == "trained")
        first = logged(tmp_path / kind)[0]
        loaded = load(str(vit(True)))
        run = finetune_module._Run(config(data, tmp_path / kind, model=model, method=method), finetune_module.Accelerator(cpu=True))
        batch = next(run.streams["target"].batches(0))
        image, text = (loaded.model.encode_image(batch["image"], normalize=True), loaded.model.encode_text(batch["text"], normalize=True))
        logits = loaded.model.logit_scale.exp() * image @ text.T + loaded.model.logit_bias
        signs = 2 * torch.eye(8) - 1
        assert first["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(signs * logits).sum().item() / 8, rel=1e-4)


@pytest.mark.slow
def test_compiled(data, tmp_path, vit):
    """The same losses but for rounding, from blocks that were compiled."""
    model = ModelConfig(str(vit(False)))
    for name, compiled in (("plain", False), ("compiled", True)):
        finetune_from(config(data, tmp_path / name, model=model, compile=compiled))
    assert [entry["loss"] for entry in logged(tmp_path / "compiled")] == pytest.approx(
        [entry["loss"] for entry in logged(tmp_path / "plain")], rel=1e-3
    )
    one = load(str(vit(False))).model
    blocks = [module for module in compile_blocks(one).modules() if module._compiled_call_impl is not None]
    assert len(blocks) == 4
    assert one.state_dict().keys() == load(str(vit(False))).model.state_dict().keys()


# terms on the target batch


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"unique_texts": True, "chunk_size": 3}])
def test_terms_on_the_target(data, tmp_path, options):
    """With a teacher, without one, on parameters; beside terms on the reference."""
    target_terms = {
        "cyclic": TermConfig("CyclicConsistency", 1.0),
        "gram": TermConfig("GramStructure", 10.0),
        "anchor": TermConfig("WeightAnchor", 0.1),
    }
    ends = []
    for name, changes in (("plain", {}), ("other", options)):
        method = MethodConfig("mix", DIVE.terms, target_terms)
        finetune_from(config(data, tmp_path / name, method=method, kind="folder", **changes))
        ends.append(logged(tmp_path / name))
    names = {"dive", "cyclic", "gram", "anchor"}
    further = {"step", "loss", "regularizer", "learning_rate", "logit_scale", "gradient_ratio", "dive/mean_norm"}
    assert ends[0][0].keys() == names | {f"{name}/weighted" for name in names} | further
    assert ends[0][0]["gram"] == pytest.approx(0, abs=1e-8)
    assert ends[0][3]["gram"] > 1e-6
    assert ends[0][3]["anchor"] > 0
    for one, other in zip(*ends, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)


def test_what_a_teacher_is_made_for(data, tmp_path):
    embed_data(Options(str(small_clip()), data / "pairs.tsv", tmp_path / "cache", device="cpu", workers=0))
    method = MethodConfig("m", DIVE.terms, {"gram": TermConfig("GramStructure", 1.0)}, teacher="cached", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a teacher that sees the augmented target pairs, got a cached one"):
        finetune_from(config(data, tmp_path / "run", method=method))
    with pytest.raises(ValueError, match="expected terms and target_terms of different names, got 'dive' twice"):
        MethodConfig("m", DIVE.terms, DIVE.terms)


def test_replay_needs_no_teacher(data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_module, "_teacher", lambda *_: FaultyTeacher())
    finetune_from(config(data, tmp_path / "run", method=MethodConfig("replay", {"replay": TermConfig("ContrastiveReplay", 1.0)})))
    assert logged(tmp_path / "run")[0]["replay"] > 0


class FaultyTeacher(torch.nn.Module):
    """That must not be asked."""


def test_dry_run(data, tmp_path, capsys):
    finetune_from(dataclasses.replace(config(data, tmp_path / "run", steps=500, average_every=100), dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    data_lines = ["files, all 40: none missing", "samples, all 40: none that cannot be loaded"]
    data_lines.append("captions, all 40: none empty, none repeated, none cut at 16 tokens")
    assert lines[:4] == [f"{'target':<11}40 samples, 5 batches an epoch", *(" " * 11 + line for line in data_lines)]
    assert lines[4:8] == [f"{'reference':<11}40 samples, 5 batches an epoch", *(" " * 11 + line for line in data_lines)]
    assert re.fullmatch(r"run {8}500 steps of \S+ m?s: \S+ (s|min|h) without evaluation", lines[8])
    assert re.fullmatch(r" {11}peak memory so far \S+ (MB|GB) of cpu", lines[9])
    assert re.fullmatch(r" {11}first 4 steps, at the full learning rate: loss \S+ -> \S+, gradient ratio \S+", lines[10])
    assert lines[11:] == [" " * 11 + "! no evaluation and no probe: nothing will say what is learned and what is forgotten"]
    assert not (tmp_path / "run").exists()


def damaged(data, folder, *, missing=0, unreadable=0, empty=0):
    """A copy of the pairs."""
    shutil.copytree(data, folder)
    names = [line.split("\t")[0] for line in (data / "pairs.tsv").read_text().splitlines()[1:]]
    for name in names[1 : 1 + missing]:
        (folder / name).unlink()
    for name in names[1 + missing : 1 + missing + unreadable]:
        (folder / name).write_bytes(b"x")
    rows = [f"{name}\t{' ' if row < empty else 'picture'}" for row, name in enumerate(names)]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return folder


@pytest.mark.parametrize("wrong", ["missing", "unreadable", "empty"])
def test_broken_samples_that_would_stop_the_run_end_a_dry_run(data, tmp_path, wrong, capsys):
    """With the numbers; where it is known from the files or captions alone, also the run itself, before there is a folder."""
    one = config(damaged(data, tmp_path / "data", **{wrong: 5}), tmp_path / "run", steps=100)
    message = r"finetune: expected at most 1% of the samples of target to be broken, got 5 of 40, the first .*(1|2)?\.png"
    with pytest.raises(RuntimeError, match=message):
        finetune_from(dataclasses.replace(one, dry_run=True))
    printed = capsys.readouterr().out
    assert "samples, all 40: 5 cannot be loaded, the first " in printed
    assert ("files, all 40: 5 missing (12.5 %), the first " in printed) == (wrong == "missing")
    assert ("captions, all 40: 5 empty, 35 repeated" in printed) == (wrong == "empty")
    assert "run        100 steps" in printed
    if wrong != "unreadable":
        with pytest.raises(RuntimeError, match=message):
            finetune_from(one)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_few_broken_samples_are_said_at_the_end(data, tmp_path, capsys):
    finetune_from(config(damaged(data, tmp_path / "data", missing=1, empty=1), tmp_path / "run", steps=5, ensemble=None))
    printed = capsys.readouterr().out
    assert re.search(r"^target +40 samples, 5 batches an epoch$", printed, re.MULTILINE)
    assert "files, all 40: 1 missing (2.5 %), the first " in printed
    assert "captions, all 40: 1 empty, 39 repeated, none cut at 16 tokens" in printed
    assert "drawn: 40 samples, 2 of them broken and replaced" in printed


def test_dry_run_evaluates_the_base_model(data, tmp_path, capsys, monkeypatch):
    """All of it, or a random part of it, before the steps that are thrown away; not a linear probe."""
    base = load(str(small_clip()))
    right = evaluated(base, data)["accuracy"]
    one = config(data, tmp_path / "run", method=PROBE, kind="folder", evaluation={"id": DataConfig("folder", str(data / "classes"))})
    finetune_from(dataclasses.replace(one, dry_run=True))
    assert f"base model     id: {right:.1f} % of 40 samples (" in capsys.readouterr().out
    monkeypatch.setattr(finetune_module, "LIMIT", 10)
    finetune_from(dataclasses.replace(one, dry_run=True))
    assert re.search(r"base model     id: \d+\.0 % of a random 10 of 40 samples \(", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weight", "rate", "told"),
    [
        (1e7, 1e-4, "far above 1, so that next to nothing"),
        (300.0, 1e-4, ""),
    ],
)
def test_dry_run_says_what_is_out_of_range(data, tmp_path, capsys, weight, rate, told):
    """Also with a warm-up that has hardly begun after a few steps."""
    method = MethodConfig("dive", {"dive": TermConfig("DiVE", weight)})
    one = config(data, tmp_path / "run", method=method, learning_rate=rate, steps=500, warmup_steps=100)
    finetune_from(dataclasses.replace(one, dry_run=True))
    printed = capsys.readouterr().out
    assert ("! the" in printed) == bool(told)
    assert told in printed


def test_one_pair_in_a_batch_warns(data, tmp_path):
    replay = MethodConfig("r", {"replay": TermConfig("ContrastiveReplay", 1.0)})
    for changes, option in (
        ({"batch_size": 1}, "train.batch_size"),
        ({"method": replay, "reference_batch_size": 1}, "reference_batch_size"),
    ):
        with pytest.warns(
            UserWarning, match=rf"a contrastive loss of one pair compares it with no other: .* Raise \S*{option}, which is 1"
        ):
            finetune_module._Run(config(data, tmp_path / "run", **changes), finetune_module.Accelerator(cpu=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        finetune_module._Run(
            config(data, tmp_path / "run", method=HEAD, kind="folder", batch_size=1), finetune_module.Accelerator(cpu=True)
        )


# evaluation


def test_evaluation_and_the_best_model(data, tmp_path):
    evaluation = {
        "id": DataConfig("folder", str(data / "classes")),
        "shift": DataConfig("folder", str(data / "classes"), {"templates": ["{}"]}),
    }
    options = {"kind": "folder", "evaluation": evaluation, "best": "id", "evaluate_every": 3, "steps": 8, "learning_rate": 1e-3}
    out = finetune_from(config(data, tmp_path / "run", **options))
    found = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    mixed = found.pop()
    assert [entry["step"] for entry in found] == [0, 3, 6, 8]
    assert (mixed["step"], mixed["ensemble"]) == (8, 0.5)
    start, *found = found
    assert start["id"] == pytest.approx(evaluated(load(str(small_clip())), data))
    assert mixed["id"] == pytest.approx(evaluated(load(str(tmp_path / "run" / "ensemble" / "alpha-0.50")), data))
    assert all(0 <= entry[name]["accuracy"] <= 100 for entry in found for name in evaluation)
    assert found[0]["id"] != found[0]["shift"] or found[1]["id"] != found[1]["shift"]
    best = load(str(tmp_path / "run" / "best"))
    assert evaluated(best, data) == pytest.approx(max((entry["id"] for entry in found), key=lambda one: one["accuracy"]))
    assert evaluated(load(str(out)), data) == pytest.approx(found[-1]["id"])
    plain = finetune_from(config(data, tmp_path / "plain", **{key: options[key] for key in ("kind", "steps", "learning_rate")}))
    assert torch.equal(weights(out), weights(plain))  # looking changes nothing
    file = tmp_path / "run" / "best" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # it is not made anew
    with pytest.raises(ValueError, match=r"finetune: expected the model in \S*best as it was written, got another content of"):
        finetune_from(config(data, tmp_path / "run", **options))
    shutil.rmtree(file.parent)
    with pytest.warns(UserWarning, match="finetune: expected the best model so far in .*best, got none"):
        finetune_from(config(data, tmp_path / "run", **options))


def test_a_probe_that_is_never_looked_at_is_said(data, tmp_path):
    one = dataclasses.replace(config(data, tmp_path / "run"), probe=DataConfig("folder", str(data / "classes")), dry_run=True)
    with pytest.warns(UserWarning, match="expected monitor.every to be at most the run's 4 steps, got 400, so that the probe is never"):
        finetune_from(one)


def test_a_measure_that_is_not_finite(data, tmp_path, monkeypatch):
    """Is null in the file, never the best, and hinders no later one."""
    values = iter([math.nan, math.nan, 20.0, math.nan, 30.0, 25.0, 10.0])  # at the start, in 5 steps, and of the mixture
    monkeypatch.setattr(finetune_module, "evaluate", lambda *args, **options: {"accuracy": 50.0, "worst_group": next(values)})
    grouped = type("Grouped", (list,), {"groups": [0], "classes": []})()
    monkeypatch.setattr(finetune_module, "read", lambda *args, **options: grouped)
    saved = []
    monkeypatch.setattr(finetune_module._Run, "export", lambda run, folder: saved.append(folder.name))
    monkeypatch.setattr(finetune_module, "ensemble", lambda options, collect: [small_clip()])
    one = config(data, tmp_path / "run", evaluation={"id": DataConfig("folder", "x")}, best="id", evaluate_every=1, steps=5)
    finetune_from(dataclasses.replace(one, best_by="worst_group"))
    assert saved == ["best", "best", "model"]
    lines = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"]["worst_group"] for line in lines] == [None, None, 20.0, None, 30.0, 25.0, 10.0]
    assert "NaN" not in "".join(lines)


def test_best_by_groups_needs_them(data, tmp_path):
    one = config(data, tmp_path / "run", evaluation={"id": DataConfig("folder", str(data / "classes"))}, best="id")
    with pytest.raises(ValueError, match=r"expected an evaluation with groups for best_by=worst_group, got id without"):
        finetune_from(dataclasses.replace(one, best_by="worst_group"))
    assert not (tmp_path / "run").exists()


def test_summary_without_a_mixture(data, tmp_path, capsys):
    evaluation = {"id": DataConfig("folder", str(data / "classes"))}
    finetune_from(config(data, tmp_path / "run", evaluation=evaluation, ensemble=None, kind="folder"))
    assert re.search(r"^id: \d+\.\d % -> \d+\.\d % \([+-]\d+\.\d\); n = 40$", capsys.readouterr().out, re.MULTILINE)


def evaluated(one, data):
    return evaluate(one.model, LabelledFolder(data / "classes", transform=one.transform), one.tokenizer)


def test_evaluation_by_hand(data):
    """Against a loop over single pictures; groups and broken samples counted."""

    class Grouped(LabelledFolder):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.groups = np.arange(len(self)) % 3

        def __getitem__(self, row):
            return {"id": "x", "broken": "x"} if row == 5 else super().__getitem__(row) | {"group": int(self.groups[row])}

    loaded = load(str(small_clip()))
    dataset = Grouped(data / "classes", transform=loaded.transform, templates=("a {}.", "{}"))
    found = evaluate(loaded.model.train(), dataset, loaded.tokenizer, batch_size=7)
    assert loaded.model.training
    loaded.model.eval()
    with torch.no_grad():
        texts = [loaded.model.encode_text(loaded.tokenizer(dataset.class_texts(one)), normalize=True) for one in dataset.templates]
        head = torch.nn.functional.normalize(sum(texts), dim=1)
        right = {}
        for row in range(len(dataset)):
            if row != 5:
                image = loaded.model.encode_image(dataset[row]["image"][None], normalize=True)
                right[row] = float((image @ head.T).argmax() == dataset.labels[row])

    def mean(rows):
        return 100 * sum(right[row] for row in rows) / len(rows)

    classes = [[row for row in right if dataset.labels[row] == label] for label in range(2)]
    assert found["accuracy"] == pytest.approx(mean(list(right)))
    assert found["class_average"] == pytest.approx(sum(map(mean, classes)) / 2)
    assert found["worst_group"] == pytest.approx(min(mean([row for row in right if row % 3 == group]) for group in range(3)))
    assert found["broken"] == 1
    dataset.unscored_group = 2
    found = evaluate(loaded.model, dataset, loaded.tokenizer, batch_size=7)
    assert found["worst_group"] == pytest.approx(min(mean([row for row in right if row % 3 == group]) for group in range(2)))


def test_macro_f1_by_hand(monkeypatch):
    """Of the classes that there are, in a loop over their counts."""

    class Scored:
        """Five classes, of which one is not there but guessed."""

        labels = (0, 0, 0, 1, 1, 2, 2, 2, 2, 4)
        guesses = (0, 1, 3, 1, 1, 2, 0, 0, 2, 2)

        def __len__(self):
            return 10

        def __getitem__(self, row):
            return {"id": str(row), "image": torch.tensor([float(self.guesses[row])]), "label": self.labels[row]}

    monkeypatch.setattr(evaluate_module, "embed", lambda model, images: Embeddings(image=images))
    found = evaluate(torch.nn.Linear(1, 1), Scored(), None, head=lambda image: torch.nn.functional.one_hot(image[:, 0].long(), 5).float())
    scores = []
    for one in (0, 1, 2, 4):
        hits = sum(guess == label == one for guess, label in zip(Scored.guesses, Scored.labels, strict=True))
        precision, recall = hits / max(1, Scored.guesses.count(one)), hits / Scored.labels.count(one)
        scores.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    assert found["macro_f1"] == pytest.approx(25 * sum(scores))
    assert found["accuracy"] == pytest.approx(50.0)


# going on


def killed(one):
    torch.set_num_threads(1)
    finetune_from(one)


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(data, tmp_path):
    """With chunks, adaptive crops, templates and two data sets."""
    options = {"kind": "folder", "steps": 10, "chunk_size": 3, "save_every": 1}
    whole = finetune_from(config(data, tmp_path / "whole", **options))
    assert killed_until_done(killed, config(data, tmp_path / "run", **options), first=0.4, more=0.31) >= 1
    assert (tmp_path / "run" / "model" / "open_clip_model.safetensors").read_bytes() == (whole / "open_clip_model.safetensors").read_bytes()
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_contexts_of_an_averaged_teacher_move_with_it(data, tmp_path, monkeypatch, vit):
    """And are the same after a kill."""
    term = {"context": TermConfig("ContextKL", 10.0)}
    options = {"target_terms": term, "loss": "classification", "head": "text_encoder", "bank": "contexts", "teacher": "averaged"}
    changes = {"kind": "folder", "method": MethodConfig("m", teacher_decay=0.5, **options), "model": ModelConfig(str(vit(False)))}
    changes |= {"save_every": 1, "learning_rate": 1e-2}
    one = config(data, tmp_path / "run", **changes)
    templates = {"templates": ["a {}.", "the {}.", "my big {}."]}
    one = dataclasses.replace(one, target=dataclasses.replace(one.target, options=templates))
    whole = finetune_from(dataclasses.replace(one, output=tmp_path / "whole"))
    add = records.Log.add

    def dying(log, entry):
        add(log, entry)
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(records.Log, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            finetune_from(one)
    assert torch.equal(weights(finetune_from(one)), weights(whole))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_other_configuration_is_refused(data, tmp_path):
    finetune_from(config(data, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"to go on with train.learning_rate 0.0001, got 0.0002"):
        finetune_from(config(data, tmp_path / "run", learning_rate=2e-4))
    finetune_from(config(data, tmp_path / "run"))  # nothing left to do


# the monitor


def test_probe_is_watched(data, tmp_path):
    """The numbers are those of the exported model; looking changes nothing."""
    one = config(data, tmp_path / "run", kind="folder", learning_rate=1e-3)
    probe = DataConfig("folder", str(data / "classes"), {"class_names": NAMES})
    watched = dataclasses.replace(one, probe=probe, monitor=MonitorConfig(every=2, samples=25))
    out = finetune_from(watched)
    found = [json.loads(line) for line in (tmp_path / "run" / "drift.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in found] == [2, 4]
    final, start = load(str(out)), load(str(small_clip()))
    folder = LabelledFolder(data / "classes", transform=final.transform, class_names=NAMES)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:25].sort().values.tolist()
    images, labels = torch.stack([folder[row]["image"] for row in rows]), torch.tensor(folder.labels[rows])
    with torch.no_grad():
        after, before = (loaded.model.encode_image(images, normalize=True) for loaded in (final, start))
        head = final.model.encode_text(final.tokenizer(folder.class_texts("a photo of a {}.")), normalize=True)
    assert found[1]["probe/rsa"] == pytest.approx(rsa(after, before).item(), rel=1e-4)
    assert found[1]["probe/mean_shift"] == pytest.approx((after - before).mean(dim=0).norm().item(), rel=1e-4)
    assert found[1]["probe/zero_shot"] == pytest.approx(100 * ((after @ head.T).argmax(1) == labels).double().mean().item())
    assert {"image/rsa", "text/rsa", "stacked/rsa", "gradient_ratio"} <= found[1].keys()
    plain = finetune_from(dataclasses.replace(one, output=tmp_path / "plain"))
    assert torch.equal(weights(out), weights(plain))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_alarm_ends_the_run(data, tmp_path, capsys, stop):
    """After the step that follows it; the model is exported, and the same command does not go on."""
    monitor = MonitorConfig(every=2, samples=25, min_rsa=0.9999, stop=stop)
    evaluation = {"id": DataConfig("folder", str(data / "classes"))}
    one = config(data, tmp_path / "run", kind="folder", learning_rate=1e-3, steps=6, evaluation=evaluation)
    one = dataclasses.replace(one, probe=DataConfig("folder", str(data / "classes")), monitor=monitor)
    out = finetune_from(one)
    assert "image/rsa is 0." in capsys.readouterr().out
    assert [entry["step"] for entry in logged(tmp_path / "run")] == list(range(1, 4 if stop else 7))
    first = json.loads((tmp_path / "run" / "drift.jsonl").read_text().splitlines()[0])
    assert first["stopped"] == stop
    assert first["alarm"].startswith("image/rsa is 0.")
    ended = weights(out)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert steps == ([0, 3, 3] if stop else [0, 6, 6])
    shutil.rmtree(out)
    (tmp_path / "run" / "evaluation.jsonl").write_text((tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()[0] + "\n")
    assert torch.equal(weights(finetune_from(one)), ended)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert steps == ([0, 3, 3] if stop else [0, 6, 6])  # what was lost comes back from the checkpoint, or is measured again
    assert len(logged(tmp_path / "run")) == (3 if stop else 6)


@pytest.mark.slow
def test_alarm_ends_with_the_mean_of_the_weights(data, tmp_path):
    """As a whole run would: the start and the weights after the step at which it ended."""
    ends = {}
    for name, average_every in (("last", None), ("mean", 3)):
        one = config(data, tmp_path / name, kind="folder", learning_rate=1e-3, steps=6, average_every=average_every)
        monitor = MonitorConfig(every=2, samples=25, min_rsa=0.9999)
        ends[name] = weights(finetune_from(dataclasses.replace(one, probe=DataConfig("folder", str(data / "classes")), monitor=monitor)))
    torch.testing.assert_close(ends["mean"], (START + ends["last"]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_changes_no_result_may_differ_in_a_run_that_goes_on(data, tmp_path):
    one = config(data, tmp_path / "run", steps=4)
    finetune_from(one)
    other = dataclasses.replace(one, train=dataclasses.replace(one.train, workers=1, save_every=3), trackers=("tensorboard",))
    finetune_from(other)
    finetune_from(dataclasses.replace(other, model=dataclasses.replace(one.model, learning_rates=(1e-5, 1e-4))))
    with pytest.raises(ValueError, match=r"to go on with train.seed 0, got 1"):
        finetune_from(dataclasses.replace(one, train=dataclasses.replace(one.train, seed=1)))


def test_export_for_transformers(data, tmp_path, vit):
    from transformers import CLIPModel

    one = config(data, tmp_path / "run", model=ModelConfig(str(vit(False))))
    out = finetune_from(dataclasses.replace(one, transformers=True))
    exported, model = CLIPModel.from_pretrained(tmp_path / "run" / "transformers"), load(str(out)).model
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = exported.get_image_features(images)
        found = getattr(found, "pooler_output", found)
        torch.testing.assert_close(found, model.encode_image(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="to_transformers: expected CLIP with a plain ViT"):
        finetune_from(dataclasses.replace(config(data, tmp_path / "emoji", model=EMOJI), transformers=True))
    assert not (tmp_path / "emoji").exists()


# what is wrong


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples(data, tmp_path, workers, capsys):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    (broken / "classes" / "owl" / "0.png").write_bytes(b"x")
    finetune_from(config(broken, tmp_path / "run", workers=workers))
    assert "0.png: not an image" in (tmp_path / "run" / "broken.txt").read_text()
    with pytest.raises(ValueError, match=r"LabelledFolder: expected an image, got .*0.png: not an image that PIL knows"):
        finetune_from(dataclasses.replace(config(broken, tmp_path / "strict", steps=8, kind="folder", workers=workers), strict=True))
    with pytest.raises(ValueError, match=r"LabelledFolder: expected an image, got .*0.png: not an image that PIL knows"):
        finetune_from(dataclasses.replace(config(broken, tmp_path / "probe", kind="folder", workers=workers, method=PROBE), strict=True))
    assert not (tmp_path / "probe").exists()  # already the linear probe is strict
    given = ["--model.name", "emojiclip", "--target.kind", "folder", "--target.path", str(broken / "classes"), "--strict", "true"]
    given += ["--train.steps", "8", "--train.batch_size", "8", "--train.warmup_steps", "0"]
    given += ["--train.workers", str(workers), "--device", "cpu"]
    assert main(["finetune", *given, "--output", str(tmp_path / "command")]) == 2
    assert re.search(r"^geomreg: LabelledFolder: expected an image, got \S*0.png: not an image", capsys.readouterr().err, re.MULTILINE)
    for row in range(2, 20, 2):
        (broken / "classes" / "owl" / f"{row}.png").write_bytes(b"x")
    with pytest.raises(RuntimeError, match="expected at most 1% of the samples to be broken, got"):
        finetune_from(config(broken, tmp_path / "many", steps=8, workers=workers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "method/divee"], "got 'method/divee'. Did you mean method/dive"),
        (["--config=method/divee"], "got 'method/divee'. Did you mean method/dive"),
        (["--trian.steps", "3"], "Did you mean --train.steps"),
        (["--train.learning_rate", "-1"], "expected learning_rate as a finite number >= 0, got -1.0"),
        (["--train.clip_norm", "0"], "expected clip_norm as a finite number > 0, got 0.0"),
        (["--train.warmup_steps", "-1"], "expected warmup_steps as a whole number >= 0, got -1"),
        (["--train.betas", "[0.9, 1.0]"], "expected betas between 0 and 1, got 1.0"),
        (["--train.crop", "[0.9, 1.2]"], "expected crop as two shares of the area in (0, 1], ascending, got [0.9, 1.2]"),
        (["--target.modalities", "[image]"], "expected modalities of reference data alone, got target.modalities"),
        (["--texts", '{"kind": "csv", "path": "x", "captions": "y"}'], "expected captions of the target alone, got texts.captions"),
        (["--evaluation", '{"id": {"kind": "folder", "path": "nowhere"}}'], "expected a folder of class folders, got none at"),
        (["--probe", '{"kind": "folder", "path": "nowhere"}'], "expected a folder of class folders, got none at"),
        (["--target.kind", "cvs"], "cvs"),
        (["--train.epochs", "3"], "expected epochs or steps, got both. Set one to null; beside a file with epochs: --train.epochs null."),
        (["--train.lr", "3"], "Did you mean --train.learning_rate?"),
        (["--train.wd=3"], "Did you mean --train.weight_decay?"),
        (["--train.bs", "3"], "Did you mean --train.batch_size?"),
        (["--model.lora.rnk", "3"], "Option 'rnk' is not accepted. Did you mean rank?"),
        (["--model.lora.rank", "0"], "geomreg: Lora: expected rank as a whole number >= 1, got 0. Pass such a number."),
        (["--texts", '{"kind": "csv", "path": ""}'], "geomreg: DataConfig: expected a path for files and none without, got '' for csv."),
        (
            ["--texts.kind", "csv", "--texts.path", "x", "--texts.options.nope", "3"],
            "geomreg: options of csv: expected options of CsvPairs",
        ),
        (["--target.kind", "coco"], "expected the option root of CocoCaptions, got none. Set options.root (--target.options.root for"),
        (
            ["--texts", '{"kind": "csv", "path": "x", "options": {"path": "y"}}'],
            "expected options of CsvPairs, got 'path'. There are image_key",
        ),
        (
            ["--target.options.image_key", "filepath", "--evaluation.id.options.split", "val"],
            "got --evaluation.id.options.split. Write --evaluation.id.options '{\"split\": ...}'.",
        ),
        (
            ["--config", "method/dive", "--method.terms.dive.options.decay=0.5"],
            "got --method.terms.dive.options.decay=0.5. Write --method.terms.dive.options '{\"decay\": ...}'.",
        ),
        (["--config", "method/vanilla", "--config", "method/dive"], "expected one method, got method/dive after that of method/vanilla"),
        (["--config", "method/dive"], "got terms without reference data"),
        (["--method.terms", '{"d": {"term": "Dive", "weight": 1}}'], "got 'Dive'. Did you mean 'DiVE'"),
        (["--method.terms", '{"d": {"term": "WeightAnchor", "weight": 1}}'], "got only such on weights (d). Make them method.target_terms"),
        (["--model.name", "ViT-B-61"], "Did you mean 'ViT-B-16'"),
        (["--target.options", '{"captionkey": "title"}'], "got 'captionkey'. Did you mean 'caption_key'"),
        (["--best", "id"], "expected best as the name of an evaluation, got 'id'. There are none"),
        (["--evaluation", '{"id": {"kind": "csv", "path": "x"}}'], "expected labelled data for the evaluation id, got csv"),
        (["--train.batch_size", "41"], "expected at least 41 samples for a batch"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, capsys, arguments, message):
    given = ["--model.name", str(small_clip()), "--target.kind", "csv", "--target.path", str(data / "pairs.tsv"), "--train.steps", "1"]
    given += ["--train.warmup_steps", "0"]
    given += ["--train.workers", "0", "--train.batch_size", "8", "--output", str(tmp_path / "run"), "--device", "cpu"]
    if "--method.terms" in arguments:
        given += ["--reference.kind", "csv", "--reference.path", str(data / "pairs.tsv")]
    with contextlib.suppress(SystemExit):  # of the parser
        assert main(["finetune", *given, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()  # so that the mended command can use it


def test_methods_do_not_mix(data, tmp_path, capsys):
    """Not even with that of an earlier run; a file of one's own may change some of one."""
    finetune_from(config(data, tmp_path / "run", method=TEXTS, kind="folder", ensemble=None))
    before = str(tmp_path / "run" / "config.json")
    assert main(["finetune", "--config", before, "--config=method/flyp", "--output", str(tmp_path / "other")]) == 2
    assert "expected one method, got method/flyp after that of " in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("method: {terms: {dive: {term: DiVE, weight: 5.0}}}")
    captured = []
    given = ["--reference.kind", "target", "--output", str(tmp_path / "other")]
    with mock.patch.object(finetune_module, "finetune_from", captured.append):
        assert main(["finetune", "--config", before, "--config", str(tmp_path / "own.yaml"), *given]) == 0
    assert captured[0].method == dataclasses.replace(TEXTS, terms={"dive": TermConfig("DiVE", 5.0)})


def test_subcommands_are_suggested(capsys):
    with pytest.raises(SystemExit):
        main(["finetne", "--x"])
    assert capsys.readouterr().err.endswith(" Did you mean finetune?\n")


@pytest.mark.slow
def test_the_command_ends_with_the_model_and_warns_on_one_line(data, tmp_path, capsys):
    """And goes on, unless it must not."""
    given = [
        "finetune",
        "--model.name",
        "emojiclip",
        "--target.kind",
        "csv",
        "--target.path",
        str(data / "pairs.tsv"),
        "--train.steps",
        "2",
    ]
    given += ["--train.batch_size", "8", "--train.workers", "0", "--device", "cpu", "--output", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="warm-up") as caught:
        assert main([*given, "--resume", "never"]) == 0
    with cli._warnings_on_one_line():
        (line,) = [warnings.formatwarning(one.message, one.category, one.filename, one.lineno) for one in caught]
        assert warnings.formatwarning("theirs", UserWarning, "torch.py", 1).startswith("torch.py:1: UserWarning: theirs")
    assert re.fullmatch(r"geomreg: warning: finetune: the warm-up of 500 steps does not end .* Lower train.warmup_steps\.\n", line)
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert (lines[0], lines[-1]) == (str(tmp_path / "run" / "ensemble" / "alpha-0.50"), str(tmp_path / "run" / "model"))
    assert lines[1].split("  ") == ["target", "40 samples, 5 batches an epoch"]
    assert lines[-2].strip() == "drawn: 16 samples, none of them broken and replaced"
    with pytest.warns(UserWarning, match="warm-up"):
        assert main(given) == 0
    assert main([*given, "--resume", "never"]) == 2
    assert "with --resume never, got one. Delete the folder to begin afresh, choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"lerning_rate": 1.0}}, "Did you mean train.learning_rate?"),
        ({"trian": {"learning_rate": 1.0}}, "Did you mean train.learning_rate?"),
        ({"method": {"terms": {"d": {"term": "DiVE", "wieght": 1}}}}, "Did you mean weight?"),
    ],
)
def test_unknown_keys_of_files(data, tmp_path, capsys, content, message):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    given = ["--model.name", "emojiclip", "--target.kind", "csv", "--target.path", str(data / "pairs.tsv"), "--train.steps", "1"]
    given += ["--train.warmup_steps", "0"]
    with pytest.raises(SystemExit):
        main(["finetune", *given, "--output", str(tmp_path / "run"), "--config", str(tmp_path / "own.yaml")])
    assert message in capsys.readouterr().err


def test_folders_of_runs(data, tmp_path, monkeypatch):
    """A file is refused before anything is loaded; a moved run goes on."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "load", None)
        with pytest.raises(FileExistsError, match="expected output as a folder, got the file"):
            finetune_from(config(data, tmp_path / "file"))
    out = finetune_from(config(data, tmp_path / "run"))
    os.replace(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(weights(finetune_from(config(data, tmp_path / "moved"))), weights(tmp_path / "moved" / out.name))


def test_a_finished_run_makes_further_exports(data, tmp_path, vit):
    one = config(data, tmp_path / "run", model=ModelConfig(str(vit(False))), ensemble=None)
    finetune_from(one)
    before = weights(tmp_path / "run" / "model")
    finetune_from(dataclasses.replace(one, transformers=True, ensemble=0.25))
    assert (tmp_path / "run" / "transformers" / "config.json").is_file()
    assert torch.equal(weights(tmp_path / "run" / "model"), before)
    torch.testing.assert_close(weights(tmp_path / "run" / "ensemble" / "alpha-0.25"), 0.75 * weights(vit(False)) + 0.25 * before)
    assert len(logged(tmp_path / "run")) == 4


def test_damaged_configuration_of_a_run(data, tmp_path, capsys):
    file = tmp_path / "run" / "config.json"
    file.parent.mkdir()
    given = ["--model.name", "emojiclip", "--target.kind", "csv", "--target.path", str(data / "pairs.tsv"), "--train.steps", "4"]
    for content in ('{"model": {"name', "[]"):
        file.write_text(content)
        assert main(["finetune", *given, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert re.search(
            rf"^geomreg: finetune: expected the configuration of a run in {file}, got .*\. Restore it, or use", error, re.MULTILINE
        )


def test_an_error_ends_the_bar(data, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="expected a finite loss"):
        finetune_from(config(data, tmp_path / "run", learning_rate=1e9, steps=8))
    assert capsys.readouterr().err.endswith("\n")  # what follows has a line of its own


def test_a_run_goes_on_with_its_data_alone(data, tmp_path):
    """Of target, evaluation and probe; and lets its folder go, also when it is refused."""
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    classes = DataConfig("folder", str(copied / "classes"))
    one = config(copied, tmp_path / "run", evaluation={"id": classes})
    one = dataclasses.replace(one, probe=classes, monitor=MonitorConfig(every=4, samples=8))
    finetune_from(one)
    assert set(json.loads((one.output / "data.json").read_text())) == {"target", "reference", "evaluation.id", "probe"}
    assert not records._LOCKS
    rows = (copied / "pairs.tsv").read_text()
    (copied / "pairs.tsv").write_text(rows[: rows.rindex("classes")])
    with pytest.raises(ValueError, match=r"to go on with the 40 samples of (target|reference) that it began with, got 39\."):
        finetune_from(one)
    (copied / "pairs.tsv").write_text(rows)
    gone = (copied / "classes" / "owl" / "38.png").rename(copied / "38.png")
    with pytest.raises(ValueError, match=r"to go on with the 40 samples of (evaluation\.id|probe) that it began with, got 39\."):
        finetune_from(one)
    assert not records._LOCKS
    gone.rename(copied / "classes" / "owl" / "38.png")
    finetune_from(one)


def dying(monkeypatch, step):
    """A run that ends after a step's records, before what would save it."""
    add = records.Log.add

    def die(log, entry):
        if entry["step"] == step:
            raise KeyboardInterrupt
        add(log, entry)

    monkeypatch.setattr(records.Log, "add", die)


@pytest.mark.slow
def test_an_early_stop_is_the_same_after_a_kill(data, tmp_path, monkeypatch):
    """What the monitor had collected, and every file of the run, at a kill between a checkpoint and the alarm."""
    monitor = MonitorConfig(every=3, samples=8, min_rsa=0.99999)
    one = config(data, tmp_path / "run", kind="folder", learning_rate=1e-3, steps=8, save_every=2, ensemble=None)
    one = dataclasses.replace(one, probe=DataConfig("folder", str(data / "classes")), monitor=monitor)
    finetune_from(dataclasses.replace(one, output=tmp_path / "whole"))
    with monkeypatch.context() as patched:
        dying(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            finetune_from(one)
    finetune_from(one)
    assert [entry["step"] for entry in logged(one.output)] == [1, 2, 3, 4]
    files = {path.relative_to(one.output) for path in one.output.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    own = {"config.json", "environment.json"}  # the folder's name, the run's
    for name in files:
        assert name.name in own or (one.output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_other_weights_are_refused_in_a_run_that_goes_on(data, tmp_path):
    """The teacher would be another model."""
    shutil.copytree(small_clip(), tmp_path / "model")
    one = config(data, tmp_path / "run", model=ModelConfig(str(tmp_path / "model")), ensemble=None)
    finetune_from(one)
    file = tmp_path / "model" / "open_clip_config.json"
    before = file.read_text()
    content = json.loads(before)
    content["preprocess_cfg"]["mean"] = [0.4, 0.4, 0.4]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"to go on with the configuration of the model that it began with, got another\. Restore it"):
        finetune_from(one)
    file.write_text(before)
    finetune_from(one)
    model = load(str(tmp_path / "model"))
    with torch.no_grad():
        next(model.model.parameters()).view(-1)[0] += 1e-3
    to_open_clip(model.model, content | {"preprocess_cfg": json.loads(before)["preprocess_cfg"]}, tmp_path / "model")
    with pytest.raises(ValueError, match=r"to go on with the (weights|configuration of the model) that it began with, got another\. Rest"):
        finetune_from(one)


@pytest.mark.slow
def test_a_folder_of_a_run_that_was_not_finite(data, tmp_path):
    """It is said how to begin afresh, by that run and by the next in its folder."""
    one = config(data, tmp_path / "run", learning_rate=1e9, steps=8)
    with pytest.raises(RuntimeError, match=rf"give it another output folder, or delete {one.output} to begin again there"):
        finetune_from(one)
    with pytest.raises(ValueError, match=rf"That run ended with a loss that is not finite: delete {one.output} to begin afresh"):
        finetune_from(config(data, tmp_path / "run", learning_rate=1e-4, steps=8))
    with (
        pytest.warns(UserWarning, match=r"ended with a loss that is not finite, and goes on .* Delete the folder"),
        pytest.raises(RuntimeError, match="expected a finite loss"),
    ):
        finetune_from(one)
    shutil.rmtree(one.output)
    finetune_from(config(data, tmp_path / "run", learning_rate=1e-4, steps=2))


@pytest.mark.slow
def test_damaged_records_are_made_anew_or_named(data, tmp_path):
    """Evaluation and drift come back from the checkpoint."""
    one = config(data, tmp_path / "run", evaluation={"id": DataConfig("folder", str(data / "classes"))}, ensemble=None)
    one = dataclasses.replace(one, probe=DataConfig("folder", str(data / "classes")), monitor=MonitorConfig(samples=8, every=2))
    finetune_from(one)
    for name in ("evaluation.jsonl", "drift.jsonl"):
        whole = (one.output / name).read_bytes()
        for damage in (b"{", whole.replace(b"step", b"stop"), None):
            (one.output / name).unlink() if damage is None else (one.output / name).write_bytes(damage)
            finetune_from(one)
            assert (one.output / name).read_bytes() == whole
