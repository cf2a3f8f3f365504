"""Target losses: each against its formula written out, and in the loop against a loop by hand."""

import copy
import dataclasses
import itertools
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from geomreg import ContextKL, FeatureDistillation, Teacher, WeightedSum
from geomreg.integrations.recipes.head import NAME, attach_head, linear_probe, zero_shot_classifier
from geomreg.integrations.recipes.losses import Contrastive, HeadClassification, TextClassification
from geomreg.integrations.recipes.train import Settings, encode, finetune

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
SETTINGS = Settings(steps=4, learning_rate=1e-3, warmup_steps=2)
CLASSES, ROWS = 3, 6


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def model(**options):
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT, output_dict=True, **options).double()


def tokens(*shape, seed=3):
    return torch.randint(1, 63, (*shape, 8), generator=torch.Generator().manual_seed(seed))


def batches(seed):
    def stream():
        generator = torch.Generator().manual_seed(seed)
        while True:
            images = torch.randn(ROWS, 3, 16, 16, generator=generator).double()
            texts, captions = (torch.randint(1, 63, (ROWS, 8), generator=generator) for _ in range(2))
            labels = torch.randint(CLASSES, (ROWS,), generator=generator)
            yield {"image": images, "text": texts, "caption": captions, "label": labels}

    return lambda start: itertools.islice(stream(), start, None)


