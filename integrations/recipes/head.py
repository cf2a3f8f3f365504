"""A linear classifier on the image embeddings: its start, where it is kept, and how it is written.

An exported model with a head, ``model``, ``best`` or an ensemble of a run that trained one, holds ``head.safetensors``: ``weight``
(C, D) and ``bias`` (C,) on unit image embeddings, and ``start.weight`` and ``start.bias``, the zero-shot head of the base model. Row c
belongs to the c-th name in ``classes.json``. With open_clip and safetensors alone it is used so::

    import json
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:runs/mine/model")
    head = load_file("runs/mine/model/head.safetensors")
    classes = json.load(open("runs/mine/model/classes.json", encoding="utf-8"))
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(Image.open("picture.png"))[None], normalize=True)
        logits = image @ head["weight"].T + head["bias"]
    print(classes[logits.argmax().item()])

A picture with transparency, an orientation or 16 bits is read as in training by ``load_rgb("picture.png")`` of
:mod:`geomreg.integrations.recipes.data.images`, in the place of ``Image.open``.

:func:`load_head` gives it as two ``nn.Linear`` and the names.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes.checksums import check_export
from geomreg.integrations.recipes.data import collate
from geomreg.integrations.recipes.evaluate import zero_shot_head
from geomreg.integrations.recipes.files import read_json

__all__ = ["NAME", "attach_head", "linear_probe", "load_head", "take_head", "write_head", "zero_shot_classifier"]

NAME = "classifier"  # the model's submodule, so that it is trained, saved and synchronised with the rest


def zero_shot_classifier(model: nn.Module, tokens: Tensor) -> nn.Linear:
    """The head that plain fine-tuning starts from: class embeddings times the logit scale, bias 0 (WiSE-FT, arXiv 2109.01903).

    Args:
        model: open_clip model.
        tokens: ``(T, C, L)`` token ids of C classes in T templates.
    """
    weight = zero_shot_head(model, tokens) * model.logit_scale.detach().exp()
    return _linear(weight, torch.zeros_like(weight[:, 0]))


def linear_probe(
    model: nn.Module,
    dataset: Any,
    start: nn.Linear,
    accelerator: Accelerator,
    *,
    penalty: float = 1e-4,
    steps: int = 200,
    batch_size: int = 256,
    workers: int = 0,
    limit: int | None = None,
) -> nn.Linear:
    """Logistic regression on the frozen model's unit embeddings of un-augmented images: the first half of LP-FT (arXiv 2202.10054).

    Minimises by L-BFGS the mean cross-entropy and ``penalty / 2`` times the squared distance of the weights to the start, in fp64.

    Args:
        model: open_clip model.
        dataset: samples of ``image`` and ``label``; broken ones are left out.
        start: where the search begins, the zero-shot head say.
        accelerator: its processes share the work of embedding, and all end at the same head.
        penalty: on the weights; larger than 0 keeps them finite where classes can be separated.
        steps: of L-BFGS, at most.
        batch_size: images at a time.
        workers: loading processes.
        limit: use the first so many samples alone.
    """
    rows = list(range(len(dataset) if limit is None else min(limit, len(dataset))))[accelerator.process_index :: accelerator.num_processes]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    images, labels = [], []
    loader = DataLoader(Subset(dataset, rows), batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator())
    with torch.no_grad():
        for batch in loader:
            if batch["id"]:
                images.append(embed(model, images=batch["image"].to(device)).image.cpu())
                labels.append(batch["label"])
    model.train(training)
    parts = [(torch.cat(images), torch.cat(labels))] if images else []
    parts = gather_object(parts) if accelerator.num_processes > 1 else parts
    if not parts:
        raise RuntimeError("linear_probe: expected samples that can be read, got none. Look at the data set.")
    image = torch.cat([one for one, _ in parts]).to(device, torch.float64)
    label = torch.cat([one for _, one in parts]).to(device)
    first = start.weight.detach().to(device, torch.float64)
    weight = first.clone().requires_grad_()
    bias = start.bias.detach().to(device, torch.float64).requires_grad_()
    search = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(image @ weight.T + bias, label) + penalty / 2 * (weight - first).square().sum()
        value.backward()
        return value

    search.step(loss)
    return _linear(weight.detach().float(), bias.detach().float())


def attach_head(model: nn.Module, head: nn.Linear) -> nn.Module:
    """Make the head a submodule of the model, on its device; in place."""
    model.add_module(NAME, head.to(next(model.parameters()).device))
    return model


def take_head(model: nn.Module) -> nn.Linear | None:
    """Take the head off the model, in place, and return it; None if there is none."""
    return model._modules.pop(NAME, None)  # type: ignore[return-value]


def write_head(folder: Path, head: nn.Linear, start: nn.Linear, classes: Sequence[str]) -> None:
    """``head.safetensors`` with ``weight`` (C, D), ``bias`` (C,) and where they started, and ``classes.json``."""
    tensors = {"weight": head.weight, "bias": head.bias, "start.weight": start.weight, "start.bias": start.bias}
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, folder / "head.safetensors")
    (folder / "classes.json").write_text(json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_head(folder: Path) -> tuple[nn.Linear, nn.Linear, list[str]] | None:
    """Head, its start, and the classes' names, as :func:`write_head` wrote them; None if there is no head.

    Raises:
        ValueError: a damaged file, or any that is not as it was exported.
    """
    check_export("load_head", folder)
    file = folder / "head.safetensors"
    if not file.is_file():
        return None
    try:
        found = load_file(file)
        head, start = _linear(found["weight"], found["bias"]), _linear(found["start.weight"], found["start.bias"])
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"load_head: expected a head in {file}, got a damaged file ({error}). Export the model anew.") from error
    classes = read_json("load_head", folder / "classes.json", list, "names of classes", "Export the model anew.")
    if len(classes) != len(head.weight) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"load_head: expected {len(head.weight)} names of classes in {folder / 'classes.json'}, as the head has, got {len(classes)} "
            "entries, or others than names. Export the model anew."
        )
    return head, start, classes


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):  # its own start is not used
        head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head
