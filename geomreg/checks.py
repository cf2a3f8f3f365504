"""The only place that builds shape and value error messages.

Every message reads ``<callable>: expected <what>, got <value>. <what to do>.``
"""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.same_weights import compare
from geomreg.types import Embeddings

__all__ = [
    "check_all_finite",
    "check_anchors",
    "check_axis",
    "check_bank",
    "check_below",
    "check_call",
    "check_callable",
    "check_choices",
    "check_chunks",
    "check_class_numbers",
    "check_classes",
    "check_collapse",
    "check_common_ids",
    "check_count",
    "check_dense",
    "check_directions",
    "check_distances_differ",
    "check_embeddings",
    "check_finite",
    "check_fraction",
    "check_inputs",
    "check_labels",
    "check_layers",
    "check_map_pair",
    "check_maps",
    "check_mask",
    "check_matrix",
    "check_max_samples",
    "check_mean",
    "check_modalities",
    "check_modality",
    "check_module",
    "check_named",
    "check_next_widths",
    "check_number",
    "check_one_number",
    "check_option",
    "check_order",
    "check_pair",
    "check_paired",
    "check_paired_embeddings",
    "check_pairs_present",
    "check_points",
    "check_positive",
    "check_prefixes",
    "check_returned",
    "check_rows",
    "check_same_ids",
    "check_same_keys",
    "check_same_rows",
    "check_same_samples",
    "check_sample_count",
    "check_samples",
    "check_scalar",
    "check_scale",
    "check_size",
    "check_student",
    "check_teacher",
    "check_tensors_or_embeddings",
    "check_updated",
    "check_weight",
    "check_width",
    "describe",
]