def unit(seed, rows=ROWS):
    return F.normalize(torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def cross_entropy(logits, label, smoothing=0.0):
    """Of one row."""
    log_share = [value - torch.logsumexp(logits, 0) for value in logits]
    wanted = [smoothing / len(logits) + (1 - smoothing) * (k == label) for k in range(len(logits))]
    return -sum(share * value for share, value in zip(wanted, log_share, strict=True))


def test_contrastive():
    one, image, text, caption = model(), unit(1), unit(2), unit(3)

    def by_hand(text):
        logits = one.logit_scale.exp() * image @ text.T
        return sum(cross_entropy(logits[k], k) + cross_entropy(logits[:, k], k) for k in range(ROWS)) / (2 * ROWS)

    batch = next(batches(1)(0))
    loss = Contrastive(one, Accelerator(cpu=True))
    torch.testing.assert_close(loss(image, text, batch), by_hand(text))
    assert torch.equal(loss.texts(batch, 5), batch["text"])
    loss = Contrastive(one, Accelerator(cpu=True), caption_weight=0.3)
    both = torch.cat([text, caption])
    torch.testing.assert_close(loss(image, both, batch), by_hand(text) + 0.3 * by_hand(caption))
    assert torch.equal(loss.paired(both, batch), text)
    assert torch.equal(loss.texts(batch, 5), torch.cat([batch["text"], batch["caption"]]))


def test_contrastive_of_a_model_with_a_bias_is_siglips():
    one, image, text = model(init_logit_scale=math.log(10), init_logit_bias=-10.0), unit(1), unit(2)
    logits = 10 * image @ text.T - 10
    expected = -sum(F.logsigmoid(logits[j, k] * (1 if j == k else -1)) for j in range(ROWS) for k in range(ROWS)) / ROWS
    loss = Contrastive(one, Accelerator(cpu=True))(image, text, next(batches(1)(0)))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert one.logit_bias.grad.abs() > 0
    assert one.logit_scale.grad.abs() > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classifications(smoothing):
    one, image, batch = model(), unit(1), next(batches(1)(0))
    head = torch.nn.Linear(24, CLASSES).double()
    expected = sum(cross_entropy(head(row), label, smoothing) for row, label in zip(image, batch["label"], strict=True)) / ROWS
    torch.testing.assert_close(HeadClassification(head, label_smoothing=smoothing)(image, None, batch), expected)
    text, loss = unit(2, CLASSES), TextClassification(one, tokens(2, CLASSES), label_smoothing=smoothing)
    logits = one.logit_scale.exp() * image @ text.T
    expected = sum(cross_entropy(row, label, smoothing) for row, label in zip(logits, batch["label"], strict=True)) / ROWS
    torch.testing.assert_close(loss(image, text, batch), expected)
    assert [torch.equal(loss.texts(batch, step), tokens(2, CLASSES)[step % 2]) for step in range(3)] == [True] * 3
    assert not torch.equal(loss.texts(batch, 0), loss.texts(batch, 1))
    assert HeadClassification(head).texts(batch, 0) is None


@pytest.mark.parametrize("loss", [HeadClassification, Contrastive])
def test_bad_options(loss):
    option = {"label_smoothing": 1.5} if loss is HeadClassification else {"caption_weight": -1.0}
    with pytest.raises(ValueError, match=next(iter(option))):
        loss(torch.nn.Identity(), *([Accelerator(cpu=True)] if loss is Contrastive else []), **option)


# in the loop


def prepared(kind):
    """Model, its loss, and parts of the model that are not trained."""
    one = model()
    if kind == "head":
        attach_head(one, zero_shot_classifier(one, tokens(2, CLASSES)).double())
        for name, value in one.named_parameters():
            value.requires_grad_(name.startswith(("visual.", NAME)))
        return one, HeadClassification(getattr(one, NAME), label_smoothing=0.1)
    if kind == "texts":
        return one, TextClassification(one, tokens(2, CLASSES), label_smoothing=0.1)
    return one, Contrastive(one, Accelerator(cpu=True), caption_weight=0.5)


def parts(kind, one):
    """Terms on the target images and on reference images, with a bank of texts."""
    bank = unit(9, 4)
    keep = WeightedSum(fd=(3.0, FeatureDistillation(modalities=("image",))))
    target_keep = WeightedSum(context=(2.0, ContextKL()))
    return {
        "regularizer": keep,
        "target_regularizer": target_keep,
        "teacher": Teacher(one, encode),
        "texts": lambda start: itertools.islice(itertools.cycle([bank, -bank]), start, None),
    }


def images(seed):
    return lambda start: ({"image": batch["image"]} for batch in batches(seed)(start))


def by_hand(kind):
    one, _ = prepared(kind)
    one.train()
    frozen = copy.deepcopy(one).eval()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=SETTINGS.weight_decay)
    target, reference, bank = batches(1)(0), batches(2)(0), unit(9, 4)
    for step in range(SETTINGS.steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 2)))
        batch, other, scale = next(target), next(reference)["image"], one.logit_scale.exp()
        image = one.encode_image(batch["image"], normalize=True)
        if kind == "head":
            loss = F.cross_entropy(getattr(one, NAME)(image), batch["label"], label_smoothing=0.1)
        elif kind == "texts":
            text = one.encode_text(tokens(2, CLASSES)[step % 2], normalize=True)
            loss = F.cross_entropy(scale * image @ text.T, batch["label"], label_smoothing=0.1)
        else:
            loss = 0.0
            for weight, key in ((1.0, "text"), (0.5, "caption")):
                logits = scale * image @ one.encode_text(batch[key], normalize=True).T
                rows = torch.arange(ROWS)
                loss = loss + weight * (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        with torch.no_grad():
            before, other_before = (frozen.encode_image(value, normalize=True) for value in (batch["image"], other))
        contexts = bank * (-1) ** step
        kept = F.kl_div(
            F.log_softmax(scale * image @ contexts.T, 1), F.softmax(scale.detach() * before @ contexts.T, 1), reduction="batchmean"
        )
        moved = (one.encode_image(other, normalize=True) - other_before).square().sum(dim=1).mean()
        optimizer.zero_grad()
        (loss + 2.0 * kept + 3.0 * moved).backward()
        optimizer.step()
    return one.state_dict()


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("kind", ["head", "texts", "captions"])
def test_loop_equals_loop_by_hand(kind, chunk_size):
    one, loss = prepared(kind)
    log = []
    extra = parts(kind, one)
    settings = dataclasses.replace(SETTINGS, chunk_size=chunk_size)
    finetune(
        one, batches(1), settings, loss=loss, reference=images(2), accelerator=Accelerator(cpu=True), on_step=log.append, **extra
    )  # fmt: skip
    for key, value in by_hand(kind).items():
        torch.testing.assert_close(one.state_dict()[key], value, rtol=1e-7, atol=1e-9, msg=key)
    assert all(entry["context/weighted"] == pytest.approx(2 * entry["context"]) for entry in log)
    assert log[0]["gradient_ratio"] < 1e-6 < log[1]["gradient_ratio"]  # nothing has moved yet


def test_gradient_ratio_by_hand():
    """Norms over the embeddings of target and reference together, at the second step, where something has moved; the
    texts of classes are no samples."""
    one, loss = prepared("texts")
    log, states = [], []
    extra = parts("texts", one)

    def on_step(entry):
        log.append(entry)
        states.append(copy.deepcopy(one.state_dict()))

    finetune(one, batches(1), SETTINGS, loss=loss, reference=images(2), accelerator=Accelerator(cpu=True), on_step=on_step, **extra)
    moved = model()
    moved.load_state_dict(states[0])
    frozen, batch, other = model(), list(itertools.islice(batches(1)(0), 2))[1], list(itertools.islice(images(2)(0), 2))[1]
    frozen_target, frozen_other = (frozen.encode_image(one["image"], normalize=True).detach() for one in (batch, other))
    image, kept = (moved.encode_image(one["image"], normalize=True).detach().requires_grad_() for one in (batch, other))
    text = moved.encode_text(tokens(2, CLASSES)[1], normalize=True).detach()
    scale = moved.logit_scale.exp().detach()
    task = torch.autograd.grad(F.cross_entropy(scale * image @ text.T, batch["label"], label_smoothing=0.1), [image])
    bank, (unit_image, unit_kept) = -unit(9, 4), (F.normalize(value, dim=1) for value in (image, kept))  # as the terms do
    context = F.kl_div(F.log_softmax(scale * unit_image @ bank.T, 1), F.softmax(scale * frozen_target @ bank.T, 1), reduction="batchmean")
    distance = (unit_kept - frozen_other).square().sum(dim=1).mean()
    terms = [torch.autograd.grad(2 * context, image)[0], torch.autograd.grad(3 * distance, kept)[0]]
    expected = math.sqrt(sum(g.square().sum() for g in terms) / sum(g.square().sum() for g in task))
    assert log[1]["gradient_ratio"] == pytest.approx(expected, rel=1e-5)


def test_mean_of_the_weights():
    """Of the start and after every second step; the optimizer's own weights go on meanwhile."""
    states = [copy.deepcopy(model().state_dict())]
    plain = model()
    finetune(
        plain, batches(1), SETTINGS, accelerator=Accelerator(cpu=True), on_step=lambda _: states.append(copy.deepcopy(plain.state_dict()))
    )
    one = model()
    finetune(one, batches(1), dataclasses.replace(SETTINGS, average_every=2), accelerator=Accelerator(cpu=True))
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, (states[0][key] + states[2][key] + states[4][key]) / 3, msg=key)


