"""Two processes with different data equal one process with all of it: losses, gradients, running means."""

import os
from datetime import timedelta
from functools import partial
from unittest import mock

import contract
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import batch_mean, random_pair
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from geomreg import (
    AverageVectorLoss,
    ContrastiveReplay,
    DiVE,
    Embeddings,
    FeatureDistillation,
    FeatureMapDistance,
    RelationalAngle,
    SimilarityKL,
    Teacher,
    WeightedSum,
    backward,
    recompute_statistics,
)
from geomreg.distributed import gathered_rows, weighted_by_rows
from geomreg.functional import contrastive_loss
from geomreg.schedules import BalancedWeight

pytestmark = pytest.mark.slow
RANKS, STEPS, ROWS = 2, 3, 4
EQUAL, RAGGED = (ROWS, ROWS), (6, 10)
STATEFUL = {
    "average_vector": partial(AverageVectorLoss, decay=0.5),
    "average_vector_before": partial(AverageVectorLoss, decay=0.5, update="before"),
    "dive": partial(DiVE, decay=0.5),
    "dive_before": partial(DiVE, decay=0.5, update="before"),
}
TERMS = STATEFUL | {name: term.build for name, term in contract.TERMS.items() if name not in ("AverageVectorLoss", "DiVE")}
TERMS |= {
    "batch_similarity": partial(SimilarityKL, against="batch"),
    "sigmoid_replay": partial(ContrastiveReplay, form="sigmoid"),
    "drawn_angles": partial(RelationalAngle, max_triplets=10),
    "labelled_replay": ContrastiveReplay,
    "feature_maps": FeatureMapDistance,
}


SEPARATE = ("average_vector", "FeatureDistillation", "CosineAnchor")  # terms whose images need no texts
COMPILED = ("dive", "FeatureDistillation", "ContextKL")


class Towers(nn.Module):
    """An image and a text encoder; the same weights in every process."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = nn.Linear(5, 6).double(), nn.Linear(3, 6).double()

    def forward(self, images, texts):
        return Embeddings(self.image(images), self.text(texts))


def data(step, ranks, rows=EQUAL):
    """The batches of some ranks, one under the other."""
    generators = [torch.Generator().manual_seed(100 * step + rank) for rank in ranks]
    values = [
        [torch.randn(rows[rank], width, generator=one, dtype=torch.float64) + rank for width in (5, 3)]
        for rank, one in zip(ranks, generators, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*values, strict=True)]


def inputs(name, regularizer, batch, ranks, rows=EQUAL):
    """Named inputs of a term: the same bank and scale on every rank, its own labels and second teacher's embeddings."""
    texts = torch.randn(5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    previous = Towers(seed=2)
    found = {"logit_scale": 2.0, "texts": texts, "previous": Embeddings(*(value.detach() for value in previous(*batch)))}
    if name == "sigmoid_replay":
        found["logit_bias"] = -1.0
    if name == "labelled_replay":
        found["labels"] = torch.cat([torch.arange(rows[rank]) % (2 + rank) for rank in ranks])
    taken = (*getattr(regularizer, "inputs", ()), *getattr(regularizer, "optional_inputs", ()))
    if name == "batch_similarity":
        taken = ("logit_scale",)
    return {key: value for key, value in found.items() if key in taken}


def trained(name, ranks, wrap=lambda model: model, rows=EQUAL, compiled=False):
    """Loss, gradient and running mean at each of a few steps."""
    build = TERMS[name]
    teacher = Teacher(Towers(seed=1), lambda model, batch: model(*batch))
    towers, regularizer = Towers(), build()
    student, record = wrap(towers), []
    called = torch.compile(regularizer, fullgraph=True, backend="aot_eager") if compiled else regularizer
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    for step in range(STEPS):
        batch = data(step, ranks, rows)
        embeddings, extra = student(*batch), inputs(name, regularizer, batch, ranks, rows)
        if name == "feature_maps":
            extra = {"feature_maps": list(embeddings), "teacher_feature_maps": list(teacher(batch))}
        loss = called(embeddings, teacher(batch), **extra)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regularizer.step()
        gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in towers.parameters()])
        record.append({"loss": loss.detach(), "gradient": gradients, "mean": getattr(regularizer, "mean", torch.zeros(())).clone()})
    return record