def describe(value: object) -> str:
    """Kind, dtype and shape of a tensor, the name of a class, the type's name of anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"nested {dtype} tensor"
        kind = "meta " if value.is_meta else "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{kind}{dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"{type(value).__name__}"


def check_dense(name: str, what: str, value: object, *, shape: str = "", real: bool = True) -> Tensor:
    """A tensor whose numbers lie one beside the other, each of 16 bits or more; ``real``: on a device that holds them."""
    if not isinstance(value, Tensor):
        inner = _tensor_in(value)
        hint = f"Take its .{inner}" if inner else "Pass a tensor"
        raise TypeError(f"{name}: expected {what} as a tensor{shape}, got {describe(value)}. {hint}.")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: expected {what} as a dense tensor, got a {describe(value)}. Call .to_dense(), or pad it.")
    if value.dtype.itemsize == 1 and value.is_floating_point():
        raise TypeError(f"{name}: expected {what} of at least 16 bits, got a {describe(value)}. Convert with .float().")
    if real and value.is_meta:
        raise TypeError(f"{name}: expected {what} with numbers in it, got a {describe(value)}. Build the model on a real device.")
    return value


def check_matrix(name: str, label: str, value: object, *, real: bool = True) -> Tensor:
    """Embeddings: a floating-point tensor ``(B, D)`` with at least one row and column."""
    value = check_dense(name, f"{label} embeddings", value, shape=" of shape (B, D)", real=real)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(
            f"{name}: expected {label} embeddings of shape (B, D) with B, D >= 1, got {describe(value)}. "
            "Flatten or pool to one vector per sample."
        )
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating-point {label} embeddings, got {describe(value)}. Convert with .float().")
    return value


def check_returned(name: str, embeddings: object) -> Embeddings:
    """What ``encode`` returned: :class:`Embeddings` of dense tensors."""
    if not isinstance(embeddings, Embeddings):
        inner = _tensor_in(embeddings)
        hint = f"Take its .{inner} and wrap it" if inner else "Wrap its result"
        raise TypeError(f"{name}: expected encode to return geomreg.Embeddings, got {describe(embeddings)}. {hint}.")
    for field, value in embeddings._asdict().items():
        if value is not None:
            check_dense(name, f"{field} embeddings", value)
    return embeddings


def _tensor_in(output: object) -> str | None:
    """Name of the embeddings in an output object, as models of transformers return it."""
    names = ("image_embeds", "text_embeds", "pooler_output")
    return next((name for name in names if isinstance(getattr(output, name, None), Tensor)), None)


def check_pair(name: str, student: Tensor, teacher: Tensor, modality: str = "", *, same_width: bool = True, other: str = "teacher") -> None:
    """Student and teacher embeddings of the same samples: equal ``(B, D)``, one device, a constant teacher."""
    label = f"{modality} " if modality else ""
    check_matrix(name, f"{label}student", student, real=False)
    check_matrix(name, f"{label}{other}", teacher, real=False)
    if len(student) != len(teacher) or (same_width and student.shape != teacher.shape):
        what = "shape" if same_width else "number of rows"
        raise ValueError(
            f"{name}: expected {label}student and {other} embeddings of one {what}, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Embed the same batch with both models."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: expected {label}student and {other} on one device, got {student.device} and {teacher.device}. "
            f"Move the {other}'s embeddings."
        )
    check_dense(name, f"{label}student embeddings", student)
    if teacher.requires_grad:
        raise ValueError(
            f"{name}: expected {label}{other} embeddings without gradient, got a {other} that requires grad. "
            "Embed with geomreg.Teacher, under torch.no_grad(), or call .detach()."
        )
    compare(student, teacher)


def check_rows(name: str, embeddings: Tensor, minimum: int) -> None:
    """Enough samples for a relation between them."""
    if len(embeddings) < minimum:
        raise ValueError(f"{name}: expected at least {minimum} samples, got {len(embeddings)}. Use a larger batch.")


def check_paired(name: str, image: Tensor, text: Tensor) -> None:
    """Images and texts of the same pairs: equal ``(B, D)`` on one device."""
    if image.shape != text.shape or image.device != text.device:
        raise ValueError(
            f"{name}: expected image and text embeddings of the same pairs, got {describe(image)} on {image.device} and "
            f"{describe(text)} on {text.device}. Row j of both must belong to pair j."
        )


def check_paired_embeddings(name: str, image: Tensor, text: Tensor) -> None:
    """Image and text embeddings of the same pairs by one model: floating-point ``(B, D)`` matrices of one shape."""
    check_matrix(name, "image", image)
    check_matrix(name, "text", text)
    check_paired(name, image, text)


def check_student(name: str, student: Embeddings) -> Embeddings:
    """The argument is ``Embeddings``."""
    if not isinstance(student, Embeddings):
        raise TypeError(f"{name}: expected student as geomreg.Embeddings(image=, text=), got {describe(student)}. Wrap the tensors.")
    return student


def check_teacher(name: str, teacher: Embeddings) -> Embeddings:
    """The argument is ``Embeddings``."""
    if not isinstance(teacher, Embeddings):
        raise TypeError(f"{name}: expected teacher as geomreg.Embeddings(image=, text=), got {describe(teacher)}. Wrap the tensors.")
    return teacher


def check_width(name: str, embeddings: Embeddings) -> int:
    """Width of the embeddings, the same for images and texts."""
    widths = [value.shape[1] for value in embeddings if value is not None]
    if len(set(widths)) > 1:
        raise ValueError(
            f"{name}: expected image and text embeddings of one width, got {widths[0]} and {widths[1]}. Take both after the projection."
        )
    return widths[0]


def check_bank(name: str, label: str, bank: Tensor | None, like: Tensor, *, constant: bool = False) -> Tensor:
    """Embeddings ``(M, D)`` to compare those of a batch with: of its width, on its device."""
    bank = check_matrix(name, label, bank, real=False)
    if bank.shape[1] != like.shape[1] or bank.device != like.device:
        raise ValueError(
            f"{name}: expected {label} embeddings of width {like.shape[1]} on {like.device}, got {describe(bank)} on {bank.device}. "
            "Embed them with the same model and move them."
        )
    if constant and bank.requires_grad:
        raise ValueError(f"{name}: expected constant {label} embeddings, got some that require grad. Embed them under torch.no_grad().")
    return bank


def check_mask(name: str, label: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """None, or a boolean tensor of ``shape``."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"{name}: expected {label} as a bool tensor of shape {shape}, got {describe(mask)}. Compare labels, say.")


def check_anchors(name: str, label: str, values: Mapping[str, Tensor], anchors: Mapping[str, Tensor], *, constant: bool = True) -> None:
    """At least one tensor; for each an anchor of its name and shape, without gradient if ``constant``."""
    for what, given in (("parameters", values), (label, anchors)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name}: expected {what} as a mapping of names to tensors, got {describe(given)}. Pass a dict.")
    if not values:
        raise ValueError(f"{name}: expected at least one parameter that requires grad, got none. Unfreeze some, or exclude fewer.")
    check_same_keys(f"{name}, {label}", values, anchors)
    for key, anchor in anchors.items():
        if constant and anchor.requires_grad:
            raise ValueError(f"{name}: expected constant {label}, got one that requires grad for {key!r}. Detach and clone them.")


