"""Replay: FLYP's, open_clip's and CaRot's numbers, soft labels, row blocks; retrieval of anchors."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import random_pair
from golden_cases import cases, check, leaves, name_of, tensor

from geomreg import ContrastiveReplay, Embeddings, blocked
from geomreg.functional import contrastive_loss, retrieve_anchors, sigmoid_contrastive_loss
from geomreg.regularizers import replay


@pytest.mark.parametrize(
    "golden",
    cases("flyp", containing="default") + cases("open_clip", containing="clip_scale") + cases("carot", containing="label_smoothing_0/"),
    ids=name_of,
)
def test_golden(golden):
    arguments = leaves(golden, logit_scale=golden["hyper"]["logit_scale"])
    output = "contrastive_loss" if "contrastive_loss" in golden["outputs"] else "loss"
    check(golden, contrastive_loss(arguments["image"], arguments["text"], logit_scale=arguments["logit_scale"]), arguments, output=output)


@pytest.mark.parametrize("golden", cases("flyp", containing="soft_labels"), ids=name_of)
@pytest.mark.parametrize("matrix", [False, True])
def test_golden_soft_labels(golden, matrix):
    arguments = leaves(golden, logit_scale=golden["hyper"]["logit_scale"])
    labels = tensor(golden["inputs"]["labels"]).long()
    labels = 3.0 * (labels[:, None] == labels[None, :]).double() if matrix else labels
    value = contrastive_loss(arguments["image"], arguments["text"], logit_scale=arguments["logit_scale"], labels=labels)
    check(golden, value, arguments)


@pytest.mark.parametrize("golden", cases("open_clip", containing="siglip"), ids=name_of)
def test_golden_sigmoid(golden):
    arguments = leaves(golden, **golden["hyper"])
    check(golden, sigmoid_contrastive_loss(**arguments), arguments)


def test_equals_loop():
    (image, text), _ = random_pair(4, 3)
    labels = [5, 2, 5, 9]
    logits = [[1.3 * float(z @ t) for t in text] for z in image]
    expected = 0.0
    for table in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for j, row in enumerate(table):
            total = math.log(sum(math.exp(value) for value in row))
            same = [k for k in range(4) if labels[k] == labels[j]]
            expected += sum(total - row[k] for k in same) / len(same) / 8
    value = contrastive_loss(image, text, logit_scale=1.3, labels=torch.tensor(labels))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    pairs = sum(math.log1p(math.exp(-(1 if j == k else -1) * (logits[j][k] - 0.4))) for j in range(4) for k in range(4))
    assert sigmoid_contrastive_loss(image, text, logit_scale=1.3, logit_bias=-0.4).item() == pytest.approx(pairs / 4, rel=1e-12)


def test_unsymmetric_soft_labels_are_divided_by_rows_and_by_columns():
    (image, text), _ = random_pair(4, 3)
    labels = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = 2.0 * image @ text.T
    rows = F.cross_entropy(logits, labels / labels.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, labels.T / labels.T.sum(1, keepdim=True))
    torch.testing.assert_close(contrastive_loss(image, text, logit_scale=2.0, labels=labels), (rows + columns) / 2)


def test_repeated_captions_cost_at_least_log_k_on_the_diagonal():
    text = torch.eye(2, 4).repeat(3, 1)
    assert contrastive_loss(text, text, logit_scale=100.0).item() == pytest.approx(math.log(3), rel=1e-6)
    assert contrastive_loss(text, text, logit_scale=100.0, labels=torch.tensor([0, 1] * 3)).item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "labels", "matrix", "sigmoid"])
def test_row_blocks_change_nothing(monkeypatch, kind):
    (image, text), _ = random_pair(13, 4)
    ids = torch.arange(13) % 5
    labels = {"labels": ids, "matrix": (ids[:, None] == ids).double()}.get(kind)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, -1.0))

    def run():
        if kind == "sigmoid":
            value = sigmoid_contrastive_loss(image, text, logit_scale=scale, logit_bias=bias)
            return value, torch.autograd.grad(value, (image, text, scale, bias))
        value = contrastive_loss(image, text, logit_scale=scale, labels=labels)
        return value, torch.autograd.grad(value, (image, text, scale))

    expected, gradients = run()
    monkeypatch.setattr(blocked, "TILE", 3 * 13)
    value, blockwise = run()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for one, other in zip(blockwise, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_batch_of_32_thousand_needs_no_similarity_matrix():
    """It would take 4 GB; the process grows by far less."""
    import resource

    image, text = (torch.randn(32_768, 8, generator=torch.Generator().manual_seed(k), requires_grad=True) for k in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contrastive_loss(image, text, logit_scale=10.0).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert image.grad.abs().max() > 0


def test_module_forms():
    student, _ = random_pair()
    unit = Embeddings(*(F.normalize(value) for value in student))
    labels = torch.tensor([0, 0, 1, 2, 3])
    torch.testing.assert_close(ContrastiveReplay()(student, logit_scale=7.0), contrastive_loss(*unit, logit_scale=7.0))
    value = ContrastiveReplay(normalize=False)(student, None, logit_scale=7.0, labels=labels)
    torch.testing.assert_close(value, contrastive_loss(*student, logit_scale=7.0, labels=labels))
    value = ContrastiveReplay(form="sigmoid")(student, logit_scale=7.0, logit_bias=-3.0)
    torch.testing.assert_close(value, sigmoid_contrastive_loss(*unit, logit_scale=7.0, logit_bias=-3.0))


def test_module_refuses_what_its_form_does_not_take():
    student, _ = random_pair()
    with pytest.raises(ValueError, match=r'^ContrastiveReplay: expected logit_bias with form="sigmoid"'):
        ContrastiveReplay(form="sigmoid")(student, logit_scale=1.0)
    with pytest.raises(ValueError, match=r'^ContrastiveReplay: expected no labels with form="sigmoid"'):
        ContrastiveReplay(form="sigmoid")(student, logit_scale=1.0, logit_bias=0.0, labels=torch.arange(5))
    with pytest.raises(ValueError, match=r'^ContrastiveReplay: expected no logit_bias with form="softmax"'):
        ContrastiveReplay()(student, logit_scale=1.0, logit_bias=0.0)
    with pytest.raises(ValueError, match=r"^ContrastiveReplay: expected form to be one of"):
        ContrastiveReplay(form="triplet")
    with pytest.raises(ValueError, match=r"^ContrastiveReplay: expected image-text pairs"):
        ContrastiveReplay()(Embeddings(student.image), logit_scale=1.0)
    for labels in (torch.arange(4), torch.ones(5), torch.ones(5, 5), torch.ones(5, dtype=torch.bool), [0] * 5):
        with pytest.raises(ValueError, match=r"^ContrastiveReplay: expected labels as integers of shape \(5,\)"):
            ContrastiveReplay()(student, logit_scale=1.0, labels=labels)


# retrieval ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
@pytest.mark.parametrize("k", [1, 9, 50])
def test_retrieval_is_exact(backend, chunk_size, k):
    queries, bank = random_pair(4, dtype=torch.float32)[1].image, random_pair(50, seed=1, dtype=torch.float32)[1].image
    scores, rows = retrieve_anchors(queries, bank, k, chunk_size=chunk_size, backend=backend)
    similar = queries @ bank.T
    assert torch.equal(rows, similar.argsort(dim=1, descending=True)[:, :k])
    torch.testing.assert_close(scores, similar.gather(1, rows))


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_retrieval_in_low_precision_is_exact_on_the_stored_values(backend):
    queries, bank = random_pair(4, 32, dtype=torch.bfloat16)[1].image, random_pair(300, 32, seed=1, dtype=torch.float16)[1].image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rows = retrieve_anchors(queries, bank, 20, chunk_size=70, backend=backend)
    assert torch.equal(rows, (queries.float() @ bank.float().T).argsort(dim=1, descending=True)[:, :20])


def test_not_a_number_in_the_bank():
    bank = torch.ones(5, 8)
    bank[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^retrieve_anchors: expected finite bank embeddings"):
        retrieve_anchors(torch.ones(2, 8), bank, 1)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equal_similarities_come_in_order_of_rows(backend):
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    scores, rows = retrieve_anchors(torch.tensor([[1.0, 0.0]]), bank, k=4, chunk_size=2, backend=backend)
    assert rows.tolist() == [[3, 1, 2, 4]]
    assert scores.tolist() == [[2.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(("k", "width"), [(1, 3), (5, 64), (40, 129), (190, 64)])
def test_equal_rows_are_taken_in_order_whatever_finds_them(k, width):
    """Twenty rows, each about ten times: more equal ones than there is room for, in several chunks."""
    generator = torch.Generator().manual_seed(k)
    queries, few = (F.normalize(torch.randn(n, width, generator=generator), dim=1) for n in (7, 20))
    bank = few[torch.randint(0, 20, (200,), generator=generator)]
    exact = torch.stack([torch.stack([(one.double() * row.double()).sum().float() for row in bank]) for one in queries])
    scores, rows = exact.sort(dim=1, descending=True, stable=True)
    for backend in ("torch", "faiss"):
        for chunk_size in (3, 20, 64, 1000):
            found = retrieve_anchors(queries, bank, k, chunk_size=chunk_size, backend=backend)
            assert torch.equal(found[1], rows[:, :k]), (backend, chunk_size)
            assert torch.equal(found[0], scores[:, :k]), (backend, chunk_size)


@pytest.mark.parametrize("precision", ["high", "medium", None])
def test_retrieval_with_rough_matrix_products(precision, monkeypatch):
    """Those that a GPU makes: here of factors that are rounded; also where torch does not say how roughly."""
    queries, bank = (F.normalize(torch.randn(n, 33, generator=torch.Generator().manual_seed(n)), dim=1) for n in (6, 400))
    exact = (queries.double() @ bank.double().T).float().sort(dim=1, descending=True, stable=True)

    def rough(queries, bank, k):
        values = queries.bfloat16().float() @ bank.bfloat16().float().T if precision != "high" else queries @ bank.T
        return tuple(values.topk(k, dim=1))

    def asked():
        if precision is None:
            raise RuntimeError("set otherwise")
        return precision

    monkeypatch.setattr(torch, "get_float32_matmul_precision", asked)
    monkeypatch.setattr(replay, "_torch_search", rough)
    scores, rows = retrieve_anchors(queries, bank, 5, chunk_size=150, backend="torch")
    assert torch.equal(rows, exact.indices[:, :5])
    torch.testing.assert_close(scores, exact.values[:, :5])


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_one_row_many_times(backend):
    """All rows tie: the first ones are taken; products that overflow do no harm."""
    for scale in (1.0, 1e25):
        _, rows = retrieve_anchors(torch.full((2, 8), scale), torch.full((90, 8), scale), 4, chunk_size=50, backend=backend)
        assert rows.tolist() == [[0, 1, 2, 3]] * 2


def test_retrieval_from_mapped_memory(tmp_path):
    bank = random_pair(30, seed=1, dtype=torch.float32)[1].image
    bank.numpy().tofile(tmp_path / "bank")
    mapped = torch.from_file(str(tmp_path / "bank"), shared=False, size=bank.numel()).view_as(bank)
    assert torch.equal(retrieve_anchors(bank[:3], mapped, 1, chunk_size=8)[1], torch.arange(3)[:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "expected k of at most 5, the rows of the bank, got 6"),
        ({"k": 0}, "expected k as a whole number >= 1"),
        ({"chunk_size": 0}, "expected chunk_size as a whole number >= 1"),
        ({"bank": torch.ones(0, 8)}, r"expected bank embeddings of shape \(B, D\)"),
        ({"bank": torch.ones(5, 3)}, "expected bank embeddings of width 8"),
        ({"queries": torch.ones(8)}, r"expected query embeddings of shape \(B, D\)"),
        ({"backend": "annoy"}, "expected backend to be one of"),
    ],
)
def test_bad_retrieval(change, message):
    good = {"queries": torch.ones(2, 8), "bank": torch.ones(5, 8), "k": 2}
    with pytest.raises(ValueError, match=f"^retrieve_anchors: {message}"):
        retrieve_anchors(**{**good, **change})


def test_faiss_that_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(RuntimeError, match=r"^retrieve_anchors: expected faiss, got none"):
        retrieve_anchors(torch.ones(2, 8), torch.ones(5, 8), 1, backend="faiss")
