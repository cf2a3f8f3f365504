"""Every metric class over batches and processes equals its function on everything; bad updates store nothing."""

import itertools
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import MetricCollection

from geomreg import Embeddings
from geomreg.metrics import (
    RSA,
    AlignmentUniformity,
    Distortion,
    Drift,
    LinearCKA,
    ModalityGap,
    MutualKNN,
    Procrustes,
    ZeroShotAgreement,
    alignment,
    distortion_bound,
    drift,
    linear_cka,
    modality_gap,
    mutual_knn,
    procrustes,
    rsa,
    uniformity,
    zero_shot_bound,
)

PAIRS, WIDTH = 13, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEACHER = Embeddings(3 * randn(PAIRS, WIDTH, seed=10) + 1, 2 * randn(PAIRS, WIDTH, seed=11) - 1)
STUDENT = Embeddings(TEACHER.image + 0.1 * randn(PAIRS, WIDTH, seed=12) + 0.05, TEACHER.text * 1.1 + 0.2 * randn(PAIRS, WIDTH, seed=13))
HEADS = TEACHER.image[:4], TEACHER.image[:4] + 0.01 * randn(4, WIDTH, seed=14)


def picked(values: Embeddings, modality: str) -> Tensor:
    return torch.cat(list(values)) if modality == "stacked" else getattr(values, modality)


def of_two(function, modality="image", **options):
    return lambda student, teacher: function(picked(student, modality), picked(teacher, modality), **options)


def both(student: Embeddings, teacher: Embeddings) -> tuple[Tensor, ...]:
    image, text = student
    options = {"t": 1.0, "normalize": False}
    return alignment(image, text, alpha=1.0, normalize=False), *(uniformity(*values, **options) for values in ((image,), (text,), student))


CASES = {  # name -> (class and options, its function of student and teacher, least number of pairs)
    f"cka-{modality}-{unbiased}": (
        (LinearCKA, {"modality": modality, "unbiased": unbiased}),
        of_two(linear_cka, modality, unbiased=unbiased),
        3 + unbiased if modality != "stacked" else 2,
    )
    for modality, unbiased in itertools.product(("image", "text", "stacked"), (False, True))
}
CASES |= {
    f"procrustes-{modality}": ((Procrustes, {"modality": modality}), of_two(procrustes, modality), 3 if modality != "stacked" else 2)
    for modality in ("image", "text", "stacked")
}
CASES |= {
    f"drift-{modality}": ((Drift, {"modality": modality}), of_two(drift, modality), 3 if modality != "stacked" else 2)
    for modality in ("image", "text", "stacked")
}
CASES |= {
    f"knn-{modality}-{metric}": (
        (MutualKNN, {"k": 2, "modality": modality, "metric": metric}),
        of_two(mutual_knn, modality, k=2, metric=metric),
        3 if modality != "stacked" else 2,
    )
    for modality, metric in (("image", "inner"), ("text", "cosine"), ("stacked", "euclidean"))
}
CASES |= {
    "distortion-cosine": (
        (Distortion, {"modality": "stacked", "dissimilarity": "cosine"}),
        of_two(distortion_bound, "stacked", dissimilarity="cosine"),
        2,
    ),
    "agreement": (
        (ZeroShotAgreement, {"student_heads": HEADS[0], "teacher_heads": HEADS[1]}),
        of_two(lambda *x: zero_shot_bound(*x, *HEADS)),
        1,
    ),
    "gap": ((ModalityGap, {}), lambda student, teacher: modality_gap(*student), 1),
    "gap-raw": ((ModalityGap, {"normalize": False}), lambda student, teacher: modality_gap(*student, normalize=False), 1),
    "uniformity": ((AlignmentUniformity, {"alpha": 1.0, "t": 1.0, "normalize": False}), both, 2),
    "uniformity-default": (
        (AlignmentUniformity, {}),
        lambda student, teacher: (alignment(*student), *(uniformity(*x) for x in (student[:1], student[1:], student))),
        2,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
ONE_MODEL = (ModalityGap, AlignmentUniformity)


def build(name: str):
    (kind, options), function, least = CASES[name]
    return kind(**options), function, least


def rows(start: int, stop: int) -> tuple[Embeddings, Embeddings]:
    student, teacher = (Embeddings(*(part[start:stop] for part in value)) for value in (STUDENT, TEACHER))
    return student, teacher


def arguments(metric, start: int, stop: int) -> tuple[Embeddings, ...]:
    return rows(start, stop)[:1] if isinstance(metric, ONE_MODEL) else rows(start, stop)


def check(actual, expected) -> None:
    if isinstance(actual, dict):
        assert not hasattr(expected, "_fields") or tuple(actual) == expected._fields
        actual = tuple(actual.values())
    actual, expected = (value if isinstance(value, tuple) else (value,) for value in (actual, expected))
    for one, two in zip(actual, expected, strict=True):
        assert one.ndim == 0
        assert one.dtype == torch.float64
        assert not one.requires_grad
        assert float(one) == pytest.approx(float(two), rel=1e-9, abs=1e-11)


def stored(metric) -> list[int]:
    return [len(getattr(metric, state)) for state in metric._defaults if state != "options"]


@every_case
@pytest.mark.parametrize("cuts", [(0, PAIRS), (0, 1, 4, PAIRS), tuple(range(PAIRS + 1))], ids=["one", "uneven", "single rows"])
def test_batches_equal_function(name, cuts):
    metric, function, _ = build(name)
    for start, stop in itertools.pairwise(cuts):
        metric.update(*arguments(metric, start, stop))
    value = metric.compute()
    check(value, function(*rows(0, PAIRS)))
    assert isinstance(value, Tensor if metric.results is None else metric.results)


@every_case
def test_call_reset_pickle_and_merge(name):
    metric, function, _ = build(name)
    check(metric(*arguments(metric, 0, 5)), function(*rows(0, 5)))
    check(metric(*arguments(metric, 5, 10)), function(*rows(5, 10)))
    metric = pickle.loads(pickle.dumps(metric))
    other, _, _ = build(name)
    other.update(*arguments(metric, 10, PAIRS))
    metric.merge_state(other)
    check(metric.compute(), function(*rows(0, PAIRS)))
    metric.update(*arguments(metric, 0, 1))  # further batches after a result
    again = (Embeddings(*(torch.cat([part, part[:1]]) for part in value)) for value in rows(0, PAIRS))
    check(metric.compute(), function(*again))
    metric.reset()
    assert set(stored(metric)) == {0}
    metric.update(*arguments(metric, 0, 6))
    check(metric.compute(), function(*rows(0, 6)))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2] > 1])  # for others any batch is enough
