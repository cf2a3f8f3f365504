"""open_clip models for training: by name or from a folder, frozen in part, with adapters."""

import difflib
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from geomreg.checks import check_count, check_positive
from geomreg.gradients import reached
from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes.checksums import check_export
from geomreg.integrations.recipes.data.rgb import ImageConfig, Preprocessing
from geomreg.integrations.recipes.files import read_json
from geomreg.integrations.recipes.preprocess import Preprocess, check_written, preprocess_of_file
from geomreg.integrations.recipes.tokenizers import load_tokenizer

__all__ = [
    "Lora",
    "Model",
    "ModelConfig",
    "clamp_logit_scale",
    "compile_blocks",
    "freeze",
    "freeze_unreached",
    "load",
    "merge_adapters",
    "model_folder",
]

ADAPTED = ("c_fc", "c_proj", "fc1", "fc2")  # the MLP layers of open_clip's transformers, and of timm's


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) by peft; all weights beside them are frozen.

    Attributes:
        rank: of the updates.
        alpha: their scale is alpha / rank.
        layers: last parts of the names of the adapted layers. Attention of open_clip's own towers (``nn.MultiheadAttention``) is
            refused: peft merges adapters into its weights for each forward, which a teacher with adapters off cannot undo exactly.
    """

    rank: int = 16
    alpha: float = 16.0
    layers: tuple[str, ...] = ADAPTED

    def __post_init__(self) -> None:
        check_count("Lora", "rank", self.rank, 1)
        check_positive("Lora", "alpha", self.alpha)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        name: of an open_clip model, a folder with open_clip_config.json and weights, or ``emojiclip``, the quickstart's small CLIP.
        pretrained: tag or file of the weights; not for a folder.
        learning_rates: lowest and highest that are usual for this model; a learning rate far above or below warns.
        frozen: towers (``"image"``, ``"text"``) or prefixes of parameter names that are not trained.
        logit_scale: trained or frozen.
        max_logit_scale: clamp it after each step (CLIP's 100); None: FLYP does not.
        lora: train adapters instead of the weights.
        preprocess: how images become tensors, for weights from a file whose preprocessing open_clip does not know.
    """

    name: str
    pretrained: str | None = None
    learning_rates: tuple[float, float] | None = None
    frozen: tuple[str, ...] = ()
    logit_scale: Literal["trained", "frozen"] = "trained"
    max_logit_scale: float | None = None
    lora: Lora | None = None
    preprocess: Preprocess | None = None

    def __post_init__(self) -> None:
        if self.max_logit_scale is not None:
            check_positive("ModelConfig", "max_logit_scale", self.max_logit_scale)
            if self.logit_scale == "frozen":
                raise ValueError(
                    f"ModelConfig: expected no max_logit_scale with logit_scale=frozen, got {self.max_logit_scale}. "
                    "Leave it out: it would move the scale."
                )
            if self.max_logit_scale < 1:
                raise ValueError(f"ModelConfig: expected max_logit_scale of at least 1, got {self.max_logit_scale}. CLIP's is 100.")


@dataclass(frozen=True)
class Model:
    """A model with what belongs to it.

    Attributes:
        model: open_clip model in evaluation mode.
        config: open_clip's configuration, ``{"model_cfg", "preprocess_cfg"}``, and at ``"images"`` how image files are read, which
            open_clip does not look at.
        train_transform: PIL image to tensor with open_clip's crops.
        transform: PIL image to tensor, of evaluation. Both take images as ``PIL.Image.open`` gives them.
        tokenizer: list of texts to ``(N, L)`` token ids.
    """

    model: nn.Module
    config: dict[str, Any]
    train_transform: Callable[..., Any]
    transform: Callable[..., Any]
    tokenizer: Callable[..., Any]


def model_folder() -> Path:
    """Folder of the checkpoint that comes with geomreg, EmojiCLIP."""
    return Path(str(resources.files("geomreg.integrations.quickstart") / "model"))


