"""Exports of every kind of tower give the model's embeddings, from texts as strings and pictures as files; or they are not published."""

import copy
import json
import random

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes import selfcheck
from geomreg.integrations.recipes.export import to_open_clip, to_transformers
from geomreg.integrations.recipes.models import Lora, ModelConfig, compile_blocks, freeze, load, merge_adapters
from geomreg.integrations.recipes.selfcheck import pictures

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 1}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TIMM = {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": None}
LAKE = "photo of red fox two boats on lake old woman o it s clock 1953"
SPECIAL = ["[PAD]", "[UNK]", "[EOS]", "[CLS]"]
WORDS = SPECIAL + LAKE.split() + list("a7,;:'")
HF = {**TEXT, "vocab_size": len(WORDS), "hf_tokenizer_name": "somebody/words"}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "longest", "fill_color": 200}
TEXTS = ["a photo of a red fox", "two boats on a lake"]
KINDS = {
    "vit": {"vision_cfg": VISION, "text_cfg": TEXT},
    "quick_gelu": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "rectangular": {"vision_cfg": {**VISION, "image_size": [32, 48]}, "text_cfg": TEXT},
    "patch_dropout": {"vision_cfg": {**VISION, "patch_dropout": 0.5}, "text_cfg": TEXT},
    "pool_avg": {"vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, "text_cfg": TEXT},
    "attentional_pool": {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, "text_cfg": TEXT},
    "text_pool_last": {"vision_cfg": VISION, "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True}},
    "grown_vocabulary": {"vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": 49410}},
    "modified_resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, "text_cfg": TEXT},
    "custom_text": {"vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True},
    "timm": {"vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True},
    "mobileclip": {
        "vision_cfg": {**TIMM, "timm_model_name": "fastvit_t8", "image_size": 64},
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "siglip": {
        "vision_cfg": VISION,
        "text_cfg": {**HF, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "hf_text": {"vision_cfg": VISION, "text_cfg": {"hf_model_name": "bert", "hf_tokenizer_name": "bert", "context_length": 16}},
    "coca": {
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}
FAST = ("rectangular", "modified_resnet", "timm", "siglip", "hf_text", "coca")
KINDS = {kind: {"embed_dim": 32, **config} for kind, config in KINDS.items()}  # the layers of ModifiedResNet end in 32 * width


def words(folder):
    """A tokenizer of Hugging Face with a vocabulary of its own."""
    found = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)


def folder_of(path, config, preprocess=PREPROCESS):
    """A model with random weights in open_clip's layout, written by hand."""
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    if "hf_model_name" in config["text_cfg"]:
        BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).save_pretrained(
            path / "bert"
        )
        config["text_cfg"]["hf_model_name"] = str(path / "bert")
    if "hf_tokenizer_name" in config["text_cfg"]:
        words(path)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # a new text tower of Hugging Face starts from its configuration
        patch.setattr("open_clip.hf_model.AutoModel.from_pretrained", lambda name, **options: hf_tower(path, **options))
        model = open_clip.create_model(f"local-dir:{path}")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("logit_"):
                value.add_(0.02 * torch.randn_like(value))
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return path


def hf_tower(path, **options):
    from transformers import AutoModel

    return AutoModel.from_config(BertConfig.from_pretrained(path / "bert"), **options)


def opened(path):
    """Pictures as files."""
    path.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures()):
        picture.save(path / f"{number}.png")
    return [Image.open(path / f"{number}.png") for number in range(2)]


@pytest.mark.parametrize("side", [32, 48, 63, 64, 65, 240])
def test_pictures_of_the_check_are_cropped_alike(side):
    """Beside them transformers' processor may crop one pixel beside where torchvision does: then an export was refused for its size."""
    seen = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
    processor = CLIPImageProcessor(**seen, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    transform = image_transform_v2(PreprocessCfg((side, side), mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="shortest"), False)
    for picture in pictures(side):
        assert min(picture.size) > side
        assert picture.size[0] != picture.size[1]
        theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert (transform(picture) - theirs).abs().mean() * 127.5 < 0.1


def embedded(model, transform, tokenizer, images):
    with torch.no_grad():
        return embed(model, images=torch.stack([transform(one) for one in images])).image, embed(model, texts=tokenizer(TEXTS)).text


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_open_clip_loads_every_kind_of_tower(tmp_path, kind):
    loaded = load(str(folder_of(tmp_path / "start", KINDS[kind])))
    out = to_open_clip(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}", output_dict=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    found, expected = open_clip.get_model_preprocess_cfg(model), open_clip.get_model_preprocess_cfg(loaded.model)
    assert {key: str(value).strip("[]()") for key, value in found.items()} == {
        key: str(value).strip("[]()") for key, value in expected.items()
    }
    assert found["fill_color"] == 200
    assert found["resize_mode"] == "longest"
    images = opened(tmp_path / "pictures")
    assert all(torch.equal(transform(one), loaded.transform(one)) for one in images)
    assert torch.equal(tokenizer(TEXTS), loaded.tokenizer(TEXTS))
    for one, other in zip(
        embedded(model.eval(), transform, tokenizer, images),
        embedded(loaded.model, loaded.transform, loaded.tokenizer, images),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert not torch.equal(one[0], one[1])


def test_export_with_merged_adapters(tmp_path):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["vit"])))
    model = freeze(loaded.model, ModelConfig("m", lora=Lora(rank=2)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    images = opened(tmp_path / "pictures")
    before = embedded(model, loaded.transform, loaded.tokenizer, images)
    again = load(str(to_open_clip(merge_adapters(model), loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)))
    for one, other in zip(before, embedded(again.model, again.transform, again.tokenizer, images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_export_in_the_middle_of_a_run(tmp_path):
    """Under autocast, compiled, and in training mode."""
    config = copy.deepcopy(KINDS["patch_dropout"])
    config["vision_cfg"]["layers"] = 2
    loaded = load(str(folder_of(tmp_path / "start", config)))
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(compile_blocks(loaded.model).train())
    AcceleratorState._reset_state(True)  # other tests have other precisions
    to_open_clip(copy.deepcopy(loaded.model), loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)


def test_check_leaves_no_trace(tmp_path):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["modified_resnet"])))
    loaded.model.train()
    loaded.model.visual.eval()
    modes, state = [one.training for one in loaded.model.modules()], copy.deepcopy(loaded.model.state_dict())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    to_open_clip(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert [one.training for one in loaded.model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in loaded.model.parameters())


def change_activation(config):
    config["model_cfg"]["quick_gelu"] = True


def change_mean(config):
    config["preprocess_cfg"]["mean"] = [0.0, 0.0, 0.0]


def change_pool(config):
    config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"


def forget_width(config):
    del config["model_cfg"]["vision_cfg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_activation, "embeddings of images at a distance of"),
        (change_pool, "embeddings of images at a distance of"),
        (change_mean, r"mean \[0.0, 0.0, 0.0\] instead of"),
        (forget_width, "when it was loaded"),
    ],
)
def test_an_export_that_differs_is_not_published(tmp_path, monkeypatch, change, message):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["vit"])))
    out = to_open_clip(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
    dumps = json.dumps

    def changed(content, **options):
        if "model_cfg" in content:
            content = copy.deepcopy(content)
            change(content)
        return dumps(content, **options)

    monkeypatch.setattr(json, "dumps", changed)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(RuntimeError, match=rf"to_open_clip: expected an export in .*, got .*{message}.* It was not published"):
            to_open_clip(loaded.model, loaded.config, folder, tokenizer=loaded.tokenizer)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "start"]
    load(str(out))  # the old one


def test_a_diverged_model_is_exported(tmp_path):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["vit"])))
    with torch.no_grad():
        loaded.model.visual.proj.fill_(torch.nan)
    to_open_clip(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)


