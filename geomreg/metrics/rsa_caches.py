"""RSA of two embedding caches on disk, in batches."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from geomreg.cache import EmbeddingCache
from geomreg.checks import check_common_ids, check_count, check_option, describe
from geomreg.metrics.results import Results
from geomreg.metrics.rsa import MODALITIES, RSA
from geomreg.metrics.rsa_bootstrap import RSAInterval
from geomreg.types import Embeddings

__all__ = ["rsa_of_caches"]


def rsa_of_caches(
    student: EmbeddingCache,
    teacher: EmbeddingCache,
    *,
    modality: str = "image",
    ids: Sequence[object] | None = None,
    batch_size: int = 4096,
    **options: Any,
) -> Tensor | RSAInterval:
    """:class:`RSA` of two embedding caches of the same data set, read in batches by id: before and after fine-tuning, say.

    Args:
        student: cache of the fine-tuned model, whose rows may be in another order.
        teacher: cache of the model before.
        modality: as for :class:`RSA`.
        ids: samples to compare; by default all, which both must have.
        batch_size: samples read at a time.
        options: of :class:`RSA`. With ``dissimilarity="cosine"`` or another one that streams, any number of samples fits.

    Returns:
        What :class:`RSA` computes; in several processes each computes all of it.

    Raises:
        TypeError: no caches.
        ValueError: a modality that one of them lacks; samples that only one of them has, or the same one twice; and as :class:`RSA`.

    Example:
        >>> import tempfile, torch
        >>> from geomreg import EmbeddingCache, Embeddings, Teacher
        >>> data = [{"id": k, "image": torch.randn(4, generator=torch.Generator().manual_seed(k))} for k in range(20)]
        >>> before, after = (
        ...     EmbeddingCache.build(
        ...         Teacher(torch.nn.Linear(4, 2), lambda model, batch: Embeddings(image=model(batch["image"]))),
        ...         data, tempfile.mkdtemp(), progress=False,
        ...     )
        ...     for _ in range(2)
        ... )
        >>> rsa_of_caches(after, before, dissimilarity="sqeuclidean") <= 1
        tensor(True)
    """
    name = "rsa_of_caches"
    check_option(name, "modality", modality, MODALITIES)
    check_count(name, "batch_size", batch_size, 1)
    for label, cache in (("student", student), ("teacher", teacher)):
        if not isinstance(cache, EmbeddingCache):
            raise TypeError(f"{name}: expected geomreg.EmbeddingCache as {label}, got {describe(cache)}. Open one, or use rsa on tensors.")
    fields = Embeddings._fields if modality in ("stacked", "cross-modal") else (modality,)
    known = teacher.ids(fields[0]) if ids is None else list(ids)
    if ids is None:
        for label, cache in (("student", student), ("teacher", teacher)):
            for field in fields:
                check_common_ids(name, known, cache.ids(field), f"the teacher's {fields[0]}s", f"the {label}'s {field}s")
    elif len(set(known)) != len(known):
        raise ValueError(f"{name}: expected every sample once, got repeated ids. Drop repeats.")
    metric = RSA(modality=modality, sync_on_compute=False, **options)
    for start in range(0, len(known), batch_size):
        some = known[start : start + batch_size]
        metric.update(student(some, fields), teacher(some, fields))
    result = metric.compute()
    return result.as_parts() if isinstance(result, Results) else result
