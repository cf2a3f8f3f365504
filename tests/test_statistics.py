"""Running statistics of batch normalisations beside averaged weights: collected anew they are those of a direct pass."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import geomreg
from geomreg import Embeddings, Teacher, alpha_sweep, interpolate, recompute_statistics


def network(kind="1d", seed=0):
    """With dropout, and one batch normalisation that keeps no statistics."""
    torch.manual_seed(seed)
    if kind == "2d":
        layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 4)]
    else:
        layers = [nn.Linear(5, 9), nn.BatchNorm1d(9, momentum=0.3), nn.Dropout(0.5), nn.Linear(9, 4), nn.BatchNorm1d(4)]
        layers.append(nn.BatchNorm1d(4, track_running_stats=False))
    return nn.Sequential(*layers).double()


def data(rows, kind="1d", seed=1):
    shape = (rows, 2, 4, 4) if kind == "2d" else (rows, 5)
    return 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model, batch):
    return model(batch)


def trained(model, kind="1d", steps=30, rate=0.05):
    """Moved far from where it began."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(steps):
        batch = data(16, kind, seed=step)
        loss = F.cross_entropy(model.train()(batch), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def statistics(model):
    return {key: value for key, value in model.state_dict().items() if "running" in key}


def without_dropout(model):
    """In training mode for batch normalisations alone."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return model


@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_one_batch_is_a_direct_pass(kind):
    """In evaluation mode the model then gives what it gives for that batch in training mode, but for the count less one in the variance."""
    model, batch = trained(network(kind), kind), data(4000, kind)
    direct = without_dropout(copy.deepcopy(model))(batch)
    assert recompute_statistics(model, [batch], run) == 1
    found = model.eval()(batch)
    torch.testing.assert_close(found, direct, rtol=5e-3, atol=5e-3)
    assert all(layer.num_batches_tracked == 1 for layer in model if getattr(layer, "running_mean", None) is not None)


def test_several_batches_count_alike():
    model = trained(network())
    seen = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].mean(0), inputs[0].var(0))))
    recompute_statistics(model, (data(rows, seed=rows) for rows in (8, 5, 12)), run)
    for found, parts in zip((model[1].running_mean, model[1].running_var), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(parts).mean(dim=0))


def test_modes_momenta_gradients_and_random_numbers_stay():
    model = network().train()
    model[1].eval()
    modes, momenta = [module.training for module in model.modules()], [model[1].momentum, model[4].momentum]
    weights = copy.deepcopy(model[0].state_dict())
    state = torch.get_rng_state()
    recompute_statistics(model, [data(9)], run)
    assert [module.training for module in model.modules()] == modes
    assert [model[1].momentum, model[4].momentum] == momenta
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model[0].state_dict()[key]) for key, value in weights.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_data_they_stay_as_they_were():
    model = trained(network())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^recompute_statistics: expected batches of training data, got none"):
        recompute_statistics(model, [], run)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert recompute_statistics(nn.Linear(2, 2), iter(lambda: 1 / 0, 1), run) == 0  # nothing is read for a model without any


# interpolate ------------------------------------------------------------------------------------------------------------


def loss_of(model):
    batch = data(400, seed=99)
    return F.cross_entropy(model.eval()(batch), torch.arange(400) % 4)


def test_interpolated_statistics_are_said_and_can_be_collected_anew():
    start, end = trained(network(), rate=0.2), trained(network(seed=3), rate=0.2)
    with pytest.warns(UserWarning, match=r"^interpolate: .* running statistics .* got different ones in '1.running_mean' and 3 more"):
        mixed = interpolate(start.state_dict(), end.state_dict(), 0.5)
    model = network()
    model.load_state_dict(mixed)
    averaged = loss_of(model)
    recompute_statistics(model, [data(400, seed=99)], run)
    direct = F.cross_entropy(without_dropout(copy.deepcopy(model))(data(400, seed=99)), torch.arange(400) % 4)
    assert loss_of(model).item() == pytest.approx(direct.item(), rel=1e-2)
    assert abs(averaged - direct) > 5 * abs(loss_of(model) - direct)


def test_ends_and_equal_statistics_are_not_said():
    start, end = trained(network()), trained(network(), rate=0.5)
    frozen = copy.deepcopy(end)
    frozen.load_state_dict(end.state_dict() | statistics(start))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolate(start.state_dict(), end.state_dict(), 0.0)
        interpolate(start.state_dict(), end.state_dict(), 1)
        list(alpha_sweep(start.state_dict(), frozen.state_dict(), [0.3, 0.6]))
    with pytest.warns(UserWarning, match="running statistics"):
        list(alpha_sweep(start.state_dict(), end.state_dict(), [0.5]))


# averaged teacher -------------------------------------------------------------------------------------------------------


def test_averaged_teacher_says_once_that_statistics_move():
    student = network().train()
    teacher = Teacher.averaged(student, lambda model, batch: Embeddings(image=model(batch)), decay=0.9)
    with pytest.warns(UserWarning, match=r"^Teacher: expected no batch normalisation in training mode .* got '1': .*recompute_statistics"):
        teacher.step()
    trained(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.step()
        frozen = Teacher.averaged(student.eval(), lambda model, batch: Embeddings(image=model(batch)))
        frozen.step()
    batch = data(4000)
    assert recompute_statistics(teacher.model, [batch], run) == 1
    direct = without_dropout(copy.deepcopy(teacher.model))(batch)
    torch.testing.assert_close(teacher(batch).image, direct, rtol=5e-3, atol=5e-3)
    assert not teacher.model.training
    assert geomreg.recompute_statistics is recompute_statistics


def image(model, batch):
    return Embeddings(image=model(batch))


@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_teacher_that_follows_has_statistics_of_its_own_weights(kind, decay):
    """As if the averaged weights themselves had been trained on these batches; at a decay of 0 those of the student."""
    student = network(kind)
    teacher, by_hand = Teacher.averaged(student, image, decay=decay), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20):
            batch = data(16, kind, seed=step)
            optimizer.zero_grad()
            F.cross_entropy(without_dropout(student)(batch), torch.arange(16) % 4).backward()
            state = torch.get_rng_state()
            teacher.follow(batch)
            assert torch.equal(torch.get_rng_state(), state)
            without_dropout(by_hand)(batch)
            optimizer.step()
            teacher.step()
            with torch.no_grad():
                for held, value in zip(by_hand.parameters(), student.parameters(), strict=True):
                    held.lerp_(value, 1 - decay)
    assert not teacher.model.training
    for key, value in by_hand.state_dict().items():
        torch.testing.assert_close(teacher.model.state_dict()[key], value, msg=key)
        if decay == 0:
            torch.testing.assert_close(student.state_dict()[key], value, msg=key)
    saved = Teacher.averaged(network(kind), image, decay=decay)
    saved.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(saved(batch).image, teacher(batch).image, rtol=0, atol=0)


def test_following_moves_what_moves_in_the_student_alone():
    student = network().train()
    student[1].eval()  # frozen statistics
    teacher, before = Teacher.averaged(student, image), copy.deepcopy(student.state_dict())
    teacher.follow(data(8))
    after = teacher.model.state_dict()
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == {
        "4.running_mean", "4.running_var", "4.num_batches_tracked",
    }  # fmt: skip
    for other in (Teacher(student, image), Teacher.averaged(student.eval(), image), Teacher.averaged(nn.Linear(5, 4), image)):
        held = copy.deepcopy(other.model.state_dict())
        other.follow(data(8))
        assert all(torch.equal(value, held[key]) for key, value in other.model.state_dict().items())


def test_narrow_statistics_that_follow_are_saved():
    student = nn.BatchNorm1d(5).bfloat16().train()
    teacher = Teacher.averaged(student, image)
    teacher.follow(data(8).bfloat16())
    teacher.step()
    saved = Teacher.averaged(nn.BatchNorm1d(5).bfloat16(), image)
    saved.load_state_dict(teacher.state_dict())
    assert teacher.model.running_mean.abs().max() > 0
    assert torch.equal(saved.model.running_mean, teacher.model.running_mean)


def test_layers_that_are_not_reached_or_not_meant_keep_theirs():
    model = trained(network())
    before = copy.deepcopy(statistics(model))
    recompute_statistics(model, [data(9)], lambda model, batch: model[:3](batch))
    after = copy.deepcopy(statistics(model))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"1.running_mean", "1.running_var"}
    recompute_statistics(model, [data(9)], run, names=["4"])
    assert all(torch.equal(after[key], statistics(model)[key]) for key in after if key.startswith("1."))
    assert not torch.equal(after["4.running_mean"], statistics(model)["4.running_mean"])


def follow_on_rank(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        student = network().train()
        teacher = Teacher.averaged(student, image)
        for step in range(2):
            teacher.follow(data(6 + rank, seed=2 * step + rank))
        torch.save(teacher.model.state_dict(), folder / f"{rank}.pt")
        if not rank:  # without the other
            recompute_statistics(student, [data(9)], run, alone=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_processes_follow_as_those_of_the_student(tmp_path):
    mp.spawn(follow_on_rank, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    first = without_dropout(network())
    first(data(6, seed=0))
    for rank, one in enumerate(found):
        own = copy.deepcopy(first)
        own(data(6 + rank, seed=2 + rank))
        for key, value in own.state_dict().items():
            torch.testing.assert_close(one[key], value, msg=key)


def test_a_student_in_a_wrapper_is_followed():
    class Wrapper(nn.Module):
        """Names its model as DistributedDataParallel does."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    student = network()
    for wrapped in (Wrapper(student), torch.compile(student)):
        teacher, plain = (Teacher.averaged(student, image, decay=0.5) for _ in range(2))
        teacher.follow(data(8), wrapped)
        plain.follow(data(8))
        assert torch.equal(teacher.model[1].running_mean, plain.model[1].running_mean)
        assert not torch.equal(teacher.model[1].running_mean, student[1].running_mean)


def test_nothing_half_made_stays():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(model, batch):
        model(batch)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        recompute_statistics(model, [data(8)], failing)
    with pytest.raises(ValueError, match="expected finite activations, got others before a BatchNorm1d of 9 features"):
        recompute_statistics(model, [data(8), data(8) * float("nan")], run)
    with pytest.raises(ValueError, match="expected names of modules, got '7'"):
        recompute_statistics(model, [data(8)], run, names=["1", "7"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
