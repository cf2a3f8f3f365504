"""``geomreg retrieve``: the nearest of a pool, by loops over all pairs."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_clip
from torch import nn

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.integrations.recipes import retrieve as module
from geomreg.integrations.recipes.data import CsvPairs, LabelledFolder, Subset
from geomreg.integrations.recipes.embed import Options as EmbedOptions
from geomreg.integrations.recipes.embed import embed_data
from geomreg.integrations.recipes.retrieve import RetrieveOptions, retrieve

TARGET, POOL, WIDTH = 11, 40, 4


class Vectors:
    """Images and texts that are their own embeddings."""

    def __init__(self, rows, seed, name):
        generator = torch.Generator().manual_seed(seed)
        self.image, self.text = (nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1) for _ in range(2))
        self.ids = [f"{name}/{row}.jpg" for row in range(rows)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"id": self.ids[row], "image": self.image[row], "text": self.text[row]}


def built(path, data, *, scale=1.0, modalities=("image", "text"), **options):
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(model.weight)
    model.weight.data.mul_(scale)

    def encode(model, batch):
        return Embeddings(**{modality: nn.functional.normalize(model(batch[modality]), dim=1) for modality in modalities})

    EmbeddingCache.build(Teacher(model, encode), data, path, shard_rows=7, progress=False, **options)
    return path


@pytest.fixture(scope="module")
def data():
    return Vectors(TARGET, 1, "target"), Vectors(POOL, 2, "pool")


@pytest.fixture(scope="module")
def caches(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {"target": built(folder / "target", data[0]), "pool": built(folder / "pool", data[1])}


def expected(queries, bank, k, limit=None):
    """Rank by rank: what some query has at this rank and none at a better one, the most similar first."""
    ranked = [sorted(range(len(bank)), key=lambda row: -float(query @ bank[row]))[:k] for query in queries]
    found = []
    for rank in range(k):
        best = {}
        for query, rows in zip(queries, ranked, strict=True):
            if rows[rank] not in found:
                best[rows[rank]] = max(best.get(rows[rank], -np.inf), float(query @ bank[rows[rank]]))
        found += sorted(best, key=lambda row: -best[row])
    return found[:limit]


@pytest.fixture(params=[(65_536, 16_384, 1 << 26), (3, 5, 8), (1, 1, 1), (11, 40, 22)])
def sizes(request, monkeypatch):
    for name, value in zip(("QUERIES", "BANK", "_SIMILARITIES"), request.param, strict=True):
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("modalities", list(itertools.product(["image", "text"], repeat=2)))
@pytest.mark.parametrize("k", [1, 3, POOL])
def test_the_nearest_by_loops(data, caches, tmp_path, modalities, k):
    options = {"target_modality": modalities[0], "pool_modality": modalities[1], "k": k, "device": "cpu"}
    rows = expected(getattr(data[0], modalities[0]), getattr(data[1], modalities[1]), k)
    ids = retrieve(RetrieveOptions(**caches, output=tmp_path / "ids.txt", **options))
    assert ids == [data[1].ids[row] for row in rows]
    assert (tmp_path / "ids.txt").read_text().splitlines() == ids
    assert 1 < len(ids) <= min(k * TARGET, POOL)


@pytest.mark.parametrize("limit", [1, 4, 9, 1000])
def test_limit_is_the_beginning(data, caches, tmp_path, limit):
    ids = [retrieve(RetrieveOptions(**caches, output=tmp_path / "a.txt", k=3, limit=one)) for one in (limit, None)]
    assert ids[0] == ids[1][:limit] == [data[1].ids[row] for row in expected(data[0].image, data[1].image, 3, limit)]
    nearest = retrieve(RetrieveOptions(**caches, output=tmp_path / "b.txt", k=1))
    assert ids[1][: len(nearest)] == nearest  # as a smaller k


def test_equal_pool_samples_come_in_their_order(tmp_path):
    pool = Vectors(9, 3, "pool")
    pool.image = torch.eye(WIDTH)[[1, 0, 0, 1, 1, 0, 0, 1, 0]]  # whose products are exact
    queries = Vectors(2, 0, "target")
    queries.image = torch.eye(WIDTH)[:2]
    caches = {"target": built(tmp_path / "target", queries), "pool": built(tmp_path / "pool", pool)}
    ids = retrieve(RetrieveOptions(**caches, output=tmp_path / "ids.txt", k=9))
    assert sorted(ids) == sorted(pool.ids)
    assert ids[:2] == ["pool/0.jpg", "pool/1.jpg"]


def test_a_subset_takes_the_file(data, caches, tmp_path):
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "".join(f"{one},x\n" for one in data[1].ids))
    pairs = CsvPairs(tmp_path / "pairs.csv", transform=None, tokenizer=lambda texts: torch.zeros(1, 3).long(), modalities=("text",))
    ids = retrieve(RetrieveOptions(**caches, output=tmp_path / "deep" / "er" / "ids.txt", k=2))
    assert sorted(Subset(pairs, tmp_path / "deep" / "er" / "ids.txt").ids) == sorted(ids)


def test_caches_of_embed(tmp_path):
    """Pictures are found again in a pool of other pictures, with a real model."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=np.uint8)
    for name, rows in (("target", (2, 5)), ("pool", range(8))):
        (tmp_path / name / "class").mkdir(parents=True)
        for row in rows:
            Image.fromarray(pictures[row]).save(tmp_path / name / "class" / f"{row}.png")
        options = {"data": tmp_path / name, "output": tmp_path / f"{name} cache", "modality": "image"}
        embed_data(EmbedOptions(str(small_clip()), **options, device="cpu", workers=0, check=0))
    options = {"target": tmp_path / "target cache", "pool": tmp_path / "pool cache", "output": tmp_path / "ids.txt"}
    assert sorted(retrieve(RetrieveOptions(**options, k=1))) == ["class/2.png", "class/5.png"]
    data = Subset(LabelledFolder(tmp_path / "pool", transform=np.asarray), tmp_path / "ids.txt")
    assert [sample["image"].tolist() for sample in data] == [pictures[2].tolist(), pictures[5].tolist()]


