"""Figures of a run, from plain arrays. Every function returns a matplotlib `Figure`; `save` writes it as a PNG.

One style: no frame but the axes that are read, labels at the lines instead of legends, colours (Okabe & Ito) that
remain apart for the colour-blind; grey is before, blue after. A title says what is to be seen.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..files import replacing

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK, FAINT = "#8C8C8C", "#222222", "#BFBFBF"
CLASSES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
}
P = ParamSpec("P")


class Curve(NamedTuple):
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None  # half-width of the 95 % interval


class RegressionTask(NamedTuple):
    support_x: np.ndarray  # (S,)
    support_y: np.ndarray  # (S,)
    true_x: np.ndarray  # (Q,) points of the function to be learned
    true_y: np.ndarray  # (Q,)
    grid: np.ndarray  # (G,)
    before: np.ndarray  # (G,) predictions
    after: np.ndarray  # (G,)
    error: tuple[float, float]  # mean squared, on the query, before and after


class PlaneTask(NamedTuple):
    support_x: np.ndarray  # (S, 2)
    support_y: np.ndarray  # (S,)
    query_x: np.ndarray  # (Q, 2)
    query_y: np.ndarray  # (Q,)
    extent: tuple[float, float, float, float]  # x low, x high, y low, y high
    before: np.ndarray  # (G, G) predicted classes; row 0 is y low
    after: np.ndarray  # (G, G)
    accuracy: tuple[float, float]  # on the query, before and after


class ImageTask(NamedTuple):
    support_x: np.ndarray  # (S, H, W) or (S, H, W, C)
    support_y: np.ndarray  # (S,)
    query_x: np.ndarray
    query_y: np.ndarray  # (Q,)
    predicted: np.ndarray  # (Q,)


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
            return draw(*args, **kwargs)

    return wrapped


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as a PNG, whole or not at all."""
    with mpl.rc_context(STYLE), replacing(path) as file:  # pyright: ignore[reportArgumentType]
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    return Path(path)


