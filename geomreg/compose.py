"""Several terms as one regularizer."""

from torch import Tensor, nn

from geomreg.checks import check_weight, describe
from geomreg.types import Embeddings, Terms

__all__ = ["WeightedSum"]


class WeightedSum(nn.Module):
    """Weighted sum of named regularizers; itself a regularizer. Use one per data source.

    Args:
        terms: ``name=(weight, regularizer)``; the weight is a finite number >= 0.

    Example:
        >>> from geomreg import AverageVectorLoss, PairwiseVectorLoss, WeightedSum
        >>> keep = WeightedSum(avl=(1000.0, AverageVectorLoss()), pvl=(1000.0, PairwiseVectorLoss()))
        >>> sorted(keep.weights)
        ['avl', 'pvl']
    """

    def __init__(self, **terms: tuple[float, nn.Module]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("WeightedSum: expected at least one name=(weight, regularizer), got none. Add a term.")
        self.weights: dict[str, float] = {}
        self.regularizers = nn.ModuleDict()
        for name, entry in terms.items():
            if not name.isidentifier() or hasattr(self.regularizers, name):
                raise ValueError(
                    f"WeightedSum: expected a plain name for a term, got {name!r}. Choose another: it is taken or no identifier."
                )
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise TypeError(f"WeightedSum: expected {name}=(weight, regularizer), got {describe(entry)}. Write {name}=(1.0, term).")
            weight, regularizer = entry
            check_weight("WeightedSum", f"the weight of {name}", weight)
            if not isinstance(regularizer, nn.Module) or not hasattr(regularizer, "step"):
                raise TypeError(
                    f"WeightedSum: expected {name} as an nn.Module with step(), got {describe(regularizer)}. Use a geomreg term."
                )
            self.weights[name] = float(weight)
            self.regularizers[name] = regularizer

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        return self.terms(student, teacher).total

    def terms(self, student: Embeddings, teacher: Embeddings | None) -> Terms:
        """The total with graph, and each term's detached, unweighted value."""
        values = {name: regularizer(student, teacher) for name, regularizer in self.regularizers.items()}
        total: Tensor = sum(self.weights[name] * value for name, value in values.items())
        return Terms(total, {name: value.detach() for name, value in values.items()})

    def step(self) -> None:
        """Commit the state of every term; once after each optimizer step that was not skipped."""
        for regularizer in self.regularizers.values():
            regularizer.step()  # type: ignore[operator]

    def discard(self) -> None:
        """Drop what the terms collected since the last step; instead of :meth:`step` after a skipped optimizer step."""
        for regularizer in self.regularizers.values():
            if hasattr(regularizer, "discard"):
                regularizer.discard()  # type: ignore[operator]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())