def separate(build, rank):
    """Gradient of a term on images and texts of different numbers, which differ over ranks too."""
    towers, teacher = Towers(), Teacher(Towers(seed=1), lambda model, batch: model(*batch))
    images, texts = data(0, [rank], RAGGED)
    batch = (images, texts[: 3 + rank])
    student = DistributedDataParallel(towers)
    build()(student(*batch), teacher(batch)).backward()
    return torch.cat([p.grad.flatten() for p in towers.parameters()])


def alone(rank):
    """Values of all terms in evaluation mode on rank 0, which does not wait for the other."""
    found = {}
    if rank == 0:
        teacher, towers, batch = Teacher(Towers(seed=1), lambda model, batch: model(*batch)), Towers(), data(0, [0], RAGGED)
        for name, build in TERMS.items():
            regularizer, embeddings = build().eval(), towers(*batch)
            extra = inputs(name, regularizer, batch, [0], RAGGED)
            if name == "feature_maps":
                extra = {"feature_maps": list(embeddings), "teacher_feature_maps": list(teacher(batch))}
            found[name] = regularizer(embeddings, teacher(batch), **extra).detach()
    return found


def uneven(build, rank, spoiled=False):
    """The mean after one batch that is larger on rank 1 and, if spoiled, not finite there."""
    regularizer = build(normalize=False)
    regularizer(*random_pair(rows=3 + 2 * rank, seed=rank))
    regularizer.step()
    if spoiled:
        student, teacher = random_pair(seed=rank + 10)
        with torch.no_grad():
            student.image[0, 0] *= float("nan") if rank == 1 else 1.0
        regularizer(student, teacher)
        regularizer.step()
    return regularizer.mean


def absent(build, rank, committed):
    """The mean after a step in which rank 1 had no batch, first of all or after a commit."""
    regularizer = build(normalize=False, update="after")
    if committed:
        regularizer(*random_pair(seed=rank))
        regularizer.step()
    if rank == 0:
        regularizer(*random_pair(seed=7))
    regularizer.step()
    return regularizer.mean


def refused(build, rank):
    """What step() says on rank 1, without a batch, where the mean moves before the loss."""
    regularizer = build(normalize=False, update="before")
    if rank == 0:
        return ""
    try:
        regularizer.step()
    except RuntimeError as error:
        return str(error)


def accumulated(rank):
    """The mean after a step in which rank 1 had two batches and rank 0 one."""
    regularizer = AverageVectorLoss(decay=0.0, normalize=False)
    for k in range(1 + rank):
        regularizer(*random_pair(rows=2 + k, seed=10 * rank + k))
    regularizer.step()
    return regularizer.mean


def collected(ranks):
    """Running statistics from three batches of each rank, of equal sizes."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    for value in model.parameters():
        nn.init.constant_(value, 0.5)
    batches = [data(step, [rank])[0] for rank in ranks for step in range(3)]
    assert recompute_statistics(model, batches, lambda model, batch: model(batch)) == len(batches)
    return torch.stack([model[1].running_mean, model[1].running_var])


def balanced_weight(ranks):
    """A balanced weight after a few steps on the ranks' data."""
    teacher, towers = Teacher(Towers(seed=1), lambda model, batch: model(*batch)), Towers()
    keep = WeightedSum(fd=(BalancedWeight(0.3, warmup=1, decay=0.5), FeatureDistillation()))
    for step in range(STEPS):
        batch = data(step, ranks)
        task = contrastive_loss(*(gathered_rows(value) for value in keep.watch_task(towers(*batch))), logit_scale=1.0)
        (task + keep(towers(*batch), teacher(batch))).backward()
        keep.step()
    return keep.balanced["fd"].weight


