"""Replay: the contrastive objective again, on reference pairs or retrieved anchors (FLYP + replay; ARF, arXiv 2404.06244)."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomreg.blocked import row_blocked
from geomreg.checks import (
    check_bank,
    check_count,
    check_finite,
    check_labels,
    check_matrix,
    check_one_number,
    check_option,
    check_paired_embeddings,
    check_scale,
    describe,
)
from geomreg.distributed import gathered_rows
from geomreg.nearest import nearest_rows
from geomreg.precision import at_least_fp32, common_precision, full_precision, one_number
from geomreg.regularizers.common import pairs
from geomreg.types import Embeddings

__all__ = ["ContrastiveReplay", "contrastive_loss", "retrieve_anchors", "sigmoid_contrastive_loss"]


def contrastive_loss(image: Tensor, text: Tensor, *, logit_scale: float | Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Symmetric contrastive loss of a batch of image-text pairs, by rows and columns of the similarity matrix.

    .. math:: \frac1{2B} \sum_i \Big( -\sum_k y_{ik} \log \mathrm{softmax}_k\, s \langle z_i, t_k \rangle
              - \sum_k y_{ki} \log \mathrm{softmax}_k\, s \langle z_k, t_i \rangle \Big)

    Args:
        image: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        text: ``(B, D)`` embeddings of the paired texts; receives gradient.
        logit_scale: exponentiated scale s, a positive number or one number in a tensor; receives gradient.
        labels: what counts as a pair. None: the diagonal alone, as FLYP does even where captions repeat. ``(B,)``
            integers: texts of the same label are positives in equal shares. ``(B, B)`` floating point: soft labels, which
            are divided by their row sums (for texts, column sums), which must be positive.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Nats; averaged over the 2 B rows and columns. log B for embeddings that tell nothing. The similarity matrix is
        computed in row blocks: memory O(B D) beyond a fixed tile (B x B if soft labels are given as a matrix).

    Invariances:
        Permutation of pairs (with their labels); one orthogonal map of both modalities; exchange of the modalities
        (with transposed labels).

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a scale that is not positive, labels of another shape.

    Deviations:
        With repeated captions the diagonal form costs at least log k for a caption that occurs k times: FLYP's behaviour.

    Example:
        >>> import torch
        >>> contrastive_loss(torch.eye(2), torch.eye(2), logit_scale=100.0)
        tensor(0.)

    Reference:
        Radford et al., CLIP, arXiv 2103.00020; as the target loss of fine-tuning: Goyal et al., FLYP, CVPR 2023,
        arXiv 2212.00638.
    """
    name = "contrastive_loss"
    check_paired_embeddings(name, image, text)
    check_scale(name, "logit_scale", logit_scale)
    check_labels(name, labels, len(image), matrix=True)
    with full_precision(image):
        z, t = common_precision(image, text)
        scale = one_number(logit_scale, z)
        indices = torch.arange(len(z), device=z.device)

        def rows(z: Tensor, wanted: Tensor, t: Tensor, scale: Tensor, all_labels: Tensor) -> Tensor:
            logits = scale * z @ t.T  # (b, B)
            if labels is None:
                return F.cross_entropy(logits, wanted, reduction="sum")
            same = wanted.to(z.dtype) if wanted.ndim == 2 else (wanted[:, None] == all_labels[None, :]).to(z.dtype)
            return F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True), reduction="sum")

        by_row = indices if labels is None else labels
        by_column = by_row.T if by_row.ndim == 2 else by_row
        total = row_blocked(rows, (z, by_row), (t, scale, indices if by_row.ndim == 2 else by_row), columns=len(z))
        total = total + row_blocked(rows, (t, by_column), (z, scale, indices if by_row.ndim == 2 else by_row), columns=len(z))
        return total / (2 * len(z))


