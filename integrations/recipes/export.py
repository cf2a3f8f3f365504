"""A trained model in the layouts that others load: open_clip's, and transformers' for plain ViTs."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from geomreg.integrations.recipes.checksums import CHECKSUMS, write_checksums
from geomreg.integrations.recipes.files import new_folder, put_in_place, writing
from geomreg.integrations.recipes.head import write_head
from geomreg.integrations.recipes.selfcheck import check_open_clip, check_transformers, preprocess_of
from geomreg.integrations.recipes.tokenizers import write_clip_tokenizer, write_tokenizer

__all__ = ["check_plain", "to_open_clip", "to_transformers"]

_PLAIN_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WRITTEN = {"open_clip_model.safetensors", "head.safetensors", "classes.json", "model.safetensors", CHECKSUMS}  # beside a configuration


def to_open_clip(
    model: nn.Module,
    config: dict[str, Any],
    folder: Path,
    *,
    head: tuple[nn.Linear, nn.Linear, Sequence[str]] | None = None,
    tokenizer: Callable[..., Tensor] | None = None,
    check: bool = True,
) -> Path:
    """Write what ``open_clip.create_model_and_transforms("local-dir:...")`` and its ``get_tokenizer`` load: whole, or nothing.

    Checksums of all files are written with them, which :func:`~geomreg.integrations.recipes.models.load` and
    :func:`~geomreg.integrations.recipes.head.load_head` compare. The export is loaded again and compared with the model on a few
    texts and pictures before it takes the folder's name, see :func:`~geomreg.integrations.recipes.selfcheck.check_open_clip`.

    Args:
        model: open_clip model, without adapters.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        folder: of the export; an export that is there is replaced.
        head: classifier, where it started, and names of the classes: written beside the model by
            :func:`~geomreg.integrations.recipes.head.write_head`; :mod:`geomreg.integrations.recipes.head` says how to load it.
        tokenizer: the model's; its files travel with the model if it is one of Hugging Face, which needs it.
        check: False leaves out the comparison.

    Raises:
        ValueError: a model with a tokenizer of Hugging Face without it.
        RuntimeError: the export gives other embeddings than the model, or cannot be loaded.
        OSError: no space to write to.
    """
    state = {key: _on_its_own(value) for key, value in model.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in state and not config["model_cfg"].get("nonscalar_logit_scale", False):
            state[name] = state[name].reshape(())  # FSDP2 needs one dimension, the layout has none
    with _whole(folder) as temporary:
        save_file(state, temporary / "open_clip_model.safetensors", metadata={"format": "pt"})
        del state  # the check loads another
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if head is not None:
            write_head(temporary, *head)
        write_tokenizer(tokenizer, config["model_cfg"], temporary)
        write_checksums(temporary)
        if check:
            check_open_clip(model, config, temporary, folder, tokenizer=tokenizer)
    return folder


def to_transformers(model: nn.Module, config: dict[str, Any], folder: Path, *, tokenizer: Callable[..., Tensor] | None = None) -> Path:
    """Write what ``CLIPModel``, ``AutoProcessor`` and ``AutoTokenizer`` of transformers load, for CLIP with plain ViT and text transformer.

    The export is loaded again and compared with the model on a few texts and pictures before it takes the folder's name, see
    :func:`~geomreg.integrations.recipes.selfcheck.check_transformers`. transformers' tokenizer does not straighten curly quotes and
    mend broken Unicode and HTML entities in texts as open_clip's does, and its processor reads pictures by ``convert("RGB")``, whatever
    ``config["images"]`` says: see :func:`~geomreg.integrations.recipes.data.images.load_rgb`.

    Args:
        model: open_clip ``CLIP`` without adapters.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        folder: of the export; an export that is there is replaced.
        tokenizer: the model's; by default open_clip's own.

    Raises:
        ValueError: an architecture, a tokenizer or a preprocessing that transformers' CLIPModel and its processor do not have.
        RuntimeError: the export gives other embeddings than the model.
        OSError: no space to write to.
    """
    from transformers import CLIPConfig, CLIPModel

    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    tokenizer = SimpleTokenizer(context_length=length) if tokenizer is None else tokenizer
    check_plain(model, config, tokenizer)
    assert isinstance(tokenizer, SimpleTokenizer)  # has been checked
    vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    activation = "quick_gelu" if any(isinstance(module, QuickGELU) for module in model.modules()) else "gelu"
    size = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    width, heads = vision["width"], vision["width"] // vision.get("head_width", 64)
    target = CLIPModel(
        CLIPConfig(
            projection_dim=config["model_cfg"]["embed_dim"],
            vision_config={
                "hidden_size": width,
                "intermediate_size": round(width * vision.get("mlp_ratio", 4.0)),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": heads,
                "image_size": size,
                "patch_size": vision["patch_size"],
                "hidden_act": activation,
            },
            text_config={
                "hidden_size": text["width"],
                "intermediate_size": round(text["width"] * text.get("mlp_ratio", 4.0)),
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": length,
                "vocab_size": text.get("vocab_size", 49408),
                "hidden_act": activation,
                "eos_token_id": tokenizer.eot_token_id,  # where CLIPModel takes the text's embedding: the first of them
                "bos_token_id": tokenizer.sot_token_id,
                "pad_token_id": tokenizer.eot_token_id,
            },
        )
    )
    missing, unexpected = target.load_state_dict(_renamed(model.state_dict()), strict=False)
    if unexpected or [key for key in missing if not key.endswith("position_ids")]:
        raise ValueError(f"to_transformers: expected the weights of a plain CLIP, got also {unexpected[:3]} and no {missing[:3]}.")
    with _whole(folder) as temporary:
        target.save_pretrained(temporary)
        write_clip_tokenizer(tokenizer, length, temporary)
        processor = json.dumps(_processor(preprocess_of(model, config)), indent=1)
        (temporary / "preprocessor_config.json").write_text(processor + "\n", encoding="utf-8")
        check_transformers(model, config, temporary, folder, tokenizer)
    return folder


def _processor(preprocess: dict[str, Any]) -> dict[str, Any]:
    """open_clip's preprocessing as transformers' CLIPImageProcessor."""
    side = _sides(preprocess["size"])[0]
    shortest = preprocess["resize_mode"] == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if shortest else {"height": side, "width": side},
        "resample": int(_RESAMPLING[preprocess["interpolation"]]),
        "do_center_crop": shortest,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name of ``folder`` if all went well; a kill at any time leaves one or the other."""
    folder = folder.resolve()  # where a link leads
    temporary = new_folder(folder)
    try:
        if folder.exists() and not list(folder.glob("*config.json")) and {path.name for path in folder.iterdir()} - _WRITTEN:
            raise FileExistsError(f"export: expected a new folder or an earlier export, got {folder} with other files. Choose another.")
        with writing("export", folder):
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                file.chmod(temporary.stat().st_mode & 0o666)  # the umask's, as the folder has it: safetensors writes for the owner alone
            put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_plain(model: nn.Module, config: dict[str, Any], tokenizer: Any) -> None:
    """A model that :func:`to_transformers` can write.

    Raises:
        ValueError: another architecture, tokenizer or preprocessing.
    """
    architecture, reason = config["model_cfg"], None
    if not isinstance(model, CLIP) or not isinstance(getattr(model, "visual", None), VisionTransformer):
        reason = f"{type(model).__name__} with {type(getattr(model, 'visual', None)).__name__}"
    elif extra := sorted(set(architecture["vision_cfg"]) - _PLAIN_VISION) + sorted(set(architecture["text_cfg"]) - _PLAIN_TEXT):
        reason = f"the options {', '.join(extra)}"
    elif getattr(model, "logit_bias", None) is not None:
        reason = "one with a logit bias"
    elif not isinstance(tokenizer, SimpleTokenizer):
        reason = f"one with the tokenizer {type(tokenizer).__name__}"
    elif len(tokenizer.encoder) > (size := architecture["text_cfg"].get("vocab_size", 49408)):
        reason = f"a vocabulary of {size} for a tokenizer with {len(tokenizer.encoder)} entries"
    else:
        preprocess = preprocess_of(model, config)
        (height, width), mode = _sides(preprocess["size"]), preprocess["resize_mode"]
        if height != width:
            reason = f"images of {height} x {width} pixels, which CLIPModel does not take"
        elif mode not in ("shortest", "squash") or preprocess["interpolation"] not in _RESAMPLING:
            reason = f"the resize mode {mode} with {preprocess['interpolation']}, which its processor does not have"
    if reason:
        raise ValueError(
            f"to_transformers: expected CLIP with a plain ViT and text transformer, got {reason}. Use open_clip's layout, in a run "
            "--transformers false."
        )


def _on_its_own(value: Tensor) -> Tensor:
    return value.detach().cpu().clone().contiguous()


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names as transformers'."""
    found = {
        "logit_scale": state["logit_scale"].reshape(()),
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for kind in ("weight", "bias"):
        found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
    for tower, prefix in (("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model")):
        for key, value in state.items():
            if not key.startswith(tower):
                continue
            layer, _, rest = key.removeprefix(tower).partition(".")
            stem, _, kind = rest.rpartition(".")
            block = f"{prefix}.encoder.layers.{layer}"
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{block}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
            else:
                found[f"{block}.{parts.get(stem, stem)}.{kind}"] = value
    return {key: _on_its_own(value) for key, value in found.items()}
