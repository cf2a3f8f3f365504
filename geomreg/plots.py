"""Pictures of what fine-tuning did to an embedding space; needs matplotlib: ``pip install 'geomreg[plots]'``.

Every function returns a ``matplotlib.figure.Figure`` of its own and leaves pyplot alone: ``figure.savefig("picture.png")``. Colours are
those of Okabe and Ito, which colour-blind people can tell apart; in grey, markers and hatches do. Heat maps get lighter from low to high.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geomreg.checks import (
    check_all_finite,
    check_classes,
    check_collapse,
    check_count,
    check_embeddings,
    check_finite,
    check_max_samples,
    check_mean,
    check_named,
    check_option,
    check_order,
    check_points,
    check_rows,
    check_samples,
    check_size,
    check_tensors_or_embeddings,
    check_width,
)
from geomreg.metrics.distortion import DistortionBound
from geomreg.metrics.procrustes import PARTS, ProcrustesParts
from geomreg.metrics.results import Results
from geomreg.metrics.rsa_pairs import directions
from geomreg.metrics.tiles import squared_distances
from geomreg.types import Embeddings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bound_against_measured", "decomposition_bars", "difference_pca", "frontier", "rdm_heatmaps"]

BLUE, VERMILLION, SKY, YELLOW = "#0072B2", "#D55E00", "#56B4E9", "#F0E442"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", SKY, "#E69F00")
MARKERS = "os^DvPX<>hpd"
LINES = ("-", (0, (5, 2)), "-.", ":")
DIVERGING = ("#002244", "#1F5A94", "#8F8F8F", "#E8B23A", "#FFF6C8")  # lighter all the way: grey keeps the sign
SEGMENTS = {"translation": (BLUE, ""), "rotation": (SKY, "///"), "scale": (YELLOW, "..."), "residual": ("#E6E6E6", "")}
PANEL = 200  # points: about the height of a heat map


def rdm_heatmaps(
    student: Tensor | Embeddings,
    teacher: Tensor | Embeddings,
    *,
    labels: Sequence[int] | Sequence[str] | Tensor | None = None,
    order: Sequence[int] | Tensor | None = None,
    dissimilarity: str = "cosine",
    modality: str | None = None,
    max_samples: int = 2000,
) -> "Figure":
    """Dissimilarity matrices before (teacher) and after (student) fine-tuning on one colour scale, and their difference.

    A scale leaves out at most 0.5 % of the pairs at each end, where pointed ends of its bar say so; the diagonal, 0 by definition, has the
    lowest colour. In the difference, after less before, light is farther apart than before and dark nearer.

    Args:
        student: ``(N, D)`` embeddings, as they come; or :class:`~geomreg.Embeddings`, of which ``modality`` says what is shown.
        teacher: ``(N, E)`` embeddings of the same samples in the same order; the widths may differ.
        labels: N classes. Rows are sorted by them (those of one class stay in their order), with lines between classes and the names of
            as many as there is room for.
        order: N row numbers: the order of the rows. With ``labels`` too, the lines are where the class changes.
        dissimilarity: ``"cosine"`` (1 - cosine), ``"correlation"``, ``"euclidean"`` or ``"sqeuclidean"``, as in ``geomreg.metrics.rsa``.
        modality: None for tensors; ``"image"`` or ``"text"`` for Embeddings.
        max_samples: more rows than this raise: a picture has no pixels for more, and memory grows with their square.

    Raises:
        ImportError: no matplotlib.
        TypeError: not floating-point tensors or Embeddings of them.
        ValueError: fewer than 3 samples or more than ``max_samples``, different numbers of samples, NaN or infinity, a vector without
            direction (``"cosine"``, ``"correlation"``), teacher embeddings that do not differ, labels or an order of another length.

    Example:
        >>> import torch
        >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
        >>> figure = rdm_heatmaps(points + 0.1, points, labels=["a", "b", "a", "b"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['before', 'after', 'after − before']
    """
    name = "rdm_heatmaps"
    check_option(name, "dissimilarity", dissimilarity, ("cosine", "correlation", "euclidean", "sqeuclidean"))
    check_option(name, "modality", modality, (None, "image", "text"))
    check_count(name, "max_samples", max_samples, 3)
    one, two = (check_tensors_or_embeddings(name, value, modality) for value in (student, teacher))
    check_samples(name, one, two, minimum=3)
    check_max_samples(name, len(one), max_samples)
    classes = None if labels is None else check_classes(name, labels, len(one))
    rows = list(range(len(one)))
    if order is not None:
        rows = check_order(name, order, len(one))
    elif classes is not None:
        rows.sort(key=classes.__getitem__)
    before, after = (
        _dissimilarities(name, label, value, dissimilarity)[rows][:, rows] for label, value in (("teacher", two), ("student", one))
    )
    check_collapse(name, "teacher", not bool(before.any()))
    change = after - before

    figure = _figure(11, 3.4)
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    off = ~torch.eye(len(before), dtype=torch.bool)
    pairs = torch.stack([before[off], after[off]])
    low, high = _range(pairs)
    most = _range(change[off].abs())[1] or high  # nothing changed: all grey
    diverging = LinearSegmentedColormap.from_list("geomreg_diverging", DIVERGING)
    panels = figure.subplots(1, 3)
    for axes, values, title in zip(panels, (before, after, change), ("before", "after", "after − before"), strict=True):
        colours, least, largest = (diverging, -most, most) if values is change else ("viridis", low, high)
        image = axes.imshow(values.numpy(), cmap=colours, vmin=least, vmax=largest)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("sample" if classes is None else "sample, by class", fontsize=9)
        axes.tick_params(labelsize=8, labelleft=values is before)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        if classes is not None:
            _mark_blocks(axes, [classes[row] for row in rows], named=values is before)
        if values is not before:
            extend = _pointed(change[off] if values is change else pairs, least, largest)
            bar = figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.05, 1)), extend=extend)
            bar.set_label(f"change of {_measure(dissimilarity)}" if values is change else _measure(dissimilarity), fontsize=9)
            bar.ax.tick_params(labelsize=8)
    return figure


def difference_pca(
    student: Embeddings,
    teacher: Embeddings,
    *,
    mean: Tensor | None = None,
    labels: Sequence[int] | Sequence[str] | Tensor | None = None,
) -> "Figure":
    """Difference vectors u (images) and v (texts), student less teacher, on their first two principal components about 0.

    About 0 and not about their mean, because the common shift is what DiVE allows: it is the distance of the means from the origin.
    The share of a component is that of the mean squared norm of all difference vectors, which is 0 where nothing moved. The mean of the
    vectors lies at coordinates >= 0.

    Args:
        student: :class:`~geomreg.Embeddings` of ``(N, D)``, as they come (unit ones, if ``mean`` is that of such); one of them may be None.
        teacher: the same of the frozen model.
        mean: ``(D,)`` running mean m, ``DiVE().mean``; 0-d before its first step.
        labels: N classes, at most 12, for images and texts alike: a marker and colour each, texts hollow.

    Raises:
        ImportError: no matplotlib.
        TypeError: not Embeddings.
        ValueError: fewer than 3 samples, different shapes, NaN or infinity, a teacher or mean that requires grad, a mean of another width,
            more than 12 classes.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings
        >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> figure = difference_pca(Embeddings(points * torch.tensor([3.0, 1.0])), Embeddings(points))
        >>> figure.axes[0].get_xlabel()
        'component 1 (100 % of the mean square)'
    """
    name = "difference_pca"
    teacher = check_embeddings(name, student, teacher)
    width, shifts = check_width(name, student), {}
    for modality, one, other in zip(Embeddings._fields, student, teacher, strict=True):
        if one is None or other is None:
            continue
        check_rows(name, one, 3)
        for label, value in (("student", one), ("teacher", other)):
            check_finite(name, f"{modality} {label} embeddings", value)
            check_size(name, label, value, small=True)  # differences are scaled before they are squared
        shifts[modality] = one.detach().double().cpu() - other.detach().double().cpu()
    if mean is not None:
        check_mean(name, mean, width)
        check_finite(name, "mean", mean)
    classes = {
        modality: None if labels is None else check_classes(name, labels, len(shift), len(MARKERS)) for modality, shift in shifts.items()
    }
    stacked = torch.cat(list(shifts.values()))
    centre = stacked.mean(dim=0)
    axes_of, shares = _components(stacked, centre)

    figure = _figure(6.4, 5.6)
    axes = figure.subplots()
    axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.75", linewidth=0.8, zorder=0)
    size = min(36.0, max(12.0, 6000 / len(stacked)))
    for modality, shift in shifts.items():
        _scatter_shifts(axes, shift @ axes_of, modality, classes[modality], size)
    if labels is not None:
        for k, found in enumerate(sorted({found for known in classes.values() for found in known or ()})):
            entry = " " + _plain(_short(str(found)))  # without the space "_x" is none
            axes.plot([], [], MARKERS[k], color=COLOURS[k % len(COLOURS)], markersize=6, label=entry)
    for modality in shifts:
        symbol = "u" if modality == "image" else "v"
        marker, colour, face = _style(modality) if labels is None else ("o", "0.4", "none" if modality == "text" else "0.4")
        axes.plot([], [], marker, color=colour, markerfacecolor=face, markersize=6, label=f"{modality}s, {symbol}")
    points = {"batch mean": (centre, "P", YELLOW)}
    if mean is not None:
        points["running mean m"] = (mean.double().cpu().expand(width), "*", "white")
    for label, (point, marker, colour) in points.items():
        x, y = (point @ axes_of).tolist()
        axes.plot([x], [y], marker, color=colour, markersize=13, markeredgecolor="black", markeredgewidth=1.2, zorder=4, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    for set_label, k in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
        set_label(f"component {k + 1} ({100 * shares[k]:.0f} % of the mean square)", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.set_title("difference vectors, in embedding units", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def frontier(
    points: Mapping[str, Any],
    *,
    base: tuple[float, float] | None = None,
    xlabel: str = "ID accuracy, %",
    ylabel: str = "zero-shot accuracy, %",
) -> "Figure":
    """What is learned against what is forgotten: accuracy on the target (ID) against zero-shot accuracy, one marker a method.

    Args:
        points: name of a method to its (ID, zero-shot) accuracies in per cent, or to a sequence of such: a sweep of weights or of mixtures
            with the base model, joined by a line in the order given, with the name at its last point.
        base: those of the base model, drawn as a star with a line at each level.
        xlabel: of the axis.
        ylabel: of the axis.

    Raises:
        ImportError: no matplotlib.
        TypeError: points is no mapping.
        ValueError: no point, not pairs of numbers from 0 to 100, NaN.

    Example:
        >>> figure = frontier({"FLYP": (100.0, 52.0), "DiVE": [(92.7, 60.7), (99.1, 60.5)]}, base=(37.7, 61.3))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['base model', 'FLYP', 'DiVE']
    """
    name = "frontier"
    check_named(name, "points", points, object)
    sweeps = {label: check_points(name, label, value) for label, value in points.items()}
    start = None if base is None else check_points(name, "base", base)[0]

    figure = _figure(7, 5)
    axes = figure.subplots()
    if start is not None:
        axes.axvline(start[0], color="0.55", linewidth=0.8, linestyle="--", zorder=0)
        axes.axhline(start[1], color="0.55", linewidth=0.8, linestyle="--", zorder=0)
        axes.plot(*start, color="black", marker="*", markersize=14, linestyle="", zorder=3)
    for k, sweep in enumerate(sweeps.values()):
        turn = k // len(MARKERS)  # of the markers: each has another colour in the next
        style: dict[str, Any] = {"color": COLOURS[(k + turn) % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        line = LINES[k % len(LINES)] if len(sweep) > 1 else ""
        axes.plot(*_columns(sweep), **style, markersize=4, linewidth=1.4, linestyle=line, zorder=2)
        axes.plot(*sweep[-1], **style, markersize=9, markeredgecolor="black", markeredgewidth=0.8, linestyle="", zorder=3)
    axes.margins(0.12)
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.tick_params(labelsize=9)
    _label_ends(figure, axes, [*([] if start is None else [("base model", [start])]), *sweeps.items()], start)
    return figure


def decomposition_bars(parts: Mapping[str, ProcrustesParts], *, unit: str = "squared embedding units") -> "Figure":
    """What fine-tuning did to the space, one stacked bar a method: shares of the mean squared change, and the total beside it.

    Args:
        parts: name to what :func:`geomreg.metrics.procrustes` or the metric returned.
        unit: of the totals.

    Raises:
        ImportError: no matplotlib.
        TypeError: no mapping of names to ProcrustesParts.
        ValueError: an empty mapping, NaN or infinity.

    Example:
        >>> import torch
        >>> from geomreg.metrics import procrustes
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, -3.0]])
        >>> figure = decomposition_bars({"twice, and moved": procrustes(2 * points + 5, points)})
        >>> [text.get_text() for text in figure.axes[0].texts]  # of translation and scale; the total
        ['91', '9', '55', 'total, squared embedding units']
    """
    name, parts = "decomposition_bars", _as_tuples(parts)
    check_named(name, "parts", parts, ProcrustesParts)
    for label, value in parts.items():
        check_all_finite(name, label, value)

    figure, axes = _rows_figure(list(parts))
    left = [0.0] * len(parts)
    for part in PARTS:
        colour, hatch = SEGMENTS[part]
        widths = [100 * float(value.shares[part]) for value in parts.values()]
        axes.barh(range(len(parts)), widths, 0.62, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8, label=part)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 7:  # room for the number
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
                axes.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=8, bbox=box)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, value in enumerate(parts.values()):
        axes.text(1.02, row, f"{float(value.total):.3g}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if value.total == 0:
            axes.text(1, row, "no change", va="center", fontsize=9, color="0.35")
    axes.text(1.02, 1.01, f"total, {unit}", transform=axes.transAxes, va="bottom", ha="left", fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the mean squared change, %", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False, handlelength=2.5, handleheight=1.2)
    return figure


def bound_against_measured(bounds: Mapping[str, DistortionBound], *, quantity: str = "rsa", unit: str = "embedding units") -> "Figure":
    """Measured distortion against what the difference vectors prove about it; the line between them is the slack.

    Args:
        bounds: name to what :func:`geomreg.metrics.distortion_bound` or the metric returned.
        quantity: ``"rsa"``, with its two lower bounds, or ``"distance"``: the root-mean-square change of a distance, with its upper bound.
        unit: of ``"distance"``; ``"1 − cosine"`` for bounds of that dissimilarity.

    Raises:
        ImportError: no matplotlib.
        TypeError: no mapping of names to DistortionBound.
        ValueError: an empty mapping, NaN or infinity, another quantity.

    A bound of -1 says nothing: a cross at the left end and a dotted line mark it as vacuous.

    Example:
        >>> import torch
        >>> from geomreg.metrics import distortion_bound
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, -3.0]])
        >>> figure = bound_against_measured({"moved": distortion_bound(points + 5, points)})
        >>> figure.axes[0].get_xlabel()
        'RSA against the base model'
    """
    name, bounds = "bound_against_measured", _as_tuples(bounds)
    check_named(name, "bounds", bounds, DistortionBound)
    check_option(name, "quantity", quantity, ("rsa", "distance"))
    for label, value in bounds.items():
        check_all_finite(name, label, value)
    kinds = {  # field, height in its row, marker, colour
        "rsa": {"lower bound": ("rsa_bound", -0.16, ">", VERMILLION), "lower bound after alignment": ("aligned_rsa_bound", 0.16, "s", SKY)},
        "distance": {"upper bound": ("distance_bound", 0.0, "<", VERMILLION)},
    }[quantity]
    measured = [float(value.rsa if quantity == "rsa" else value.distance_change) for value in bounds.values()]
    proved = {label: [float(getattr(value, field)) for value in bounds.values()] for label, (field, *_) in kinds.items()}

    def vacuous(bound: float) -> bool:
        return quantity == "rsa" and bound == -1

    told = [*measured, *(bound for column in proved.values() for bound in column if not vacuous(bound))]
    low, high = min(0.0, *told), 1.0 if quantity == "rsa" else max(told) or 1.0
    nowhere = low - 0.1 * (high - low)  # where vacuous ones are drawn: beside all values
    nothing: list[tuple[float, float]] = []

    figure, axes = _rows_figure(list(bounds), height=0.24 * len(kinds) + 0.2)
    for label, (_, height, marker, colour) in kinds.items():
        ends: list[tuple[float, float]] = []
        for row, (bound, found) in enumerate(zip(proved[label], measured, strict=True)):
            at, style = (nowhere, ":") if vacuous(bound) else (bound, "-")
            (nothing if vacuous(bound) else ends).append((at, row + height))
            axes.plot([at, found], [row + height] * 2, color="0.45", linewidth=1.8, linestyle=style, zorder=1)
            slack = found - bound if quantity == "rsa" else bound - found
            slack = 0.0 if abs(slack) < 1e-9 * abs(bound) else slack  # rounding
            text = "vacuous" if vacuous(bound) else f"slack {slack:.3g}"
            axes.text(1.02, row + height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.plot(*_columns(ends), marker, color=colour, markersize=8, markeredgecolor="black", zorder=3, label=label)
    if nothing:
        axes.plot(*_columns(nothing), "x", color="black", markersize=7, markeredgewidth=1.5, zorder=3, label="vacuous bound")
    heights = [height for _, height, *_ in kinds.values()]
    for row, found in enumerate(measured):  # one bar across the lines of its bounds
        axes.plot([found] * 2, [row + min(heights) - 0.12, row + max(heights) + 0.12], color=BLUE, linewidth=4, zorder=2)
    axes.plot([], [], color=BLUE, linewidth=4, label="measured")
    pad = 0.04 * (high - low)
    axes.set_xlim((nowhere if nothing else low) - pad, high + pad)
    axes.set_xlabel("RSA against the base model" if quantity == "rsa" else f"root-mean-square change of a distance, {unit}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("geomreg.plots: expected matplotlib, got none installed. Run pip install 'geomreg[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows_figure(names: list[str], height: float = 0.5) -> "tuple[Figure, Axes]":
    """A figure with one row for each name, the first at the top."""
    figure = _figure(8, 1.5 + height * len(names))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [textwrap.fill(_plain(name), 26) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _as_tuples(values: Any) -> Any:
    """Results of metric classes as those of the functions; what is no mapping is refused later."""
    if not isinstance(values, Mapping):
        return values
    return {name: value.as_parts() if isinstance(value, Results) else value for name, value in values.items()}


def _plain(name: str) -> str:
    """As it is: no mathematics between dollars."""
    return name.replace("$", r"\$")


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _dissimilarities(name: str, label: str, embeddings: Tensor, dissimilarity: str) -> Tensor:
    """``(N, N)``, fp64, on the CPU; 0 where rows differ by rounding alone."""
    check_size(name, label, embeddings)
    rows = directions(name, embeddings, dissimilarity).cpu()
    norms = rows.square().sum(dim=1)
    rows = rows - rows.mean(dim=0)
    squares = squared_distances(rows, rows, own=torch.arange(len(rows)))
    squares = torch.where(squares > 1e-28 * (norms[:, None] + norms), squares, 0.0)
    if dissimilarity == "euclidean":
        return squares.sqrt()
    return squares if dissimilarity == "sqeuclidean" else squares / 2


def _measure(dissimilarity: str) -> str:
    names = {"cosine": "1 − cosine", "correlation": "1 − correlation", "euclidean": "distance, embedding units"}
    return names.get(dissimilarity, "squared distance, embedding units²")


def _range(values: Tensor) -> tuple[float, float]:
    """Ends of a colour scale: without the outermost 0.5 % on either side, if more than one value is left; from 0 if all are equal."""
    ordered = values.flatten().sort().values
    cut = ordered.numel() // 200
    cut = cut if ordered[cut] < ordered[-1 - cut] else 0
    low, high = float(ordered[cut]), float(ordered[-1 - cut])
    return (low, high) if low < high else (0.0, high)


def _pointed(values: Tensor, least: float, largest: float) -> str:
    """Which ends of a colour scale leave values out."""
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    return ends[bool((values < least).any()), bool((values > largest).any())]


def _mark_blocks(axes: "Axes", classes: Sequence[int | str], *, named: bool) -> None:
    """Lines where the class changes from row to row, thinner than the blocks beside them; names at the middle of blocks, largest first."""
    starts = [0, *(row for row, (one, two) in enumerate(pairwise(classes), start=1) if one != two), len(classes)]
    row = PANEL / len(classes)  # in points
    for before, start, after in zip(starts, starts[1:], starts[2:], strict=False):
        width = min(1.4, 0.15 * row * min(start - before, after - start))
        for line in (axes.axhline, axes.axvline) if width >= 0.15 else ():  # finer ones are a haze
            line(start - 0.5, color="white", linewidth=width)
            line(start - 0.5, color="black", linewidth=width / 2)
    kept: list[tuple[float, int]] = []
    for start, stop in sorted(pairwise(starts), key=lambda block: block[0] - block[1]):
        if all(abs((start + stop - 1) / 2 - other) * row >= 9 for other, _ in kept):
            kept.append(((start + stop - 1) / 2, start))
    axes.set_xticks([])
    axes.set_yticks([middle for middle, _ in kept])
    if named:
        axes.set_yticklabels([_plain(_short(str(classes[start]))) for _, start in kept], fontsize=8)


def _short(name: str) -> str:
    """Without its middle: names of one kind differ at the end."""
    return name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}"


def _components(vectors: Tensor, centre: Tensor) -> tuple[Tensor, list[float]]:
    """``(D, 2)`` first two principal directions about 0, and their shares of the mean square."""
    size = float(vectors.abs().max()) or 1.0
    scaled = vectors / size
    squares, found = torch.linalg.eigh(scaled.T @ scaled)
    squares, found = squares.flip(0)[:2].clamp(min=0), found.flip(1)[:, :2]
    found = torch.where(centre @ found < 0, -found, found)
    if found.shape[1] < 2:  # D = 1
        squares, found = torch.cat([squares, squares.new_zeros(1)]), torch.cat([found, found.new_zeros(1, 1)], dim=1)
    total = float(scaled.square().sum())
    return found, [float(square) / total if total else 0.0 for square in squares]


def _style(modality: str) -> tuple[str, str, str]:
    """Marker, colour of its edge and of its face, where there are no classes: texts are hollow."""
    return ("^", VERMILLION, "none") if modality == "text" else ("o", BLUE, BLUE)


def _scatter_shifts(axes: "Axes", points: Tensor, modality: str, classes: Sequence[int | str] | None, size: float) -> None:
    """One modality's points, of each class by itself."""
    groups: list[tuple[Tensor, tuple[str, str, str]]] = []
    if classes is None:
        groups.append((points, _style(modality)))
    else:
        for k, one in enumerate(sorted(set(classes))):
            rows = [row for row, other in enumerate(classes) if other == one]
            colour = COLOURS[k % len(COLOURS)]
            groups.append((points[rows], (MARKERS[k], colour, "none" if modality == "text" else colour)))
    for group, (marker, edge, face) in groups:
        x, y = group.T.tolist()
        axes.scatter(x, y, s=size, marker=marker, facecolor=face, edgecolor=edge, linewidth=0.8)


