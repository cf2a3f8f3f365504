"""RSA of embedding caches: what the function says of all rows, whatever their order on disk."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.metrics import rsa, rsa_interval, rsa_of_caches


def message(name: str, expected: str, got: str) -> str:
    return rf"^{re.escape(name)}: expected {expected}, got {got}\. .+\.$"


class Towers(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = torch.nn.Linear(4, 6), torch.nn.Linear(3, 6)


def encode(model: Towers, batch: dict) -> Embeddings:
    return Embeddings(model.image(batch["image"]), model.text(batch["text"]))


class Samples:
    def __init__(self, names: list[str]) -> None:
        self.ids = names

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < len(self.ids):
            raise IndexError(row)
        generator = torch.Generator().manual_seed(int(self.ids[row]))
        return {"id": self.ids[row], "image": torch.randn(4, generator=generator), "text": torch.randn(3, generator=generator)}


NAMES = [str(number) for number in range(37)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> tuple[EmbeddingCache, EmbeddingCache]:
    """The student's in another order."""
    made = []
    for seed, names in ((1, NAMES[::-1]), (0, NAMES)):
        folder = tmp_path_factory.mktemp("cache")
        made.append(EmbeddingCache.build(Teacher(Towers(seed), encode), Samples(names), folder, shard_rows=10, progress=False))
    return made[0], made[1]


@pytest.mark.parametrize("modality", ["image", "text", "stacked", "cross-modal"])
@pytest.mark.parametrize("dissimilarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("batch_size", [5, 4096])
def test_caches(caches, modality, dissimilarity, batch_size):
    student, teacher = caches
    for ids in (None, ["30", "4", "17", "9"]):
        known = NAMES if ids is None else ids
        found = rsa_of_caches(student, teacher, modality=modality, ids=ids, batch_size=batch_size, dissimilarity=dissimilarity)
        expected = rsa(student(known), teacher(known), modality=modality, dissimilarity=dissimilarity)
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_caches_are_read_in_batches_of_what_is_asked(caches, monkeypatch):
    read = []
    plain = EmbeddingCache.__call__
    monkeypatch.setattr(EmbeddingCache, "__call__", lambda self, ids, which: read.append((len(ids), which)) or plain(self, ids, which))
    rsa_of_caches(*caches, modality="text", batch_size=10, dissimilarity="cosine")
    assert read == [(10, ("text",)), (10, ("text",))] * 3 + [(7, ("text",))] * 2


def test_options_of_caches(caches):
    found = rsa_of_caches(*caches, dissimilarity="cosine", correlation="spearman", level=0.9, resamples=20)
    student, teacher = (cache(NAMES).image for cache in caches)
    assert found == rsa_interval(student, teacher, dissimilarity="cosine", correlation="spearman", level=0.9, resamples=20)
    with pytest.raises(ValueError, match=message("RSA", "at most max_samples=36 rows", "37")):
        rsa_of_caches(*caches, max_samples=36)


def test_what_is_no_cache_or_lacks_a_modality(caches, tmp_path):
    with pytest.raises(TypeError, match=message("rsa_of_caches", r"geomreg\.EmbeddingCache as teacher", "float32 tensor of .+")):
        rsa_of_caches(caches[0], torch.zeros(3, 4))
    images = Teacher(Towers(0), lambda model, batch: Embeddings(image=model.image(batch["image"])))
    one = EmbeddingCache.build(images, Samples(NAMES), tmp_path, progress=False)
    with pytest.raises(ValueError, match=message("EmbeddingCache", "modalities among image", "'text'")):
        rsa_of_caches(caches[0], one, modality="text")


def test_caches_of_other_samples(caches, tmp_path):
    other = EmbeddingCache.build(Teacher(Towers(2), encode), Samples([*NAMES[2:], "99"]), tmp_path, progress=False)
    expected, got = "the student's images of the same samples as the teacher's images", "3 that only one of them has: '0', '1', '99'"
    with pytest.raises(ValueError, match=message("rsa_of_caches", expected, got)):
        rsa_of_caches(other, caches[1])
    assert rsa_of_caches(other, caches[1], ids=NAMES[2:]).isfinite()
    with pytest.raises(ValueError, match=r"^EmbeddingCache: expected ids of .+, got 1 of 36 that it lacks: '1'"):
        rsa_of_caches(other, caches[1], ids=NAMES[1:])
    with pytest.raises(ValueError, match=message("rsa_of_caches", "every sample once", "repeated ids")):
        rsa_of_caches(*caches, ids=["1", "2", "3", "1"])


def in_each_process(rank: int, folder: str, paths: tuple[str, str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        caches = [EmbeddingCache.open(path) for path in paths]
        torch.save([rsa_of_caches(*caches, dissimilarity=one) for one in ("euclidean", "cosine")], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_each_of_two_processes_computes_all(caches, tmp_path):
    """And no sample twice."""
    mp.spawn(in_each_process, args=(str(tmp_path), tuple(str(cache.path) for cache in caches)), nprocs=2)
    for rank in range(2):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pt"), ("euclidean", "cosine"), strict=True):
            assert float(found) == pytest.approx(float(rsa_of_caches(*caches, dissimilarity=one)), rel=1e-12)
