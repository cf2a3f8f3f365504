"""Pictures hold the data they should, read back from what is drawn; orders, degenerate inputs, errors; no pyplot."""

import io
import math
import subprocess
import sys
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.text import Text
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from geomreg import Embeddings, plots
from geomreg.metrics import Distortion, DistortionBound, Procrustes, ProcrustesParts, distortion_bound, procrustes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


TEACHER, STUDENT = randn(12, 5), randn(12, 5) + 0.5 * randn(12, 5, seed=1)
PAIR = Embeddings(STUDENT, 1.1 * STUDENT), Embeddings(TEACHER, TEACHER)
PARTS = {"FLYP": procrustes(STUDENT, TEACHER), "moved": procrustes(TEACHER + 2, TEACHER), "still": procrustes(TEACHER, TEACHER)}
BOUNDS = {
    "told": DistortionBound(*map(number, (0.1, 0.25, 0.9, 0.5, 0.7, 0.02, 0.01))),
    "half": DistortionBound(*map(number, (0.3, 0.6, 0.8, -1.0, 0.2, 0.05, 0.03))),
    "nothing": DistortionBound(*map(number, (0.4, 0.9, -0.3, -1.0, -1.0, 0.2, 0.1))),
}
POINTS = {"FLYP": (100.0, 52.0), "DiVE": [(60.0, 61.0), (92.5, 60.5), (99.0, 60.0)]}
FIGURES = {
    "rdm_heatmaps": lambda: plots.rdm_heatmaps(STUDENT, TEACHER),
    "difference_pca": lambda: plots.difference_pca(*PAIR),
    "frontier": lambda: plots.frontier(POINTS, base=(37.5, 61.5)),
    "decomposition_bars": lambda: plots.decomposition_bars(PARTS),
    "bound_against_measured": lambda: plots.bound_against_measured(BOUNDS),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


def png(figure) -> bytes:
    """The picture; a warning of the layout (no room) is an error."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def luminance(colour) -> float:
    """Relative luminance (WCAG): what is left in grey."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# all of them


@every_figure
@pytest.mark.filterwarnings("error")
def test_is_a_picture_of_its_own(name):
    one, two = FIGURES[name](), FIGURES[name]()
    assert one is not two
    content = png(one)
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000
    assert content == png(two)  # nothing random


@every_figure
def test_needs_matplotlib_only_when_called(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r"^geomreg.plots: expected matplotlib, got none installed. Run pip install 'geomreg\[plots\]'\.$"
    with pytest.raises(ImportError, match=message):
        FIGURES[name]()


@pytest.mark.slow
def test_importing_needs_no_matplotlib():
    code = """
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == "matplotlib":  # torchmetrics asks
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.modules["matplotlib"] = None
import geomreg.plots
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@every_figure
def test_leaves_pyplot_and_settings_alone(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it raises
    before = dict(matplotlib.rcParams), Gcf.get_all_fig_managers(), Gcf.get_active()
    png(FIGURES[name]())
    assert (dict(matplotlib.rcParams), Gcf.get_all_fig_managers(), Gcf.get_active()) == before


@every_figure
def test_text_is_large_and_inside(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.findobj(Axes):
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    assert len(texts) > 10
    width, height = figure.bbox.size
    for text in texts:
        box = text.get_window_extent()
        assert text.get_fontsize() >= 8, text
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


# heat maps


def arrays(figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3]]


@pytest.mark.parametrize("dissimilarity", ["cosine", "correlation", "euclidean", "sqeuclidean"])
def test_heat_maps_are_the_dissimilarities_on_one_scale(dissimilarity):
    figure = plots.rdm_heatmaps(STUDENT[:, :4], TEACHER, dissimilarity=dissimilarity)  # the widths may differ
    expected = [squareform(pdist(value.numpy(), dissimilarity)) for value in (TEACHER, STUDENT[:, :4])]
    for found, value in zip(arrays(figure), (*expected, expected[1] - expected[0]), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)
    before, after, change = (axes.images[0] for axes in figure.axes[:3])
    off = ~np.eye(12, dtype=bool)
    pairs = np.concatenate([value[off] for value in expected])  # 264: without the 1 at each end
    assert before.get_clim() == after.get_clim() == pytest.approx((np.sort(pairs)[1], np.sort(pairs)[-2]), rel=1e-10)
    most = np.abs(expected[1] - expected[0]).max()  # 132: all
    assert change.get_clim() == pytest.approx((-most, most), rel=1e-10)
    assert before.cmap.name == after.cmap.name == "viridis"
    labels = {"cosine": "1 − cosine", "correlation": "1 − correlation", "euclidean": "distance, embedding units"}
    label = labels.get(dissimilarity, "squared distance, embedding units²")
    bars = [child for axes in figure.axes[1:3] for child in axes.child_axes]
    assert [bar.get_ylabel() for bar in bars] == [label, f"change of {label}"]


def test_rows_are_sorted_by_label_with_borders_and_names():
    labels = ["b", "a", "c", "a", "b", "b", "a", "c", "b", "b", "b", "a"]
    rows = [1, 3, 6, 11, 0, 4, 5, 8, 9, 10, 2, 7]
    figure = plots.rdm_heatmaps(STUDENT, TEACHER, labels=labels)
    np.testing.assert_allclose(arrays(figure)[0], squareform(pdist(TEACHER[rows].numpy(), "cosine")), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(arrays(figure)[1], squareform(pdist(STUDENT[rows].numpy(), "cosine")), rtol=1e-10, atol=1e-12)
    for axes in figure.axes[:3]:
        across = {float(line.get_ydata()[0]) for line in axes.lines if list(line.get_xdata()) == [0, 1]}
        down = {float(line.get_xdata()[0]) for line in axes.lines if list(line.get_ydata()) == [0, 1]}
        assert across == down == {3.5, 9.5}
    names = {text.get_text(): tick for text, tick in zip(figure.axes[0].get_yticklabels(), figure.axes[0].get_yticks(), strict=True)}
    assert names == {"a": 1.5, "b": 6.5, "c": 10.5}


def test_integer_labels_sort_as_numbers_and_a_stated_order_wins():
    labels = torch.tensor([10, 9, 10, 9, 2, 2, 2, 2, 2, 2, 2, 2])
    found = arrays(plots.rdm_heatmaps(STUDENT, TEACHER, labels=labels))[0]
    rows = [4, 5, 6, 7, 8, 9, 10, 11, 1, 3, 0, 2]
    np.testing.assert_allclose(found, squareform(pdist(TEACHER[rows].numpy(), "cosine")), rtol=1e-10, atol=1e-12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    figure = plots.rdm_heatmaps(STUDENT, TEACHER, labels=labels, order=order)
    np.testing.assert_allclose(arrays(figure)[0], squareform(pdist(TEACHER[order].numpy(), "cosine")), rtol=1e-10, atol=1e-12)
    changes = {k - 0.5 for k in range(1, 12) if labels[order[k]] != labels[order[k - 1]]}
    assert {float(line.get_ydata()[0]) for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]} == changes


def test_names_of_many_classes_do_not_overlap_and_lines_leave_the_data():
    samples, classes = 300, [f"class {k // 3}, with a name that is far too long" for k in range(300)]
    figure = plots.rdm_heatmaps(randn(samples, 4), randn(samples, 4, seed=1), labels=classes)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert 10 < len(boxes) < 30
    assert all(not one.overlaps(two) for one, two in combinations(boxes, 2))
    assert all(len(text.get_text()) <= 18 for text in figure.axes[0].get_yticklabels())
    panel = figure.axes[0].get_window_extent().height * 72 / figure.dpi
    assert sum(line.get_linewidth() for line in figure.axes[0].lines if line.get_color() == "white") < 2 * 0.4 * panel


def test_long_names_are_shortened_in_the_middle():
    classes = [f"a very long class name number {k:03d}" for k in range(500)]
    figure = plots.rdm_heatmaps(randn(500, 4), randn(500, 4, seed=1), labels=classes)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert "a very lo…mber 000" in names
    assert len(set(names)) == len(names) > 10
    twelve = [f"exactly 18 letters{'!' * (k == 1)}" for k in range(12)]
    names = {text.get_text() for text in plots.rdm_heatmaps(STUDENT, TEACHER, labels=twelve).axes[0].get_yticklabels()}
    assert names == {"exactly 18 letters", "exactly 1…letters!"}


def test_scale_leaves_out_half_a_per_cent_and_says_so():
    teacher = randn(60, 3)
    teacher[0] *= 100  # 118 of 7080 pairs are far: more than the 35 left out
    student = teacher.clone()
    student[1] += 1000  # 118 of 7080
    figure = plots.rdm_heatmaps(student, teacher, dissimilarity="euclidean")
    values = [squareform(pdist(value.numpy())) for value in (teacher, student)]
    off = ~np.eye(60, dtype=bool)
    pairs = np.sort(np.concatenate([value[off] for value in values]))
    change = np.sort(np.abs((values[1] - values[0])[off]))
    low, high = figure.axes[0].images[0].get_clim()
    assert (low, high) == pytest.approx((pairs[35], pairs[-36]), rel=1e-9)
    assert figure.axes[2].images[0].get_clim()[1] == pytest.approx(change[-18], rel=1e-9)
    bars = [axes.child_axes[0]._colorbar for axes in figure.axes[1:3]]
    assert [bar.extend for bar in bars] == ["both", "max"]
    one = plots.rdm_heatmaps(2 * TEACHER[:3] + 1, TEACHER[:3])
    assert [axes.child_axes[0]._colorbar.extend for axes in one.axes[1:3]] == ["neither", "neither"]
    assert all(float(tick).is_integer() for axes in one.axes[:3] for tick in (*axes.get_xticks(), *axes.get_yticks()))  # no half samples


def test_embeddings_by_modality():
    for modality, value in (("image", PAIR[0].image), ("text", PAIR[0].text)):
        found = arrays(plots.rdm_heatmaps(*PAIR, modality=modality, dissimilarity="euclidean"))
        np.testing.assert_allclose(found[1], squareform(pdist(value.numpy())), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_degenerate_heat_maps():
    still = plots.rdm_heatmaps(TEACHER, TEACHER)
    assert not arrays(still)[2].any()
    assert still.axes[2].images[0].get_clim()[1] > 0
    collapsed = plots.rdm_heatmaps(torch.full((12, 5), 0.1, dtype=torch.float64), TEACHER, dissimilarity="euclidean")
    assert not arrays(collapsed)[1].any()
    scaled = plots.rdm_heatmaps(TEACHER[:1].expand(12, 5) * torch.arange(1, 13)[:, None], TEACHER)  # one direction: rounding is no distance
    assert not arrays(scaled)[1].any()
    corners = torch.eye(3)
    equal = plots.rdm_heatmaps(corners, corners)
    assert equal.axes[0].images[0].get_clim() == (0.0, 1.0)
    outlier = torch.zeros(500, 2)
    outlier[7, 0] = 1.0  # 0.4 % of the pairs: not cut off, or the scale has no length
    assert plots.rdm_heatmaps(outlier, outlier, dissimilarity="euclidean").axes[0].images[0].get_clim() == (0.0, 1.0)
    for figure in (still, collapsed, scaled, equal):
        png(figure)


def test_the_diverging_scale_keeps_the_sign_in_grey():
    scale = LinearSegmentedColormap.from_list("scale", plots.DIVERGING)
    values = [luminance(scale(k / 100)[:3]) for k in range(101)]
    assert all(one < two for one, two in pairwise(values))
    assert values[0] < 0.05
    assert values[-1] > 0.85


# difference vectors


def scattered(axes) -> list[np.ndarray]:
    return [np.asarray(collection.get_offsets()) for collection in axes.collections]


def marks(axes) -> dict[str, tuple[float, float]]:
    return {line.get_label(): (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1}


def projection(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two right singular vectors of the matrix as it is, the mean at positive coordinates; squared singular values."""
    _, values, right = np.linalg.svd(vectors)
    axes = right[:2].T
    return axes * np.where(vectors.mean(axis=0) @ axes < 0, -1, 1), values**2


def test_difference_vectors_on_components_about_zero():
    shift = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    student = Embeddings(STUDENT + shift, TEACHER + 0.1 * randn(12, 5, seed=4))
    mean = randn(5, seed=5)
    figure = plots.difference_pca(student, PAIR[1], mean=mean)
    u, v = (student.image - TEACHER).numpy(), (student.text - TEACHER).numpy()
    axes_of, squares = projection(np.concatenate([u, v]))
    axes = figure.axes[0]
    for found, value in zip(scattered(axes), (u, v), strict=True):
        np.testing.assert_allclose(found, value @ axes_of, rtol=1e-9, atol=1e-12)
    found = marks(axes)
    assert found["batch mean"] == pytest.approx(tuple(np.concatenate([u, v]).mean(axis=0) @ axes_of), rel=1e-9)
    assert min(found["batch mean"]) >= 0
    assert found["running mean m"] == pytest.approx(tuple(mean.numpy() @ axes_of), rel=1e-9)
    shares = [f"component {k + 1} ({100 * squares[k] / squares.sum():.0f} % of the mean square)" for k in range(2)]
    assert [axes.get_xlabel(), axes.get_ylabel()] == shares
    assert axes.get_aspect() == 1
    markers = [collection.get_paths()[0].vertices.shape for collection in axes.collections]
    assert markers[0] != markers[1]  # told apart in grey
    assert len(axes.collections[1].get_facecolor()) == 0  # hollow


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_and_a_mean_before_its_first_step(modality):
    one, two = (Embeddings(**{modality: value}) for value in (STUDENT, TEACHER))
    axes = plots.difference_pca(one, two, mean=torch.zeros(())).axes[0]
    assert [points.shape for points in scattered(axes)] == [(12, 2)]
    assert marks(axes)["running mean m"] == (0.0, 0.0)


def test_classes_have_markers_of_their_own():
    labels = [f"_{k % 3}" for k in range(12)]
    figure = plots.difference_pca(*PAIR, labels=labels)
    axes_of, _ = projection(torch.cat([STUDENT - TEACHER, 1.1 * STUDENT - TEACHER]).numpy())
    groups = scattered(figure.axes[0])
    assert len(groups) == 6
    for k, group in enumerate(groups):
        shift = (STUDENT if k < 3 else 1.1 * STUDENT) - TEACHER
        np.testing.assert_allclose(group, shift[k % 3 :: 3].numpy() @ axes_of, rtol=1e-9, atol=1e-12)
    shapes = [tuple(map(tuple, collection.get_paths()[0].vertices)) for collection in figure.axes[0].collections]
    assert len(set(shapes[:3])) == 3
    assert shapes[:3] == shapes[3:]
    assert [len(collection.get_facecolor()) for collection in figure.axes[0].collections] == [1, 1, 1, 0, 0, 0]  # texts are hollow
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [" _0", " _1", " _2", "images, u", "texts, v", "batch mean"]


@pytest.mark.filterwarnings("error")
def test_degenerate_difference_vectors():
    still = plots.difference_pca(PAIR[1], PAIR[1]).axes[0]
    assert still.get_xlabel() == "component 1 (0 % of the mean square)"
    assert not any(points.any() for points in scattered(still))
    narrow = plots.difference_pca(Embeddings(STUDENT[:, :1]), Embeddings(TEACHER[:, :1])).axes[0]
    np.testing.assert_allclose(np.abs(scattered(narrow)[0][:, 0]), (STUDENT - TEACHER)[:, 0].abs().numpy(), rtol=1e-12)
    assert narrow.get_ylabel() == "component 2 (0 % of the mean square)"
    tiny = plots.difference_pca(Embeddings(1e-200 * STUDENT), Embeddings(1e-200 * TEACHER)).axes[0]  # squares vanish
    assert tiny.get_xlabel() == plots.difference_pca(Embeddings(STUDENT), Embeddings(TEACHER)).axes[0].get_xlabel()


# frontier


def test_frontier_holds_points_sweeps_and_base():
    axes = plots.frontier(POINTS, base=(37.5, 61.5)).axes[0]
    lines = [list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)) for line in axes.lines]
    assert lines[:2] == [[(37.5, 0.0), (37.5, 1.0)], [(0.0, 61.5), (1.0, 61.5)]]  # across the whole axes
    assert lines[2:] == [[(37.5, 61.5)], [POINTS["FLYP"]], [POINTS["FLYP"]], POINTS["DiVE"], [POINTS["DiVE"][-1]]]
    assert axes.lines[5].get_linestyle() != "None"
    assert {text.get_text(): text.xy for text in axes.texts} == {
        "base model": (37.5, 61.5),
        "FLYP": (100.0, 52.0),
        "DiVE": (99.0, 60.0),
    }
    assert axes.lines[4].get_marker() != axes.lines[6].get_marker()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ID accuracy, %", "zero-shot accuracy, %")
    assert not axes.get_legend()