def test_names_that_are_not_utf8(data, tmp_path):
    pool = Vectors(3, 2, "pool")
    pool.ids = ["caf\udce9.jpg", "b.jpg", "c.jpg"]
    caches = {"target": built(tmp_path / "target", data[0]), "pool": built(tmp_path / "pool", pool)}
    retrieve(RetrieveOptions(**caches, output=tmp_path / "ids.txt", k=3))
    assert b"caf\xe9.jpg" in (tmp_path / "ids.txt").read_bytes().split(b"\n")


@pytest.mark.parametrize("name", ["a\nb", "a\r", " "])
def test_ids_that_do_not_fit_on_a_line(data, tmp_path, name):
    pool = Vectors(3, 2, "pool")
    pool.ids = ["a", name, "c"]
    caches = {"target": built(tmp_path / "target", data[0]), "pool": built(tmp_path / "pool", pool)}
    with pytest.raises(ValueError, match=r"^retrieve: expected ids that fit on a line, got '"):
        retrieve(RetrieveOptions(**caches, output=tmp_path / "ids.txt", k=3))
    assert not (tmp_path / "ids.txt").exists()


def test_other_models_are_refused(data, caches, tmp_path):
    options = {"target": caches["target"], "output": tmp_path / "ids.txt"}
    with pytest.raises(ValueError, match=r"^retrieve: expected two caches by one model, got weights '.*' in .*target and '.*' in .*other"):
        retrieve(RetrieveOptions(pool=built(tmp_path / "other", data[1], scale=2.0), **options))
    other = built(tmp_path / "other view", data[1], preprocessing="crops", tokenizer="words")
    with pytest.raises(
        ValueError, match=r"^retrieve: expected two caches by one model, got preprocessing 'not given' in .* and 'crops' in"
    ):
        retrieve(RetrieveOptions(pool=other, **options))
    assert retrieve(RetrieveOptions(pool=other, **options, pool_modality="text"))  # neither sees what the other does
    assert not (tmp_path / "no.txt").exists()


def test_mistakes(data, caches, tmp_path):
    images = built(tmp_path / "images", data[1], modalities=("image",))
    options = {"target": caches["target"], "output": tmp_path / "ids.txt"}
    with pytest.raises(ValueError, match=r"^retrieve: expected text embeddings in .*images, got image alone\. Build them"):
        retrieve(RetrieveOptions(pool=images, **options, pool_modality="text"))
    with pytest.raises(ValueError, match=r"^retrieve: expected k of at most 40, the samples of the pool, got 41\. Lower k"):
        retrieve(RetrieveOptions(pool=images, **options, k=41))
    with pytest.raises(FileNotFoundError, match="expected a cache in"):
        retrieve(RetrieveOptions(pool=tmp_path / "absent", **options))
    for changes in ({"k": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match=r"^retrieve: expected (k|limit) as a whole number >= 1, got 0"):
            RetrieveOptions(pool=images, **options, **changes)
    assert not (tmp_path / "ids.txt").exists()


@pytest.mark.parametrize("at_once", [3, 10, 1000])
def test_of_copies_in_the_pool_the_first_are_taken(monkeypatch, at_once):
    monkeypatch.setattr(module, "_SIMILARITIES", at_once * 5)
    generator = torch.Generator().manual_seed(0)
    queries, few = (nn.functional.normalize(torch.randn(rows, 65, generator=generator), dim=1) for rows in (5, 6))
    bank = few.repeat(20, 1)
    _, rows = module._nearest(queries, bank.split(at_once), 4)
    nearest = (queries @ few.T).argmax(dim=1)
    assert torch.equal(rows, nearest[:, None] + 6 * torch.arange(4))