def test_call_with_too_few_samples_is_nan_and_adds_them(name):
    metric, function, least = build(name)
    metric.update(*arguments(metric, 0, 6))
    value = metric(*arguments(metric, 6, 5 + least))
    assert all(one.isnan() and one.ndim == 0 for one in (value.values() if metric.results else [value]))
    assert metric.update_count == 2
    check(metric.compute(), function(*rows(0, 5 + least)))


@every_case
def test_call_that_raises_adds_and_loses_nothing(name):
    metric, function, _ = build(name)
    metric(*arguments(metric, 0, 6))
    count = metric.update_count
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric(*(Embeddings(*(part * math.nan for part in value)) for value in arguments(metric, 6, 9)))
    assert metric.update_count == count
    check(metric.compute(), function(*rows(0, 6)))


@pytest.mark.parametrize("name", [name for name in CASES if hasattr(build(name)[0], "moments") or name.startswith("gap")])
def test_sums_stay_as_small_as_they_are(name):
    """Also where batches come by calls and merges."""
    metric, _, _ = build(name)
    sizes = set()
    for start, stop in ((0, 4), (4, 8), (8, PAIRS)):
        metric(*arguments(metric, start, stop))
        other, _, _ = build(name)
        other.update(*arguments(metric, start, stop))
        metric.merge_state(other)
        sizes.add(sum(value.numel() for value in getattr(metric, "moments", getattr(metric, "sums", []))))
    assert len(sizes) == 1


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0][0] not in ONE_MODEL])
def test_ids(name):
    metric, function, _ = build(name)
    metric.update(*rows(0, 6), ids=range(6), teacher_ids=torch.arange(6))
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: expected the same ids in the same order"):
        metric.update(*rows(6, 9), ids=[6, 7, 8], teacher_ids=[6, 8, 7])
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: expected ids in every update or in none"):
        metric.update(*rows(6, 9))
    metric.update(*rows(6, PAIRS), ids=torch.arange(6, PAIRS) + 2**62)
    check(metric.compute(), function(*rows(0, PAIRS)))
    metric.update(*rows(0, 1), ids=[3])
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: expected every sample once, got repeated ids\."):
        metric.compute()
    metric.reset()
    metric.update(*rows(0, 6))
    check(metric.compute(), function(*rows(0, 6)))