def check_call(name: str, parameters: Sequence[inspect.Parameter], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Arguments that a signature without self has: by position only where it allows, no unknown name, none missing."""
    named = [one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
    places = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    takes = f"Its options are {', '.join(named)}" if named else "It has no options"
    if len(args) > len(places):
        raise TypeError(f"{name}: expected options by name, got {describe(args[len(places)])} without one. {takes}.")
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        for key in kwargs:
            if key not in named:
                near = difflib.get_close_matches(key, named, n=1)
                raise TypeError(
                    f"{name}: expected options that it has, got {key}. " + (f"Did you mean {near[0]}?" if near else f"{takes}.")
                )
    given = {*places[: len(args)], *kwargs}
    missing = [one.name for one in parameters if one.name in named and one.default is one.empty and one.name not in given]
    if missing:
        raise TypeError(f"{name}: expected {', '.join(missing)}, got no value. Pass {missing[0]}=....")


def check_callable(name: str, label: str, value: object, what: str) -> None:
    """``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected {label} as a function {what}, got {describe(value)}. Pass a function.")


def check_axis(name: str, axis: int) -> None:
    """A whole number other than 0, the axis of the samples."""
    if isinstance(axis, bool) or not isinstance(axis, Integral) or axis == 0:
        raise ValueError(f"{name}: expected axis as a whole number other than 0, got {axis!r}. Use -1 for channels.")


def check_layers(name: str, layers: Sequence[str], known: Mapping[str, object]) -> Sequence[str]:
    """At least one name of a layer, all known."""
    layers = layers if isinstance(layers, (str, list, tuple)) else ()
    unknown = [] if isinstance(layers, str) else [layer for layer in layers if layer not in known]
    if isinstance(layers, str) or not layers or unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
        hint = f"Did you mean {near[0]!r}?" if near else "See model.named_modules()."
        raise ValueError(f"{name}: expected a list of names of the model's layers, got {unknown[0] if unknown else layers!r}. {hint}")
    return layers


def check_maps(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Equally many feature maps, at least one, from student and teacher."""
    for label, value in (("student", student), ("teacher", teacher)):
        for one in value if isinstance(value, (list, tuple)) else ():
            if isinstance(one, Tensor):
                check_dense(name, f"{label} maps", one)
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, Tensor) and one.is_floating_point() for one in value):
            raise TypeError(f"{name}: expected {label} maps as a list of floating-point tensors, got {describe(value)}. Use FeatureMaps.")
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{name}: expected as many maps from both models, got {len(student)} and {len(teacher)}. Name the same layers.")


def check_map_pair(name: str, student: Tensor, teacher: Tensor, axis: int) -> None:
    """Two feature maps of one shape and device that have ``axis``, the teacher's constant."""
    if student.shape != teacher.shape or student.device != teacher.device:
        raise ValueError(
            f"{name}: expected maps of one shape and device from both models, got {describe(student)} on {student.device} and "
            f"{describe(teacher)} on {teacher.device}. Use the same layers and batch."
        )
    if not student.numel():
        raise ValueError(f"{name}: expected maps with at least one number, got {describe(student)}. Drop what is empty.")
    if teacher.requires_grad:
        raise ValueError(
            f"{name}: expected teacher maps without gradient, got some that require grad. Run the teacher under torch.no_grad()."
        )
    check_axis(name, axis)
    if not -student.ndim < axis < student.ndim:
        raise ValueError(f"{name}: expected an axis of a map of shape {tuple(student.shape)}, got {axis}. Use -1 for channels.")


def check_chunks(name: str, batch: Any) -> Any:
    """A tensor, or a tuple, list or dict of tensors, of one length along dimension 0."""
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(tensors, (list, tuple)) or not tensors or not all(isinstance(value, Tensor) for value in tensors):
        raise TypeError(
            f"{name}: expected batch as a tensor, or a tuple or dict of tensors, got {_content(batch)}. Collate it first, and leave "
            "out what the encoder does not take."
        )
    lengths = [len(value) if value.ndim else None for value in tensors]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"{name}: expected tensors with equally many samples along dimension 0, got {lengths}. Give towers of their own "
            "length as parts."
        )
    return batch


def _content(batch: Any) -> str:
    """A batch by its first entry that is no tensor."""
    entries = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    for key, value in entries:
        if not isinstance(value, Tensor):
            return f"{describe(batch)} with {describe(value)} at {key!r}"
    return f"an empty {describe(batch)}" if isinstance(batch, (Mapping, list, tuple)) else describe(batch)


def check_same_rows(name: str, embeddings: Embeddings, rows: int) -> Embeddings:
    """Every modality that is there has one row for each sample."""
    for field, value in embeddings._asdict().items():
        if value is not None:
            check_dense(name, f"{field} embeddings", value)
        if value is not None and (value.ndim != 2 or len(value) != rows or not value.is_floating_point()):
            raise ValueError(
                f"{name}: expected floating-point {field} embeddings of shape ({rows}, D) for {rows} samples, got {describe(value)}. "
                "Row i must belong to sample i."
            )
    return embeddings


def check_scalar(name: str, loss: Tensor) -> Tensor:
    """A 0-d floating-point tensor."""
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise ValueError(f"{name}: expected loss_fn to return a 0-d floating-point tensor, got {describe(loss)}. Average over samples.")
    return loss


def check_inputs(name: str, given: Mapping[str, object], needed: Sequence[str], optional: Sequence[str]) -> None:
    """Named inputs: all that are needed, none that is unknown."""
    known = (*needed, *optional)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Its terms take {', '.join(known) or 'none'}."
            raise TypeError(f"{name}: expected inputs that a term takes, got {key}. {hint}")
    missing = [key for key in needed if key not in given]
    if missing:
        raise TypeError(f"{name}: expected the inputs {', '.join(needed)}, got no {missing[0]}. Pass {missing[0]}=....")


def check_labels(name: str, labels: Tensor | None, rows: int, *, matrix: bool = False) -> None:
    """None, ``(B,)`` integers, or (if ``matrix``) ``(B, B)`` floating-point soft labels."""
    if labels is None:
        return
    soft = isinstance(labels, Tensor) and matrix and labels.is_floating_point() and tuple(labels.shape) == (rows, rows)
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool and labels.shape == (rows,)
    if not soft and not integers:
        more = f" or floating-point soft labels of shape ({rows}, {rows})" if matrix else ""
        raise ValueError(f"{name}: expected labels as integers of shape ({rows},){more}, got {describe(labels)}. One label a pair.")


def check_class_numbers(name: str, labels: Tensor | None, classes: int) -> None:
    """None, or integer labels of classes that there are."""
    if labels is not None and (wrong := labels[(labels < 0) | (labels >= classes)]).numel():
        raise ValueError(
            f"{name}: expected labels from 0 to {classes - 1}, one of {classes} classes, got {int(wrong[0])}. Number the classes."
        )


def check_one_number(name: str, label: str, value: float | Tensor) -> None:
    """A finite number, or one floating-point number in a tensor (whose value nobody waits for)."""
    if not isinstance(value, Tensor):
        check_number(name, label, value)
    elif value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name}: expected {label} as one floating-point number, got {describe(value)}. Pass a number or a 0-d tensor.")


