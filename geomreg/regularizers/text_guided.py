"""Text-guided terms: images keep their similarities to fixed texts (Lipsum-FT, arXiv 2404.00860; CAR-FT, arXiv 2211.16175)."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from geomreg.checks import check_bank, check_callable, check_count, check_pair, check_scale, describe
from geomreg.distributed import weighted_by_rows
from geomreg.precision import common_precision, full_precision, one_number
from geomreg.regularizers.common import chosen, unit_rows
from geomreg.regularizers.similarity_kl import similarity_kl_loss
from geomreg.types import Embeddings

__all__ = ["ContextKL", "TextEnergy", "context_embeddings", "context_kl_loss", "text_energy_loss"]


def text_energy_loss(image: Tensor, teacher_image: Tensor, texts: Tensor, *, logit_scale: float | Tensor) -> Tensor:
    r"""Mean squared change of the images' logits for a set of texts.

    .. math:: \frac1B \sum_i \frac1{2M} \sum_m \big( s \langle z_i, r_m \rangle - s \langle z^0_i, r_m \rangle \big)^2

    Args:
        image: ``(B, D)`` image embeddings of the model in training, as they come; receives gradient.
        teacher_image: ``(B, D)`` embeddings of the same images by the frozen model; constant.
        texts: ``(M, D)`` embeddings of the texts by the frozen model; constant. Lipsum-FT: 80 random token sequences.
        logit_scale: exponentiated scale s, a positive number or one number in a tensor; receives gradient.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Squared logits: the scale is inside the square, so 100 makes 10,000. Averaged over B and M, halved.

    Invariances:
        Permutation of samples and of texts; one orthogonal map of all three; a translation of both images' sides; any change
        of the images orthogonal to all texts.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, the teacher or the texts require grad, a scale that is not positive.

    Deviations:
        None known.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1, 2)
        >>> text_energy_loss(torch.tensor([[1.0, 5.0]]), zero, torch.tensor([[2.0, 0.0]]), logit_scale=1.0)  # 2^2 / 2
        tensor(2.)

    Reference:
        Nam et al., Lipsum-FT, ICLR 2024, arXiv 2404.00860, equation 8.
    """
    name = "text_energy_loss"
    check_pair(name, image, teacher_image, "image")
    check_bank(name, "texts", texts, image, constant=True)
    check_scale(name, "logit_scale", logit_scale)
    with full_precision(image):
        z, z_teacher, bank = common_precision(image, teacher_image, texts)
        shift = z - z_teacher  # (B, D): no logit is formed that could cancel
        return (one_number(logit_scale, shift) * shift @ bank.T).square().mean() / 2


def context_kl_loss(image: Tensor, teacher_image: Tensor, contexts: Tensor, *, logit_scale: float | Tensor) -> Tensor:
    r"""Divergence of the images' distribution over contexts ("a photo", "a sketch", ...) from the teacher's.

    .. math:: \frac1B \sum_i \mathrm{KL}\big( p^0_i \,\Vert\, p_i \big), \quad p_i = \mathrm{softmax}_k\, s \langle z_i, c_k \rangle

    Args:
        image: ``(B, D)`` image embeddings of the model in training, as they come; receives gradient.
        teacher_image: ``(B, D)`` embeddings of the same images by the frozen model; constant.
        contexts: ``(K, D)`` one embedding for each template, see :func:`context_embeddings`; constant.
        logit_scale: exponentiated scale s, on the teacher's side constant; receives gradient.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Nats; averaged over B, a divergence over K (not divided by K).

    Invariances:
        Permutation of samples and of contexts; one orthogonal map of all three; adding one vector to all contexts.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, the teacher or the contexts require grad, a scale that is not positive.

    Deviations:
        The paper has no public code; direction and weight of the divergence are not stated in what we could read. KL(teacher,
        student) keeps every context that the teacher saw.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> context_kl_loss(z, z, torch.eye(2), logit_scale=100.0)
        tensor(0.)

    Reference:
        Mao et al., Context-aware robust fine-tuning, arXiv 2211.16175.
    """
    name = "context_kl_loss"
    check_pair(name, image, teacher_image, "image")
    check_bank(name, "contexts", contexts, image, constant=True)
    check_scale(name, "logit_scale", logit_scale)
    return similarity_kl_loss(image, teacher_image, contexts, logit_scale=logit_scale, temperature=1.0)


def context_embeddings(texts: Tensor) -> Tensor:
    """One unit vector for each template: the mean over classes of unit text embeddings.

    Args:
        texts: ``(K, C, D)`` text embeddings of C class names in K templates by the frozen model.

    Returns:
        ``(K, D)``.

    Raises:
        ValueError: another number of dimensions.

    Example:
        >>> import torch
        >>> context_embeddings(torch.tensor([[[2.0, 0.0], [5.0, 0.0]]]))
        tensor([[1., 0.]])
    """
    if not isinstance(texts, Tensor) or texts.ndim != 3 or not texts.is_floating_point():
        raise ValueError(
            f"context_embeddings: expected a floating-point tensor of shape (K, C, D), got {describe(texts)}. Stack by template."
        )
    return unit_rows(unit_rows(texts).mean(dim=1))


class TextEnergy(nn.Module):
    """Module form of :func:`text_energy_loss`; takes ``logit_scale=`` and either ``texts=`` or draws random texts itself.

    Args:
        encode_text: ``(M, L) token ids -> (M, D)`` embeddings by the frozen text tower. With it, ``count`` random token sequences are
            drawn and encoded once a step, other ones after each :meth:`step`, the same on every process. None: give ``texts=``.
        count: M; 80 in Lipsum-FT.
        length: random tokens of each text, between start and end; 8 there.
        vocabulary: ids are drawn below it; 49,406 there: all of CLIP's but the two special ones.
        start: id of the start of text.
        end: id of the end of text.
        context_length: pad with zeros to this many ids, as open_clip's towers need; None for no padding.
        seed: of the draws.
        normalize: divide embeddings by their L2 norm first, texts too.

    The number of steps so far is part of ``state_dict``: a resumed run draws on.
    """

    separable: ClassVar[bool] = True

    def __init__(
        self,
        encode_text: Callable[[Tensor], Tensor] | None = None,
        *,
        count: int = 80,
        length: int = 8,
        vocabulary: int = 49_406,
        start: int = 49_406,
        end: int = 49_407,
        context_length: int | None = None,
        seed: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        name = "TextEnergy"
        if encode_text is not None:
            check_callable(name, "encode_text", encode_text, "of token ids (M, L)")
        for option, value in (("count", count), ("length", length), ("vocabulary", vocabulary)):
            check_count(name, option, value, 1)
        for option, value in (("start", start), ("end", end), ("seed", seed)):
            check_count(name, option, value, 0)
        if context_length is not None:
            check_count(name, "context_length", context_length, length + 2)
        self.inputs: tuple[str, ...] = ("logit_scale", "texts") if encode_text is None else ("logit_scale",)
        self._encode = (encode_text,)  # in a tuple: a module would be registered, and its tower saved and trained
        self.count, self.length, self.vocabulary = count, length, vocabulary
        self.start, self.end, self.context_length, self.seed, self.normalize = start, end, context_length, seed, normalize
        self._steps = 0
        self._tokens = self.random_tokens()
        self._drawn: Tensor | None = None

    def forward(
        self, student: Embeddings, teacher: Embeddings | None, *, logit_scale: float | Tensor, texts: Tensor | None = None
    ) -> Tensor:
        name = "TextEnergy"
        ((image, teacher_image),) = chosen(name, ("image",), self.normalize, student, teacher)
        if (texts is None) == (self._encode[0] is None):
            got = "neither" if texts is None else "both"
            raise ValueError(f"{name}: expected texts or encode_text, got {got}. Pass texts=, or construct with encode_text.")
        bank = check_bank(name, "texts", self.random_texts(image) if texts is None else texts, image, constant=True)
        value = text_energy_loss(image, teacher_image, unit_rows(bank) if self.normalize else bank, logit_scale=logit_scale)
        return weighted_by_rows([(value, len(image))], self.training)

    def random_tokens(self) -> Tensor:
        """``(M, L)`` token ids of this step, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._steps)
        body = torch.randint(self.vocabulary, (self.count, self.length), generator=generator)
        tokens = nn.functional.pad(nn.functional.pad(body, (1, 0), value=self.start), (0, 1), value=self.end)
        padding = 0 if self.context_length is None else self.context_length - tokens.shape[1]
        return nn.functional.pad(tokens, (0, padding))

    @torch.no_grad()
    def random_texts(self, like: Tensor) -> Tensor:
        """Embeddings of this step's random texts on the device of ``like``; encoded once a step."""
        (encode_text,) = self._encode
        if encode_text is None:
            raise ValueError("TextEnergy: expected encode_text for random texts, got None. Construct with it.")
        if self._drawn is None or self._drawn.device != like.device:
            self._drawn = encode_text(self._tokens.to(like.device)).detach()
        return self._drawn

    def step(self) -> None:
        """Other texts from now on."""
        self._steps += 1
        self._tokens, self._drawn = self.random_tokens(), None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        self._steps = int(state)
        self._tokens, self._drawn = self.random_tokens(), None

    def extra_repr(self) -> str:
        return f"count={self.count}, length={self.length}, seed={self.seed}, normalize={self.normalize}"


class ContextKL(nn.Module):
    """Module form of :func:`context_kl_loss`; takes the contexts as ``texts=`` and the live ``logit_scale=``.

    Args:
        normalize: divide embeddings by their L2 norm first, contexts too.
    """

    inputs: ClassVar[tuple[str, ...]] = ("logit_scale", "texts")
    separable: ClassVar[bool] = True

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None, *, logit_scale: float | Tensor, texts: Tensor) -> Tensor:
        ((image, teacher_image),) = chosen("ContextKL", ("image",), self.normalize, student, teacher)
        contexts = check_bank("ContextKL", "texts", texts, image, constant=True)
        contexts = unit_rows(contexts) if self.normalize else contexts
        value = context_kl_loss(image, teacher_image, contexts, logit_scale=logit_scale)
        return weighted_by_rows([(value, len(image))], self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"