class Whole(nn.Module):
    """Student, teacher and terms in one module, as Lightning has them."""

    def __init__(self):
        super().__init__()
        self.towers, self.teacher = Towers(), Teacher(Towers(seed=1), lambda model, batch: model(*batch))
        self.keep = WeightedSum(dive=(BalancedWeight(0.3, warmup=1, decay=0.5), DiVE(decay=0.5)))

    def forward(self, batch):
        seen = self.keep.watch_task(self.towers(*batch))
        task = weighted_by_rows([((seen.image - seen.text).square().sum(1).mean(), len(seen.image))])
        return task + self.keep(self.towers(*batch), self.teacher(batch))


def within_one_module(ranks, wrap=lambda model: model):
    """Running mean and balanced weight after each step of two backward passes through it."""
    whole, record = Whole(), []
    module, optimizer = wrap(whole), torch.optim.SGD(whole.towers.parameters(), lr=0.02)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            module(data(10 * step + part, ranks, RAGGED)).backward()
        optimizer.step()
        whole.keep.step()
        record.append(torch.cat([whole.keep.regularizers.dive.mean, whole.keep.balanced["dive"].weight[None]]))
    return record


class Scaled(Towers):
    """Towers with a logit scale, which their forward does not use."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.logit_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


def stepped(ranks, chunk_size, wrap=lambda model: model, declared=True, target_first=False, rows=EQUAL):
    """Gradients after a chunked regularizer and a chunked target loss, in this order or the other, step by step."""
    towers, teacher = Scaled(), Teacher(Towers(seed=1), lambda model, batch: model(*batch))
    student, keep, replay, record = wrap(towers), DiVE(decay=0.5), ContrastiveReplay(), []
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        target, reference = data(step, ranks, rows), data(step + 50, ranks, rows)
        options = {"chunk_size": chunk_size, "model": student}

        def encode(batch):
            return student(*batch)

        options["parameters"] = [towers.logit_scale] if declared else []

        def regularize(sync, reference=reference, options=options, encode=encode):
            backward(
                encode, reference, lambda e, index: keep(e, Embeddings(*(x[index] for x in teacher(reference)))), separable=True,
                sync=sync, **options,
            )  # fmt: skip

        def fit(sync, target=target, options=options, encode=encode):
            backward(encode, target, lambda e: replay(e, logit_scale=towers.logit_scale.exp()), sync=sync, **options)

        for last, part in enumerate((fit, regularize) if target_first else (regularize, fit)):
            part(bool(last))
        record.append(torch.cat([p.grad.flatten() for p in towers.parameters()]))
        optimizer.step()
        keep.step()
    return record


def unique_texts(ranks, chunk_size, wrap=lambda model: model):
    """Gradients of a contrastive loss whose captions repeat, each encoded once; towers and logit scale in one DDP module."""
    towers = Scaled()
    student = wrap(Either(towers))
    images, texts = data(0, ranks)
    texts = torch.cat(
        [texts[k : k + 4][[0, 1, 0, 0] if rank == 0 else [0, 1, 2, 1]] for k, rank in zip(range(0, 8, 4), ranks, strict=False)]
    )
    different, row = texts.unique(dim=0, return_inverse=True)
    replay = ContrastiveReplay()
    parts = [(lambda b: Embeddings(image=student(images=b)), images), (lambda b: Embeddings(text=student(texts=b)), different)]
    backward(
        parts, None, lambda e: replay(Embeddings(e.image, e.text[row]), logit_scale=towers.logit_scale.exp()), chunk_size=chunk_size,
        model=student, parameters=[towers.logit_scale],
    )  # fmt: skip
    return torch.cat([p.grad.flatten() for p in towers.parameters()])


class Either(nn.Module):
    """One tower a call, through the module that DDP wraps."""

    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def forward(self, images=None, texts=None):
        return self.towers.image(images) if texts is None else self.towers.text(texts)


def undeclared(rank):
    """What a chunked step says that forgets the logit scale."""
    try:
        stepped([rank], 2, DistributedDataParallel, declared=False)
    except ValueError as error:
        return str(error)
    return ""


def sharded(rank):
    """Gradients of FSDP2 after one chunked step, put together again."""
    towers = Scaled()
    towers.logit_scale = nn.Parameter(towers.logit_scale.detach()[None])  # FSDP2 refuses 0-d parameters
    fully_shard(towers, mesh=init_device_mesh("cpu", (RANKS,)))
    batch = data(0, [rank])
    replay = ContrastiveReplay()
    backward(
        lambda b: towers(*b), batch, lambda e: replay(e, logit_scale=2.0), chunk_size=3, model=towers,
    )  # fmt: skip
    return torch.cat([p.grad.full_tensor().flatten() for p in towers.parameters() if p.grad is not None])


def unequal_chunks(rank, sharding):
    """Gradient of one step on 8 images and, on rank 0, one text that all share, on rank 1 five; chunks of two."""
    torch.manual_seed(0)
    towers = TwoTowers()
    batches = [unequal_batch(one) for one in ([rank] if sharding else range(RANKS))]
    if sharding:
        fully_shard(towers, mesh=init_device_mesh("cpu", (RANKS,)))
    for images, texts, row in batches:
        backward(
            [(lambda b: Embeddings(image=towers(images=b)), images), (lambda b: Embeddings(text=towers(texts=b)), texts)],
            None, lambda e, row=row: contrastive_loss(e.image, e.text[row], logit_scale=2.0),
            chunk_size=2, model=towers if sharding else None,
        )  # fmt: skip
        backward(
            lambda b: Embeddings(image=towers(images=b)), images[: len(texts)], lambda e, index: e.image.square().sum(1).mean(),
            chunk_size=2, model=towers if sharding else None, separable=True,
        )  # fmt: skip
    return torch.cat([(p.grad.full_tensor() if sharding else p.grad / RANKS).flatten() for p in towers.parameters()])


class Normalised(Towers):
    """With buffers, which DDP sends to the other processes."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(6).double().eval()

    def forward(self, images, texts):
        return Embeddings(self.norm(self.image(images)), self.text(texts))


