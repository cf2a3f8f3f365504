"""Exact gradients of losses over a whole batch at the memory of a chunk: an embedding-gradient cache over every term.

GradCache (Gao et al., 2021, arXiv 2101.06983) for any encoder and any loss on embeddings: target losses and regularizers alike.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from geomreg.checks import check_chunks, check_count, check_option, check_returned, check_same_rows, check_scalar, describe
from geomreg.chunks import SeparablePass, separable_pass
from geomreg.distributed import all_reduce_max, world_size
from geomreg.gradients import reached
from geomreg.random_state import random_state, set_random_state
from geomreg.separable import check_arguments, refusing_unseparable, try_once
from geomreg.types import Embeddings

__all__ = ["backward"]

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Encode = Callable[[Any], Embeddings]


def backward(
    encode: Encode | Sequence[tuple[Encode, Batch]],
    batch: Batch | None,
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int,
    model: nn.Module | None = None,
    parameters: Sequence[Tensor] = (),
    separable: bool | Literal["unchecked"] = False,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    sync: bool = True,
) -> Tensor:
    """Add the gradient of ``loss_fn(encode(batch))`` to ``.grad``, holding the activations of one chunk at a time.

    All chunks are encoded without graph; the loss and its gradient are taken on the embeddings of the whole batch; each chunk is
    encoded again with graph, under the same random state, and the cached gradient pushed through. The result is that of
    ``loss_fn(encode(batch)).backward()``, whatever the loss: contrastive losses see the whole batch. If one chunk holds the
    batch it is encoded once. Call it once for the target loss and once for each regularizer's batch: their gradients add up and
    their activations never coexist.

    Args:
        encode: ``encode(chunk) -> Embeddings``, row i of which belongs to row i of the chunk. Or a list of ``(encode, batch)`` parts,
            whose embeddings are merged field by field and may have different lengths (images, and the unique texts among
            their captions); ``batch`` then is None.
        batch: tensor, or tuple, list or dict of tensors, with samples along dimension 0.
        loss_fn: ``loss_fn(Embeddings) -> 0-d``; called once. With ``separable`` it is ``loss_fn(Embeddings, index)``, called for each chunk
            with the rows of the batch that it holds.
        chunk_size: samples at a time.
        model: the ``DistributedDataParallel`` or FSDP2 module that ``encode`` runs, whose gradients are to be synchronised in the
            last chunk alone; None in a single process.
        parameters: tensors that require grad and that ``loss_fn`` uses outside of ``encode``, such as the logit scale. Their
            gradient enters in the last chunk's backward pass, so that DDP sees it. Those that ``loss_fn`` does not use get zero.
        separable: the loss is a mean over samples: one pass, each chunk's loss weighted by its share of the batch. Terms that say they
            are no such mean are refused. Any other function is tried once on random embeddings: its value and gradient for the batch must
            be the mean of those for the chunks, and for two unequal parts. One that draws random numbers cannot be tried and warns.
            ``"unchecked"`` leaves the trial out, for a function that counts how often it is called.
        scale: applied to the loss once, ``GradScaler.scale`` say.
        sync: False on all but the last call of an optimizer step. That call must see every parameter that is trained: let its
            ``parameters`` name the logit scale also where only the step's other losses use it.

    Returns:
        The loss: 0-d, detached, not scaled.

    Raises:
        ValueError: ``chunk_size`` < 1, tensors of different or zero length, embeddings of other rows, widths or modalities
            between chunks, a loss that does not depend on the embeddings, a loss that is not 0-d, with ``separable`` a loss that is no
            mean over samples; in several chunks and without ``separable`` also a parameter that ``loss_fn`` uses and ``parameters``
            lacks.
        TypeError: ``encode`` returns no :class:`Embeddings`; the batch holds no tensors; ``loss_fn`` takes other arguments.
        RuntimeError: a batch normalisation in training mode, whose statistics would be those of the chunks.

        Whatever is refused is refused before any gradient is added; but with ``separable`` what shows in a later chunk leaves the
        gradient of the earlier ones.

    Note:
        Random numbers of torch are replayed, on the CPU and on the devices of batch, model and parameters; those of Python and NumPy
        are not. A term on feature maps cannot be chunked: its maps are activations. Under FSDP2, where each forward pass is a
        collective, all processes must call this together; those with fewer chunks than the others encode a row more for each, to no effect.
        Under DDP too: where one process has several chunks, those with one encode it twice.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings, backward
        >>> from geomreg.functional import contrastive_loss
        >>> encoder = torch.nn.Linear(4, 2)
        >>> def encode(batch):
        ...     return Embeddings(image=encoder(batch["image"]), text=encoder(batch["text"]))
        >>> batch = {"image": torch.eye(6, 4), "text": torch.ones(6, 4)}
        >>> loss = backward(encode, batch, lambda e: contrastive_loss(*e, logit_scale=1.0), chunk_size=2)
        >>> loss.shape, encoder.weight.grad.shape
        (torch.Size([]), torch.Size([2, 4]))
    """
    check_count("backward", "chunk_size", chunk_size, 1)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("backward: expected to run outside of torch.inference_mode(), got it switched on. Leave it; no_grad is fine.")
    check_option("backward", "separable", separable, (False, True, "unchecked"))
    check_arguments(loss_fn, bool(separable))
    parameters = _declared(parameters)
    parts = _parts(encode, batch)
    chunks = [
        _Chunk(part, encoder, piece, start, idle)
        for part, ((encoder, one), count) in enumerate(zip(parts, _counts(parts, chunk_size, model), strict=True))
        for start, piece, idle in _chunked(one, chunk_size, count)
    ]
    if separable:
        with refusing_unseparable():
            return _separable(parts, chunks, loss_fn, model, parameters, scale, sync, tried=separable == "unchecked")
    if not _several(len(chunks) > len(parts), chunk_size, model):  # nothing to save
        with torch.enable_grad(), _synchronised(model, sync):
            embeddings = _watched(_merged([[_encoded(chunk)] for chunk in chunks]))
            loss = check_scalar("backward", loss_fn(embeddings))
            _check_reached(loss, embeddings)
            _seen(scale(loss), parameters).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    devices = _devices(chunks, model, parameters)
    states, encoded = [], [[] for _ in parts]  # type: ignore[var-annotated]
    with torch.no_grad(), _refusing_batch_norm(model):
        for chunk in chunks:
            states.append(random_state(devices))
            # copies: a slice would keep all that it is a slice of, and a reused output would be overwritten
            copy = Embeddings(*(None if x is None else x.detach().clone() for x in _encoded(chunk)))
            encoded[chunk.part] += [] if chunk.idle else [copy]
    torch.clear_autocast_cache()  # weights that were cast without graph
    leaves = Embeddings(*(None if value is None else value.detach().requires_grad_() for value in _merged(encoded)))
    with torch.enable_grad():
        loss = check_scalar("backward", loss_fn(leaves))
        after = random_state(devices)  # a loss may draw too
        _check_reached(loss, leaves)
        _check_declared(loss, leaves, parameters)
        wanted = [value for value in leaves if value is not None]
        found = torch.autograd.grad(scale(loss), [*wanted, *parameters], allow_unused=True)
    cached = dict(zip([name for name, value in leaves._asdict().items() if value is not None], found, strict=False))
    of_parameters = found[len(wanted) :]
    starts = _starts(encoded, chunks)
    final = {chunk.part: k for k, chunk in enumerate(chunks)}

    def products(k: int) -> list[Tensor]:
        """What, encoded again, has the cached gradient."""
        set_random_state(states[k], devices)
        if chunks[k].idle:
            nothing = _nothing(_encoded(chunks[k])).to(loss.dtype)
            return [nothing] if nothing.requires_grad else []
        return [
            (value * gradient[starts[k] : starts[k] + len(value)].to(value.dtype)).sum().to(loss.dtype)
            for name, value in _encoded(chunks[k])._asdict().items()
            if value is not None and value.requires_grad and (gradient := cached[name]) is not None
        ]

    added = False
    for k, chunk in enumerate(chunks):
        if k != final[chunk.part]:
            with torch.enable_grad(), _synchronised(model, False):
                added |= _add_gradient(products(k))
    with torch.enable_grad(), _synchronised(model, sync):  # the last chunks of all parts together: DDP waits for every parameter
        of_loss = [
            (value * (0.0 if gradient is None else gradient)).sum().to(loss.dtype)
            for value, gradient in zip(parameters, of_parameters, strict=True)
        ]
        added |= _add_gradient([product for k in final.values() for product in products(k)] + of_loss)
    if not added:
        raise ValueError("backward: expected a loss that depends on embeddings with gradient, got a frozen encoder. Train some of it.")
    set_random_state(after, devices)
    return loss.detach()


def _add_gradient(products: list[Tensor]) -> bool:
    """Backward pass of the sum, if there is any."""
    if products:
        torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]
    return bool(products)


def _seen(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The loss, with a gradient of zero at least for every parameter: DDP waits for each."""
    for value in parameters:
        loss = loss + (0.0 * value).sum().to(loss.dtype)
    return loss