def load(
    name: str,
    pretrained: str | None = None,
    *,
    crop: tuple[float, float] = (0.9, 1.0),
    images: ImageConfig | None = None,
    preprocess: Preprocess | None = None,
) -> Model:
    """A pre-trained open_clip model by name, or from a folder.

    Args:
        name: one of ``open_clip.list_models()``, ``hf-hub:...``, a folder, or ``emojiclip``.
        pretrained: tag or file of the weights; not for a folder or a hub.
        crop: scale of the random crops in training; FLYP's.
        images: how image files are read; by default as the folder of an exported model says, or by the defaults.
        preprocess: fields that differ from what the weights come with. Weights from a file come with what all of open_clip's tags for the
            model agree on.

    Raises:
        ValueError: an unknown name, no weights, or weights beside a folder; a damaged or impossible configuration; an export whose files
            are not those that were written; weights whose preprocessing is not known; a tokenizer whose files are not to be had; a
            TorchScript archive.
        RuntimeError: damaged weights, or those of another architecture.
    """
    stated = {} if preprocess is None else preprocess.stated()
    folder = model_folder() if name == "emojiclip" else Path(name)
    if folder.is_dir():
        if pretrained is not None:
            raise ValueError(f"load: expected no pretrained weights beside the folder {name}, got {pretrained!r}. It holds its own.")
        check_export("load", folder)
        name, (config, written) = f"local-dir:{folder}", _config_of_folder(folder, name, stated)
        images = images or written
    elif name.startswith("hf-hub:"):
        config = open_clip.get_model_config(name)
    elif name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See open_clip.list_models()."
        raise ValueError(f"load: expected a model of open_clip or a folder, got {name!r}. {hint}")
    elif pretrained is None:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"load: expected pretrained weights for {name} (a file, or of: {known}), got none. Pass them.")
    else:
        config = open_clip.get_model_config(name)
        if not open_clip.get_pretrained_cfg(name, pretrained) and Path(pretrained).is_file():
            _refuse_torchscript(Path(pretrained))
            stated = preprocess_of_file(name, pretrained, stated)
    tokenizer = load_tokenizer(name, config)  # before the costly part
    model = _built(name, pretrained, stated)
    found = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    train_transform = image_transform_v2(found, is_train=True, aug_cfg={"scale": crop})
    images = (images or ImageConfig()).resolved(found.fill_color)
    described = {"model_cfg": config, "preprocess_cfg": asdict(found), "images": asdict(images)}
    transforms = (Preprocessing(one, images) for one in (train_transform, image_transform_v2(found, is_train=False)))
    return Model(model.float().eval(), described, *transforms, tokenizer)


def _config_of_folder(folder: Path, name: str, stated: dict[str, Any]) -> tuple[dict[str, Any], ImageConfig]:
    """The ``model_cfg`` of a folder in open_clip's layout, which also says how images are normalised, and how ours reads image files."""
    file = folder / "open_clip_config.json"
    if not file.is_file():
        raise ValueError(f"load: expected open_clip_config.json in the model's folder {name}, got none. Export the model there.")
    weights = (path for path in folder.iterdir() if path.name != "head.safetensors")
    if not any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in weights):  # open_clip would begin at random
        raise ValueError(f"load: expected weights in the model's folder {name}, got none. Export or copy the model there.")
    content = read_json("load", file, dict, "a configuration with model_cfg", "Export the model anew.")
    try:
        config: dict[str, Any] = content["model_cfg"]
        for part in (config, config["vision_cfg"], config["text_cfg"], preprocess := content.get("preprocess_cfg", {})):
            if not isinstance(part, dict):
                raise TypeError(f"{type(part).__name__} where a mapping should be")
        images = ImageConfig(**content.get("images", {}))
    except (ValueError, KeyError, TypeError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"load: expected open_clip_config.json with model_cfg in {folder}, got {got}. Export the model anew.") from error
    check_written(file, "preprocess_cfg", preprocess)
    check_written(file, "vision_cfg", {"image_size": config["vision_cfg"].get("image_size")})
    if lacking := [key for key in ("mean", "std") if preprocess.get(key) is None and key not in stated]:
        raise ValueError(
            f"load: expected preprocess_cfg with mean and std in {file}, got no {' and no '.join(lacking)}. Write there what the weights "
            f"were trained with, or state it in model.preprocess, say --model.preprocess.{lacking[0]} '[0.5,0.5,0.5]' (in geomreg embed "
            f"--preprocess.{lacking[0]})."
        )
    return config, images


def _refuse_torchscript(file: Path) -> None:
    """An archive of code and weights, as OpenAI published CLIP's."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # of a dozen kinds, for a damaged one: torch, which reads it next, says so
        return
    if not any("/code/" in one for one in names):
        return
    raise ValueError(
        f"load: expected a file of weights, got the TorchScript archive {file}. Convert it: "
        f"state = torch.jit.load({str(file)!r}, map_location='cpu').state_dict(); "
        "torch.save({k: v for k, v in state.items() if k not in ('input_resolution', 'context_length', 'vocab_size')}, 'weights.pt')."
    )


def _built(name: str, pretrained: str | None, preprocess: dict[str, Any]) -> nn.Module:
    """The model by open_clip, on the CPU; what it cannot build is said in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model: nn.Module = open_clip.create_model(name, pretrained=pretrained, output_dict=True, force_preprocess_cfg=preprocess)
        except (SafetensorError, EOFError, pickle.UnpicklingError, struct.error, MemoryError) as error:
            raise RuntimeError(
                f"load: expected whole weights of {pretrained or name}, got a damaged file ({' '.join(str(error).split())[:200]}). "
                "Copy it anew."
            ) from error
        except (AssertionError, ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, RuntimeError) as error:
            is_here = Path(pretrained or name.removeprefix("local-dir:")).exists()
            if isinstance(error, OSError) and (error.filename is not None or not is_here):
                raise  # a file or a server that cannot be reached; else what a damaged file leads to
            got = f"{type(error).__name__} ({' '.join(str(error).split())[:300]})"
            if name.startswith("local-dir:"):
                file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
                raise ValueError(
                    f"load: expected a model that open_clip can build, and that fits the weights beside it, in {file}, got {got}. Mend the "
                    "file, or export the model anew."
                ) from error
            raise RuntimeError(
                f"load: expected weights that fit {name} in {pretrained or name}, got {got}. "
                + (
                    "Look at the connection, or pass a file."
                    if "download" in str(error).lower()
                    else "Use those of this model, or copy the file anew."
                )
            ) from error
    if any("QuickGELU" in str(one.message) for one in caught):
        raise ValueError(
            f"load: expected the activation that the weights {pretrained!r} were trained with, got {name}'s. Use the model "
            f"{name.removesuffix('-quickgelu') if name.endswith('-quickgelu') else name + '-quickgelu'!r}."
        )
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return model


