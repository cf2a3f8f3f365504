"""Similarities to reference embeddings keep the teacher's distribution (ZSCL, arXiv 2303.06628; open_clip; StarFT)."""

import torch.nn.functional as F
from torch import Tensor, nn

from geomreg.blocked import row_blocked
from geomreg.checks import check_bank, check_choices, check_mask, check_option, check_pair, check_positive, check_scale, describe
from geomreg.distributed import gathered_rows, weighted_by_rows
from geomreg.precision import common_precision, full_precision, one_number
from geomreg.regularizers.common import chosen, summed, unit_rows
from geomreg.types import Embeddings

__all__ = ["SimilarityKL", "similarity_kl_loss"]

_EXCLUDED = -1e8  # a logit that no softmax sees, and finite: a row with nothing left is uniform on both sides


def similarity_kl_loss(
    student: Tensor,
    teacher: Tensor,
    reference: Tensor,
    *,
    logit_scale: float | Tensor,
    temperature: float = 2.0,
    form: str = "kl",
    teacher_reference: Tensor | None = None,
    teacher_logit_scale: float | Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the softmax over similarities to reference embeddings, from the teacher's.

    .. math:: \frac{T^2}{B} \sum_i \mathrm{KL}\Big( \mathrm{softmax}_m\, \tfrac{s^0}{T} \langle z^0_i, r^0_m \rangle \,\Big\Vert\,
              \mathrm{softmax}_m\, \tfrac{s}{T} \langle z_i, r_m \rangle \Big)

    ``form="ce"`` is the cross-entropy: the same gradient, and the entropy of the teacher's distribution more. Special cases:
    ZSCL (``form="ce"``, reference texts of the frozen model; its text loss has reference and student exchanged), open_clip's
    distillation (``form="ce"``, ``temperature=1``, the student's own texts against the teacher's, both directions halved),
    StarFT (``temperature=1``, spurious texts by both models, the same class left out).

    Args:
        student: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        teacher: ``(B, D)`` embeddings of the same inputs by the frozen model; constant.
        reference: ``(M, D)`` reference embeddings r that the student is compared with; receives gradient if it requires any.
        logit_scale: exponentiated scale s, a positive number or 0-d tensor; receives gradient.
        temperature: T; 2 in ZSCL.
        form: ``"kl"`` or ``"ce"``.
        teacher_reference: ``(M, D)`` reference embeddings r^0 of the teacher; constant; by default ``reference``, then constant
            on the teacher's side.
        teacher_logit_scale: s^0; by default ``logit_scale``, then constant on the teacher's side.
        exclude: ``(B, M)`` bool, entries that neither distribution sees.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Free of embedding units once logits are; averaged over B, a divergence over M (not divided by M). T^2 keeps the size of
        the gradient. A row-blocked matrix: memory O((B + M) D) beyond a fixed tile.

    Invariances:
        Permutation of samples and of references; one orthogonal map of a model's embeddings and references; for the student
        also adding one vector to all references.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a teacher requires grad, a scale or temperature that is not positive, unknown form.

    Deviations:
        ZSCL weights image and text loss 1 (5 in its class-incremental code); StarFT uses the teacher's scale on both sides. Pass
        what you want.

    Example:
        >>> import torch
        >>> z, texts = torch.tensor([[1.0, 0.0]]), torch.eye(2)
        >>> similarity_kl_loss(z, z, texts, logit_scale=10.0)
        tensor(0.)

    Reference:
        Zheng et al., Preventing zero-shot transfer degradation in continual learning of vision-language models, ICCV 2023,
        arXiv 2303.06628, equations 3 and 4; Hinton et al., arXiv 1503.02531.
    """
    name = "similarity_kl_loss"
    check_pair(name, student, teacher)
    check_bank(name, "reference", reference, student)
    check_option(name, "form", form, ("kl", "ce"))
    check_positive(name, "temperature", temperature)
    check_scale(name, "logit_scale", logit_scale)
    if teacher_reference is not None:
        check_pair(name, reference, teacher_reference, "reference")
    if teacher_logit_scale is not None:
        check_scale(name, "teacher_logit_scale", teacher_logit_scale, constant=True)
    check_mask(name, "exclude", exclude, (len(student), len(reference)))

    with full_precision(student):
        constant = reference.detach() if teacher_reference is None else teacher_reference
        z, z_teacher, r, r_teacher = common_precision(student, teacher, reference, constant)
        scale = one_number(logit_scale, z) / temperature
        teacher_scale = one_number(logit_scale if teacher_logit_scale is None else teacher_logit_scale, z).detach() / temperature

        def rows(z: Tensor, z_teacher: Tensor, *rest: Tensor) -> Tensor:
            *excluded, r, r_teacher, scale, teacher_scale = rest
            logits, target = scale * z @ r.T, teacher_scale * z_teacher @ r_teacher.T  # (b, M)
            for mask in excluded:
                logits, target = logits.masked_fill(mask, _EXCLUDED), target.masked_fill(mask, _EXCLUDED)
            log_student, log_teacher = F.log_softmax(logits, dim=1), F.log_softmax(target, dim=1)
            if form == "ce":
                return -(log_teacher.exp() * log_student).sum()
            return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)

        by_row = (z, z_teacher) if exclude is None else (z, z_teacher, exclude)
        total = row_blocked(rows, by_row, (r, r_teacher, scale, teacher_scale), columns=len(r))
        return temperature**2 * total / len(z)


class SimilarityKL(nn.Module):
    """Module form of :func:`similarity_kl_loss`; takes ``logit_scale=`` and, with ``against="texts"``, a bank ``texts=``.

    Args:
        against: ``"texts"`` compares the images with a bank of constant text embeddings by the frozen model (ZSCL);
            ``"batch"`` images and texts of the batch with each other by both models (open_clip's distillation), over the batches
            of all processes.
        directions: ``"rows"`` distributes each image over texts, ``"columns"`` each text over images; both are averaged in
            ``"batch"`` and added in ``"texts"``, as in open_clip and ZSCL.
        temperature: of both softmaxes.
        form: ``"kl"`` or ``"ce"``.
        teacher_logit_scale: of the teacher; by default that of the student, constant.
        normalize: divide embeddings by their L2 norm first.
    """

    def __init__(
        self,
        *,
        against: str = "texts",
        directions: tuple[str, ...] = ("rows", "columns"),
        temperature: float = 2.0,
        form: str = "kl",
        teacher_logit_scale: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        name = "SimilarityKL"
        check_option(name, "against", against, ("texts", "batch"))
        check_option(name, "form", form, ("kl", "ce"))
        check_positive(name, "temperature", temperature)
        if teacher_logit_scale is not None:
            check_scale(name, "teacher_logit_scale", teacher_logit_scale, constant=True)
        self.directions = check_choices(name, "directions", directions, ("rows", "columns"))
        self.against, self.temperature, self.form, self.normalize = against, temperature, form, normalize
        self.teacher_logit_scale = teacher_logit_scale
        self.separable = against == "texts" and self.directions == ("rows",)
        self.inputs: tuple[str, ...] = ("logit_scale", "texts") if against == "texts" else ("logit_scale",)

    def forward(
        self, student: Embeddings, teacher: Embeddings | None, *, logit_scale: float | Tensor, texts: Tensor | None = None
    ) -> Tensor:
        name = "SimilarityKL"
        modalities = ("image",) if self.against == "texts" else ("image", "text")
        parts = chosen(name, modalities, self.normalize, student, teacher)
        if not self.separable:  # a mean over texts looks at all images
            parts = [tuple(gathered_rows(value, self.training) for value in part) for part in parts]
        (image, teacher_image), *others = parts
        if self.against == "texts":
            bank = check_bank(name, "texts", texts, image, constant=True)
            text = teacher_text = unit_rows(bank) if self.normalize else bank
        elif texts is not None:
            raise ValueError(f'{name}: expected no texts with against="batch", got {describe(texts)}. Leave them out.')
        else:
            ((text, teacher_text),) = others
        sides = {"rows": (image, teacher_image, text, teacher_text), "columns": (text, teacher_text, image, teacher_image)}
        total = summed(
            similarity_kl_loss(
                one,
                one_teacher,
                other,
                teacher_reference=other_teacher,
                logit_scale=logit_scale,
                teacher_logit_scale=self.teacher_logit_scale,
                temperature=self.temperature,
                form=self.form,
            )
            for one, one_teacher, other, other_teacher in (sides[direction] for direction in self.directions)
        )
        if self.separable:
            return weighted_by_rows([(total, len(image))], self.training)
        return total / len(self.directions) if self.against == "batch" else total

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        names = ("against", "directions", "temperature", "form", "teacher_logit_scale", "normalize")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