class _Chunk(NamedTuple):
    part: int
    encode: Encode
    batch: Any
    start: int
    idle: bool  # encoded only because other processes encode, to no effect


def _declared(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Each once, without those that are frozen."""
    if isinstance(parameters, Tensor):
        raise TypeError(f"backward: expected parameters as a list of tensors, got a {describe(parameters)}. Put it into a list.")
    return [value for value in {id(one): one for one in parameters}.values() if value.requires_grad]


def _parts(encode: Encode | Sequence[tuple[Encode, Batch]], batch: Batch | None) -> list[tuple[Encode, Batch]]:
    if callable(encode):
        return [(encode, check_chunks("backward", batch))]
    if batch is not None or not encode:
        raise ValueError(
            f"backward: expected parts as a list of (encode, batch) with batch=None, got {len(encode)} parts and {describe(batch)}. "
            "Give each part its batch."
        )
    return [(one, check_chunks("backward", of_part)) for one, of_part in encode]


def _rows(batch: Any) -> int:
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    return len(tensors[0])


def _counts(parts: list[tuple[Encode, Batch]], chunk_size: int, model: nn.Module | None) -> list[int]:
    """Chunks of each part: under FSDP2, where each forward pass is a collective, as many as the process with the most needs."""
    counts = [-(-_rows(batch) // chunk_size) for _, batch in parts]
    if model is None or not hasattr(model, "set_requires_gradient_sync"):
        return counts
    device = next(model.parameters()).device
    return [all_reduce_max(count, device) for count in counts]


def _several(here: bool, chunk_size: int, model: nn.Module | None) -> bool:
    """Whether a batch is encoded in several chunks, here or, under DDP, on any process.

    All then encode twice: DDP's first forward pass with graph in a step may agree on its buckets with the other processes, which has to
    come on the same side of the loss's own collectives everywhere.
    """
    if world_size() == 1 or not hasattr(model, "no_sync") or chunk_size == sys.maxsize:  # the last: no batch is as long
        return here
    device = next((value.device for value in model.parameters()), torch.device("cpu"))  # type: ignore[union-attr]
    return bool(all_reduce_max(int(here), device))


def _chunked(batch: Any, chunk_size: int, count: int) -> Iterator[tuple[int, Any, bool]]:
    """Start and content of each of ``count`` chunks, in the container of the batch, and whether it is idle: the first row once more."""
    rows = _rows(batch)
    for k in range(count):
        idle = k * chunk_size >= rows
        part = slice(0, 1) if idle else slice(k * chunk_size, (k + 1) * chunk_size)
        if isinstance(batch, Tensor):
            yield part.start, batch[part], idle
        elif isinstance(batch, Mapping):
            yield part.start, _like(batch, {key: value[part] for key, value in batch.items()}), idle
        else:
            pieces = [value[part] for value in batch]
            yield part.start, type(batch)(*pieces) if hasattr(batch, "_fields") else type(batch)(pieces), idle


def _nothing(embeddings: Embeddings) -> Tensor:
    """Zero, with a gradient of zero for what the embeddings depend on."""
    return torch.stack([(0.0 * value).sum() for value in embeddings if value is not None]).sum()


def _like(batch: Any, pieces: dict[str, Tensor]) -> Any:
    """In the mapping type of the batch, if it is made from a dict."""
    if type(batch) is not dict:
        with suppress(TypeError):
            return type(batch)(pieces)
    return pieces


def _encoded(chunk: _Chunk) -> Embeddings:
    return check_same_rows("backward", check_returned("backward", chunk.encode(chunk.batch)), _rows(chunk.batch))


def _merged(encoded: list[list[Embeddings]]) -> Embeddings:
    """Chunks of each part one under the other, parts side by side."""
    fields: dict[str, Tensor] = {}
    for of_part in encoded:
        for name in Embeddings._fields:
            values = [getattr(one, name) for one in of_part]
            present = [value for value in values if value is not None]
            if not present:
                continue
            if name in fields or len(present) != len(values) or len({value.shape[1:] for value in present}) > 1:
                shapes = ", ".join(describe(value) for value in values[:3])
                raise ValueError(
                    f"backward: expected {name} embeddings of one width from every chunk of one part, got {shapes}. "
                    "encode must do the same to each chunk."
                )
            fields[name] = present[0] if len(present) == 1 else torch.cat(present)
    if not fields:
        raise ValueError("backward: expected image or text embeddings, got None for both. Embed at least one modality.")
    return Embeddings(**fields)


def _starts(encoded: list[list[Embeddings]], chunks: list[_Chunk]) -> list[int]:
    """First row of each chunk in its part, in the order of the chunks; 0 of idle ones."""
    found = []
    for part, of_part in enumerate(encoded):
        start = 0
        for one in of_part:
            found.append(start)
            start += next(len(value) for value in one if value is not None)
        found += [0 for chunk in chunks if chunk.part == part and chunk.idle]
    return found


def _watched(embeddings: Embeddings) -> Embeddings:
    """The same values behind a node of the graph that is theirs alone."""
    return Embeddings(*(None if value is None else value.view_as(value) if value.requires_grad else value for value in embeddings))


def _check_reached(loss: Tensor, embeddings: Embeddings) -> None:
    """The loss depends on embeddings that require grad; of a frozen encoder, on something that does."""
    own = {value if value.grad_fn is None else value.grad_fn for value in embeddings if value is not None and value.requires_grad}
    if not (own & reached(loss).keys() if own else loss.requires_grad):
        raise ValueError(
            "backward: expected a loss that depends on embeddings with gradient, got one that does not. Use what loss_fn is given, do not "
            "detach it, and train some of the encoder."
        )


def _check_declared(loss: Tensor, leaves: Embeddings, parameters: Sequence[Tensor]) -> None:
    """Beside the embeddings the loss depends on no parameter that is not declared."""
    known = {id(value) for value in (*leaves, *parameters)}
    undeclared = [value for value in reached(loss) if isinstance(value, Tensor) and id(value) not in known]
    if undeclared:
        raise ValueError(
            f"backward: expected every tensor that loss_fn uses outside of encode in parameters, got {len(undeclared)} more that "
            f"require grad, the first a {describe(undeclared[0])}. Pass parameters=[model.logit_scale], say; terms on feature maps "
            "cannot be chunked."
        )


def _separable(
    parts: list[tuple[Encode, Batch]],
    chunks: list[_Chunk],
    loss_fn: Callable[..., Tensor],
    model: nn.Module | None,
    parameters: Sequence[Tensor],
    scale: Callable[[Tensor], Tensor],
    sync: bool,
    tried: bool,
) -> Tensor:
    if len(parts) > 1:
        raise ValueError(f"backward: expected one encode and batch with separable=True, got {len(parts)} parts. Encode both in one.")
    rows, total = _rows(parts[0][1]), None
    widths: Embeddings | None = None
    one_pass, tried = SeparablePass(rows), tried or sum(not chunk.idle for chunk in chunks) == 1
    for k, chunk in enumerate(chunks):
        share, last = _rows(chunk.batch) / rows, k == len(chunks) - 1
        with torch.enable_grad(), _refusing_batch_norm(model, len(chunks) > 1), _synchronised(model, sync and last):
            embeddings = _watched(_encoded(chunk))
            _merged([[embeddings if widths is None else widths, embeddings]])  # refuses other widths
            widths = Embeddings(*(None if value is None else value.detach()[:1] for value in embeddings))
            device = next(value.device for value in embeddings if value is not None)
            index = torch.arange(chunk.start, chunk.start + _rows(chunk.batch), device=device)
            if chunk.idle:
                loss = _nothing(embeddings)
            else:
                one_pass.held = slice(chunk.start, chunk.start + len(index))
                with separable_pass(one_pass):
                    loss = share * check_scalar("backward", loss_fn(embeddings, index))
            _check_reached(loss, embeddings)
            if not tried and not chunk.idle:
                sizes = [_rows(one.batch) for one in chunks if not one.idle]
                try_once(loss_fn, embeddings, sizes, one_pass, _devices(chunks, model, parameters))
                tried = True
            _seen(scale(loss), parameters if last else ()).backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:  # excluded by check_chunks
        raise ValueError("backward")
    return total


@contextmanager
def _refusing_batch_norm(model: nn.Module | None, chunked: bool = True) -> Iterator[None]:
    """A batch normalisation that would normalise by a chunk's statistics raises before it runs."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            names = [name for name, one in ([] if model is None else model.named_modules()) if one is module]
            raise RuntimeError(
                f"backward: expected no batch normalisation in training mode, got {type(module).__name__} "
                f"{names[0] if names else module}: its statistics would be a chunk's. Put it in eval() if it tracks statistics, or raise "
                "chunk_size to the batch."
            )

    handle = register_module_forward_pre_hook(refuse) if chunked else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _synchronised(model: nn.Module | None, sync: bool) -> Iterator[None]:
    """Within, gradients of a DDP or FSDP2 module are reduced if ``sync``; else only added up."""
    if model is not None and hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        _set_sync(model, sync)
        try:
            yield
        finally:
            _set_sync(model, True)
        return
    with model.no_sync() if model is not None and hasattr(model, "no_sync") and not sync else nullcontext():  # type: ignore[operator]
        yield


def _set_sync(model: nn.Module, sync: bool) -> None:
    model.set_requires_gradient_sync(sync)  # type: ignore[operator]
    model.set_is_last_backward(sync)  # type: ignore[operator]


def _devices(chunks: list[_Chunk], model: nn.Module | None, parameters: Sequence[Tensor]) -> list[torch.device]:
    """Accelerators whose random numbers encode may draw: of the batch, of the model, and the one in use."""
    tensors = [*parameters] if model is None else [*parameters, *model.parameters()]
    for chunk in chunks:
        batch = chunk.batch
        tensors += [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    found = {value.device for value in tensors}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.add(torch.device("cuda", torch.cuda.current_device()))
    return [device for device in found if device.type in ("cuda", "xpu", "mps")]
