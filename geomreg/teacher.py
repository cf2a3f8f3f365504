"""The model that a student is compared with: a frozen copy, the student without its adapters, a running average of it, or a cache."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geomreg.checks import check_count, check_fraction, check_modalities, check_returned, describe
from geomreg.same_weights import HALF_ROUNDING, Agreement, Origin, same_parameters
from geomreg.schedules import Schedule
from geomreg.statistics import follow_statistics, moving_statistics
from geomreg.types import Embeddings

if TYPE_CHECKING:
    from geomreg.cache import EmbeddingCache

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """Frozen copy of a model, as it is now: evaluation mode, no gradient, buffers copied too.

    The copy stays frozen under ``.train()`` and ``.requires_grad_()``, follows ``.to(...)``, and as a part of another
    module adds nothing to that module's ``parameters()`` or ``state_dict()``: checkpoints do not grow and no optimizer
    moves it. Its embeddings are ordinary tensors without graph (``no_grad``, not ``inference_mode``, whose tensors
    cannot enter a loss).

    :meth:`adapters_off`, :meth:`averaged` and :meth:`cached` build the other kinds; all are called alike, and :meth:`step` may be
    called on each after every optimizer step.

    A student in training mode with dropout, drop path or patch dropout does not agree with its teacher even before it has moved: every
    term starts far from 0 and fits that noise. Embed the batch of the terms with ``student.eval()`` (gradients flow all the same), or set
    the rates to 0; the batch of the task may keep its dropout. Another view of the batch, other preprocessing and another precision do
    the same. The first term that compares embeddings of a student that still has the weights of this teacher warns of it, once; a student
    that is another model, or has moved, is left alone, and so are weights that are sharded over processes, and cached teachers but for
    those whose cache was opened or built with a teacher made from the student.

    Args:
        model: any ``nn.Module``; copied, never changed.
        encode: ``encode(model, batch) -> Embeddings``, the same function and the same view of the batch as for the student.

    Raises:
        TypeError: ``model`` is no module, ``encode`` is not callable or does not return :class:`Embeddings`.
        ValueError: the copy shares storage with ``model``, so training the student would move the teacher.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings, Teacher
        >>> student = torch.nn.Linear(4, 2)
        >>> teacher = Teacher(student, lambda model, batch: Embeddings(image=model(batch)))
        >>> teacher(torch.ones(3, 4)).image.shape, len(list(teacher.parameters()))
        (torch.Size([3, 2]), 0)
    """

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings]) -> None:
        super().__init__()
        _check_encode(model, encode)
        frozen = copy.deepcopy(model)
        _check_independent(model, frozen)
        self.encode = encode
        self._held = (frozen.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not register it
        self._agreement = Agreement(model, self._agrees)
        super().train(False)

    @property
    def model(self) -> nn.Module:
        """The frozen copy."""
        return self._held[0]

    @classmethod
    def adapters_off(cls, model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings]) -> "Teacher":
        """The student itself with its PEFT adapters switched off for the call: no parameter is copied.

        Storage is shared on purpose; what is not an adapter must stay frozen. Modes and ``requires_grad`` of every submodule are
        restored after each call. Adapters on ``nn.MultiheadAttention`` are refused: PEFT merges them into the base weights for
        each forward and takes them out again, which is not exact; use a frozen copy there. So are adapters on its ``out_proj``, which
        never run: the attention reads that layer's weight and does not call it.

        Args:
            model: a model with PEFT adapters (LoRA and its relatives), not merged.
            encode: as for the constructor.

        Raises:
            ValueError: no adapters, merged adapters, adapters on attention; adapters that never run, because their owner reads the weight
                without calling the layer, as ``nn.MultiheadAttention`` does with ``out_proj`` (said in the first call where only running
                it can tell); and what would move with the student: weights beside the adapters that require grad, PEFT's
                ``modules_to_save``, running statistics of a batch normalisation.
        """
        return _AdaptersOff(model, encode)

    @classmethod
    def averaged(
        cls,
        model: nn.Module,
        encode: Callable[[nn.Module, Any], Embeddings],
        *,
        decay: float | Schedule = 0.999,
        every: int = 1,
    ) -> "Teacher":
        """An exponential moving average of the student: ``teacher <- m * teacher + (1 - m) * student`` in :meth:`step`.

        Unlike a frozen copy it is saved: ``state_dict`` holds the average, in fp32 or wider even of a bf16 model, and the number of steps.
        Buffers that are not floating point are the student's. Running statistics of batch normalisations are averaged too, and are not
        those of the averaged weights: the first :meth:`step` warns where they move. Show the teacher the student's batches by
        :meth:`follow`, and they are its own, or collect them anew by :func:`geomreg.recompute_statistics` on ``teacher.model``.

        Args:
            model: the student; the average starts as a copy of it.
            encode: as for the constructor.
            decay: m, or a schedule of it over step numbers. CaRot (arXiv 2311.01723): from 0.05 to 0.9 over a fifth of the steps.
            every: move at step 0 and after each so many; CaRot 500.

        Raises:
            ValueError: a decay outside [0, 1], ``every`` < 1.
        """
        return _Averaged(model, encode, decay=decay, every=every)

    @classmethod
    def cached(
        cls,
        cache: "EmbeddingCache",
        *,
        preprocessing: object = None,
        tokenizer: object = None,
        modalities: tuple[str, ...] | None = None,
    ) -> "Teacher":
        """Embeddings that were computed before: looked up by ``batch["id"]``, on the device of the batch's other tensors.

        Exact where each sample always looks the same: a cache holds one view of each, so the student must see the same one. Where the batch
        has token ids at ``"text"``, they are compared with those that were embedded; images are not compared, so give ``preprocessing``.

        Args:
            cache: an open :class:`geomreg.EmbeddingCache`.
            preprocessing: the transform of the student's images; must be that of the cache (compared if given).
            tokenizer: likewise of its texts.
            modalities: ``("image",)`` or ``("text",)`` for a student that embeds only these; by default all that the cache has.

        Raises:
            ValueError: another preprocessing or tokenizer than the cache's; modalities that it lacks; in a call, unknown ids, or
                another text than the one that was embedded.
            TypeError: in a call, a batch without ``"id"``.
            RuntimeError: in a call, damaged files.
        """
        return _Cached(cache, preprocessing=preprocessing, tokenizer=tokenizer, modalities=modalities)

    def fingerprint(self) -> str:
        """SHA-256 over names and values of the weights and buffers that the embeddings come from.

        Adapters that are off do not count, so that a student with adapters has the fingerprint of the model that it started from.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self._weights(), key=lambda entry: entry[0]):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        return digest.hexdigest()[:32]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from _named_tensors(self.model)

    def step(self) -> None:
        """After each optimizer step that was not skipped: moves an averaged teacher, nothing else."""

    def follow(self, batch: Any, student: nn.Module | None = None) -> None:
        """In each step before :meth:`step`: the running statistics of an averaged teacher's batch normalisations move with the batch on
        which the student is trained, as the student's do, by a forward pass without gradient. They are then not averaged.

        Layers that are in evaluation mode in the student, models without running statistics and other kinds of teachers cost nothing and
        stay as they are. All processes call it together.

        Args:
            batch: what ``encode`` takes.
            student: whose modes count; by default the model that the teacher was made from.
        """

    def forward(self, batch: Any) -> Embeddings:
        with torch.no_grad():
            embeddings = check_returned("Teacher", self.encode(self.model, batch))
        self._agreement.mark(embeddings)
        return embeddings

    def _agrees(self, student: nn.Module) -> bool:
        """Whether both embed alike, by their weights."""
        return same_parameters(student, self.model)

    def train(self, mode: bool = True) -> "Teacher":
        """Changes nothing: a teacher stays in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.model._apply(fn)  # type: ignore[no-untyped-call]
        return self


def _check_encode(model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Teacher: expected model as an nn.Module, got {describe(model)}. Pass the student itself; it is copied.")
    if not callable(encode):
        raise TypeError(f"Teacher: expected encode as a function of (model, batch), got {describe(encode)}. Pass the student's.")


def _check_independent(model: nn.Module, frozen: nn.Module) -> None:
    storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)} - {0}  # empty, on meta, or fake
    for name, tensor in list(frozen.named_parameters()) + list(frozen.named_buffers()):
        if tensor.untyped_storage().data_ptr() in storages:
            raise ValueError(
                f"Teacher: expected a copy with storage of its own, got one that shares {name!r} with the model. "
                "The model's __deepcopy__ keeps it; pass a second, separately built model."
            )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class _AdaptersOff(Teacher):
    """See :meth:`Teacher.adapters_off`."""

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings]) -> None:
        nn.Module.__init__(self)
        _check_encode(model, encode)
        adapters = _adapters(model)
        inside = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
        base = {id(p) for adapter in adapters for p in _base_layer(adapter).parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (id(parameter) not in inside or id(parameter) in base):
                raise ValueError(
                    f"Teacher: expected every weight beside the adapters to be frozen, got {name!r}, which requires grad: the teacher "
                    "would move with it. Freeze it, or use a frozen copy."
                )
        for name, module in model.named_modules():
            if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict) or getattr(module, "running_mean", None) is not None:
                raise ValueError(
                    f"Teacher: expected a model of which only adapters are trained, got {type(module).__name__} at {name!r}, whose "
                    "trained copy or running statistics the teacher would share. Use a frozen copy, Teacher(model, encode)."
                )
        _check_not_passed_over(model, adapters)
        self.encode = encode
        self._held = (model,)
        self._agreement = Agreement(model, self._agrees)
        self._ran = False  # adapters were seen to run

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        adapters = _adapters(self.model)
        inside = {id(value) for adapter in adapters for _, value in _named_tensors(adapter)}
        base = {id(value) for adapter in adapters for _, value in _named_tensors(_base_layer(adapter))}
        for name, value in super()._weights():
            if id(value) not in inside or id(value) in base:
                yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), value

    def forward(self, batch: Any) -> Embeddings:
        adapters = _adapters(self.model)
        with _restored(self.model), _switched_off(adapters), nullcontext() if self._ran else _seen_to_run(self.model, adapters):
            self.model.eval()
            embeddings = super().forward(batch)
        self._ran = True
        return embeddings

    def _agrees(self, student: nn.Module) -> bool:
        """LoRA as it begins: its second matrix is 0 in every layer."""
        second = [value for name, value in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
        if len(second) < len(_adapters(student)) or any(hasattr(value, "to_local") or value.is_meta for value in second):
            return False
        return not any(bool(value.detach().any()) for value in second)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        return self  # the student moves by itself


def _adapters(model: nn.Module) -> list[nn.Module]:
    """PEFT's adapter layers, by what they can do, so that peft is not needed here."""
    found = [module for module in model.modules() if hasattr(module, "enable_adapters") and hasattr(module, "base_layer")]
    if not found:
        raise ValueError("Teacher: expected a model with PEFT adapters, got none. Add them first, or use Teacher(model, encode).")
    for module in found:
        if isinstance(_base_layer(module), nn.MultiheadAttention):
            raise ValueError(
                "Teacher: expected adapters on layers that can be switched off exactly, got one on nn.MultiheadAttention. "
                "Use a frozen copy, Teacher(model, encode)."
            )
        if getattr(module, "merged", False):
            raise ValueError("Teacher: expected adapters beside their weights, got merged ones. Call unmerge_adapter() first.")
    return found


