"""A trained model in the layouts that others load: open_clip's, and transformers' for plain ViTs."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from geomreg.integrations.recipes.files import new_folder, put_in_place, writing
from geomreg.integrations.recipes.head import write_head

__all__ = ["check_plain", "to_open_clip", "to_transformers"]

_PLAIN_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_WRITTEN = {"open_clip_model.safetensors", "head.safetensors", "classes.json", "model.safetensors"}  # beside a configuration


def to_open_clip(
    model: nn.Module, config: dict[str, Any], folder: Path, *, head: tuple[nn.Linear, nn.Linear, Sequence[str]] | None = None
) -> Path:
    """Write what ``open_clip.create_model_and_transforms("local-dir:...")`` loads: whole, or nothing.

    Args:
        model: open_clip model, without adapters.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        folder: of the export; an export that is there is replaced.
        head: classifier, where it started, and names of the classes: written beside the model by
            :func:`~geomreg.integrations.recipes.head.write_head`; :mod:`geomreg.integrations.recipes.head` says how to load it.
    """
    state = {key: _on_its_own(value) for key, value in model.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in state and not config["model_cfg"].get("nonscalar_logit_scale", False):
            state[name] = state[name].reshape(())  # FSDP2 needs one dimension, the layout has none
    with _whole(folder) as temporary:
        save_file(state, temporary / "open_clip_model.safetensors", metadata={"format": "pt"})
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if head is not None:
            write_head(temporary, *head)
    return folder


def to_transformers(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write what ``transformers.CLIPModel.from_pretrained`` loads, for CLIP with plain ViT and text transformer.

    Args:
        model: open_clip ``CLIP`` without adapters.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        folder: of the export; an export that is there is replaced.

    Raises:
        ValueError: an architecture that transformers' CLIPModel does not have.
    """
    from transformers import CLIPConfig, CLIPModel

    check_plain(model, config["model_cfg"])
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
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"],
                "hidden_act": activation,
                "eos_token_id": text["vocab_size"] - 1,
                "bos_token_id": text["vocab_size"] - 2,
            },
        )
    )
    missing, unexpected = target.load_state_dict(_renamed(model.state_dict()), strict=False)
    if unexpected or [key for key in missing if not key.endswith("position_ids")]:
        raise ValueError(f"to_transformers: expected the weights of a plain CLIP, got also {unexpected[:3]} and no {missing[:3]}.")
    with _whole(folder) as temporary:
        target.save_pretrained(temporary)
    return folder


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


def check_plain(model: nn.Module, config: dict[str, Any]) -> None:
    """A model that :func:`to_transformers` can write.

    Raises:
        ValueError: another architecture.
    """
    reason = None
    if not isinstance(model, CLIP) or not isinstance(getattr(model, "visual", None), VisionTransformer):
        reason = f"{type(model).__name__} with {type(getattr(model, 'visual', None)).__name__}"
    elif extra := sorted(set(config["vision_cfg"]) - _PLAIN_VISION) + sorted(set(config["text_cfg"]) - _PLAIN_TEXT):
        reason = f"the options {', '.join(extra)}"
    elif getattr(model, "logit_bias", None) is not None:
        reason = "one with a logit bias"
    if reason:
        raise ValueError(f"to_transformers: expected CLIP with a plain ViT and text transformer, got {reason}. Use open_clip's layout.")


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
