"""What torchmetrics and Lightning ask of any metric, asked of every metric class that geomreg.metrics exports: of a new one too."""

import copy
import inspect
import itertools
import pickle
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

import geomreg.metrics
from geomreg import Embeddings

PAIRS, WIDTH = 24, 4


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEACHER = Embeddings(randn(PAIRS, WIDTH, seed=1) + 1, randn(PAIRS, WIDTH, seed=2) - 1)
STUDENT = Embeddings(*(value + 0.2 * randn(PAIRS, WIDTH, seed=3) for value in TEACHER))
HEADS = {"student_heads": TEACHER.image[:4] + 0.01, "teacher_heads": TEACHER.image[:4]}
OPTIONS = {  # of classes that need some; and further ones with states of another kind
    "MutualKNN": [{"k": 2}],
    "ZeroShotAgreement": [HEADS],
    "LinearCKA": [{}, {"unbiased": True, "modality": "stacked"}],
    "RSA": [
        {},
        {"dissimilarity": "cosine"},
        {"dissimilarity": "sqeuclidean", "modality": "cross-modal"},
        {"level": 0.8, "resamples": 40},
        {"level": 0.8, "resamples": 40, "correlation": "spearman", "modality": "cross-modal"},
    ],
}
CLASSES = [kind for name in geomreg.metrics.__all__ if inspect.isclass(kind := getattr(geomreg.metrics, name)) and issubclass(kind, Metric)]
CASES = [(kind, options) for kind in CLASSES for options in OPTIONS.get(kind.__name__, [{}])]
every_metric = pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind.__name__}-{k}" for k, (kind, _) in enumerate(CASES)])


def batch(metric: Metric, start: int, stop: int) -> tuple[Embeddings, ...]:
    """Rows of student and teacher, or of the student where a metric is of one model."""
    taken = tuple(Embeddings(*(part[start:stop] for part in value)) for value in (STUDENT, TEACHER))
    return taken if "teacher" in inspect.signature(type(metric).update).parameters else taken[:1]


def updated(kind: type[Metric], options: dict, *cuts: int) -> Metric:
    metric = kind(**options)
    for start, stop in itertools.pairwise(cuts):
        metric.update(*batch(metric, start, stop))
    return metric


def numbers(value: object) -> list[float]:
    values = list(value.values()) if isinstance(value, dict) else [value]
    assert all(isinstance(one, Tensor) and one.ndim == 0 and one.dtype == torch.float64 for one in values)
    return [float(one) for one in values]


def check(value: object, metric: Metric) -> None:
    assert numbers(value) == pytest.approx(numbers(metric.compute()), rel=1e-9, abs=1e-11)


def part(metric: Metric) -> Metric:
    """The metric, or one of its numbers by name."""
    return metric if metric.results is None else metric[metric.results.parts._fields[0]]


def test_every_metric_is_here():
    assert {"RSA", "Drift", "Distortion", "Procrustes", "LinearCKA", "ModalityGap"} < {kind.__name__ for kind in CLASSES}


@every_metric
def test_constants_and_kind_of_result(kind, options):
    """A tuple could be neither logged, nor tracked, nor composed."""
    metric = updated(kind, options, 0, PAIRS)
    assert isinstance(kind.higher_is_better, bool)
    assert metric.full_state_update is False
    assert metric.is_differentiable is False
    value = metric.compute()
    assert isinstance(value, Tensor if metric.results is None else dict)
    if isinstance(value, dict):
        assert tuple(value) == value.parts._fields
        assert all(getattr(value, name) is value[name] for name in value)
        assert isinstance(value.as_parts(), value.parts)
        for name, member in vars(value.parts).items():
            if isinstance(member, property):
                assert getattr(value, name) is not None
        with pytest.raises(AttributeError, match=r"^\w+Results: expected one of .+, got 'missing'\."):
            _ = value.missing
        for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(other) is type(value)
            assert other == value