def one_chunk_here(ranks, chunk_size, wrap=lambda model: model):
    """Gradients, step by step, of a loss over all rows, where one process has a chunk and the other several, in turns."""
    found, replay = [], ContrastiveReplay()

    def loss(embeddings):
        return replay(embeddings, logit_scale=2.0)

    for build in (Towers, Normalised):
        towers = build()
        student, optimizer = wrap(towers), torch.optim.SGD(towers.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            batch = data(step, ranks, ((2, 9), (9, 2))[step // 2])
            backward(lambda b, student=student: student(*b), batch, loss, chunk_size=chunk_size, model=student)
            found.append(torch.cat([p.grad.flatten() for p in towers.parameters()]))
            optimizer.step()
    return found


def unequal_batch(rank):
    """Images, unique texts, and the text of each image."""
    generator = torch.Generator().manual_seed(rank)
    images, texts = torch.randn(8, 4, generator=generator), torch.randn(1 + 4 * rank, 4, generator=generator)
    return images, texts, torch.arange(8) % len(texts)


class TwoTowers(nn.Module):
    """An image and a text tower behind one forward pass."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, images=None, texts=None):
        return self.text(texts) if images is None else self.image(images)


def uneven_rows(rank):
    """Gathered rows and the gradient that comes back, with two rows on rank 0 and five on rank 1."""
    value = (torch.arange(2.0 + 3 * rank)[:, None] + 10 * rank).requires_grad_()
    rows = gathered_rows(value)
    (rows * torch.arange(7.0)[:, None] * (1 + rank)).sum().backward()
    return rows.detach(), value.grad


def work(rank, folder):
    """What each process does; the results go to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        result = {name: trained(name, [rank], partial(DistributedDataParallel, find_unused_parameters=True)) for name in TERMS}
        wrap = partial(DistributedDataParallel, find_unused_parameters=True)
        result["ragged"] = {name: trained(name, [rank], wrap, RAGGED) for name in TERMS}
        result["compiled"] = {name: trained(name, [rank], wrap, RAGGED, compiled=True) for name in COMPILED}
        result["separate"] = {name: separate(TERMS[name], rank) for name in SEPARATE}
        result["alone"] = alone(rank)
        result["one chunk here"] = {size: one_chunk_here([rank], size, DistributedDataParallel) for size in (4, 100)}
        result["ragged chunks"] = {size: stepped([rank], size, DistributedDataParallel, rows=RAGGED) for size in (1, 4, 7, 100)}
        result["collected"] = collected([rank])
        result["accumulated"] = accumulated(rank)
        with mock.patch("geomreg.regularizers.average_vector.all_reduce_sum", lambda value: value):
            result["rank-local mean"] = trained("average_vector", [rank], DistributedDataParallel)
        with mock.patch("geomreg.regularizers.gram.gathered_rows", lambda value, training: value):
            result["rank-local pairs"] = trained("GramStructure", [rank], DistributedDataParallel)
        result["uneven"] = {name: uneven(partial(TERMS[name], decay=0.0), rank) for name in STATEFUL}
        result["spoiled"] = {name: uneven(TERMS[name], rank, spoiled=True) for name in STATEFUL}
        owners = {"average_vector": AverageVectorLoss, "dive": DiVE}
        result["absent"] = {(n, c): absent(partial(o, decay=0.0), rank, c) for n, o in owners.items() for c in (False, True)}
        result["uneven rows"] = uneven_rows(rank)
        result["stepped"] = {
            (size, first): stepped([rank], size, DistributedDataParallel, target_first=first)
            for size in (1, 3, 10)
            for first in (False, True)
        }
        result["unique"] = {size: unique_texts([rank], size, DistributedDataParallel) for size in (1, 2, 10)}
        result["undeclared"] = undeclared(rank)
        result["sharded"] = sharded(rank)
        result["unequal chunks"] = unequal_chunks(rank, sharding=True)
        result["balanced"] = balanced_weight([rank])
        result["within one module"] = within_one_module([rank], DistributedDataParallel)
        result["refused"] = refused(AverageVectorLoss, rank)
        torch.save(result, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both processes' results."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def close(actual, expected, tolerance):
    """Largest error within a share of the largest entry."""
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


def contract_of(name):
    """The declaration of a term."""
    others = {"batch_similarity": "SimilarityKL", "drawn_angles": "RelationalAngle", "sigmoid_replay": "ContrastiveReplay"}
    others |= {"labelled_replay": "ContrastiveReplay", "feature_maps": "FeatureDistillation"} | dict.fromkeys(STATEFUL, "DiVE")
    return contract.TERMS[others.get(name, name)]


def test_rank_local_mean_fails(results):
    """The averaged gradient is linear in the mean, so only the mean itself tells."""
    ranks = [result["rank-local mean"][-1]["mean"] for result in results]
    assert (ranks[0] - ranks[1]).abs().max() > 1e-2 * ranks[0].abs().max()


def test_rank_local_pairs_fail(results):
    expected = trained("GramStructure", range(RANKS))
    for result in results:
        error = (result["rank-local pairs"][0]["gradient"] - expected[0]["gradient"]).abs().max()
        assert error > 1e-2 * expected[0]["gradient"].abs().max()


@pytest.mark.parametrize("name", TERMS)
def test_loss_and_gradient_equal_one_process(results, name):
    expected = trained(name, range(RANKS))
    tolerance = 1e-6 if name in STATEFUL else 1e-12  # the mean is fp32
    for step in range(STEPS):
        ranks = [result[name][step] for result in results]
        if contract_of(name).separable:
            assert not torch.equal(ranks[0]["loss"], ranks[1]["loss"])
        close(torch.stack([rank["loss"] for rank in ranks]).mean(), expected[step]["loss"], tolerance)
        for rank in ranks:
            close(rank["gradient"], expected[step]["gradient"], tolerance)


@pytest.mark.parametrize("name", TERMS)
def test_ragged_batches_weigh_by_their_rows(results, name):
    """As if one process had all rows: value, gradient, running mean; a sum of terms keeps its ratio."""
    expected = trained(name, range(RANKS), rows=RAGGED)
    tolerance = 1e-6 if name in STATEFUL else 1e-12
    for step in range(STEPS):
        ranks = [result["ragged"][name][step] for result in results]
        close(torch.stack([rank["loss"] for rank in ranks]).mean(), expected[step]["loss"], tolerance)
        for rank in ranks:
            close(rank["gradient"], expected[step]["gradient"], tolerance)
            if name in STATEFUL:
                close(rank["mean"], expected[step]["mean"], 1e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_ragged_batches_under_compile(results, name):
    """In one graph."""
    for result in results:
        for step in range(STEPS):
            close(result["compiled"][name][step]["gradient"], result["ragged"][name][step]["gradient"], 1e-6)


@pytest.mark.parametrize("name", SEPARATE)
def test_ragged_images_and_texts_weigh_each_by_their_rows(results, name):
    batches = [data(0, [rank], RAGGED) for rank in range(RANKS)]
    images = torch.cat([images for images, _ in batches])
    texts = torch.cat([texts[: 3 + rank] for rank, (_, texts) in enumerate(batches)])
    towers, teacher = Towers(), Teacher(Towers(seed=1), lambda model, batch: model(*batch))
    TERMS[name]()(towers(images, texts), teacher((images, texts))).backward()
    for result in results:
        close(result["separate"][name], torch.cat([p.grad.flatten() for p in towers.parameters()]), 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
def test_ragged_batches_in_chunks(results, chunk_size):
    """The ranks have different numbers of chunks, of 4 two and three."""
    expected = stepped(range(RANKS), 100, rows=RAGGED)
    for step in range(STEPS):
        for result in results:
            close(result["ragged chunks"][chunk_size][step], expected[step], 1e-6)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_one_chunk_on_one_process_and_several_on_the_other(results, chunk_size):
    """The collectives of DDP (buckets in the second step, buffers) and those of the loss come in one order on both."""
    expected = one_chunk_here(range(RANKS), 100)
    for result in results:
        for found, wanted in zip(result["one chunk here"][chunk_size], expected, strict=True):
            close(found, wanted, 1e-10)


def test_evaluation_on_one_process_alone(results):
    """Nothing is weighted, and nobody waited for."""
    assert results[0]["alone"].keys() == TERMS.keys()
    assert not results[1]["alone"]
    for name, value in results[0]["alone"].items():
        if name not in STATEFUL:
            close(value, trained(name, [0], rows=RAGGED)[0]["loss"], 1e-12)


def test_terms_within_the_module_that_ddp_wraps(results):
    """DDP copies the buffers of rank 0 to the others before each forward pass: none may hold what a process collected."""
    for step, expected in enumerate(within_one_module(range(RANKS))):
        for result in results:
            close(result["within one module"][step], expected, 1e-6)


def test_running_statistics_equal_one_process(results):
    for result in results:
        close(result["collected"], collected(range(RANKS)), 1e-12)


def test_more_forwards_on_one_process_before_a_step(results):
    pairs = [random_pair(rows=2 + k, seed=10 * rank + k) for rank, k in ((0, 0), (1, 0), (1, 1))]
    whole = [Embeddings(*(torch.cat(parts) for parts in zip(*side, strict=True))) for side in zip(*pairs, strict=True)]
    for result in results:
        close(result["accumulated"], batch_mean(*whole), 1e-6)


@pytest.mark.parametrize("name", STATEFUL)
def test_running_mean_equals_one_process(results, name):
    expected = trained(name, range(RANKS))
    for step in range(STEPS):
        ranks = [result[name][step]["mean"] for result in results]
        assert torch.equal(*ranks)
        assert ranks[0].any()
        close(ranks[0], expected[step]["mean"], 1e-6)


@pytest.mark.parametrize("name", STATEFUL)
def test_uneven_batches_count_every_vector(results, name):
    pairs = [random_pair(rows=3 + 2 * rank, seed=rank) for rank in range(RANKS)]
    whole = [Embeddings(*(torch.cat(parts) for parts in zip(*side, strict=True))) for side in zip(*pairs, strict=True)]
    ranks = [result["uneven"][name] for result in results]
    assert torch.equal(*ranks)
    close(ranks[0], batch_mean(*whole), 1e-6)


@pytest.mark.parametrize("name", STATEFUL)
def test_batch_spoiled_on_one_rank_is_skipped_on_both(results, name):
    ranks = [result["spoiled"][name] for result in results]
    assert torch.equal(*ranks)
    close(ranks[0], 0.5 * results[0]["uneven"][name], 1e-6)


@pytest.mark.parametrize("name", ["average_vector", "dive"])
@pytest.mark.parametrize("committed", [False, True])
def test_rank_without_a_batch_takes_the_others_mean(results, name, committed):
    ranks = [result["absent"][name, committed] for result in results]
    assert torch.equal(*ranks)
    close(ranks[0], batch_mean(*random_pair(seed=7)), 1e-6)


def test_before_refuses_a_rank_without_a_batch(results):
    assert results[1]["refused"].startswith("AverageVectorLoss: expected a training forward on every process")


@pytest.mark.parametrize("chunk_size", [1, 3, 10])
@pytest.mark.parametrize("target_first", [False, True])
def test_chunked_step_equals_one_process(results, chunk_size, target_first):
    expected = stepped(range(RANKS), 100)
    for step in range(STEPS):
        for result in results:
            close(result["stepped"][chunk_size, target_first][step], expected[step], 1e-6)  # the mean is fp32
    close(results[0]["stepped"][chunk_size, target_first][0], expected[0], 1e-12)  # at the first step it is zero


@pytest.mark.parametrize("chunk_size", [1, 2, 10])
def test_towers_as_parts_equal_one_process(results, chunk_size):
    """Each tower's last chunk takes part in the pass that synchronises, also where the ranks have unequally many chunks."""
    expected = unique_texts(range(RANKS), 100)
    for result in results:
        close(result["unique"][chunk_size], expected, 1e-12)


def test_undeclared_logit_scale_raises_on_every_rank(results):
    """Without the error the ranks' scales would silently part."""
    assert all(result["undeclared"].startswith("backward: expected every tensor that loss_fn uses") for result in results)


def test_chunked_step_under_fsdp2(results):
    towers, replay = Scaled(), ContrastiveReplay()
    replay(towers(*data(0, range(RANKS))), logit_scale=2.0).backward()
    expected = torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])
    for result in results:
        close(result["sharded"], expected, 1e-12)


def test_balanced_weight_equals_one_process(results):
    ranks = [result["balanced"] for result in results]
    assert torch.equal(*ranks)
    close(ranks[0], balanced_weight(range(RANKS)), 1e-5)
    assert (ranks[0] - balanced_weight([0])).abs() > 1e-3 * ranks[0]


def test_rows_of_uneven_batches(results):
    for rank, result in enumerate(results):
        rows, gradient = result["uneven rows"]
        assert rows.flatten().tolist() == [0, 1, 10, 11, 12, 13, 14]
        assert gradient.flatten().tolist() == [3.0 * k for k in (range(2) if rank == 0 else range(2, 7))]


def test_different_data_matters():
    """The check above would see a rank that keeps its own mean."""
    both, alone = trained("average_vector", range(RANKS)), trained("average_vector", [0])
    assert (both[0]["mean"] - alone[0]["mean"]).abs().max() > 1e-2 * both[0]["mean"].abs().max()


def test_processes_with_other_numbers_of_chunks_under_fsdp(results):
    for result in results:
        close(result["unequal chunks"], unequal_chunks(0, sharding=False), 1e-6)