def test_a_collection_of_all_gives_what_each_gives():
    """Those whose states are equal after the first batch are updated once: others must not look so, by chance or empty."""
    paired = [name for name in CASES if CASES[name][0][0] not in ONE_MODEL and name != "knn-stacked-euclidean"]  # ties go by the order
    extra = {
        "rsa cosine": (RSA(dissimilarity="cosine"), of_two(rsa, dissimilarity="cosine")),
        "rsa": (RSA(), of_two(rsa)),
        "rsa texts": (RSA(modality="text"), of_two(rsa, "text")),
        "rsa spearman": (RSA(correlation="spearman"), of_two(rsa, correlation="spearman")),
        "rsa squared": (RSA(dissimilarity="sqeuclidean"), of_two(rsa, dissimilarity="sqeuclidean")),
        "knn 3": (MutualKNN(k=3), of_two(mutual_knn, k=3)),
    }
    collection = MetricCollection({name: build(name)[0] for name in paired} | {name: metric for name, (metric, _) in extra.items()})
    still = Embeddings(TEACHER.image[:4], TEACHER.image[:4])  # nothing moved, and texts are images
    collection.update(still, still)
    for start, stop in ((0, 5), (5, PAIRS)):
        collection.update(*rows(start, stop))
    student, teacher = (Embeddings(*(torch.cat(parts) for parts in zip(still, value, strict=True))) for value in rows(0, PAIRS))
    found = {name: metric.compute() for name, metric in collection.items()}
    for name in paired:
        check(found[name], CASES[name][1](student, teacher))
    for name, (_, function) in extra.items():
        check(found[name], function(student, teacher))


@pytest.mark.parametrize("first", [Drift, Procrustes, LinearCKA, RSA, Distortion])
def test_modalities_of_a_collection_stay_apart(first):
    """Also if the first batch shows no difference."""
    collection = MetricCollection({modality: first(modality=modality) for modality in ("image", "text")})
    collection.update(Embeddings(TEACHER.image, TEACHER.image), Embeddings(TEACHER.image, TEACHER.image))
    assert len(collection.compute_groups) == 2


@every_case
def test_stores_no_graph(name):
    metric, function, _ = build(name)
    metric.update(*(Embeddings(*(part.clone().requires_grad_() for part in value)) for value in arguments(metric, 0, 6)))
    assert not any(value.requires_grad for state in metric._defaults for value in getattr(metric, state))
    check(metric.compute(), function(*rows(0, 6)))


@every_case
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_too_few_samples(name):
    metric, _, least = build(name)
    message = rf"^{type(metric).__name__}: expected at least \d samples, got none\. Call update\(\) first\.$"
    with pytest.raises(ValueError, match=message):
        metric.compute()
    if least > 1:
        metric.update(*arguments(metric, 0, least - 1))
        with pytest.raises(ValueError, match=r"^\w+: expected at least \d samples, got \d\. .+\.$"):
            metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match=message):
        metric.compute()


NAN = torch.full((4, WIDTH), math.nan)


@every_case
def test_stores_nothing_when_update_raises(name):
    metric, function, _ = build(name)
    metric.update(*arguments(metric, 0, 6))
    before, good = stored(metric), arguments(metric, 6, 10)
    student = good[0]
    bad = [
        (ValueError, "NaN or infinity", Embeddings(NAN, student.text)),
        (ValueError, "NaN or infinity", Embeddings(student.image, NAN)),
        (ValueError, r"width|one shape", Embeddings(student.image[:, :3], student.text[:, :3])),
        (ValueError, "got None", Embeddings(text=student.text)),
        (ValueError, "got None", Embeddings(image=student.image)),
        (TypeError, r"geomreg\.Embeddings\(image=, text=\)", student.image),
        (TypeError, "floating-point", Embeddings(student.image.long(), student.text.long())),
    ]
    refused = 0
    for error, message, value in bad:
        if (
            getattr(metric, "modality", "both") in ("image", "text")
            and isinstance(value, Embeddings)
            and message in ("NaN or infinity", "got None")
        ):
            part = getattr(value, metric.modality)
            if part is not None and bool(torch.isfinite(part).all()):
                continue  # the other modality is not its business
        if name == "agreement" and isinstance(value, Embeddings) and value.image is student.image:
            continue
        with pytest.raises(error, match=rf"^{type(metric).__name__}: expected .*{message}"):
            metric.update(value, *good[1:])
        refused += 1
    assert refused >= 5
    assert stored(metric) == before
    check(metric.compute(), function(*rows(0, 6)))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0][0] not in ONE_MODEL])
def test_student_and_teacher_of_other_samples(name):
    metric, _, _ = build(name)
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: expected .+, got (shapes )?\(\d+, 5\) and \(\d+, 5\)\. .+\.$"):
        metric.update(rows(0, 4)[0], rows(0, 5)[1])


