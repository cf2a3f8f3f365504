"""The chunked step with encoders of the common libraries, their dropout, mixed precision and scalers."""

import open_clip
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import CLIPConfig, CLIPModel

from geomreg import DiVE, Embeddings, Teacher, WeightedSum, backward
from geomreg.functional import contrastive_loss
from geomreg.integrations.open_clip import embed

ROWS = 7


def of_open_clip():
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1, "patch_dropout": 0.5}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, output_dict=True), lambda m, b: embed(m, b["image"], b["text"])


def of_transformers():
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.3}
    text = {**tower, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63, "bos_token_id": 62, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=24)

    def encode(model, batch):
        out = model(input_ids=batch["text"], pixel_values=batch["image"])
        return Embeddings(out.image_embeds, out.text_embeds)

    return CLIPModel(config), encode


def of_timm():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=24, drop_path_rate=0.5
    )
    return model, lambda m, b: Embeddings(image=m(b["image"]))


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(ROWS, 3, 16, 16, generator=generator).double(),
        "text": torch.randint(1, 60, (ROWS, 8), generator=generator),
    }


def loss_fn(embeddings):
    image, text = embeddings
    return contrastive_loss(image, image.roll(1, 0) if text is None else text, logit_scale=5.0)


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("build", [of_open_clip, of_transformers, of_timm])
@pytest.mark.parametrize("training", [False, True], ids=["deterministic", "dropout"])
def test_encoders(build, training):
    """The gradient of chunks encoded one after the other and compared as a whole, with the same random masks."""
    torch.manual_seed(0)
    model, encode = build()
    model.double().train(training)
    batch = batch_of()
    torch.manual_seed(1)
    parts = [encode(model, {key: value[k : k + 3] for key, value in batch.items()}) for k in range(0, ROWS, 3)]
    whole = Embeddings(*(None if parts[0][k] is None else torch.cat([part[k] for part in parts]) for k in range(2)))
    loss_fn(whole).backward()
    expected = gradients(model)
    torch.manual_seed(1)
    backward(lambda b: encode(model, b), batch, loss_fn, chunk_size=3)
    found = gradients(model)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    torch.manual_seed(2)
    backward(lambda b: encode(model, b), batch, loss_fn, chunk_size=3)
    assert torch.equal(gradients(model), found) != training  # the masks mattered


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_and_autocast(dtype):
    """Scaled losses, unscaled and clipped gradients, equal to the plain step's but for the rounding of other batch shapes."""
    torch.manual_seed(0)
    model, encode = of_open_clip()
    model.eval()
    scaler, batch = torch.amp.GradScaler("cpu", init_scale=1024.0), batch_of()
    batch["image"] = batch["image"].float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teacher = Teacher(of_open_clip()[0], encode)
    found = []
    for chunk_size in (3, ROWS):
        keep = WeightedSum(dive=(10.0, DiVE()))

        def encoded(chunk):
            with torch.autocast("cpu", dtype):
                return encode(model, chunk)

        options = {"chunk_size": chunk_size, "scale": scaler.scale}
        backward(encoded, batch, loss_fn, **options)
        backward(encoded, batch, lambda e, keep=keep: keep(e, teacher(batch)), **options)
        assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) > 1
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        found.append((norm, gradients(model)))
    (norm, chunked), (expected_norm, expected) = found
    assert (chunked - expected).norm() <= 0.02 * expected.norm()
    assert norm == pytest.approx(expected_norm.item(), rel=0.02)


def test_overflow_reaches_the_scaler():
    """An infinite loss skips the step, as in the plain loop."""
    torch.manual_seed(0)
    model, encode = of_open_clip()
    scaler, batch = torch.amp.GradScaler("cpu", init_scale=1024.0), batch_of()
    batch["image"] = batch["image"].float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backward(lambda b: encode(model, b), batch, lambda e: e.image.sum() * float("inf"), chunk_size=3, scale=scaler.scale)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    torch.testing.assert_close(model.state_dict(), before)


@pytest.fixture
def _new_accelerate_state():
    """accelerate keeps one state for the process."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.usefixtures("_new_accelerate_state")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_accelerate(precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    torch.manual_seed(0)
    plain, encode = of_open_clip()
    model = accelerator.prepare(plain.eval())
    batch = batch_of()
    batch["image"] = batch["image"].float()
    accelerator.backward(loss_fn(encode(model, batch)))
    expected = gradients(model)
    scale = accelerator.scaler.scale if accelerator.scaler is not None else lambda loss: loss
    backward(lambda b: encode(model, b), batch, loss_fn, chunk_size=3, model=model, scale=scale)
    assert (gradients(model) - expected).norm() <= (0.02 if precision == "bf16" else 1e-5) * expected.norm()