def check_scale(name: str, label: str, value: float | Tensor, *, constant: bool = False) -> None:
    """An exponentiated logit scale: a positive number, or one number in a tensor; without gradient if ``constant``."""
    check_one_number(name, label, value)
    if not isinstance(value, Tensor):
        check_positive(name, label, value)
    elif constant and value.requires_grad:
        raise ValueError(f"{name}: expected a constant {label}, got one that requires grad. Call .detach() on it.")


def check_mean(name: str, mean: Tensor, width: int) -> None:
    """A mean difference vector: ``(D,)`` or a 0-d zero-like scalar, constant."""
    if isinstance(mean, Tensor):
        check_dense(name, "mean", mean)
    if not isinstance(mean, Tensor) or not mean.is_floating_point():
        raise TypeError(f"{name}: expected mean as a floating-point tensor, got {describe(mean)}. Pass torch.zeros({width}) for none.")
    if mean.ndim != 0 and tuple(mean.shape) != (width,):
        raise ValueError(f"{name}: expected mean of shape ({width},) or (), got {tuple(mean.shape)}. Use the embedding width.")
    if mean.requires_grad:
        raise ValueError(f"{name}: expected a constant mean, got one that requires grad. Call .detach() on it.")


def check_embeddings(
    name: str, student: Embeddings, teacher: Embeddings | None, *, required: tuple[str, ...] = (), other: str = "teacher"
) -> Embeddings:
    """Both arguments are ``Embeddings`` with the same modalities, at least one and all ``required``, and pass
    :func:`check_pair`; returns the teacher's, which messages call ``other``."""
    for label, value in (("student", student), (other, teacher)):
        if not isinstance(value, Embeddings):
            raise TypeError(f"{name}: expected {label} as geomreg.Embeddings(image=, text=), got {describe(value)}. Wrap the tensors.")
    if teacher is None:  # excluded above; tells the type checker
        raise TypeError(name)
    for modality in Embeddings._fields:
        present = [getattr(value, modality) is not None for value in (student, teacher)]
        if present[0] != present[1]:
            having, lacking = ("student", other) if present[0] else (other, "student")
            raise ValueError(
                f"{name}: expected {modality} embeddings from both models, got them from the {having} and None from the {lacking}. "
                "Embed the same modalities with both."
            )
        if all(present):
            check_pair(name, getattr(student, modality), getattr(teacher, modality), modality, other=other)
    for modality in required:
        if getattr(student, modality) is None:
            raise ValueError(f"{name}: expected {modality} embeddings, got None. Embed them, or leave {modality!r} out of modalities.")
    if student.image is None and student.text is None:
        raise ValueError(f"{name}: expected image or text embeddings, got None for both. Embed at least one modality.")
    return teacher


