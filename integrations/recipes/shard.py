"""Training with weights, gradients and optimizer state spread over the processes (FSDP2)."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from geomreg.compose import WeightedSum
from geomreg.regularizers import ProjectionOrthogonality, WeightAnchor
from geomreg.regularizers.weight_anchor import weight_anchor_loss
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["Sharded", "check_launch", "like"]

# containers of blocks that are gathered one at a time: open_clip's, timm's, transformers', ResNets'
_BLOCKS = re.compile(r"(.*\.)?(resblocks|blocks|stages|layers?|layer[1-4])\.[^.]+")


def check_launch(accelerator: Accelerator) -> None:
    """Refuse FSDP of accelerate: it would shard the logit scale, which losses use outside of the model, and not run on a CPU.

    Raises:
        ValueError: launched with it.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "finetune: expected a launch without accelerate's FSDP, got one with it. Use torchrun or accelerate launch --multi_gpu, and "
            "--train.shard true."
        )


class Sharded:
    """A copy of a model that is trained, each process holding a part of its weights, gradients and optimizer state, beside the whole model.

    Parameters that losses and terms use outside of the copy's forward pass (logit scale and bias, a classifier, projections that a term
    looks at) stay whole: the copy shares them with the model, and :meth:`finish_gradients` averages their gradients. All other weights of
    the model stay as they are until :meth:`gather`. A :class:`WeightAnchor` is exchanged for one that looks at the process's shards.

    Precision is that of autocast, as elsewhere. Every method is called on all processes.

    Args:
        model: open_clip model, with the same weights in every process; teachers are made before.
        accelerator: of several processes.
        terms: the run's regularizers.

    Attributes:
        whole: the model.
        model: its sharded copy.

    Raises:
        ValueError: fp16, whose gradient scaling does not know whole and sharded weights together.
        RuntimeError: an older torch.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, terms: Sequence[WeightedSum | None] = ()) -> None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise RuntimeError(f"finetune: expected torch 2.7 or newer for sharded training, got {torch.__version__}. Update it.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("finetune: expected precision bf16 or no for sharded training, got fp16. Use bf16.")
        given = [one for one in terms if one is not None]
        self.whole, self.accelerator, self.followed = model, accelerator, False
        outside = list(_outside(model, given))
        for value in outside:
            value.data = value.data.to(accelerator.device)
        self.model = copy.deepcopy(model, {id(value): value for value in outside})
        options: dict[str, Any] = {
            "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            "ignored_params": set(outside),
        }
        for name, module in reversed(list(self.model.named_modules())):  # inner ones first
            if (
                _BLOCKS.fullmatch(name)
                and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
                and any(True for _ in module.parameters())
            ):
                fully_shard(module, **options)
        fully_shard(self.model, **options)
        self.outside = [value for value in self.model.parameters() if not isinstance(value, DTensor)]
        self.parts = [value for value in self.model.parameters() if isinstance(value, DTensor)]
        self.anchors = []
        for one in given:
            for name, term in one.regularizers.items():
                if isinstance(term, WeightAnchor):
                    one.regularizers[name] = anchor = _ShardedAnchor(term, self.model)
                    self.anchors.append(anchor)

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: what is sharded and what is whole, which its kernels cannot take together."""
        return [{"params": values} for values in (self.parts, self.outside) if values]

    def declared(self) -> list[Tensor]:
        """What losses may use outside of the forward pass, for :func:`geomreg.backward`."""
        leaves = [leaf for anchor in self.anchors for leaf in anchor.leaves.values()]
        return [value for value in (*self.outside, *leaves) if value.requires_grad]

    def serve(self, teacher: Teacher | None) -> None:
        """Keep what a teacher takes from the whole model: base weights beside its adapters, or a running average."""
        if getattr(teacher, "model", None) is self.whole:
            self.whole.to(self.accelerator.device)
        self.followed = teacher is not None and bool(teacher.state_dict())

    def finish_gradients(self, clip_norm: float | None) -> None:
        """After the last backward pass of a step: average the gradients of what is whole, add those of anchors, clip by the norm of all."""
        ranks = self.accelerator.num_processes
        for value in self.outside:
            if value.grad is not None:
                dist.all_reduce(value.grad)
                value.grad /= ranks
        for anchor in self.anchors:
            anchor.add_gradients()
        if clip_norm is not None:
            kinds = [[value for value in values if value.grad is not None] for values in (self.parts, self.outside)]
            norms = [_whole(torch.nn.utils.get_total_norm([value.grad for value in values])) for values in kinds if values]
            factor = (clip_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
            for value in (value for values in kinds for value in values):
                _local(value.grad).mul_(factor)

    def after_step(self) -> None:
        """After each optimizer step, before the teacher's."""
        if self.followed:
            self.gather(everywhere=True)

    @torch.no_grad()
    def gather(self, *, everywhere: bool = False) -> None:
        """Put the weights into the whole model: of the main process, or of all."""
        held = self.whole.state_dict()
        for name, value in self.model.state_dict().items():
            full = _whole(value)
            if everywhere or self.accelerator.is_main_process:
                held[name].copy_(full)

    def finish(self) -> nn.Module:
        """The whole model as trained, on the device."""
        self.gather(everywhere=True)
        return self.whole.to(self.accelerator.device)

    def gathered(self, state: Any) -> Any:
        """Nested dicts and lists with whole tensors in place of sharded ones; on the main process."""
        if isinstance(state, DTensor):
            full = state.full_tensor()
            return full.cpu() if self.accelerator.is_main_process else None
        if isinstance(state, Mapping):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return [self.gathered(value) for value in state]
        return state

    def scattered(self, model: dict[str, Tensor], optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Gathered states of model and optimizer with this process's shards in place of whole tensors."""
        live, trained = self.model.state_dict(), [*self.parts, *self.outside]
        state = {
            number: {key: like(one, trained[number]) if one.ndim else one for key, one in entries.items()}  # the step has no shape
            for number, entries in optimizer["state"].items()
        }
        return {name: like(value, live[name]) for name, value in model.items()}, {**optimizer, "state": state}


class _ShardedAnchor(WeightAnchor):
    """A WeightAnchor of which each process computes the part of its shards; the mean over the processes is the whole term.

    The shards are leaves of their own, without FSDP's hooks; :meth:`add_gradients` puts their gradients beside those that FSDP leaves.
    Anchors stay whole and are saved as ever.
    """

    def __init__(self, term: WeightAnchor, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.anchors, self.fisher = term.anchors, term.fisher
        live = dict(model.named_parameters())
        self.live = {name: live[name] for name in self.anchors.named()}
        self.leaves = {name: value.to_local().detach().requires_grad_() for name, value in self.live.items() if isinstance(value, DTensor)}

    def forward(self, student: Embeddings | None = None, teacher: Embeddings | None = None) -> Tensor:
        whole = {name: value for name, value in self.live.items() if name not in self.leaves}
        parts = [(dist.get_world_size(), self.leaves), (1, whole)]
        return torch.stack([factor * self._of(values) for factor, values in parts if values]).sum()

    def _of(self, values: Mapping[str, Tensor]) -> Tensor:
        anchors, fisher = (
            None if held is None else {name: _local(like(one, self.live[name])) for name, one in held.named().items() if name in values}
            for held in (self.anchors, self.fisher)
        )
        return weight_anchor_loss(values, anchors, fisher=fisher)

    def add_gradients(self) -> None:
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                value = self.live[name]
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                _local(value.grad).add_(leaf.grad, alpha=1 / dist.get_world_size())
                leaf.grad = None


def _outside(model: nn.Module, terms: Sequence[WeightedSum]) -> Iterator[nn.Parameter]:
    """Parameters that are used outside of the model's forward pass; and those without a dimension, which FSDP2 refuses."""
    held = {id(value) for one in terms for term in one.regularizers.values() for value in _looked_at(term)}
    for name, value in model.named_parameters():
        if value.ndim == 0 or name.split(".")[0] in ("logit_scale", "logit_bias", "classifier") or id(value) in held:
            yield value


def _looked_at(term: nn.Module) -> tuple[Tensor, ...]:
    return term.weights if isinstance(term, ProjectionOrthogonality) else ()


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, live: Tensor) -> Tensor:
    """A whole tensor, the same in every process, on the device of the live one and sharded as it is."""
    if not isinstance(live, DTensor):
        return value.to(live.device)
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements, src_data_rank=None)