_Point = tuple[float, float]


def _label_ends(figure: "Figure", axes: "Axes", sweeps: Sequence[tuple[str, Sequence[_Point]]], cross: _Point | None) -> None:
    """A name beside each last point, where it covers no marker, line or other name; a thin line leads to one that is farther away."""
    figure.draw_without_rendering()  # limits and layout stay as they are now
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    pixels = axes.transData.transform
    unit = figure.dpi / 72  # pixels of a point
    left, bottom, right, top = axes.get_window_extent().extents
    frame = torch.tensor([[left, bottom, right, top]])
    taken = []
    if cross is not None:
        x, y = pixels(cross)
        taken += [(x - unit, bottom, x + unit, top), (left, y - unit, right, y + unit)]
    boxes = torch.tensor(taken).reshape(-1, 4)
    for _, sweep in sweeps:
        corners = pixels(sweep).tolist()
        boxes = torch.cat([boxes, _around(torch.tensor(corners), (6 * unit, 6 * unit))])
        boxes = torch.cat([boxes, *(_path(one, two, unit) for one, two in pairwise(corners))])
    for label, sweep in sweeps:
        text = textwrap.fill(_plain(label), 30)
        probe = axes.text(0, 0, text, fontsize=9)
        extent = probe.get_window_extent()
        probe.remove()
        x, y = pixels(sweep[-1])
        half = (extent.width / 2 + unit, extent.height / 2 + unit)
        centre, far = _free_place((x, y), half, boxes, frame, unit)
        boxes = torch.cat([boxes, _around(torch.tensor([centre]), half), *([_path((x, y), centre, unit)] if far else [])])
        leader = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5} if far else None
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "arrowprops": leader, "zorder": 5}
        at = ((centre[0] - x) / unit, (centre[1] - y) / unit)
        axes.annotate(text, sweep[-1], at, textcoords="offset points", **style).set_in_layout(False)


