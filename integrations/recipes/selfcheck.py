"""An export is loaded again and compared with the model before it is called done: texts as strings, pictures as pictures."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes.tokenizers import SAMPLES

__all__ = ["check_open_clip", "check_transformers", "pictures", "preprocess_of", "without_trace"]

TOLERANCES = {"cpu": 1e-4, "other": 5e-3}  # of unit embeddings' distances; a GPU's convolutions round to TF32
PROCESSED = 3e-2  # the same for pictures that transformers' processor resized, on tensors instead of with PIL
LEVELS = 1.0  # mean difference of its pixels, of 255


def check_open_clip(
    model: nn.Module, config: dict[str, Any], exported: Path, target: Path, *, tokenizer: Callable[..., Tensor] | None
) -> None:
    """An export in open_clip's layout gives the model's weights, pixels, token ids and embeddings.

    Loads the export on the CPU, so for a moment there is one more copy of the weights in memory. The model's modes and the state of the
    random number generators stay as they were.

    Args:
        model: what was exported.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        exported: folder of the export.
        target: the folder's name to be, for messages.
        tokenizer: of the model; None: token ids are made up.

    Raises:
        RuntimeError: it does not.
    """
    name = f"local-dir:{exported}"
    with without_trace(model):
        try:
            again = open_clip.create_model(name, output_dict=True).eval()
            found = open_clip.get_model_preprocess_cfg(again)
            again_tokenizer = None if tokenizer is None else open_clip.get_tokenizer(name)
        except Exception as error:  # whatever open_clip, timm or transformers raise for what they cannot build
            raise _refused("to_open_clip", target, f"{type(error).__name__} when it was loaded ({error})") from error
        expected = preprocess_of(model, config)
        for field, value in expected.items():
            if _plain(found[field]) != _plain(value):
                raise _refused("to_open_clip", target, f"{field} {found[field]!r} instead of {value!r}")
        _check_weights(model, again, target)
        images = [torch.stack([image_transform_v2(PreprocessCfg(**one), False)(each) for each in pictures()]) for one in (expected, found)]
        if not torch.equal(*images):
            raise _refused("to_open_clip", target, "other pixels")
        ids = _made_up(config)
        if tokenizer is not None and again_tokenizer is not None:
            known = tokenizer(list(SAMPLES))
            if not torch.equal(known, again_tokenizer(list(SAMPLES))):
                raise _refused("to_open_clip", target, "other token ids")
            if "hf_model_name" in config["model_cfg"]["text_cfg"] or known.max() < _vocabulary(config):
                ids = known
        tolerance = _tolerance(model)
        for modality, batch in (("images", images[0]), ("texts", ids)):
            _compare("to_open_clip", target, modality, _embedded(model, modality, batch), _embedded(again, modality, batch), tolerance)


def check_transformers(model: nn.Module, config: dict[str, Any], exported: Path, target: Path, tokenizer: Callable[..., Tensor]) -> None:
    """An export for transformers gives the model's embeddings, from the same tensors and from texts and pictures by its own processor.

    Args:
        model: what was exported.
        config: ``{"model_cfg", "preprocess_cfg"}``.
        exported: folder of the export.
        target: the folder's name to be, for messages.
        tokenizer: of the model.

    Raises:
        RuntimeError: it does not.
    """
    from transformers import AutoProcessor, CLIPModel

    name, size = "to_transformers", model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    with without_trace(model):
        try:
            again = CLIPModel.from_pretrained(exported).eval()
            processed = AutoProcessor.from_pretrained(exported)(
                text=list(SAMPLES), images=pictures(side), return_tensors="pt", padding=True, truncation=True
            )
        except Exception as error:  # whatever transformers raises for what it cannot build
            raise _refused(name, target, f"{type(error).__name__} when it was loaded ({error})") from error
        preprocess = preprocess_of(model, config)
        transform = image_transform_v2(PreprocessCfg(**preprocess), False)
        images, ids = torch.stack([transform(one) for one in pictures(side)]), tokenizer(list(SAMPLES))
        for ours, theirs in zip(ids.tolist(), processed["input_ids"].tolist(), strict=True):
            length = ours.index(max(ours)) + 1
            if ours[:length] != theirs[:length]:
                raise _refused(name, target, "other token ids")
        if images.shape != processed["pixel_values"].shape:
            raise _refused(name, target, f"pictures of shape {tuple(processed['pixel_values'].shape)}")
        levels = (images - processed["pixel_values"]).abs().mean().item() * 255 * float(np.mean(preprocess["std"]))
        if not levels <= LEVELS:
            raise _refused(name, target, f"pixels that differ by {levels:.1f} of 255 in the mean")
        image, text = (_embedded(model, key, value) for key, value in (("images", images), ("texts", ids)))
        for pixels, tokens, tolerance in (
            (images, {"input_ids": ids}, _tolerance(model)),
            (processed["pixel_values"], {key: processed[key] for key in ("input_ids", "attention_mask")}, PROCESSED),
        ):
            out = again(pixel_values=pixels, **tokens)
            _compare(name, target, "images", image, out.image_embeds, tolerance)
            _compare(name, target, "texts", text, out.text_embeds, _tolerance(model))


def preprocess_of(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Every field of open_clip's preprocessing, where the configuration has none open_clip's default; the size is the model's."""
    found: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), config.get("preprocess_cfg", {}))
    size = getattr(getattr(model, "visual", None), "image_size", None)
    return found if size is None else {**found, "size": size}