def check_pairs_present(name: str, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Image and text embeddings, for a term that needs pairs."""
    if embeddings.image is None or embeddings.text is None:
        lacking = "image" if embeddings.image is None else "text"
        raise ValueError(
            f"{name}: expected image-text pairs, got None for the {lacking} embeddings. Use paired data, or a term without pairs."
        )
    for field, value in embeddings._asdict().items():
        check_matrix(name, field, value)
    return embeddings.image, embeddings.text


def check_modalities(name: str, modalities: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """None, or a non-empty choice of ``"image"`` and ``"text"`` as a tuple."""
    if modalities is None:
        return None
    if not isinstance(modalities, (tuple, list)) or not modalities or not set(modalities) <= set(Embeddings._fields):
        raise ValueError(f'{name}: expected modalities as a tuple of "image" and "text" or None, got {modalities!r}. Pass ("image",), say.')
    return tuple(modalities)


def check_choices(name: str, option: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """A non-empty choice of different strings among ``allowed``, as a tuple."""
    if isinstance(values, str) or not values or len(set(values)) != len(values) or not set(values) <= set(allowed):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(
            f"{name}: expected {option} as a tuple of different ones of {choices}, got {values!r}. Pass ({allowed[0]!r},), say."
        )
    return tuple(values)


def check_option(name: str, option: str, value: object, allowed: tuple[object, ...]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}: expected {option} to be one of {choices}, got {value!r}. Choose one of these.")


def check_fraction(name: str, option: str, value: float, *, below_one: bool = False) -> None:
    """``value`` lies in [0, 1], or in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1 or (below_one and value == 1):
        end = "1)" if below_one else "1]"
        raise ValueError(f"{name}: expected {option} between 0 and 1, got {value!r}. Pass a number in [0, {end}.")


def check_module(name: str, label: str, value: object) -> None:
    """``value`` is an ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected {label} as an nn.Module, got {describe(value)}. Pass the model.")


def check_prefixes(name: str, option: str, prefixes: tuple[str, ...], known: Mapping[str, object]) -> None:
    """A tuple of prefixes, each of some known name."""
    if isinstance(prefixes, str) or not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"{name}: expected {option} as a tuple of prefixes, got {prefixes!r}. Write ({prefixes!r},), say.")
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in known):
            raise ValueError(f"{name}: expected {option} of parameters that there are, got {prefix!r}. See model.named_parameters().")


def check_weight(name: str, option: str, value: float) -> None:
    """``value`` is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected {option} as a finite number >= 0, got {value!r}. Pass a plain number.")


def check_positive(name: str, option: str, value: float) -> None:
    """``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected {option} as a finite number > 0, got {value!r}. Pass a plain number.")


def check_count(name: str, option: str, value: int, minimum: int) -> None:
    """``value`` is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}: expected {option} as a whole number >= {minimum}, got {value!r}. Pass such a number.")