def sigmoid_contrastive_loss(image: Tensor, text: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor) -> Tensor:
    r"""Sigmoid contrastive loss (SigLIP): every image-text combination is its own yes-or-no question.

    .. math:: -\frac1B \sum_{j,k} \log \sigma\big( y_{jk} (s \langle z_j, t_k \rangle + b) \big), \quad y_{jj} = 1,\; y_{jk} = -1

    Args:
        image: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        text: ``(B, D)`` embeddings of the paired texts; receives gradient.
        logit_scale: exponentiated scale s; receives gradient. SigLIP starts at 10.
        logit_bias: b; receives gradient. SigLIP starts at -10.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Nats; summed over B^2 combinations and divided by B (not B^2), so it grows with the batch of all processes. Computed in
        row blocks: memory O(B D) beyond a fixed tile.

    Invariances:
        Permutation of pairs; one orthogonal map of both modalities; exchange of the modalities.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a scale that is not positive.

    Deviations:
        None known.

    Example:
        >>> import torch
        >>> sigmoid_contrastive_loss(torch.eye(2), torch.eye(2), logit_scale=40.0, logit_bias=-20.0).item() < 1e-7
        True

    Reference:
        Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, arXiv 2303.15343, equation 3.
    """
    name = "sigmoid_contrastive_loss"
    check_paired_embeddings(name, image, text)
    check_scale(name, "logit_scale", logit_scale)
    check_one_number(name, "logit_bias", logit_bias)
    with full_precision(image):
        z, t = common_precision(image, text)
        scale, bias = one_number(logit_scale, z), one_number(logit_bias, z)
        indices = torch.arange(len(z), device=z.device)

        def rows(z: Tensor, index: Tensor, t: Tensor, indices: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            sign = 2 * (index[:, None] == indices[None, :]).to(z.dtype) - 1
            return -F.logsigmoid(sign * (scale * z @ t.T + bias)).sum()

        return row_blocked(rows, (z, indices), (t, indices, scale, bias), columns=len(z)) / len(z)


@torch.no_grad()
def retrieve_anchors(queries: Tensor, bank: Tensor, k: int, *, chunk_size: int = 65_536, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a bank of teacher embeddings that are most similar to each query, by inner product, exactly.

    ARF (arXiv 2404.06244) replays the image-text pairs of a large pool that are nearest to the target data: embed both with
    the frozen model, retrieve, and give the pairs of ``indices.unique()`` to :class:`ContrastiveReplay`.

    Args:
        queries: ``(Q, D)`` embeddings of target images or texts.
        bank: ``(N, D)`` embeddings of the pool by the same model; may be memory-mapped on the CPU.
        k: at most N.
        chunk_size: rows of the bank at a time; memory is O(Q (k + chunk_size)) and one chunk of the bank in fp32.
        backend: ``"torch"``, ``"faiss"`` (a flat inner-product index for each chunk), or ``"auto"``: faiss if it is installed and
            both are on the CPU. Backend and ``chunk_size`` change no result: similarities are summed in fp64 and then rounded.

    Returns:
        ``(Q, k)`` similarities in falling order, and ``(Q, k)`` rows of the bank. Of equal similarities the lower row comes first, and
        is the one that is taken where there is room for one alone.

    Raises:
        ValueError: shapes or devices differ, ``k`` above N or below 1, an empty bank, NaN or infinity, unknown backend.
        RuntimeError: ``"faiss"`` is not installed, or the tensors are not on the CPU.

    Example:
        >>> import torch
        >>> retrieve_anchors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]), k=2)[1]
        tensor([[1, 2]])
    """
    name = "retrieve_anchors"
    check_bank(name, "bank", bank, check_matrix(name, "query", queries))
    check_count(name, "k", k, 1)
    check_count(name, "chunk_size", chunk_size, 1)
    check_option(name, "backend", backend, ("auto", "torch", "faiss"))
    if k > len(bank):
        raise ValueError(f"{name}: expected k of at most {len(bank)}, the rows of the bank, got {k}. Lower k or enlarge the bank.")
    if backend == "faiss" and bank.device.type != "cpu":
        raise RuntimeError(f'{name}: expected tensors on the CPU for faiss, got {bank.device}. Move them, or use backend="torch".')
    with_faiss = backend == "faiss" or (backend == "auto" and find_spec("faiss") is not None and bank.device.type == "cpu")
    search = _faiss_search if with_faiss else _torch_search
    wide = at_least_fp32(queries)
    check_finite(name, "query embeddings", wide)
    scores, indices = wide.new_empty(len(wide), 0), torch.empty(len(wide), 0, dtype=torch.long, device=wide.device)
    with full_precision(wide):
        for start in range(0, len(bank), chunk_size):
            part = bank[start : start + chunk_size].to(wide.dtype)
            check_finite(name, "bank embeddings", part)
            floor = scores[:, k - 1] if scores.shape[1] == k else wide.new_full((len(wide),), -torch.inf)
            found, rows = nearest_rows(wide, part, min(k, len(part)), search, floor)
            scores, order = torch.cat([scores, found], dim=1).sort(dim=1, descending=True, stable=True)
            scores, indices = scores[:, :k], torch.cat([indices, rows + start], dim=1).gather(1, order)[:, :k]
    return scores, indices


def _torch_search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, rows = (queries @ bank.T).topk(k, dim=1)
    return scores, rows


def _faiss_search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise RuntimeError('retrieve_anchors: expected faiss, got none. Run pip install faiss-cpu, or use backend="torch".') from error
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.float().contiguous().numpy())
    scores, rows = index.search(queries.float().contiguous().numpy(), k)
    return torch.from_numpy(scores).to(queries), torch.from_numpy(rows)


class ContrastiveReplay(nn.Module):
    """Module form of :func:`contrastive_loss` and :func:`sigmoid_contrastive_loss`, over the batches of all processes.

    Takes ``logit_scale=`` (exponentiated and live: list the parameter in the step's ``parameters``), with ``form="sigmoid"`` also
    ``logit_bias=``, and, if captions repeat, ``labels=`` of the batch's captions. The teacher may be None.

    Args:
        form: ``"softmax"`` (CLIP, FLYP, ARF) or ``"sigmoid"`` (SigLIP).
        normalize: divide embeddings by their L2 norm first.
    """

    def __init__(self, *, form: str = "softmax", normalize: bool = True) -> None:
        super().__init__()
        check_option("ContrastiveReplay", "form", form, ("softmax", "sigmoid"))
        self.form, self.normalize = form, normalize
        self.inputs: tuple[str, ...] = ("logit_scale",) if form == "softmax" else ("logit_scale", "logit_bias")
        self.optional_inputs: tuple[str, ...] = ("labels",) if form == "softmax" else ()

    def forward(
        self,
        student: Embeddings,
        teacher: Embeddings | None = None,
        *,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        name = "ContrastiveReplay"
        image, text = pairs(name, student, self.normalize)
        check_labels(name, labels, len(image))
        image, text = (gathered_rows(value, self.training) for value in (image, text))
        if self.form == "sigmoid":
            if labels is not None:
                raise ValueError(f'{name}: expected no labels with form="sigmoid", got {describe(labels)}. Leave them out.')
            if logit_bias is None:
                raise ValueError(f'{name}: expected logit_bias with form="sigmoid", got None. Pass model.logit_bias.')
            return sigmoid_contrastive_loss(image, text, logit_scale=logit_scale, logit_bias=logit_bias)
        if logit_bias is not None:
            raise ValueError(f'{name}: expected no logit_bias with form="softmax", got one. Leave it out: a softmax does not see it.')
        labels = None if labels is None else gathered_rows(labels, self.training)
        return contrastive_loss(image, text, logit_scale=logit_scale, labels=labels)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"form={self.form!r}, normalize={self.normalize}"