def _check_not_passed_over(model: nn.Module, adapters: list[nn.Module]) -> None:
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls it."""
    known = {id(adapter) for adapter in adapters}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for inner, part in module.named_modules():
                if id(part) in known:
                    raise _never_runs(f"{name}.{inner}".strip("."), "nn.MultiheadAttention")


@contextmanager
def _seen_to_run(model: nn.Module, adapters: list[nn.Module]) -> Iterator[None]:
    """Refuses adapters none of which ran although modules that have them did: those read the weights alone."""
    names = {id(module): name for name, module in model.named_modules()}
    owners = [model.get_submodule(names[id(adapter)].rpartition(".")[0]) for adapter in adapters]
    ran: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda called, _: ran.add(id(called)))
        for module in {id(one): one for one in (*adapters, *owners)}.values()
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it reads weights in evaluation mode alone
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    passed_over = [(a, owner) for a, owner in zip(adapters, owners, strict=True) if id(owner) in ran]
    if passed_over and not any(id(adapter) in ran for adapter in adapters):
        adapter, owner = passed_over[0]
        raise _never_runs(names[id(adapter)], type(owner).__name__)


def _never_runs(name: str, owner: str) -> ValueError:
    return ValueError(
        f"Teacher: expected adapters that run, got one at {name!r}, of which {owner} reads the weight without calling it: student and "
        "teacher would stay equal for ever. Put adapters on other layers."
    )


def _base_layer(adapter: nn.Module) -> nn.Module:
    layer: Any = adapter
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    found: nn.Module = layer
    return found


@contextmanager
def _switched_off(adapters: list[nn.Module]) -> Iterator[None]:
    off = [bool(adapter.disable_adapters) for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enable_adapters(False)  # type: ignore[operator]
        yield
    finally:
        for adapter, was_off in zip(adapters, off, strict=True):
            adapter.enable_adapters(not was_off)  # type: ignore[operator]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Mode of every submodule and requires_grad of every parameter as they were."""
    modes = [(module, module.training) for module in model.modules()]
    live = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in live:
            parameter.requires_grad_(requires_grad)