def check_number(name: str, option: str, value: float) -> None:
    """``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: expected {option} as a finite number, got {value!r}. Pass a plain number.")


def check_finite(name: str, label: str, value: Tensor) -> None:
    """No NaN or infinity: for metrics, caches and commands (losses let them propagate)."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite {label}, got NaN or infinity. Look for a diverged run or a division by a zero norm.")


def check_samples(name: str, student: Tensor, teacher: Tensor, *, minimum: int, same_width: bool = False) -> None:
    """Finite embeddings of the same samples by two models, at least ``minimum`` of them."""
    for label, value in (("student", student), ("teacher", teacher)):
        check_matrix(name, label, value)
        check_finite(name, f"{label} embeddings", value)
    if len(student) != len(teacher) or (same_width and student.shape != teacher.shape):
        what = "embeddings of one shape" if same_width else "as many student as teacher embeddings"
        raise ValueError(
            f"{name}: expected {what}, got {tuple(student.shape)} and {tuple(teacher.shape)}. Embed the same samples with both."
        )
    check_sample_count(name, len(student), minimum)


def check_modality(name: str, embeddings: Embeddings, modality: str) -> Tensor:
    """The image or text embeddings, or both one under the other for ``"stacked"`` and ``"cross-modal"``."""
    if not isinstance(embeddings, Embeddings):
        raise TypeError(f"{name}: expected geomreg.Embeddings(image=, text=), got {describe(embeddings)}. Wrap the tensors.")
    both = modality in ("stacked", "cross-modal")
    needed = Embeddings._fields if both else (modality,)
    values = [getattr(embeddings, field) for field in needed]
    for field, value in zip(needed, values, strict=True):
        if value is None:
            raise ValueError(f'{name}: expected {field} embeddings for modality="{modality}", got None. Embed them or change modality.')
        check_matrix(name, field, value)
    if both:
        check_paired(name, *values)
    return torch.cat(values)


def check_same_ids(name: str, ids: object, teacher_ids: object, rows: int) -> Tensor | None:
    """Integer sample ids, one a row, the same in the same order on both sides; None if none are given."""
    if ids is None and teacher_ids is None:
        return None
    if ids is None:
        raise ValueError(f"{name}: expected ids beside teacher_ids, got None. Pass both, or ids alone.")
    known = _as_ids(name, ids, rows)
    if teacher_ids is not None and not torch.equal(known, _as_ids(name, teacher_ids, rows)):
        raise ValueError(f"{name}: expected the same ids in the same order from student and teacher, got different ones. Sort both by id.")
    return known


def _as_ids(name: str, ids: object, rows: int) -> Tensor:
    try:
        known = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected {rows} integer ids, got {describe(ids)}. Number the samples.") from error
    if known.is_floating_point() or known.is_complex() or known.dtype == torch.bool or tuple(known.shape) != (rows,):
        raise ValueError(f"{name}: expected {rows} integer ids, got {describe(known)}. Pass one id a sample.")
    return known.cpu().long()


