"""How hard losses pull at embeddings: norms of the gradients that arrive there; and what a graph reaches."""

import math
from typing import Any

import torch
from torch import Tensor

from geomreg.checks import check_option, check_student
from geomreg.types import Embeddings

__all__ = ["GradientNorms", "reached"]

ROLES = ("task", "regularizer")


class GradientNorms:
    """Norms of the gradients of the task's and the regularizers' loss with respect to the embeddings, recorded in the backward pass.

    Wrap what each loss sees; several views of a step (chunks, batches, terms) add up, squared. A loss scale that both share cancels in
    the ratio, and so does the number of processes where both batches are shared alike. Eager mode only.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings
        >>> image = torch.ones(2, 3, requires_grad=True)
        >>> norms = GradientNorms()
        >>> task, kept = (norms.watch(Embeddings(image=image), role) for role in ("task", "regularizer"))
        >>> (task.image.sum() + 0.5 * kept.image.sum()).backward()
        >>> norms.ratio()
        0.5
    """

    def __init__(self) -> None:
        self.reset()

    def watch(self, embeddings: Embeddings, role: str) -> Embeddings:
        """The embeddings, whose gradient through what is returned counts for ``"task"`` or ``"regularizer"``.

        Raises:
            TypeError, ValueError: no :class:`~geomreg.Embeddings`; another role.
        """
        check_student("GradientNorms", embeddings)
        check_option("GradientNorms", "role", role, ROLES)

        def record(gradient: Tensor) -> None:
            square = gradient.detach().float().square().sum()
            before = self.squares.get(role)
            self.squares[role] = square if before is None else before.to(square.device) + square

        views = [None if value is None else value.view_as(value) for value in embeddings]
        for view in views:
            if view is not None and view.requires_grad:
                view.register_hook(record)  # type: ignore[no-untyped-call]
        return Embeddings(*views)

    def square(self, role: str, device: torch.device | str = "cpu") -> Tensor:
        """0-d sum of squares so far; 0 without a gradient."""
        return self.squares.get(role, torch.zeros(())).to(device)

    def ratio(self) -> float:
        """Norm of the regularizer's gradient by that of the task's; NaN without the latter. Waits for the device."""
        task, term = (float(self.square(role)) for role in ROLES)
        return math.sqrt(term / task) if task > 0 else math.nan

    def reset(self) -> None:
        """Begin anew, with the next step."""
        self.squares: dict[str, Tensor] = {}


def reached(value: Tensor) -> dict[Any, None]:
    """Nodes of the graph behind a tensor, and its leaf tensors."""
    found: dict[Any, None] = {}
    queue: list[Any] = [value.grad_fn] if value.grad_fn is not None else []
    if not queue and value.requires_grad:
        found[value] = None
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found[node] = None
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[leaf] = None
        queue += [following for following, _ in node.next_functions]
    return found