@pytest.mark.parametrize(
    "value", [(80, 60), [80.0, 60.0], torch.tensor([80.0, 60.0]), np.array([[80.0, 60.0]]), [(number(80), number(60))]]
)
def test_frontier_takes_numbers_in_many_clothes(value):
    axes = plots.frontier({"one": value}).axes[0]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines] == [(80.0, 60.0)] * 2


@pytest.mark.parametrize("spread", [4.0, 0.7])
def test_twelve_names_cover_neither_each_other_nor_markers(spread):
    places = randn(12, 2, seed=1)
    points = {
        f"method {k} with a long name"[: 9 + 2 * k]: (80 + spread * float(x), 60 + spread * float(y)) for k, (x, y) in enumerate(places)
    }
    figure = plots.frontier(points, base=(70, 70))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    frame = axes.get_window_extent()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 13
    assert len({(line.get_marker(), line.get_color()) for line in axes.lines[3::2]}) == 12
    assert all(not one.overlaps(two) for one, two in combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    for x, y in axes.transData.transform([(70, 70), *points.values()]):
        assert not any(box.contains(x, y) for box in boxes)


def test_seventy_two_methods_differ_in_marker_or_colour():
    """The first twelve in their markers; then each marker comes again in another colour."""
    points = {f"{k}": (50 + k % 9, 50 + k // 9) for k in range(72)}
    styles = [(line.get_marker(), line.get_color()) for line in plots.frontier(points).axes[0].lines[::2]]
    assert len(styles) == len(set(styles)) == 72
    assert len({marker for marker, _ in styles[:12]}) == 12
    assert [marker for marker, _ in styles[:12]] == [marker for marker, _ in styles[12:24]]


def test_a_name_is_no_formula():
    for name in ("a$b$c", "$\\frac$", "x_1^2"):
        figure = plots.frontier({name: (80.0, 60.0)})
        png(figure)
        assert figure.axes[0].texts[0].get_text().replace("\\$", "$") == name
        png(plots.decomposition_bars({name: PARTS["FLYP"]}))


# decomposition


def test_bars_are_the_shares():
    figure = plots.decomposition_bars(PARTS, unit="cosines²")
    axes = figure.axes[0]
    order = ("translation", "rotation", "scale", "residual")
    assert [container.get_label() for container in axes.containers] == list(order)
    left = np.zeros(3)
    for container, part in zip(axes.containers, order, strict=True):
        expected = [100 * float(getattr(value, part)) / (float(value.total) or 1) for value in PARTS.values()]
        np.testing.assert_allclose([bar.get_width() for bar in container], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose([bar.get_x() for bar in container], left, rtol=1e-12, atol=1e-12)
        left += expected
    np.testing.assert_allclose(left, [100, 100, 0], rtol=1e-12)
    texts = [text.get_text() for text in axes.texts]
    assert {f"{float(value.total):.3g}" for value in PARTS.values()} <= set(texts)
    assert "total, cosines²" in texts
    assert texts.count("no change") == 1
    assert [text.get_text() for text in axes.get_yticklabels()] == ["FLYP", "moved", "still"]
    assert axes.yaxis_inverted()  # the first is on top
    styles = [(luminance(container.patches[0].get_facecolor()[:3]), container.patches[0].get_hatch()) for container in axes.containers]
    assert len({hatch or round(grey, 1) for grey, hatch in styles}) == 4  # told apart in grey


def test_the_numbers_in_the_bars():
    parts = ProcrustesParts(*map(number, (200.0, 100.0, 60.0, 10.0, 30.0, 1.1)))
    texts = [text.get_text() for text in plots.decomposition_bars({"one": parts}).axes[0].texts]
    assert texts == ["50", "30", "15", "200", "total, squared embedding units"]  # 5 % has no room


# bounds


def markers(axes, label: str) -> list[tuple[float, float]]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))


def test_bounds_of_rsa_with_their_slack():
    axes = plots.bound_against_measured(BOUNDS).axes[0]
    assert markers(axes, "lower bound") == [(0.5, -0.16)]
    assert markers(axes, "lower bound after alignment") == [(0.7, 0.16), (0.2, 1.16)]
    nothing = markers(axes, "vacuous bound")
    assert [y for _, y in nothing] == [0.84, 1.84, 2.16]
    left = nothing[0][0]
    assert all(x == left for x, _ in nothing)
    assert left < -0.3  # beside every value, so that no cross reads as a bound
    ends = {tuple(map(float, line.get_xdata())): line.get_linestyle() for line in axes.lines if line.get_color() == "0.45"}
    assert ends == {(0.5, 0.9): "-", (left, 0.8): ":", (left, -0.3): ":", (0.7, 0.9): "-", (0.2, 0.8): "-"}
    bars = [list(map(float, line.get_xdata())) for line in axes.lines if line.get_color() == plots.BLUE and len(line.get_xdata())]
    assert bars == [[0.9, 0.9], [0.8, 0.8], [-0.3, -0.3]]
    assert [text.get_text() for text in axes.texts] == ["slack 0.4", "vacuous", "vacuous", "slack 0.2", "slack 0.6", "vacuous"]
    assert axes.get_xlim()[0] < left
    assert axes.get_xlim()[1] > 1


def test_bounds_of_distances():
    axes = plots.bound_against_measured(BOUNDS, quantity="distance", unit="1 − cosine").axes[0]
    assert markers(axes, "upper bound") == [(0.25, 0.0), (0.6, 1.0), (0.9, 2.0)]
    assert [text.get_text() for text in axes.texts] == ["slack 0.15", "slack 0.3", "slack 0.5"]
    assert axes.get_xlabel() == "root-mean-square change of a distance, 1 − cosine"
    assert axes.get_xlim()[0] < 0


def test_slack_of_a_bound_that_does_not_hold_is_negative_and_rounding_is_none():
    broken = BOUNDS["told"]._replace(rsa=number(0.45), rsa_bound=number(0.5), aligned_rsa_bound=number(0.45 + 1e-13))
    texts = [text.get_text() for text in plots.bound_against_measured({"one": broken}).axes[0].texts]
    assert texts == ["slack -0.05", "slack 0"]


@pytest.mark.filterwarnings("error")
def test_bounds_of_a_model_that_did_not_change():
    for quantity in ("rsa", "distance"):
        png(plots.bound_against_measured({"same": distortion_bound(TEACHER, TEACHER)}, quantity=quantity))


# errors

NAN = STUDENT.clone()
NAN[1, 2] = math.nan
REFUSED = {  # the function is the first word of each key
    "rdm_heatmaps: two samples": (lambda: plots.rdm_heatmaps(STUDENT[:2], TEACHER[:2]), ValueError, "at least 3 samples, got 2"),
    "rdm_heatmaps: rows": (lambda: plots.rdm_heatmaps(STUDENT[:5], TEACHER), ValueError, r"got \(5, 5\) and \(12, 5\)"),
    "rdm_heatmaps: nan": (lambda: plots.rdm_heatmaps(NAN, TEACHER), ValueError, "finite student embeddings, got NaN"),
    "rdm_heatmaps: nan teacher": (lambda: plots.rdm_heatmaps(TEACHER, NAN), ValueError, "finite teacher embeddings, got NaN"),
    "rdm_heatmaps: many": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, max_samples=11), ValueError, "at most max_samples=11 rows, got 12"),
    "rdm_heatmaps: limit": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, max_samples=2), ValueError, "max_samples as a whole number >= 3"),
    "rdm_heatmaps: collapsed": (lambda: plots.rdm_heatmaps(STUDENT, torch.ones(12, 5)), ValueError, "teacher embeddings that differ"),
    "rdm_heatmaps: zero": (lambda: plots.rdm_heatmaps(0 * STUDENT, TEACHER), ValueError, "vectors with a direction"),
    "rdm_heatmaps: measure": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, dissimilarity="l1"), ValueError, "dissimilarity to be one of"),
    "rdm_heatmaps: modality": (lambda: plots.rdm_heatmaps(*PAIR, modality="stacked"), ValueError, "modality to be one of"),
    "rdm_heatmaps: no modality": (lambda: plots.rdm_heatmaps(*PAIR), TypeError, "tensors without modality, got Embeddings"),
    "rdm_heatmaps: list": (lambda: plots.rdm_heatmaps(STUDENT.tolist(), TEACHER), TypeError, "student embeddings as a tensor"),
    "rdm_heatmaps: short labels": (
        lambda: plots.rdm_heatmaps(STUDENT, TEACHER, labels=[1, 2]),
        ValueError,
        "12 whole numbers or 12 strings, got 2",
    ),
    "rdm_heatmaps: a string": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, labels="abcabcabcabc"), ValueError, "labels as 12 .* got str"),
    "rdm_heatmaps: fractions": (
        lambda: plots.rdm_heatmaps(STUDENT, TEACHER, labels=STUDENT[:, 0]),
        ValueError,
        "labels as 12 .* got float64 tensor",
    ),
    "rdm_heatmaps: mixed": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, labels=["a", *range(11)]), ValueError, "labels as 12 .* got list"),
    "rdm_heatmaps: truths": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, labels=[True] * 12), ValueError, "labels as 12 .* got list"),
    "rdm_heatmaps: order twice": (lambda: plots.rdm_heatmaps(STUDENT, TEACHER, order=[0] * 12), ValueError, "order as the numbers 0 to 11"),
    "rdm_heatmaps: order of floats": (
        lambda: plots.rdm_heatmaps(STUDENT, TEACHER, order=torch.arange(12.0)),
        ValueError,
        "order as the numbers 0",
    ),
    "difference_pca: pca of tensors": (lambda: plots.difference_pca(STUDENT, TEACHER), TypeError, "student as geomreg.Embeddings"),
    "difference_pca: pca of two": (
        lambda: plots.difference_pca(*(Embeddings(e.image[:2]) for e in PAIR)),
        ValueError,
        "at least 3 samples, got 2",
    ),
    "difference_pca: pca nan": (
        lambda: plots.difference_pca(Embeddings(NAN), Embeddings(TEACHER)),
        ValueError,
        "finite image student embeddings",
    ),
    "difference_pca: pca shapes": (
        lambda: plots.difference_pca(Embeddings(STUDENT[:5]), Embeddings(TEACHER)),
        ValueError,
        "of one shape, got",
    ),
    "difference_pca: pca one side": (
        lambda: plots.difference_pca(PAIR[0], Embeddings(TEACHER)),
        ValueError,
        "text embeddings from both models",
    ),
    "difference_pca: mean's width": (lambda: plots.difference_pca(*PAIR, mean=torch.ones(4)), ValueError, r"mean of shape \(5,\)"),
    "difference_pca: mean nan": (lambda: plots.difference_pca(*PAIR, mean=NAN[1]), ValueError, "finite mean, got NaN"),
    "difference_pca: many classes": (
        lambda: plots.difference_pca(*(Embeddings(torch.cat([e.image] * 2)) for e in PAIR), labels=[*range(13), *range(11)]),
        ValueError,
        "at most 12 classes, .* got 13",
    ),
    "frontier: no point": (lambda: plots.frontier({}), ValueError, "at least one named value in points, got an empty mapping"),
    "frontier: no names": (lambda: plots.frontier([(1, 2)]), TypeError, "points as a mapping of names to values, got list"),
    "frontier: number as name": (lambda: plots.frontier({1: (1, 2)}), TypeError, "points as a mapping of names to values, got dict"),
    "frontier: one number": (
        lambda: plots.frontier({"a": 5.0}),
        ValueError,
        r"\(ID, zero-shot\) accuracies or a list of such for 'a', got 5.0",
    ),
    "frontier: three numbers": (
        lambda: plots.frontier({"a": (1, 2, 3)}),
        ValueError,
        r"accuracies or a list of such for 'a', got \(1, 2, 3\)",
    ),
    "frontier: empty sweep": (lambda: plots.frontier({"a": []}), ValueError, r"accuracies or a list of such for 'a', got \[\]"),
    "frontier: point nan": (lambda: plots.frontier({"a": (math.nan, 5.0)}), ValueError, "in per cent, 0 to 100, for 'a', got nan"),
    "frontier: above 100": (lambda: plots.frontier({"a": [(1, 2), (101, 5.0)]}), ValueError, "in per cent, 0 to 100, for 'a', got 101"),
    "frontier: a word": (lambda: plots.frontier({"a": ("1", "2")}), ValueError, "in per cent, 0 to 100, for 'a', got '1'"),
    "frontier: base nan": (lambda: plots.frontier({"a": (1, 2)}, base=(1, math.nan)), ValueError, "for 'base', got nan"),
    "decomposition_bars: no parts": (lambda: plots.decomposition_bars({}), ValueError, "at least one named value in parts"),
    "decomposition_bars: other parts": (lambda: plots.decomposition_bars({"a": (1, 2)}), TypeError, "a ProcrustesParts for 'a', got tuple"),
    "decomposition_bars: parts nan": (
        lambda: plots.decomposition_bars({"a": PARTS["FLYP"]._replace(scale=number(math.nan))}),
        ValueError,
        "finite numbers for 'a', got NaN",
    ),
    "bound_against_measured: no bounds": (lambda: plots.bound_against_measured({}), ValueError, "at least one named value in bounds"),
    "bound_against_measured: other bounds": (
        lambda: plots.bound_against_measured({"a": PARTS["FLYP"]}),
        TypeError,
        "a DistortionBound for 'a'",
    ),
    "bound_against_measured: bounds inf": (
        lambda: plots.bound_against_measured({"a": BOUNDS["told"]._replace(rsa=number(math.inf))}),
        ValueError,
        "finite numbers for 'a'",
    ),
    "bound_against_measured: quantity": (lambda: plots.bound_against_measured(BOUNDS, quantity="cka"), ValueError, "quantity to be one of"),
}


@pytest.mark.parametrize(("name", "call", "error", "message"), [(key.split(":")[0], *value) for key, value in REFUSED.items()], ids=REFUSED)
def test_refuses(name, call, error, message):
    with pytest.raises(error, match=rf"^{name}: expected .*{message}.*\.$"):
        call()


def test_results_of_metric_classes():
    """Dictionaries of the classes as the named tuples of the functions."""
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for kind, function, draw in (
        (Procrustes, procrustes, plots.decomposition_bars),
        (Distortion, distortion_bound, plots.bound_against_measured),
    ):
        metric = kind()
        metric.update(Embeddings(image=points.square()), Embeddings(image=points))
        drawn = [draw({"run": result}) for result in (metric.compute(), function(points.square(), points))]
        texts = [[text.get_text() for text in figure.axes[0].texts] for figure in drawn]
        assert texts[0] == texts[1]