@styled
def training_curves(panels: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """One panel a metric, each with its curves by name ("training", "validation", …)."""
    colours = {"training": GREY, "validation": BLUE}
    figure, axes = _panels(len(panels), width=4.6, height=3.1)
    for axis, (metric, curves) in zip(axes, panels.items(), strict=True):
        ends = []
        for number, (name, curve) in enumerate(curves.items()):
            colour = colours.get(name, CLASSES[number % len(CLASSES)])
            x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
            if len(x) > 60:  # a noisy curve: the single values faintly, their running mean over them
                axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
                y = _running_mean(y, len(x) // 25)
            axis.plot(x, y, color=colour, marker="o" if len(x) < 15 else None, markersize=3.5)  # one is seen, too
            if len(x) == 1:  # where a band has no width
                axis.errorbar(x, y, yerr=curve.band, color=colour, capsize=3, elinewidth=1)
            _band(axis, x, y, curve.band, colour, floor=0.0 if metric == "loss" else -np.inf)
            ends.append((x[-1], y[-1], name, colour))
        axis.set_xlim(left=0)
        _metric_axis(axis, metric)
        _labels_at_ends(axis, ends)
        axis.set_xlabel("meta-iteration")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_title(metric)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


@styled
def adaptation_curves(
    curves: Mapping[str, Curve], metric: str, title: str, *, trained_steps: int | None = None
) -> Figure:
    """The metric on unseen tasks against the number of inner steps, with 95 % bands."""
    figure, (axis,) = _panels(1, width=5.6, height=3.5)
    ends = []
    for (name, curve), colour in zip(curves.items(), (BLUE, GREY, VERMILION, GREEN), strict=False):
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        axis.plot(x, y, color=colour, marker="o", markersize=4)
        _band(axis, x, y, curve.band, colour, floor=0.0 if metric == "loss" else -np.inf)
        ends.append((x[-1], y[-1], name, colour))
    if trained_steps is not None:
        axis.axvline(trained_steps, color=VERMILION, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(
            "as trained", (trained_steps, 0.03), (4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=VERMILION, fontsize=8.5,
        )  # fmt: skip
    _metric_axis(axis, metric)
    _labels_at_ends(axis, ends if len(ends) > 1 else [])
    axis.set_ylabel(f"{metric} on the query")
    axis.set_xlabel("inner steps on the support")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(wrapped(title, 45), fontweight="bold", fontsize=11.5, pad=12)
    return figure


@styled
def predictions(tasks: Sequence[RegressionTask], title: str) -> Figure:
    """Sample regression tasks: the function, the support, and the predictions before and after adaptation."""
    columns = 3
    figure, axes = _panels(len(tasks), width=3.3, height=2.7, columns=columns, sharey=True)
    for number, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        axis.plot(task.true_x, task.true_y, ".", color=FAINT, markersize=4, zorder=1)
        axis.plot(task.grid, task.before, color=GREY, linewidth=1.3, linestyle=(0, (4, 2)), zorder=2)
        axis.plot(task.grid, task.after, color=BLUE, zorder=3)
        axis.plot(
            task.support_x, task.support_y, "o", color=VERMILION, markersize=5.5, markeredgecolor="white", zorder=4
        )
        axis.set_title("squared error {:.2g} → {:.2g}".format(*task.error))
        axis.set_xlabel("x" if number + columns >= len(tasks) else "")
        axis.set_ylabel("" if number % columns else "y")
    handles = [
        Line2D([], [], color=FAINT, marker=".", linestyle="", markersize=8, label="truth"),
        Line2D([], [], color=VERMILION, marker="o", linestyle="", markersize=5.5, label="support"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=1.3, label="before"),
        Line2D([], [], color=BLUE, label="after adaptation"),
    ]
    _head(figure, title, handles)
    return figure


@styled
def metric_distribution(
    before: np.ndarray | None, after: np.ndarray, metric: str, title: str, *, of: str = "tasks"
) -> Figure:
    """How the metric spreads over many tasks (or what `of` says), after adaptation and, where given, before."""
    figure, (axis,) = _panels(1, width=5.6, height=3.3)
    named = [
        (name, np.asarray(values, float)[np.isfinite(values)], colour)
        for name, values, colour in (("before", before, GREY), ("after", after, BLUE))
        if values is not None
    ]
    both = np.concatenate([values for _, values, _ in named])
    if metric == "accuracy":
        levels = len(np.unique(np.round(both, 6)))
        bins = np.linspace(0, 1, min(max(levels, 5), 26))
    else:
        bins = np.linspace(0, np.quantile(both, 0.98), 31)
    for name, values, colour in reversed(named):
        shown = np.clip(values, bins[0], bins[-1])  # the outermost bars hold what is beyond
        looks: dict[str, Any] = (
            {"color": colour, "alpha": 0.55, "edgecolor": "white", "linewidth": 0.6}
            if name == "after"
            else {"histtype": "step", "color": colour, "linewidth": 1.3}
        )
        axis.hist(shown, bins=bins.tolist(), **looks)
        axis.axvline(values.mean(), ymax=0.8, color=colour, linewidth=1.6)
    top = axis.get_ylim()[1]
    axis.set_ylim(0, top * 1.24)
    for height, (name, values, colour) in zip((1.06, 1.16), reversed(named), strict=False):
        at = values.mean()  # the words are above the lines, and away from the axes' nearer edge
        left = (at - bins[0]) / (bins[-1] - bins[0]) < 0.6
        axis.annotate(
            f"{name}: mean {_number(at, metric)}", (at, top * height), (-2 if left else 2, 0),
            textcoords="offset points", ha="left" if left else "right", color=_dark(colour), fontsize=9,
        )  # fmt: skip
    if metric == "accuracy":
        axis.xaxis.set_major_formatter(percents())
    elif both.max() > bins[-1]:
        low = [tick for tick in axis.get_xticks() if bins[0] <= tick < 0.93 * bins[-1]]
        axis.set_xticks([*low, bins[-1]], [*(f"{tick:g}" for tick in low), f"≥ {bins[-1]:.2g}"])
    axis.grid(axis="x", visible=False)
    axis.set_ylabel(of)
    axis.set_xlabel(f"{metric} on the query")
    axis.set_title(title, fontweight="bold", fontsize=11.5, pad=12)
    return figure


@styled
def decision_regions(tasks: Sequence[PlaneTask], title: str) -> Figure:
    """2-D classification tasks, one a column: the regions before (above) and after adaptation (below)."""
    figure = Figure(figsize=(2.5 * len(tasks) + 0.3, 5.4), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col", sharey="col")
    classes = 1 + max(int(max(t.support_y.max(), t.query_y.max(), t.before.max(), t.after.max())) for t in tasks)
    colours = [CLASSES[c % len(CLASSES)] for c in range(classes)]
    for column, task in enumerate(tasks):
        for row, (name, regions) in enumerate((("before", task.before), ("after", task.after))):
            axis: Axes = axes[row, column]
            axis.imshow(
                regions, origin="lower", extent=task.extent, cmap=ListedColormap(colours), alpha=0.22,
                vmin=-0.5, vmax=classes - 0.5, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            for points, labels, size, edge in (
                (task.query_x, task.query_y, 11, "none"),
                (task.support_x, task.support_y, 62, INK),
            ):
                face = [colours[int(label)] for label in labels]
                axis.scatter(*points.T, s=size, c=face, edgecolors=edge, linewidths=1.3, zorder=3)
            axis.set_title(f"{name}: {100 * task.accuracy[row]:.0f} %", fontsize=9.5)
            axis.set(xticks=[], yticks=[], xlim=task.extent[:2], ylim=task.extent[2:])
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=8, markerfacecolor="white",
                         markeredgecolor=INK, label="support"),
        Line2D([], [], marker="o", linestyle="", markersize=4, color=GREY, label="query"),
    ]  # fmt: skip
    _head(figure, title, handles)
    return figure


@styled
def image_task(task: ImageTask, title: str, names: Sequence[str] | None = None, max_query: int = 8) -> Figure:
    """An image task: a row a class, its support on the left, its query on the right with wrong predictions named."""
    classes = np.unique(task.support_y)
    names = names or [f"class {chr(ord('A') + int(c))}" if c < 26 else f"class {c}" for c in range(classes.max() + 1)]
    shots = max(int((task.support_y == c).sum()) for c in classes)
    shots, queries = min(shots, 5), min(max(int((task.query_y == c).sum()) for c in classes), max_query)
    figure = Figure(figsize=(0.85 * (shots + queries) + 1.6, 1.02 * len(classes) + 0.7), layout="constrained")
    axes = figure.subplots(
        len(classes), shots + queries + 1, squeeze=False, width_ratios=[1] * shots + [0.35] + [1] * queries
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, c in enumerate(classes):
        for column, image in enumerate(task.support_x[task.support_y == c][:shots]):
            _image(axes[row, column], image, INK)
        axes[row, 0].text(
            -0.12, 0.5, names[int(c)], transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=9.5
        )
        of_class = np.nonzero(task.query_y == c)[0][:queries]
        for column, index in enumerate(of_class, shots + 1):
            right = task.predicted[index] == c
            _image(axes[row, column], task.query_x[index], GREEN if right else VERMILION)
            if not right:
                axes[row, column].set_title(
                    f"taken for {names[int(task.predicted[index])].removeprefix('class ')}",
                    loc="center", fontsize=7, color=VERMILION, pad=2,
                )  # fmt: skip
    axes[0, 0].annotate("support", (0, 1.22), xycoords="axes fraction", va="bottom", fontsize=9.5, color=INK)
    axes[0, shots + 1].annotate("query", (0, 1.22), xycoords="axes fraction", va="bottom", fontsize=9.5, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


@styled
def comparison(curves: Mapping[str, Curve], metric: str, title: str, *, of: str = "examples") -> Figure:
    """The metric against the number of examples, a line a starting point, with 95 % intervals."""
    figure, (axis,) = _panels(1, width=5.8, height=3.6)
    ends = []
    for number, ((name, curve), colour) in enumerate(zip(curves.items(), (BLUE, VERMILION, GREY, GREEN), strict=False)):
        # Side by side, so that no interval hides another.
        x, y = np.asarray(curve.x, float) * 1.05 ** (number - (len(curves) - 1) / 2), np.asarray(curve.y, float)
        axis.errorbar(x, y, yerr=curve.band, color=colour, marker="o", markersize=5, capsize=3, elinewidth=1)
        ends.append((max(curve.x) * 1.05 ** (len(curves) / 2), y[-1], name, colour))  # beyond the last interval
    axis.set_xscale("log")
    shots = sorted({x for curve in curves.values() for x in curve.x})
    axis.set_xticks(shots, [f"{x:g}" for x in shots])
    axis.minorticks_off()
    _metric_axis(axis, metric)
    _labels_at_ends(axis, ends)
    axis.set_xlabel(f"K ({of})")
    axis.set_ylabel(f"{metric} on the query")
    axis.set_title(wrapped(title), fontweight="bold", fontsize=11.5, pad=12)
    return figure


# --- pieces ----------------------------------------------------------------------------------------------------------


def wrapped(title: str, width: int = 60) -> str:
    """In lines that are no longer than the axes."""
    return textwrap.fill(title, width, break_on_hyphens=False)


def percents() -> PercentFormatter:
    """Ticks of shares: `80 %`."""
    return PercentFormatter(1, decimals=0, symbol=" %")


def _panels(
    count: int, *, width: float, height: float, columns: int = 4, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _head(figure: Figure, title: str, handles: list) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, handlelength=1.6)


def _band(axis: Axes, x: np.ndarray, y: np.ndarray, band: Any, colour: str, floor: float) -> None:
    if band is not None:
        band = np.asarray(band, float)
        axis.fill_between(x, np.maximum(y - band, floor), y + band, color=colour, alpha=0.18, linewidth=0)


def _labels_at_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap; the limits must stand already."""
    ends = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    axis.get_ylim()  # matplotlib sets the limits when they are asked for
    to_axes = axis.transData + axis.transAxes.inverted()
    own = np.array([to_axes.transform((x, y))[1] for x, y, _, _ in ends])
    at, gap = own.copy(), 0.075
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at -= (at - own).mean()
    for (x, _, name, colour), height in zip(ends, at, strict=True):
        axis.annotate(
            name, (x, height), (6, 0), xycoords=("data", "axes fraction"), textcoords="offset points", va="center",
            color=_dark(colour), fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _metric_axis(axis: Axes, metric: str) -> None:
    if "accuracy" in metric:
        axis.yaxis.set_major_formatter(percents())
    else:
        low, high = axis.get_ylim()
        data = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines] or [np.zeros(0)])
        data = data[np.isfinite(data) & (data > 0)]
        if len(data) and data.max() / data.min() > 30:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        elif 0 < low < 0.5 * high:
            axis.set_ylim(bottom=0)


def _image(axis: Axes, image: np.ndarray, colour: str) -> None:
    image = np.asarray(image, float)
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    low, high = image.min(), image.max()
    axis.imshow((image - low) / (high - low or 1), cmap="gray_r", interpolation="nearest")
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.6)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values, of fewer at the start."""
    good = np.isfinite(values)
    sums, counts = np.cumsum(np.where(good, values, 0)), np.cumsum(good)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _number(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3g}"


def _dark(colour: str) -> str:
    return "#5E5E5E" if colour == GREY else colour