def freeze(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Freeze what the configuration says, or add adapters; in place.

    Raises:
        ValueError: a prefix without parameters, adapters on attention or on one tower alone while the other is not frozen, nothing left
            to train.
    """
    if config.lora is not None:
        _add_adapters(model, config.lora, config.frozen)
    for part in config.frozen:
        found = [value for name, value in model.named_parameters() if _belongs(name, part)]
        if not found:
            tops = sorted({name.partition(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(
                f'freeze: expected "image", "text" or a prefix of parameter names, got {part!r}. They begin with {", ".join(tops)}.'
            )
        for value in found:
            value.requires_grad_(False)
    for name in ("logit_scale", "logit_bias"):
        value = getattr(model, name, None)
        if isinstance(value, nn.Parameter):
            value.requires_grad_(config.logit_scale == "trained")
    if not any(value.requires_grad for name, value in model.named_parameters() if not name.startswith("logit_")):
        raise ValueError(f"freeze: expected something to train, got frozen {', '.join(config.frozen)}. Leave a layer out.")
    return model


def freeze_unreached(loaded: Model) -> list[str]:
    """Freeze what no embedding depends on, a caption decoder say; in place. Returns the names of these parameters.

    No loss on embeddings trains them, and processes that train together would wait for their gradients. One blank image and one text are
    embedded to find out. Logit scale and bias, which losses use themselves, stay as they are.
    """
    sample = {"image": loaded.transform(Image.new("RGB", (8, 8)))[None], "text": loaded.tokenizer(["a picture"])}
    device = next(loaded.model.parameters()).device
    embedded = embed(loaded.model, *(value.to(device) for value in sample.values()))
    known = {id(value) for one in embedded if one is not None for value in reached(one) if isinstance(value, Tensor)}
    found = [
        name
        for name, value in loaded.model.named_parameters()
        if value.requires_grad and id(value) not in known and not name.startswith("logit_")
    ]
    for name in found:
        loaded.model.get_parameter(name).requires_grad_(False)
    return found


def _belongs(name: str, part: str) -> bool:
    if name.startswith("logit_"):
        return False
    if part in ("image", "text"):
        return name.startswith("visual.") == (part == "image")
    return name == part or name.startswith(part.rstrip(".") + ".")


def _add_adapters(model: nn.Module, lora: Lora, frozen: tuple[str, ...]) -> None:
    import peft

    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in lora.layers]
    modules = dict(model.named_modules())
    if not names:
        raise ValueError(f"freeze: expected layers named {', '.join(lora.layers)} for adapters, got none. See model.named_modules().")
    for tower in ("image", "text"):
        if tower not in frozen and not any(_belongs(name, tower) for name in names):
            raise ValueError(
                f"freeze: expected layers for adapters in both towers, got none named {', '.join(lora.layers)} in the {tower} tower, which "
                f"would not be trained. Add names to model.lora.layers, or {tower} to model.frozen."
            )
    for name in names:
        if isinstance(modules[name], nn.MultiheadAttention) or ".attn." in f".{name}.":
            owner = name.rpartition(".")[0]
            if isinstance(modules[name], nn.MultiheadAttention) or isinstance(modules.get(owner), nn.MultiheadAttention):
                raise ValueError(
                    f"freeze: expected adapters on layers where they are exact, got {name} (nn.MultiheadAttention). Use MLP layers."
                )
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names)
    peft.inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Put the adapters into the weights and take their layers out; in place. A model without adapters stays as it is."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge(safe_merge=True)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, module.base_layer)
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    """``torch.compile`` for each block of the towers, in place: blocks of one kind are compiled once, and weights keep their names.

    The last projections stay as they are, so that they still run in fp32.
    """
    for module in model.modules():
        blocks = list(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(blocks) > 1 and all(type(block) is type(blocks[0]) and any(block.children()) for block in blocks):
            for block in blocks:
                block.compile(dynamic=False)
    return model


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, largest: float | None) -> None:
    """Keep the exponentiated logit scale in [1, largest]; None: leave it."""
    if largest is not None:
        model.logit_scale.clamp_(0.0, math.log(largest))