_WRAPPERS = ("module", "_orig_mod")  # how DDP and torch.compile name the model in them


class _Averaged(Teacher):
    """See :meth:`Teacher.averaged`."""

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings], *, decay: float | Schedule, every: int) -> None:
        super().__init__(model, encode)
        if not callable(decay):
            check_fraction("Teacher", "decay", decay)
        check_count("Teacher", "every", every, 1)
        self.decay, self.every, self._steps, self._warned = decay, every, 0, False
        self._student = (model,)
        self._followed: set[str] = set()  # running statistics that are the teacher's own
        self._exact = {  # bf16 and fp16 would round small movements away
            name: value.detach().float().clone()
            for name, value in _named_tensors(self.model)
            if value.dtype in (torch.bfloat16, torch.float16)
        }

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        raise ValueError("Teacher: expected a teacher that stays as it is, got an averaged one. Its embeddings cannot be cached.")

    @torch.no_grad()
    def follow(self, batch: Any, student: nn.Module | None = None) -> None:
        if not (names := moving_statistics(self._student[0] if student is None else student)):
            return
        known = {name for name, _ in self.model.named_modules()}
        names = [name if name in known else ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
        follow_statistics(self.model, names, lambda: self.encode(self.model, batch))
        for name in names:
            for key, value in self.model.get_submodule(name).named_buffers():
                self._followed.add(full := f"{name}.{key}".lstrip("."))
                if full in self._exact:
                    self._exact[full] = value.float().clone()

    @torch.no_grad()
    def step(self) -> None:
        if not self._followed and not self._warned and (names := moving_statistics(self._student[0])):
            self._warned = True
            warnings.warn(
                f"Teacher: expected no batch normalisation in training mode in the student of an averaged teacher, got {names[0]!r}: the "
                "mean of running statistics is not that of averaged weights. Put it into eval(), call teacher.follow(batch) before "
                "step(), or geomreg.recompute_statistics(teacher.model, batches, encode) before the teacher is used.",
                stacklevel=3,  # past no_grad
            )
        if self._steps % self.every == 0:
            decay = self.decay(self._steps) if callable(self.decay) else self.decay
            check_fraction("Teacher", f"decay at step {self._steps}", decay)
            student = dict(_named_tensors(self._student[0]))
            for name, held in _named_tensors(self.model):
                if name in self._followed:
                    continue
                value = student[name].detach().to(held.device)
                if held.is_floating_point():
                    mean = self._exact.get(name, held).to(held.device)
                    value = value.to(mean.dtype)
                    moved = torch.where(value == mean, mean, torch.lerp(value, mean, float(decay)))  # masks hold -inf
                    held.copy_(moved)
                    if name in self._exact:
                        self._exact[name] = moved
                else:
                    held.copy_(value)
        self._steps += 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "steps"] = torch.tensor(self._steps)
        for name, value in _named_tensors(self.model):
            destination[f"{prefix}average.{name}"] = self._exact.get(name, value).detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prefix + "steps" not in state_dict:
            missing_keys.append(prefix + "steps")
            return
        self._steps = int(state_dict[prefix + "steps"])
        with torch.no_grad():
            for name, held in _named_tensors(self.model):
                saved = state_dict.get(f"{prefix}average.{name}")
                if saved is None:
                    missing_keys.append(f"{prefix}average.{name}")
                elif saved.shape != held.shape:
                    error_msgs.append(f"Teacher: expected {name!r} of shape {tuple(held.shape)}, got {tuple(saved.shape)}.")
                else:
                    held.copy_(saved)
                    if name in self._exact:
                        self._exact[name] = saved.detach().float().clone()