def check_same_keys(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Two state dicts with the same keys, shapes and kinds of numbers."""
    missing = sorted(first.keys() ^ second.keys())
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{name}: expected two state dicts with the same keys, got {shown} in only one. Use checkpoints of one architecture."
        )
    for key in first:
        one, two = first[key], second[key]
        for value in (one, two):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor for {key!r}, got {describe(value)}. Pass state dicts of tensors.")
        if one.shape != two.shape or one.is_floating_point() != two.is_floating_point():
            raise ValueError(
                f"{name}: expected equal shapes and kinds for {key!r}, got {describe(one)} and {describe(two)}. "
                "Use checkpoints of one architecture."
            )


def check_mixed(name: str, key: str, start: Tensor, stop: Tensor, mixed: Tensor) -> None:
    """Numbers of two state dicts whose mean is one: no NaN, and infinity on both sides alone."""
    if bool((mixed.isfinite() | (start == stop)).all()):
        return
    whose = "pre-trained" if not bool(start.isfinite().all()) else "fine-tuned"
    bad = start if whose == "pre-trained" else stop
    what = "NaN" if bool(bad.isnan().any()) else "infinity"
    raise ValueError(
        f"{name}: expected finite numbers in {key!r}, got {what} in the {whose} weights. Take a checkpoint from before the run diverged."
    )


def check_sample_count(name: str, count: int, minimum: int) -> None:
    """Enough samples for distances that can be compared."""
    if count < minimum:
        raise ValueError(f"{name}: expected at least {minimum} samples, got {count}. Distances need more samples to be compared.")


def check_tensors_or_embeddings(name: str, value: object, modality: str | None) -> Tensor:
    """A tensor without ``modality``; with one, what :func:`check_modality` gives."""
    if modality is not None:
        return check_modality(name, value, modality)  # type: ignore[arg-type]  # any other type raises
    if isinstance(value, Embeddings):
        raise TypeError(f'{name}: expected tensors without modality, got Embeddings. Pass modality="image", say.')
    return value  # type: ignore[return-value]  # check_samples follows


def check_common_ids(name: str, first: Sequence[object], second: Sequence[object], of_first: str, of_second: str) -> None:
    """The same sample ids, in any order."""
    if differing := set(first) ^ set(second):
        shown = ", ".join(repr(one) for one in sorted(differing, key=repr)[:3])
        raise ValueError(
            f"{name}: expected {of_second} of the same samples as {of_first}, got {len(differing)} that only one of them has: {shown}. "
            "Pass ids= of common ones."
        )


def check_max_samples(name: str, rows: int, limit: int) -> None:
    """No more rows than a metric is allowed to keep."""
    if rows > limit:
        raise ValueError(
            f"{name}: expected at most max_samples={limit} rows, got {rows}. Take a subset, or raise max_samples "
            "(the cost grows with its square)."
        )


def check_same_samples(
    name: str, labels: Sequence[str], values: Sequence[Tensor], *, minimum: int, same_rows: bool = True, same_width: bool = False
) -> None:
    """Finite embeddings, each of at least ``minimum`` samples, on one device; of the same samples if ``same_rows``."""
    for label, value in zip(labels, values, strict=True):
        check_matrix(name, label, value, real=False)
    shapes, both = " and ".join(str(tuple(value.shape)) for value in values), " and ".join(labels)
    if same_rows and len({len(value) for value in values}) > 1:
        raise ValueError(f"{name}: expected {both} embeddings of the same samples, got shapes {shapes}. Row i of each must be sample i.")
    if same_width and len({value.shape[1] for value in values}) > 1:
        raise ValueError(f"{name}: expected {both} embeddings of one width, got shapes {shapes}. Embed them into one space.")
    if len({value.device for value in values}) > 1:
        devices = " and ".join(str(value.device) for value in values)
        raise ValueError(f"{name}: expected {both} embeddings on one device, got {devices}. Move one of them.")
    for label, value in zip(labels, values, strict=True):
        check_dense(name, f"{label} embeddings", value)
        check_finite(name, f"{label} embeddings", value)
        check_size(name, label, value)
    if min(len(value) for value in values) < minimum:
        few = min(len(value) for value in values)
        raise ValueError(f"{name}: expected at least {minimum} samples, got {few}. Take more samples.")


def check_size(name: str, label: str, embeddings: Tensor, *, small: bool = False) -> None:
    """Numbers whose fourth powers neither overflow nor vanish in fp64: any of a narrower type, and zeros; with ``small`` tiny ones."""
    if embeddings.dtype != torch.float64:
        return
    largest = float(embeddings.detach().abs().max())
    if largest > 1e60:
        raise ValueError(f"{name}: expected {label} embeddings below 1e60, got larger ones. Their powers overflow; scale them.")
    if 0 < largest < 1e-60 and not small:
        raise ValueError(f"{name}: expected {label} embeddings above 1e-60, got smaller ones alone. Their powers vanish; scale them.")


def check_collapse(name: str, label: str, collapsed: bool) -> None:
    """Embeddings that are not all equal."""
    if collapsed:
        raise ValueError(
            f"{name}: expected {label} embeddings that differ, got equal ones alone. The measure is undefined; look for a collapsed model."
        )


def check_directions(name: str, label: str, embeddings: Tensor) -> Tensor:
    """The embeddings in fp64, divided by their norms, none of which is 0."""
    scale = embeddings.detach().double().abs().amax(dim=1, keepdim=True)
    if bool((scale == 0).any()):
        raise ValueError(f"{name}: expected {label} embeddings with a direction, got a zero vector. Drop that sample.")
    scaled = embeddings.detach().double() / scale  # squares neither overflow nor vanish
    directions: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return directions


def check_next_widths(name: str, before: Sequence[int], widths: Sequence[int], labels: Sequence[str] = ()) -> None:
    """A further batch, or that of another process, has the widths of those collected before."""
    if tuple(before) == tuple(widths):
        return
    if labels:  # name those that changed
        before, widths, labels = zip(*(one for one in zip(before, widths, labels, strict=True) if one[0] != one[1]), strict=True)
    old, new, whose = (" and ".join(str(one) for one in values) for values in (before, widths, labels))
    what = f"{whose} embeddings" if labels else "embeddings"
    raise ValueError(f"{name}: expected {what} of width {old} as before, got {new}. Call reset() between models.")


def check_updated(name: str, samples: int, minimum: int) -> None:
    """A metric collected at least ``minimum`` samples before ``compute``."""
    if samples < minimum:
        what = "Call update() first." if samples == 0 else "Take more samples."
        raise ValueError(f"{name}: expected at least {minimum} samples, got {samples or 'none'}. {what}")


def check_distances_differ(name: str, least: Tensor, most: Tensor, pairs: int) -> None:
    """The least and the largest distance of each space differ by more than rounding."""
    if bool((most - least <= 1e-12 * most).any()):
        raise ValueError(
            f"{name}: expected distances that differ, got {pairs} equal ones. The correlation is undefined; "
            "look for collapsed embeddings or take more samples."
        )


def check_below(name: str, option: str, value: int, limit: int, what: str) -> None:
    """``value`` is less than the number of samples, say."""
    if value >= limit:
        raise ValueError(
            f"{name}: expected {option} below the number of {what}, {limit}, got {value}. Take more samples, or a smaller {option}."
        )


def check_named(name: str, label: str, values: object, kind: type) -> None:
    """A mapping of at least one name to a value of type ``kind``."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name}: expected {label} as a mapping of names to values, got {describe(values)}. Pass {{'DiVE': ...}}, say.")
    if not values:
        raise ValueError(f"{name}: expected at least one named value in {label}, got an empty mapping. Pass {{'DiVE': ...}}, say.")
    for key, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__} for {key!r}, got {describe(value)}. See geomreg.metrics.")


