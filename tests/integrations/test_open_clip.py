"""open_clip adapter: every output form and tower, and an fp32 tail under autocast."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa

from geomreg import Embeddings
from geomreg.functional import average_vector_loss
from geomreg.integrations.open_clip import embed, unwrap

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
TIMM = {"image_size": 32, "timm_model_name": "convnext_zepto_rms", "timm_pool": "avg", "timm_proj": "linear"}


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
VISION = {
    "vit": VIT,
    "custom": VIT,
    "timm": TIMM,
    "timm-mlp": TIMM | {"timm_proj": "mlp"},
    "timm-attention": TIMM | {"timm_pool": "rot_attn", "timm_proj": None},
    "resnet": RESNET,
    "coca": VIT,
}
COCA = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def build(kind: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "coca":
        vision = VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        return CoCa(embed_dim=32, vision_cfg=vision, text_cfg=TEXT | {"embed_cls": True, "output_tokens": True}, multimodal_cfg=COCA).eval()
    build = open_clip.CustomTextCLIP if kind == "custom" else open_clip.CLIP
    return build(embed_dim=24, vision_cfg=VISION[kind], text_cfg=TEXT, **more).eval()


def inputs(kind: str, batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    size = VISION[kind]["image_size"]
    return torch.randn(batch, 3, size, size, generator=generator), torch.randint(1, 63, (batch, 8), generator=generator)


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("output_dict", [False, True])
def test_embed_equals_open_clip(kind, output_dict):
    model, (images, texts) = build(kind, output_dict=output_dict), inputs(kind)
    raw = embed(model, images, texts, normalize=False)
    torch.testing.assert_close(raw.image, model.encode_image(images, normalize=False))
    torch.testing.assert_close(raw.text, model.encode_text(texts, normalize=False))
    assert not torch.allclose(raw.image.norm(dim=1), torch.ones(len(images)), atol=0.01)
    unit = embed(model, images, texts)
    torch.testing.assert_close(unit.image, F.normalize(raw.image, dim=-1))
    torch.testing.assert_close(unit.text, F.normalize(raw.text, dim=-1))
    alone = embed(model, images)
    assert alone.text is None
    torch.testing.assert_close(alone.image, unit.image)
    alone = embed(model, texts=texts)
    assert alone.image is None
    torch.testing.assert_close(alone.text, unit.text)


def test_no_caption_decoder_runs():
    """Not of the plain model, nor behind a wrapper through whose forward pass the call goes; which is its own again afterwards."""
    model, (images, texts) = build("coca", output_dict=True), inputs("coca")
    calls = []
    model.text_decoder.register_forward_hook(lambda *_: calls.append(1))

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *given):
            return self.module(*given)

    expected = embed(model, images, texts)
    for one, other in zip(embed(Wrapper(), images, texts), expected, strict=True):
        assert torch.equal(one, other)
    assert embed(Wrapper(), texts=texts).image is None
    with pytest.raises(RuntimeError):
        embed(model, images[:, :1], texts)
    assert not calls
    assert "logits" in model(images, texts)
    assert calls == [1]


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("normalize", [True, False])
def test_tail_is_fp32_under_autocast(kind, normalize):
    model, (images, texts) = build(kind, output_dict=True), inputs(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = embed(model, images, texts, normalize=normalize)
        plain = model.encode_image(images, normalize=False)
    assert plain.dtype == torch.bfloat16  # what the adapter is there to avoid
    for value in inside:
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())  # not bf16 numbers in an fp32 tensor


def test_tail_of_an_mlp_projection_of_the_text_tower():
    """As open_clip's Hugging Face text towers have it."""
    model, (_, texts) = build("custom", output_dict=True), inputs("custom")
    model.text.text_projection = None
    model.text.proj = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 24))
    forward = model.text.forward
    model.text.forward = lambda tokens: model.text.proj(forward(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = embed(model, texts=texts, normalize=False).text
    assert not torch.equal(text, text.bfloat16().float())


def test_compiled_and_nested_models_are_unwrapped():
    model = build("vit")
    model.module = torch.nn.Linear(1, 1)  # a user's own submodule of that name is no wrapper
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
    wrapper = torch.nn.Module()
    wrapper.module = torch.compile(model, backend="eager")
    assert unwrap(wrapper) is model


@pytest.mark.parametrize("kind", ["vit", "timm", "custom"])
def test_projection_product_runs_in_fp32(kind):
    """With the towers in fp32 and autocast around the projections alone, nothing is lost at all."""
    model, (images, texts) = build(kind), inputs(kind)
    reference = embed(model, images, texts, normalize=False)
    projection_inputs = {}
    visual = model.visual
    handle = (visual.ln_post if kind != "timm" else visual.trunk).register_forward_hook(
        lambda module, args, output: projection_inputs.setdefault("pooled", output)
    )
    embed(model, images, texts, normalize=False)
    handle.remove()
    assert projection_inputs["pooled"].dtype == torch.float32
    weight = visual.head.proj.weight.T if kind == "timm" else visual.proj
    pooled = projection_inputs["pooled"]
    pooled = pooled if pooled.ndim == 2 else pooled[:, 0]
    torch.testing.assert_close(pooled @ weight, reference.image)


def moved(model: torch.nn.Module, drift: float) -> torch.nn.Module:
    """The model with noise on its last projections, so that embeddings move by about ``drift``."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in (model.visual.proj, model.text_projection):
            weight += drift * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def average_vector(student: Embeddings, teacher: Embeddings) -> float:
    return average_vector_loss(*student, *(value.detach() for value in teacher), mean=torch.zeros(())).item()


def test_average_vector_error_under_bf16_autocast_is_bounded():
    """At 0.3 % drift bf16 features are off by tens of per cent; the fp32 tail keeps the loss."""
    teacher, student = build("vit"), moved(build("vit"), 0.003)
    images, texts = inputs("vit", batch=64)
    with torch.no_grad():
        exact = average_vector(embed(student, images, texts), embed(teacher, images, texts))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = average_vector(embed(student, images, texts), embed(teacher, images, texts))
            naive = average_vector(
                *(
                    Embeddings(F.normalize(m.encode_image(images), dim=-1), F.normalize(m.encode_text(texts), dim=-1))
                    for m in (student, teacher)
                )
            )
    assert exact > 0
    assert abs(ours - exact) / exact < 0.02
    assert abs(naive - exact) / exact > 0.2  # the error that would come back without the tail


def test_bad_input():
    model, (images, _) = build("vit"), inputs("vit")
    with pytest.raises(ValueError, match=r"^embed: expected images or texts"):
        embed(model)
    wrapper = torch.nn.Module()
    wrapper.module, wrapper.forward = model, model.forward
    with pytest.raises(ValueError, match=r"^embed: expected a plain open_clip model"):
        embed(wrapper, images, normalize=False)
    broken = torch.nn.Module()
    broken.forward = lambda images, texts: images
    with pytest.raises(TypeError, match=r"^embed: expected a dict or tuple"):
        embed(broken, images)