def _around(centres: Tensor, half: _Point) -> Tensor:
    """``(N, 4)`` boxes: left, bottom, right, top."""
    sides = torch.tensor(half)
    return torch.cat([centres - sides, centres + sides], dim=1)


def _path(one: _Point, two: _Point, unit: float) -> Tensor:
    """Small boxes along a line, without its ends."""
    steps = max(1, int(math.dist(one, two) / (4 * unit)))
    share = torch.arange(1, steps)[:, None] / steps
    return _around(torch.tensor([one]) * (1 - share) + torch.tensor([two]) * share, (2 * unit, 2 * unit))


def _overlap(boxes: Tensor, others: Tensor) -> float:
    """Area that they share, summed over all pairs."""
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    return float((high - low).clamp(min=0).prod(dim=2).sum())


def _free_place(point: _Point, half: _Point, taken: Tensor, frame: Tensor, unit: float) -> tuple[_Point, bool]:
    """Centre of the nearest box around a point that covers least, and whether it is so far away that it needs a leader."""
    best: tuple[float, _Point, bool] | None = None
    for ring, distance in enumerate((9, 26, 42, 60, 82, 110)):
        for turn in range(16):
            across, up = math.cos(math.pi * turn / 8), math.sin(math.pi * turn / 8)
            # a box to the right begins at the point, one above is centred on it
            x = point[0] + across * distance * unit + half[0] * round(1.4 * across)
            y = point[1] + up * distance * unit + half[1] * round(1.4 * up)
            box = _around(torch.tensor([[x, y]]), half)
            cost = _overlap(box, taken) + 10 * (4 * half[0] * half[1] - _overlap(box, frame))
            if ring:  # nor may its leader run over others, from the marker's edge to the box's
                edge = (x - half[0] * round(1.4 * across), y - half[1] * round(1.4 * up))
                cost += _overlap(_path(point, edge, unit)[2:], taken)
            if best is None or cost < best[0] - 1e-3:
                best = cost, (x, y), ring > 0
        if best is not None and best[0] < 1:
            break
    assert best is not None  # for the type checker: there were candidates
    return best[1], best[2]
