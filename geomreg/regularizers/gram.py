"""Gram structure: inner products within a batch stay those of the teacher (the cosine structure of arXiv 2511.09973's ablation)."""

from torch import Tensor, nn

from geomreg.checks import check_choices, check_pair, check_width
from geomreg.distributed import gathered_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import chosen, summed
from geomreg.types import Embeddings

__all__ = ["GramStructure", "gram_loss"]


def gram_loss(student: Tensor, teacher: Tensor, *, student_columns: Tensor | None = None, teacher_columns: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the inner products among a batch by student and by teacher.

    .. math:: \frac1{B^2} \sum_{j,k} \big( \langle z_j, w_k \rangle - \langle z^0_j, w^0_k \rangle \big)^2
              = \frac1{B^2} \lVert Z W^\top - P Q^\top \rVert_F^2, \quad w = z \text{ unless columns are given}

    With U = Z - P, R = Z + P, V = W - Q, S = W + Q the matrix is ``(U S' + R V') / 2``, and its squared norm comes from D x D
    products alone: ``(tr(U'U S'S) + tr(R'R V'V) + 2 tr(U'R V'S)) / 4``. No B x B matrix is formed, and nothing cancels near the
    teacher, where the plain moment difference loses six per cent at a drift of 0.1 %.

    Args:
        student: ``(B, D)`` embeddings Z of the model in training, as they come; receives gradient.
        teacher: ``(B, D)`` embeddings P of the same inputs by the frozen model; constant.
        student_columns: ``(B', D)`` embeddings W of other inputs (the texts, say), for the block between the two; receives gradient.
        teacher_columns: ``(B', D)`` embeddings Q of those inputs by the frozen model; constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Fourth power of embedding units; averaged over the B^2 (or B B') entries, the diagonal included. For unit vectors a
        mean squared change of cosine, at most 4. Time O(B D^2), memory O(B D + D^2). Rounding is relative to the shift U: under a large
        rotation, which costs nothing, it is that of ``|U|^2`` (a pure rotation may give -1e-9 in fp32).

    Invariances:
        Permutation of samples; one orthogonal map of the student's rows and columns, or of the teacher's, each by itself (a
        common rotation of the student is free); not translation.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, columns on one side only or of another width, a teacher requires grad.

    Deviations:
        DiVE's table has a "cosine constraint like CyCLIP"; whether it is this one is not known.

    Example:
        >>> import torch
        >>> gram_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))  # (4 - 1)^2
        tensor(9.)

    Reference:
        Similarity-preserving distillation without the row normalisation: Tung and Mori, ICCV 2019, arXiv 1907.09682.
    """
    name = "gram_loss"
    check_pair(name, student, teacher)
    if (student_columns is None) != (teacher_columns is None):
        raise ValueError(f"{name}: expected student_columns and teacher_columns together, got one. Pass both or none.")
    if student_columns is not None and teacher_columns is not None:
        check_pair(name, student_columns, teacher_columns, "column")
        check_width(name, Embeddings(student, student_columns))
    with full_precision(student):
        z, p = at_least_fp32(student), at_least_fp32(teacher)
        w, q = z, p
        if student_columns is not None and teacher_columns is not None:
            w, q = at_least_fp32(student_columns), at_least_fp32(teacher_columns)
        u, r, v, s = z - p, z + p, w - q, w + q  # (B, D) and (B', D)
        total = ((u.T @ u) * (s.T @ s)).sum() + ((r.T @ r) * (v.T @ v)).sum() + 2 * ((u.T @ r) * (s.T @ v)).sum()
        return total / (4 * len(z) * len(w))


class GramStructure(nn.Module):
    """Module form of :func:`gram_loss`, added over blocks of the similarity matrix; over the batches of all processes.

    Args:
        blocks: ``"image-image"``, ``"text-text"``, ``"image-text"``: any of these.
        normalize: divide embeddings by their L2 norm first, so that inner products are cosines.
    """

    def __init__(self, *, blocks: tuple[str, ...] = ("image-image", "text-text", "image-text"), normalize: bool = True) -> None:
        super().__init__()
        self.blocks = check_choices("GramStructure", "blocks", blocks, ("image-image", "text-text", "image-text"))
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        needed = tuple(field for field in Embeddings._fields if any(field in block for block in self.blocks))
        parts = chosen("GramStructure", needed, self.normalize, student, teacher)
        rows = {field: tuple(gathered_rows(value, self.training) for value in part) for field, part in zip(needed, parts, strict=True)}

        def value(block: str) -> Tensor:
            one, other = block.split("-")
            columns = {} if one == other else dict(zip(("student_columns", "teacher_columns"), rows[other], strict=True))
            return gram_loss(*rows[one], **columns)

        return summed(value(block) for block in self.blocks)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, normalize={self.normalize}"