def test_a_tokenizer_that_the_export_needs(tmp_path):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["siglip"])))
    with pytest.raises(ValueError, match=r"expected the tokenizer somebody/words of the model, got none. Pass that of the loaded model"):
        to_open_clip(loaded.model, loaded.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# transformers


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("grown_vocabulary", "shortest"),
        pytest.param("vit", "squash", marks=pytest.mark.slow),
        pytest.param("quick_gelu", "shortest", marks=pytest.mark.slow),
        pytest.param("quick_gelu", "squash", marks=pytest.mark.slow),
    ],
)
def test_transformers_embeds_strings_and_files_alike(tmp_path, kind, mode):
    preprocess = {**PREPROCESS, "resize_mode": mode, "interpolation": "bilinear" if kind == "vit" else "bicubic"}
    loaded = load(str(folder_of(tmp_path / "start", KINDS[kind], preprocess)))
    out = to_transformers(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
    model, processor, images = CLIPModel.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out), opened(tmp_path / "pictures")
    assert isinstance(processor, CLIPProcessor)
    expected = embedded(loaded.model, loaded.transform, loaded.tokenizer, images)
    with torch.no_grad():
        found = model(**processor(text=TEXTS, images=images, return_tensors="pt", padding=True))
        same = model(pixel_values=torch.stack([loaded.transform(one) for one in images]), input_ids=loaded.tokenizer(TEXTS))
    torch.testing.assert_close(found.image_embeds, expected[0], rtol=0, atol=5e-3)  # its processor resizes tensors
    torch.testing.assert_close(same.image_embeds, expected[0], rtol=0, atol=1e-5)
    for out_of in (found, same):
        torch.testing.assert_close(out_of.text_embeds, expected[1], rtol=0, atol=1e-5)
    assert not torch.allclose(found.text_embeds[0], found.text_embeds[1])
    assert model.logit_scale.item() == loaded.model.logit_scale.item()
    assert model.config.text_config.eos_token_id == loaded.tokenizer.eot_token_id
    assert AutoTokenizer.from_pretrained(out)(TEXTS[0])["input_ids"] == loaded.tokenizer(TEXTS[:1])[0, :8].tolist()
    long = "a red fox " * 30
    cut = AutoTokenizer.from_pretrained(out)(long, truncation=True)["input_ids"]
    assert cut == loaded.tokenizer([long])[0].tolist()
    assert tuple(AutoImageProcessor.from_pretrained(out).image_mean) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("rectangular", {}, "images of 32 x 48 pixels, which CLIPModel does not take"),
        ("attentional_pool", {}, "the options attentional_pool"),
        ("timm", {}, "CustomTextCLIP with TimmModel"),
        ("vit", {"resize_mode": "longest"}, "the resize mode longest with bicubic"),
        ("vit", {"vocab_size": 300}, "a vocabulary of 300 for a tokenizer with 49408 entries"),
    ],
)
def test_what_transformers_lacks_is_refused(tmp_path, kind, changes, message):
    config = copy.deepcopy(KINDS[kind])
    if "vocab_size" in changes:
        config["text_cfg"]["vocab_size"] = changes.pop("vocab_size")
    loaded = load(str(folder_of(tmp_path / "start", config, {"mean": [0.5] * 3, "std": [0.5] * 3, **changes})))
    with pytest.raises(ValueError, match=f"expected CLIP with a plain ViT and text transformer, got {message}.* Use open_clip's layout"):
        to_transformers(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_transformers_export_that_differs_is_not_published(tmp_path, monkeypatch):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["vit"], {**PREPROCESS, "resize_mode": "shortest"})))
    monkeypatch.setattr("geomreg.integrations.recipes.export._processor", lambda preprocess: {"image_processor_type": "CLIPImageProcessor"})
    with pytest.raises(RuntimeError, match=r"to_transformers: expected an export in .*, got .*\. It was not published"):
        to_transformers(loaded.model, loaded.config, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("geomreg.integrations.recipes.export.QuickGELU", torch.nn.GELU)  # the wrong activation
    with pytest.raises(RuntimeError, match=r"got embeddings of .* at a distance of"):
        to_transformers(loaded.model, loaded.config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_every_export_is_checked(tmp_path, monkeypatch):
    loaded = load(str(folder_of(tmp_path / "start", KINDS["vit"])))
    monkeypatch.setattr(selfcheck, "TOLERANCES", {"cpu": -1.0, "other": -1.0})
    with pytest.raises(RuntimeError, match=r"got embeddings of images at a distance of \S+, above -1"):
        to_open_clip(loaded.model, loaded.config, tmp_path / "out", tokenizer=loaded.tokenizer)