@every_metric
@pytest.mark.parametrize("call", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_running(kind, options, call, window):
    """The last batches, all of them: torchmetrics holds their lists while it resets the metric."""
    running = Running(kind(**options), window=window)
    cuts = (0, 7, 12, 19, PAIRS)
    for start, stop in itertools.pairwise(cuts):
        (running if call else running.update)(*batch(running.base_metric, start, stop))
    check(running.compute(), updated(kind, options, *cuts[len(cuts) - 1 - window :]))
    running.reset()
    running.update(*batch(running.base_metric, 0, 9))
    check(running.compute(), updated(kind, options, 0, 9))


@every_metric
def test_call_on_a_last_batch_of_one_row(kind, options):
    """A number or NaN, not the end of the run; the row counts."""
    metric = kind(**options)
    first = metric(*batch(metric, 0, PAIRS - 1))
    check(first, updated(kind, options, 0, PAIRS - 1))
    last = numbers(metric(*batch(metric, PAIRS - 1, PAIRS)))
    assert len(last) == len(numbers(first))
    check(metric.compute(), updated(kind, options, 0, PAIRS))
    alone = updated(kind, options, PAIRS - 1, PAIRS)
    if all(number != number for number in last):
        with pytest.raises(ValueError, match=r"^\w+: expected "):
            alone.compute()
    else:
        check(alone.compute(), alone)


@every_metric
@pytest.mark.parametrize("by", ["set_dtype", "half", "bfloat16", "float", "to", "module"])
def test_states_keep_their_numbers(kind, options, by):
    """They hold counts, widths and ids: narrower numbers would spoil them without a word."""
    metric = kind(**options)
    first = batch(metric, 0, 11)
    metric.update(*first, **({"ids": torch.arange(11) + 2**40} if len(first) > 1 else {}))
    metric.compute()
    moves = {"set_dtype": lambda: metric.set_dtype(torch.float32), "to": lambda: metric.to(torch.float16)}
    moves["module"] = lambda: nn.ModuleList([metric]).to("cpu", torch.bfloat16)
    moves.get(by, getattr(metric, by, None))()
    check(metric.compute(), updated(kind, options, 0, 11))
    metric.update(*batch(metric, 11, PAIRS), **({"ids": torch.arange(11, PAIRS) + 2**40} if len(first) > 1 else {}))
    check(metric.compute(), updated(kind, options, 0, PAIRS))
    metric.reset()
    metric.update(*first)
    check(metric.compute(), updated(kind, options, 0, 11))
    assert metric.dtype == torch.float64  # of what a process without samples offers


@every_metric
def test_reset_pickle_copy_and_merge(kind, options):
    metric = updated(kind, options, 0, 5, 9)
    assert len(numbers(metric.compute()))  # cached; what follows must not see it
    for other in (copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        other.update(*batch(other, 9, 15))
        other.merge_state(updated(kind, options, 15, PAIRS))
        check(other.compute(), updated(kind, options, 0, PAIRS))
        assert other.update_count == 4
    check(metric.compute(), updated(kind, options, 0, 9))
    metric.merge_state(updated(kind, options, 9, PAIRS))
    check(metric.compute(), updated(kind, options, 0, PAIRS))
    metric.reset()
    metric.update(*batch(metric, 3, 13))
    check(metric.compute(), updated(kind, options, 3, 13))
    empty = kind(**options)
    empty.merge_state(updated(kind, options, 3, 13))
    check(empty.compute(), updated(kind, options, 3, 13))  # and no warning that it was never updated


@every_metric
def test_order_of_batches_changes_rounding_alone(kind, options):
    """Merges and processes bring them in another order."""
    one, two = updated(kind, options, 0, 10), updated(kind, options, 10, PAIRS)
    two.merge_state(one)
    check(two.compute(), updated(kind, options, 0, PAIRS))


def test_merge_of_other_options():
    for one, two in ((geomreg.metrics.Drift(), geomreg.metrics.Drift(modality="text")), (geomreg.metrics.RSA(), geomreg.metrics.RSA(
        dissimilarity="cosine"))):  # fmt: skip
        one.update(STUDENT, TEACHER)
        two.update(STUDENT, TEACHER)
        before = numbers(one.compute())
        with pytest.raises(ValueError, match=rf"^{type(one).__name__}: expected the state of a metric with the same options"):
            one.merge_state(two)
        assert numbers(one.compute()) == before


@every_metric
def test_collection_tracker_and_log(kind, options):
    collection = MetricCollection({"one": kind(**options), "two": kind(**options)}, prefix="val/")
    collection(*batch(collection["one"], 0, 8))
    collection.update(*batch(collection["one"], 8, PAIRS))
    flat = collection.compute()  # what Lightning's log_dict takes: names to single numbers
    assert all(isinstance(key, str) and isinstance(value, Tensor) and value.numel() == 1 for key, value in flat.items())
    assert len(flat) == 2 * len(numbers(updated(kind, options, 0, PAIRS).compute()))

    tracker = MetricTracker(kind(**options))  # takes the direction from higher_is_better
    for stop in (10, PAIRS):
        tracker.increment()
        tracker.update(*batch(tracker[-1], 0, stop))
    tracked = tracker.compute_all()
    assert all(value.shape == (2,) for value in (tracked.values() if isinstance(tracked, dict) else [tracked]))
    best = MetricTracker(part(kind(**options)), maximize=kind.higher_is_better)
    for stop in (10, PAIRS):
        best.increment()
        best.update(*batch(kind(**options), 0, stop))
    value, step = best.best_metric(return_step=True)
    assert value == (max if kind.higher_is_better else min)(best.compute_all().tolist())
    assert step in (0, 1)


@every_metric
def test_composition_and_extremes(kind, options):
    composed = 2 * part(kind(**options)) + 1
    composed.update(*batch(kind(**options), 0, PAIRS))
    expected = numbers(updated(kind, options, 0, PAIRS).compute())[0]
    assert float(composed.compute()) == pytest.approx(2 * expected + 1, rel=1e-9)
    extremes = MinMaxMetric(part(kind(**options)))
    found = []
    for start, stop in ((0, 10), (10, PAIRS)):
        extremes.update(*batch(kind(**options), start, stop))
        found.append(extremes.compute())
    assert float(found[-1]["max"]) == max(float(one["raw"]) for one in found)


@every_metric
def test_bootstrapper(kind, options):
    """It resamples tensors and takes the number of samples from the first argument: ids, before the embeddings."""
    arguments = inspect.signature(kind.update).parameters
    if "ids" not in arguments:
        with pytest.raises((TypeError, ValueError, RuntimeError)):  # torchmetrics cannot count the rows of embeddings
            BootStrapper(part(kind(**options)), num_bootstraps=2).update(STUDENT)
        return
    wrapped = BootStrapper(kind(**options), num_bootstraps=3, sampling_strategy="multinomial")
    wrapped.update(ids=torch.arange(PAIRS), student=STUDENT, teacher=TEACHER)
    with pytest.raises(ValueError, match="expected every sample once, got repeated ids"):  # said, not counted as new samples
        wrapped.compute()


@every_metric
def test_an_option_that_nothing_has(kind, options):
    for name in ("foo", "dist_sync_on_stp"):
        with pytest.raises(
            TypeError, match=rf"^{kind.__name__}: expected options that it or torchmetrics' Metric has, got {name}\. It has "
        ):
            kind(**options, **{name: True})
    with pytest.raises(ValueError, match="dist_sync_on_step"):  # torchmetrics' own, of another type
        kind(**options, dist_sync_on_step="x")


@every_metric
def test_plot(kind, options):
    mpl.use("agg")
    metric = updated(kind, options, 0, PAIRS)
    values = [metric.compute(), updated(kind, options, 0, 9).compute()]
    for shown in (None, values[0], values):
        figure, axes = metric.plot(shown)
        assert axes.lines
        figure.clear()
    mpl.pyplot.close("all")


# two processes --------------------------------------------------------------------------------------------------------


def collect(rank: int, folder: str) -> None:
    """Unequal batches; a metric whose compute raises goes on with its own samples; one that was moved and holds nothing."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {}
        for k, (kind, options) in enumerate(CASES):
            metric = updated(kind, options, *((10, 13, PAIRS), (0, 10))[rank])
            results[k] = metric.compute()
            alone = kind(**options).to("cpu")
            if rank == 0:
                alone.update(*batch(alone, 0, 9))
            results[f"{k} alone"] = alone.compute()
            few = kind(**options)
            few.update(*batch(few, 0, 1))
            if few.results is None and "k" in options:  # of two equal samples: no neighbours to compare
                with pytest.raises(ValueError, match="expected"):
                    few.compute()
                few.update(*batch(few, 1 + 8 * rank, 9 + 8 * rank))
                few.compute()
        torch.save({key: dict(value) if isinstance(value, dict) else value for key, value in results.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    """Bootstrap intervals too: the processes hold the samples in another order."""
    mp.spawn(collect, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for k, (kind, options) in enumerate(CASES):
            check(results[k], updated(kind, options, 0, PAIRS))
            check(results[f"{k} alone"], updated(kind, options, 0, 9))