def pictures(side: int = 32) -> list[Image.Image]:
    """Two, always the same for a model's image size: soft forms and some noise, wide and high.

    The margins that are cropped when the shorter edge is resized to ``side`` are even. Where they are odd, transformers' processor may crop
    one pixel beside where torchvision does, which is no fault of an export.
    """
    made = []
    for seed, (width, height) in enumerate(((2 * side + 24, 2 * side), (3 * side, 3 * side + 36))):
        noise = np.random.default_rng(seed)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = [np.sin(noise.uniform(2, 9) * x + noise.uniform(2, 9) * y + channel) for channel in range(3)]
        pixels = 127.5 + 100 * np.stack(waves, axis=-1) + noise.normal(0, 5, (height, width, 3))
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return made


@contextlib.contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode, not compiled, outside of autocast, without gradients; modes and random states return."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[]),  # what is built anew is built on the CPU
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # said when the model was loaded
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_weights(model: nn.Module, again: nn.Module, target: Path) -> None:
    ours, theirs = model.state_dict(), again.state_dict()
    if ours.keys() != theirs.keys():
        raise _refused("to_open_clip", target, f"other weights, {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}")
    for key, value in theirs.items():
        if not torch.equal(ours[key].detach().to(value).reshape(value.shape).nan_to_num(), value.nan_to_num()):
            raise _refused("to_open_clip", target, f"other values of {key}")


def _embedded(model: nn.Module, modality: str, batch: Tensor) -> Tensor:
    parameter = next(model.parameters())
    batch = batch.to(parameter.device, parameter.dtype if batch.is_floating_point() else batch.dtype)
    found = embed(model, **{modality: batch}, normalize=False)  # not by forward, which accelerate puts under autocast
    value = found.image if modality == "images" else found.text
    assert value is not None
    return F.normalize(value.float(), dim=-1).cpu()


def _compare(name: str, target: Path, modality: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    same = torch.isfinite(ours) == torch.isfinite(theirs)
    distance = (ours.nan_to_num() - theirs.float().cpu().nan_to_num()).norm(dim=-1).max().item()
    if not same.all() or not distance <= tolerance:
        raise _refused(name, target, f"embeddings of {modality} at a distance of {distance:.1e}, above {tolerance:g}")


def _tolerance(model: nn.Module) -> float:
    return TOLERANCES["cpu" if next(model.parameters()).device.type == "cpu" else "other"]


def _vocabulary(config: dict[str, Any]) -> int:
    return int(config["model_cfg"]["text_cfg"].get("vocab_size", 49408))


def _made_up(config: dict[str, Any]) -> Tensor:
    """``(2, L)`` token ids, where there are no texts for this vocabulary; the last is the highest, which CLIP takes for the end."""
    text = config["model_cfg"]["text_cfg"]
    size, length = _vocabulary(config), text.get("context_length", 77)
    ids = torch.randint(0, size - 1, (2, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = size - 1
    return ids


def _plain(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _refused(name: str, target: Path, got: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: expected an export in {target} that gives the model's embeddings, got {' '.join(got.split())}. It was not published; the "
        "model is as it was, a run's checkpoints are whole. Report it with the model's configuration."
    )
