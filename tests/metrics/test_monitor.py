"""The drift monitor: its numbers are the metrics', its alarms come when they should, and it costs no copy."""

import math

import pytest
import torch
import torch.nn.functional as F

from geomreg import Embeddings
from geomreg.metrics import DriftMonitor, distortion_bound, drift, rsa


def vectors(rows, seed, width=6):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def expected(student, teacher):
    moved, bound = drift(student, teacher), distortion_bound(student, teacher)
    return {"rsa": bound.rsa, "rsa_bound": bound.aligned_rsa_bound, "mean_shift": moved.mean_shift, "dispersion": moved.dispersion}


def agrees(report, which, student, teacher):
    for key, value in expected(student, teacher).items():
        assert report[f"{which}/{key}"] == pytest.approx(float(value), rel=1e-9), (which, key)


def test_numbers_are_the_metrics():
    teacher = [Embeddings(vectors(5, seed), vectors(5, seed + 10)) for seed in range(3)]
    student = [Embeddings(*(F.normalize(value + 0.3 * vectors(5, 99), dim=1) for value in one)) for one in teacher]
    monitor = DriftMonitor()
    for one, other in zip(student, teacher, strict=True):
        monitor.update(one, other)
    report = monitor.compute()
    image, text = ([torch.cat([one[k] for one in side]) for side in (student, teacher)] for k in (0, 1))
    agrees(report, "image", *image)
    agrees(report, "text", *text)
    agrees(report, "stacked", *(torch.cat(both) for both in zip(image, text, strict=True)))
    assert report["image/rsa"] == pytest.approx(rsa(*image).item())
    assert len(report) == 12
    assert monitor.compute() == {}  # what was collected is used up


@pytest.mark.parametrize("batch", [1, 4, 7, 50])
def test_the_newest_samples_count(batch):
    teacher, student = vectors(60, 1), vectors(60, 2)
    monitor = DriftMonitor(max_samples=9)
    for k in range(0, 60, batch):
        monitor.update(Embeddings(image=student[k : k + batch]), Embeddings(image=teacher[k : k + batch]))
        assert sum(len(one) for one, _ in monitor._rows["image"]) < 9 + batch  # no more is kept
    agrees(monitor.compute(), "image", student[-9:], teacher[-9:])


def test_modalities_of_one_side_and_few_samples():
    monitor = DriftMonitor()
    monitor.update(Embeddings(vectors(2, 1), vectors(2, 2)), Embeddings(image=vectors(2, 3)))
    assert monitor.compute() == {}
    monitor.update(Embeddings(vectors(4, 1), vectors(4, 2)), Embeddings(text=vectors(4, 3)))
    assert {key.split("/")[0] for key in monitor.compute()} == {"text"}


class Model:
    """A probe whose images turn towards one class, by a share of the way."""

    def __init__(self, labels):
        self.classes = torch.eye(4, 6)
        self.image, self.turned = F.normalize(self.classes[labels] + 0.01 * vectors(len(labels), 5), dim=1), 0

    def __call__(self):
        image = self.image.clone()
        image[: self.turned] = self.classes[3] + 0.01 * vectors(len(image), 6)[: self.turned]
        return image, self.classes


def test_probe_and_its_alarm():
    labels = torch.arange(20) % 3
    model, alarms = Model(labels), []
    monitor = DriftMonitor(probe=model, labels=labels, max_zero_shot_drop=12.0, on_alarm=lambda alarm: alarms.append(alarm) or True)
    report = monitor.compute()
    assert (report["probe/zero_shot"], report["probe/zero_shot_start"], report["probe/zero_shot_drop"]) == (100.0, 100.0, 0.0)
    assert report["probe/rsa"] == pytest.approx(1.0)
    model.turned = 2
    start, now = model.image, model()[0]
    report = monitor.compute()
    assert report["probe/zero_shot_drop"] == pytest.approx(10.0)
    agrees(report, "probe", now, start)
    assert not monitor.stopped
    assert alarms == []
    model.turned = 3
    report = monitor.compute()
    assert monitor.stopped
    (alarm,) = alarms
    assert (alarm.name, alarm.limit) == ("probe/zero_shot_drop", 12.0)
    assert alarm.value == pytest.approx(15.0)
    assert alarm.report == report
    assert str(alarm) == "probe/zero_shot_drop is 15, beyond the limit 12"


def test_start_is_saved():
    labels = torch.arange(20) % 3
    model = Model(labels)
    monitor = DriftMonitor(probe=model, labels=labels)
    state = monitor.state_dict()
    model.turned = 5
    resumed = DriftMonitor(probe=model, labels=labels)
    assert resumed.compute()["probe/zero_shot_drop"] == 0.0
    resumed.load_state_dict(state)
    assert resumed.compute() == monitor.compute()
    with pytest.raises(ValueError, match=r"^DriftMonitor: expected the state of a monitor with the same probe"):
        DriftMonitor().load_state_dict(state)