@every_case
def test_width_that_changes_between_updates(name):
    metric, _, _ = build(name)
    metric.update(*arguments(metric, 0, 4))
    narrow = (Embeddings(*(part[:, :3] for part in value)) for value in arguments(metric, 4, 8))
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: expected .*width.* got .+\.$"):
        metric.update(*narrow)


@pytest.mark.parametrize("name", ["knn-image-inner", "knn-stacked-euclidean", "distortion-cosine", "uniformity"])
def test_max_samples(name):
    (kind, options), function, _ = CASES[name]
    count = 2 * PAIRS if options.get("modality") == "stacked" else PAIRS
    exact, small = (kind(**options, max_samples=limit) for limit in (count, count - 1))
    for metric, (start, stop) in itertools.product((exact, small), ((0, 4), (4, PAIRS))):
        metric.update(*arguments(metric, start, stop))
    check(exact.compute(), function(*rows(0, PAIRS)))
    message = rf"^{kind.__name__}: expected at most max_samples={count - 1} rows, got {count}\. .+\.$"
    with pytest.raises(ValueError, match=message):
        small.compute()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (kind, {"modality": "both"}, "modality to be one of 'image', 'text', 'stacked', got 'both'")
            for kind in (LinearCKA, Procrustes, Drift)
        ),
        (MutualKNN, {"k": 2, "modality": "both"}, "modality to be one of 'image', 'text', 'stacked', got 'both'"),
        (LinearCKA, {"unbiased": "no"}, "unbiased to be one of False, True, got 'no'"),
        (MutualKNN, {"k": 0}, "k as a whole number >= 1, got 0"),
        (MutualKNN, {"k": 2, "metric": "l1"}, "metric to be one of 'inner', 'cosine', 'euclidean', got 'l1'"),
        (MutualKNN, {"k": 2, "max_samples": 1}, "max_samples as a whole number >= 3, got 1"),
        (Distortion, {"dissimilarity": "correlation"}, "dissimilarity to be one of 'euclidean', 'cosine', got 'correlation'"),
        (ModalityGap, {"normalize": None}, "normalize to be one of False, True, got None"),
        (AlignmentUniformity, {"alpha": 0}, "alpha as a finite number > 0, got 0"),
        (AlignmentUniformity, {"t": math.nan}, "t as a finite number > 0, got nan"),
        (AlignmentUniformity, {"normalize": 2}, "normalize to be one of False, True, got 2"),
        (AlignmentUniformity, {"max_samples": 0}, "max_samples as a whole number >= 2, got 0"),
        (
            ZeroShotAgreement,
            {"student_heads": HEADS[0], "teacher_heads": HEADS[1][:2]},
            "student head and teacher head embeddings of the same samples, got shapes (4, 5) and (2, 5)",
        ),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: expected {re.escape(message)}"):
        kind(**options)


def test_teacher_width_may_differ_where_axes_do_not_matter():
    wide = Embeddings(torch.cat([TEACHER.image, TEACHER.image[:, :1]], dim=1))
    for metric, function in ((LinearCKA(), linear_cka), (MutualKNN(k=2), lambda *x: mutual_knn(*x, k=2))):
        metric.update(Embeddings(STUDENT.image), wide)
        check(metric.compute(), function(STUDENT.image, wide.image))


def test_gap_of_unequally_many_images_and_texts():
    metric = ModalityGap()
    metric.update(Embeddings(STUDENT.image[:4], STUDENT.text[:1]))
    metric.update(Embeddings(STUDENT.image[4:5], STUDENT.text[1:]))
    check(metric.compute(), modality_gap(STUDENT.image[:5], STUDENT.text))


# two processes --------------------------------------------------------------------------------------------------------


def collect(rank: int, folder: str) -> None:
    """Two batches on the first process, one on the second, of unequal size; once more with all on the first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {}
        for name in CASES:
            metric, _, _ = build(name)
            for start, stop in itertools.pairwise(((0, 3, 8), (8, PAIRS))[rank]):
                metric.update(*arguments(metric, start, stop))
            results[name] = metric.compute()
            metric.update(*arguments(metric, rank, rank + 1))  # its own state is back after the gathering
            alone, _, _ = build(name)
            if rank == 0:
                alone.update(*arguments(metric, 0, 7))
            results[f"{name} alone"] = alone.compute()
        torch.save(
            {name: value if isinstance(value, Tensor) else tuple(value.values()) for name, value in results.items()}, f"{folder}/{rank}.pt"
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(collect, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, (_, function, _) in CASES.items():
            check(results[name], function(*rows(0, PAIRS)))
            check(results[f"{name} alone"], function(*rows(0, 7)))