# heads


class Labelled:
    """Images whose class shows."""

    def __init__(self, rows=60):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.images = torch.randn(rows, 3, 16, 16, generator=generator).double() + 3 * self.labels[:, None, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"id": str(row), "broken": "x"} if row == 7 else {"id": str(row), "image": self.images[row], "label": int(self.labels[row])}


def test_zero_shot_classifier():
    one = model()
    head = zero_shot_classifier(one, tokens(2, CLASSES))
    texts = [one.encode_text(part, normalize=True) for part in tokens(2, CLASSES)]
    expected = one.logit_scale.exp() * F.normalize(sum(texts), dim=1)
    torch.testing.assert_close(head.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert not head.bias.any()


def test_linear_probe_is_the_minimum():
    """The gradient of the penalised loss vanishes there; and random numbers are left alone."""
    one, data = model(), Labelled()
    start = zero_shot_classifier(one, tokens(2, CLASSES))
    before = torch.get_rng_state()
    head = linear_probe(one, data, start, Accelerator(cpu=True), penalty=1e-2, steps=2000).double()
    assert torch.equal(torch.get_rng_state(), before)
    rows = [row for row in range(60) if row != 7]
    image = one.encode_image(data.images[rows], normalize=True).detach()
    weight, bias = (value.detach().requires_grad_() for value in (head.weight, head.bias))
    loss = F.cross_entropy(image @ weight.T + bias, data.labels[rows]) + 0.5e-2 * (weight - start.weight.detach()).square().sum()
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(loss, [weight, bias])) < 1e-4
    first = F.cross_entropy(image @ start.weight.detach().double().T, data.labels[rows])
    assert loss < 0.9 * first