class _Cached(Teacher):
    """See :meth:`Teacher.cached`."""

    def __init__(self, cache: "EmbeddingCache", *, preprocessing: object, tokenizer: object, modalities: tuple[str, ...] | None) -> None:
        nn.Module.__init__(self)
        if not callable(cache) or not hasattr(cache, "fingerprint"):
            raise TypeError(f"Teacher: expected an open EmbeddingCache, got {describe(cache)}. Call EmbeddingCache.open(path).")
        cache.check(preprocessing=preprocessing, tokenizer=tokenizer)
        self.modalities = check_modalities("Teacher", modalities)
        for modality in self.modalities or ():
            if modality not in cache.fingerprint:
                raise ValueError(f"Teacher: expected a cache of {modality} embeddings, got {cache!r}. Build it with both modalities.")
        self.cache = cache
        student = None if self._origin is None else self._origin.model()
        self._of_student = None if student is None else Agreement(student, self._agrees, HALF_ROUNDING)  # its precision is not known
        super(Teacher, self).train(False)

    @property
    def _origin(self) -> Origin | None:
        return getattr(self.cache, "origin", None)

    def _agrees(self, student: nn.Module) -> bool:
        return self._origin is not None and self._origin.unmoved(student)

    def forward(self, batch: Any) -> Embeddings:
        if not isinstance(batch, Mapping) or "id" not in batch:
            raise TypeError(f'Teacher: expected a batch as a dict with "id" to look up, got {describe(batch)}. Let the data set give ids.')
        device = next((value.device for key, value in batch.items() if key != "id" and isinstance(value, Tensor)), torch.device("cpu"))
        found = self.cache(batch["id"], self.modalities, text=batch.get("text", batch.get("input_ids")))
        embeddings = Embeddings(*(None if value is None else value.to(device) for value in found))
        if self._of_student is not None:
            self._of_student.mark(embeddings)
        return embeddings

    def fingerprint(self) -> str:
        return next(iter(self.cache.fingerprint.values()))["weights"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        return self  # holds no tensors


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
