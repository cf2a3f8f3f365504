"""CyCLIP: the authors' numbers, loops over pairs, and what each part does not see."""

import pytest
import torch
from batches import random_pair, rotation
from golden_cases import assert_value, case, cases, check, inputs, leaves, name_of

from geomreg import CyclicConsistency, Embeddings
from geomreg.functional import cyclic_loss


@pytest.mark.parametrize(
    "golden", [one for one in cases("cyclip") if "cylambda1" in one["hyper"] and not one["hyper"]["inmodal"]], ids=name_of
)
def test_golden(golden):
    arguments, hyper = leaves(golden), golden["hyper"]
    value = cyclic_loss(arguments["image"], arguments["text"], in_modal=hyper["cylambda1"], cross_modal=hyper["cylambda2"])
    if hyper["cylambda1"] or hyper["cylambda2"]:
        check(golden, value, arguments, output="cyclic", prefix="cyclic__")
    else:  # recorded without gradients of the part that is not there
        assert_value(golden, value, golden["outputs"]["cyclic"])


def test_golden_with_augmented_views():
    """The cyclic part looks at the first views alone."""
    golden = case("cyclip", "inmodal_augmented_views")
    arguments, hyper = inputs(golden), golden["hyper"]
    image, text = arguments["image_first_half"], arguments["text_first_half"]
    assert_value(golden, cyclic_loss(image, text, in_modal=hyper["cylambda1"], cross_modal=hyper["cylambda2"]), golden["outputs"]["cyclic"])


@pytest.mark.parametrize("golden", [one for one in cases("cyclip") if "cyclic__log_logit_scale" in one["grads"]], ids=name_of)
def test_the_logit_scale_cancels_in_the_official_code(golden):
    """Which is why it is no argument here."""
    assert abs(golden["grads"]["cyclic__log_logit_scale"]) < 1e-12


def oracle(image, text, in_modal, cross_modal):
    image, text = image.detach(), text.detach()
    rows, total = range(len(image)), 0.0
    for j in rows:
        for k in rows:
            total += in_modal * float(image[j] @ image[k] - text[j] @ text[k]) ** 2
            total += cross_modal * float(image[j] @ text[k] - image[k] @ text[j]) ** 2
    return total / len(image)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 63), (7, 3), (33, 8)])
@pytest.mark.parametrize("weights", [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_equals_loop(rows, width, weights):
    student, _ = random_pair(rows, width)
    value = cyclic_loss(*student, in_modal=weights[0], cross_modal=weights[1])
    assert value.item() == pytest.approx(oracle(*student, *weights), rel=1e-10, abs=1e-12)


def test_default_weights():
    student, _ = random_pair()
    assert cyclic_loss(*student).item() == pytest.approx(oracle(*student, 0.25, 0.25), rel=1e-12)
    units = Embeddings(*(one / one.norm(dim=1, keepdim=True) for one in student))
    torch.testing.assert_close(CyclicConsistency()(student), cyclic_loss(*units))


def test_in_modal_part_allows_a_rotation_of_one_modality():
    student, _ = random_pair()
    turned = student.text @ rotation(8)
    torch.testing.assert_close(cyclic_loss(student.image, turned, cross_modal=0.0), cyclic_loss(*student, cross_modal=0.0))
    assert not torch.allclose(cyclic_loss(student.image, turned), cyclic_loss(*student), rtol=1e-3)


@pytest.mark.parametrize("drift", [1.0, 1e-1, 1e-2, 1e-3])
def test_gradient_in_fp32_is_no_worse_than_the_direct_forms(drift):
    """Relative error of the gradient against float64, where texts come close to their images."""
    image = torch.nn.functional.normalize(random_pair(96, 64)[1].image)
    text = torch.nn.functional.normalize(image + drift * random_pair(96, 64, seed=1)[1].image / 8)

    def direct(z, t):
        across = z @ t.T
        return 0.25 * ((z @ z.T - t @ t.T).square().sum() + (across - across.T).square().sum()) / len(z)

    def error(function):
        exact = torch.func.grad(function)(image.float().double(), text.float().double())
        return (torch.func.grad(function)(image.float(), text.float()) - exact).norm() / exact.norm()

    assert error(cyclic_loss) < 2e-6
    assert error(cyclic_loss) <= 2 * error(direct)
    if drift < 0.1:
        assert error(cyclic_loss) < 0.2 * error(direct)


@pytest.mark.parametrize("option", ["in_modal", "cross_modal"])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), "1", None])
def test_bad_weights(option, bad):
    with pytest.raises(ValueError, match=rf"^CyclicConsistency: expected {option} as a finite number >= 0"):
        CyclicConsistency(**{option: bad})
    with pytest.raises(ValueError, match=rf"^cyclic_loss: expected {option} as a finite number >= 0"):
        cyclic_loss(*random_pair()[0], **{option: bad})


def test_missing_text():
    with pytest.raises(ValueError, match=r"^CyclicConsistency: expected image-text pairs, got None for the text"):
        CyclicConsistency()(Embeddings(random_pair()[0].image))
    with pytest.raises(ValueError, match=r"^cyclic_loss: expected image and text embeddings of the same pairs"):
        cyclic_loss(torch.ones(2, 3), torch.ones(3, 3))