@pytest.mark.parametrize(
    ("limit", "far", "near"),
    [
        ({"min_rsa": 0.9}, lambda x: x.flip(0), lambda x: x @ torch.linalg.qr(torch.randn(6, 6))[0]),
        ({"max_mean_shift": 0.5}, lambda x: x + 1, lambda x: x + 0.1),
    ],
    ids=["rsa", "mean shift"],
)
def test_other_limits(limit, far, near):
    teacher = vectors(30, 1)
    for move, count in ((near, 0), (far, 1)):
        alarms = []
        monitor = DriftMonitor(**limit, on_alarm=alarms.append)
        monitor.update(Embeddings(text=move(teacher)), Embeddings(text=teacher))
        monitor.compute()
        assert len(alarms) == count
        assert not monitor.stopped  # append returns None


def test_without_a_callback_it_warns():
    monitor = DriftMonitor(max_mean_shift=0.1)
    monitor.update(Embeddings(image=vectors(9, 1) + 1), Embeddings(image=vectors(9, 1)))
    with pytest.warns(UserWarning, match=r"^DriftMonitor: image/mean_shift is 2.449, beyond the limit 0.1"):
        monitor.compute()


@pytest.mark.parametrize("which", [0, 1], ids=["image", "classes"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probe_with_nan_is_an_alarm(which, value):
    """Also where the guesses, of rows without NaN, are right."""
    found, alarms = [torch.eye(4, 6), torch.eye(4, 6)], []
    monitor = DriftMonitor(probe=lambda: tuple(found), labels=torch.arange(4), max_zero_shot_drop=100.0, on_alarm=alarms.append)
    found[which] = found[which].clone()
    found[which][0, 0] = value
    report = monitor.compute()
    assert math.isnan(report["probe/zero_shot"])
    assert report["probe/zero_shot_start"] == 100.0
    assert [alarm.name for alarm in alarms] == ["probe/zero_shot_drop"]
    assert math.isnan(alarms[0].value)


@pytest.mark.parametrize("samples", [100, 300, 7])
def test_the_limit_itself_is_no_alarm(samples):
    """For every number of right answers at the start."""
    labels, fallen = torch.zeros(samples, dtype=torch.long), max(1, samples // 50)
    classes = torch.eye(2)
    for right in range(fallen, samples + 1, max(1, samples // 100)):
        guesses, alarms = (torch.arange(samples) >= right).long(), []
        monitor = DriftMonitor(
            probe=lambda guesses=guesses: (classes[guesses], classes),
            labels=labels,
            max_zero_shot_drop=100 * fallen / samples,
            on_alarm=alarms.append,
        )
        guesses[right - fallen : right] = 1
        assert monitor.compute()["probe/zero_shot_drop"] == 100 * fallen / samples
        assert alarms == []
        if right > fallen:
            guesses[right - fallen - 1] = 1
            monitor.compute()
            assert len(alarms) == 1


def test_half_precision_images_with_wider_classes():
    labels = torch.arange(20) % 3
    model = Model(labels)
    reports = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        monitor = DriftMonitor(probe=lambda dtype=dtype: (model()[0].to(dtype), model()[1].double()), labels=labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reports.append(monitor.compute())
    assert [report["probe/zero_shot"] for report in reports] == [100.0] * 3


def test_guesses_are_made_in_full_precision_under_autocast():
    """bf16 would round both scores to 1."""
    image, classes = torch.tensor([[1.0, 1e-3]]).expand(4, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    monitor = DriftMonitor(probe=lambda: (image, classes), labels=torch.ones(4, dtype=torch.long))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert monitor.compute()["probe/zero_shot"] == 100.0


@pytest.mark.parametrize("spoilt", [torch.full((9, 6), math.nan), torch.ones(9, 6)], ids=["NaN", "collapsed"])
def test_what_is_not_defined_is_beyond_every_limit(spoilt):
    """Training is not stopped by an exception of its monitor."""
    alarms = []
    monitor = DriftMonitor(min_rsa=-1.0, on_alarm=alarms.append)
    monitor.update(Embeddings(image=spoilt), Embeddings(image=vectors(9, 1)))
    assert math.isnan(monitor.compute()["image/rsa"])
    assert [alarm.name for alarm in alarms] == ["image/rsa"]


def test_each_number_is_undefined_by_itself():
    """Equal distances have no correlation; the shift and the dispersion are defined all the same. NaN leaves none."""
    alarms = []
    monitor = DriftMonitor(max_mean_shift=0.1, on_alarm=alarms.append)
    monitor.update(Embeddings(image=torch.eye(8)), Embeddings(image=torch.eye(8)))
    report = monitor.compute()
    assert (report["image/mean_shift"], report["image/dispersion"]) == (0.0, 0.0)
    assert math.isnan(report["image/rsa"])
    assert math.isnan(report["image/rsa_bound"])
    assert alarms == []
    monitor.update(Embeddings(image=torch.full((8, 8), math.nan)), Embeddings(image=torch.eye(8)))
    report = monitor.compute()
    assert list(report) == ["image/rsa", "image/rsa_bound", "image/mean_shift", "image/dispersion"]
    assert all(math.isnan(value) for value in report.values())
    assert [alarm.name for alarm in alarms] == ["image/mean_shift"]


def test_an_exception_of_the_callback_comes_out_and_nothing_is_left():
    def refuse(alarm):
        raise KeyboardInterrupt(alarm.name)

    monitor = DriftMonitor(max_mean_shift=0.5, on_alarm=refuse)
    teacher = vectors(9, 1)
    monitor.update(Embeddings(image=teacher + 1), Embeddings(image=teacher))
    with pytest.raises(KeyboardInterrupt, match="image/mean_shift"):
        monitor.compute()
    assert not monitor.stopped
    assert monitor.compute() == {}
    monitor.update(Embeddings(image=teacher), Embeddings(image=teacher))
    assert monitor.compute()["image/mean_shift"] == 0.0


def test_gradient_ratio():
    value = torch.ones(3, 2, requires_grad=True)
    monitor = DriftMonitor()
    for _ in range(2):
        task, kept = (monitor.norms.watch(Embeddings(text=value), role).text for role in ("task", "regularizer"))
        (2 * task.sum() + 3 * kept.sum()).backward()
    assert monitor.compute()["gradient_ratio"] == pytest.approx(1.5)
    assert "gradient_ratio" not in monitor.compute()


def test_due():
    monitor = DriftMonitor(every=3)
    assert [step for step in range(1, 10) if monitor.due(step)] == [3, 6, 9]


def test_no_graph_and_no_copy_is_kept():
    student = vectors(8, 1).requires_grad_()
    embeddings = Embeddings(image=2 * student)
    monitor = DriftMonitor()
    monitor.update(embeddings, Embeddings(image=vectors(8, 2)))
    ((kept, _),) = monitor._rows["image"]
    assert not kept.requires_grad
    assert kept.data_ptr() == embeddings.image.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "expected every as a whole number >= 1, got 0"),
        ({"max_samples": 2}, "expected max_samples as a whole number >= 3, got 2"),
        ({"min_rsa": 1.5}, "expected min_rsa between -1 and 1, got 1.5"),
        ({"min_rsa": "x"}, "expected min_rsa as a finite number, got 'x'"),
        ({"min_rsa": True}, "expected min_rsa as a finite number, got True"),
        ({"max_mean_shift": 0.0}, "expected max_mean_shift"),
        ({"max_zero_shot_drop": 2.0}, "expected a probe for max_zero_shot_drop, got none"),
        ({"probe": lambda: (vectors(4, 1), vectors(2, 2))}, "expected probe and labels together, got one without the other"),
        (
            {"probe": lambda: (vectors(4, 1), vectors(2, 2)), "labels": torch.zeros(3, dtype=torch.long)},
            r"expected labels as integers of shape \(4,\)",
        ),
        (
            {"probe": lambda: (vectors(4, 1), vectors(2, 2, 5)), "labels": torch.zeros(4, dtype=torch.long)},
            r"expected probe class embeddings of width 6 on cpu, got float32 tensor of shape \(2, 5\)",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^DriftMonitor: {message}"):
        DriftMonitor(**options)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (None, TypeError, r"expected \(image \(N, D\), classes \(C, D\)\) from probe, got None"),
        (torch.eye(2, 6), TypeError, r"expected \(image .* from probe, got float32 tensor of shape \(2, 6\)"),
        ((torch.eye(2),) * 3, TypeError, r"expected \(image .* from probe, got 3 values"),
        ((torch.eye(2), None), TypeError, "expected probe class embeddings as a tensor"),
        ((torch.eye(2), torch.eye(2, device="meta")), ValueError, "expected probe class embeddings of width 2 on cpu, got .* on meta"),
        ((torch.eye(2) * math.nan, torch.eye(2)), ValueError, "expected finite probe image embeddings at the start, got NaN"),
        ((torch.eye(2), torch.eye(2) / 0), ValueError, "expected finite probe class embeddings at the start, got NaN or infinity"),
        ((torch.eye(2), torch.eye(1, 2)), ValueError, "expected labels from 0 to 0, one of 1 classes, got 1"),
    ],
)
def test_bad_probes(found, error, message):
    with pytest.raises(error, match=f"^DriftMonitor: {message}"):
        DriftMonitor(probe=lambda: found, labels=torch.tensor([0, 1]))


def test_what_is_no_probe():
    with pytest.raises(TypeError, match=r"^DriftMonitor: expected probe as a function"):
        DriftMonitor(probe=(torch.eye(2), torch.eye(2)), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [9, 4, -1])
def test_labels_of_no_class(label):
    labels = torch.tensor([0, 3, label, 1])
    with pytest.raises(ValueError, match=f"^DriftMonitor: expected labels from 0 to 3, one of 4 classes, got {label}"):
        DriftMonitor(probe=lambda: (vectors(4, 1), vectors(4, 2)), labels=labels)


def test_a_probe_of_other_shapes_than_at_the_start():
    found = [torch.eye(4, 6), torch.eye(4, 6)]
    monitor = DriftMonitor(probe=lambda: tuple(found), labels=torch.arange(4))
    for other in ([torch.eye(4, 5)] * 2, [torch.eye(4, 6), torch.eye(5, 6)]):
        found[:] = other
        with pytest.raises(ValueError, match=r"^DriftMonitor: expected probe .* of shapes \(4, 6\) and \(4, 6\) as at the start, got"):
            monitor.compute()
    found[:] = [torch.eye(4, 6)] * 2
    assert monitor.compute()["probe/zero_shot"] == 100.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": None}, TypeError, "expected probe class embeddings as a tensor"),
        ({"image": torch.eye(5, 6)}, ValueError, r"expected .* of shapes \(4, 6\) and \(4, 6\) as at the start, got \(5, 6\) and"),
        ({"image": torch.eye(4, 5), "classes": torch.eye(4, 5)}, ValueError, "expected .* of shapes .* as at the start"),
        ({"classes": torch.eye(3, 6)}, ValueError, "expected .* of shapes .* as at the start"),
        ({"image": torch.eye(4, 6) * math.nan}, ValueError, "expected finite probe image embeddings at the start"),
        ({"more": 1}, ValueError, "expected the state of a monitor with the same probe, .*, got .*'more'"),
    ],
)
def test_bad_states(change, error, message):
    monitor = DriftMonitor(probe=lambda: (torch.eye(4, 6), torch.eye(4, 6)), labels=torch.arange(4))
    state = monitor.state_dict()
    with pytest.raises(error, match=f"^DriftMonitor: {message}"):
        monitor.load_state_dict({**state, **change})
    for bad in ({}, {"image": state["image"]}):
        with pytest.raises(ValueError, match=r"^DriftMonitor: expected the state of a monitor with the same probe, .*, got \["):
            monitor.load_state_dict(bad)
    assert monitor.compute()["probe/zero_shot_drop"] == 0.0  # what was there stays


@pytest.mark.parametrize("other", [vectors(5, 3, 7), vectors(5, 3).to("meta")], ids=["width", "device"])
def test_a_batch_of_another_kind_than_before_is_not_stored(other):
    """Nor are the images of the same batch, which fit."""
    image, text = vectors(5, 1), vectors(5, 2)
    monitor = DriftMonitor()
    monitor.update(Embeddings(image, text), Embeddings(image, text))
    with pytest.raises(ValueError, match=r"^DriftMonitor: expected text embeddings of width 6 on cpu as before, got .* Call compute\(\)"):
        monitor.update(Embeddings(image, other), Embeddings(image, other))
    assert [len(rows) for rows in monitor._rows.values()] == [1, 1]
    assert monitor.compute()["stacked/rsa"] == pytest.approx(1.0)
    if other.shape[1] == 7:
        monitor.update(Embeddings(text=other), Embeddings(text=other))  # the collection begins anew
        assert monitor.compute()["text/rsa"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (Embeddings(vectors(4, 1)), vectors(4, 1), TypeError, "teacher as geomreg.Embeddings.*, got float32 tensor"),
        (Embeddings(vectors(4, 1)), None, TypeError, "teacher as geomreg.Embeddings.*, got None"),
        (vectors(4, 1), Embeddings(vectors(4, 1)), TypeError, "student as geomreg.Embeddings.*, got float32 tensor"),
        (Embeddings([[1.0]]), Embeddings(vectors(4, 1)), TypeError, "image student embeddings as a tensor.*, got list"),
        (Embeddings(vectors(4, 1)), Embeddings(vectors(5, 1)), ValueError, "image student and teacher embeddings of one shape"),
        (Embeddings(vectors(4, 1)), Embeddings(text=vectors(4, 1)), ValueError, "image or text embeddings from both models, got none"),
        (Embeddings(), Embeddings(), ValueError, "image or text embeddings from both models, got none"),
    ],
)
def test_bad_batches(student, teacher, error, message):
    with pytest.raises(error, match=rf"^DriftMonitor: expected {message}"):
        DriftMonitor().update(student, teacher)