def check_all_finite(name: str, label: str, values: Sequence[float | Tensor]) -> None:
    """Numbers, none of which is NaN or infinite."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}: expected finite numbers for {label!r}, got NaN or infinity. Look for a diverged run.")


def check_classes(name: str, labels: object, rows: int, limit: int | None = None) -> list[int] | list[str]:
    """One class a row, all whole numbers or all strings; at most ``limit`` different ones."""
    values: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    kinds = [all(isinstance(value, kind) and not isinstance(value, bool) for value in values) for kind in (Integral, str) if listed]
    if not any(kinds) or len(values) != rows:
        got = f"{len(values)}" if any(kinds) else describe(labels)
        raise ValueError(f"{name}: expected labels as {rows} whole numbers or {rows} strings, got {got}. Pass one label a sample.")
    if limit is not None and len(set(values)) > limit:
        raise ValueError(
            f"{name}: expected at most {limit} classes, as many as markers tell apart, got {len(set(values))}. Group them or pass none."
        )
    return list(values)


def check_order(name: str, order: object, rows: int) -> list[int]:
    """Every row's number once."""
    values: Any = order.tolist() if hasattr(order, "tolist") else order
    if not isinstance(values, Sequence) or not all(isinstance(value, Integral) for value in values) or sorted(values) != list(range(rows)):
        raise ValueError(f"{name}: expected order as the numbers 0 to {rows - 1} in some order, got others. Pass torch.argsort(...), say.")
    return list(values)


def check_points(name: str, label: str, value: object) -> list[tuple[float, float]]:
    """Pairs of percentages: one, or several of a sweep."""
    pairs: Any = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(pairs, (list, tuple)) and pairs and not isinstance(pairs[0], (list, tuple)):
        pairs = [pairs]
    if not isinstance(pairs, (list, tuple)) or not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"{name}: expected (ID, zero-shot) accuracies or a list of such for {label!r}, got {value!r}. Pass (75.0, 60.0), say."
        )
    for number in (number for pair in pairs for number in pair):
        if isinstance(number, bool) or not isinstance(number, (Real, Tensor)) or not 0 <= float(number) <= 100:
            raise ValueError(f"{name}: expected accuracies in per cent, 0 to 100, for {label!r}, got {number!r}. Check the run.")
    return [(float(x), float(y)) for x, y in pairs]
