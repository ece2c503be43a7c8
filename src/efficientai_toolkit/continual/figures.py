"""Figures of a continual-learning experiment, drawn from its results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..intervals import mean_ci95
from ..runs.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, percents, save, styled, wrapped
from .metrics import by_seed, values_by_seed

TITLES = {
    "naive": "fine-tuning",
    "joint": "joint",
    "class-means": "fine-tuning, class-mean head",
    "ewc": "EWC",
    "online-ewc": "online EWC",
    "si": "SI",
    "lwf": "LwF",
    "replay": "replay",
    "agem": "A-GEM",
    "derpp": "DER++",
    "progressive": "progressive networks",
    "separate": "separate weights",
    "melpa": "MeLPA",
    "melpa-init": "MeLPA, start only",
    "melpa-update": "MeLPA, update only",
}
_COLOURS = {
    "naive": GREY,
    "joint": INK,
    "ewc": BLUE,
    "online-ewc": SKY,
    "si": PURPLE,
    "lwf": ORANGE,
    "replay": GREEN,
    "melpa": VERMILION,
}
_OTHERS = ("#A6761D", "#44AA99", "#882255", "#999933", "#E7298A", "#5E4FA2")


def title_of(strategy: str) -> str:
    """What a reader calls it; parts of a combination keep their order."""
    return " + ".join(TITLES.get(part, part) for part in strategy.split("+"))


def colour_of(strategy: str, strategies: list[str]) -> str:
    others = [name for name in strategies if name not in _COLOURS]
    return _COLOURS.get(strategy) or _OTHERS[others.index(strategy) % len(_OTHERS)]


def by_strategy(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """strategy → the records of its seeds, in their order."""
    return {name: list(mine.values()) for name, mine in by_seed(results["runs"]).items()}


def told_apart(ours: Sequence[float | None], theirs: Sequence[float | None]) -> int:
    """1 or -1 where the 95 % interval of the difference, seed by seed, is above or below zero, else 0.

    A seed that one of them has not (a run that goes on) is left out. Two seeds with the same difference tell nothing:
    few test rows make that happen, and the interval would have no width.
    """
    both = zip(ours, theirs, strict=False)
    differences = np.array([a - b for a, b in both if a is not None and b is not None])
    if len(differences) < 2 or (len(differences) == 2 and np.ptp(differences) < 1e-9):
        return 0
    mean, half = mean_ci95(differences)
    return 0 if half is None or abs(mean) <= half else int(np.sign(mean))


def leaders(values: Mapping[str, Sequence[float | None]]) -> list[str]:
    """strategy → a value a seed: the one with the highest mean, then those that are not told apart from it."""
    ranked = sorted(values, key=lambda name: -np.mean(known(values[name])))
    return [name for name in ranked if name == ranked[0] or not told_apart(values[ranked[0]], values[name])]


def known(values: Sequence[float | None]) -> list[float]:
    """Those of the seeds that have one."""
    return [value for value in values if value is not None]


def draw(results: Mapping[str, Any], folder: Path) -> dict[Path, str]:
    """Every figure, as PNG in `folder`: path → caption."""
    names = {
        "accuracy_matrices": (
            accuracy_matrices,
            "Accuracy on each context (column) after each was learned (row), mean over the seeds. What fades "
            "downwards in a column is forgotten.",
        ),
        "forgetting": (
            forgetting,
            "Average accuracy over the contexts learned so far (95 % band over seeds, where there are several).",
        ),
        "adaptation_speed": (
            adaptation,
            "Accuracy on a context while it is being learned, mean over contexts and seeds; measured at the points.",
        ),
        "accuracy_and_memory": (
            memory,
            "Average accuracy at the end against everything that is stored: weights, the strategy's arrays, examples.",
        ),
    }
    if not set(by_strategy(results)) - {"joint"}:  # which has neither a matrix nor a curve
        names = {"accuracy_and_memory": names["accuracy_and_memory"]}
    written = {}
    for name, (function, caption) in names.items():
        figure = function(results)
        written[save(stamped(figure, results["plan"]["quick"]), folder / f"{name}.png")] = caption
    return written


def stamped(figure: Figure, quick: bool) -> Figure:
    """QUICK across the figure of a run that was made to try the machinery."""
    if quick:
        text = figure.text(
            0.5, 0.5, "QUICK", fontsize=70, color=GREY, alpha=0.25, ha="center", va="center", rotation=25
        )
        text.set_in_layout(False)
    return figure


@styled
def accuracy_matrices(results: Mapping[str, Any]) -> Figure:
    """One heat map of R a strategy."""
    runs = {
        name: np.nanmean([np.array(r["matrix"], float) for r in records], axis=0)
        for name, records in by_strategy(results).items()
        if None not in records[0]["matrix"][0]
    }
    size = len(next(iter(runs.values())))
    columns = min(len(runs), 4)
    rows = math.ceil(len(runs) / columns)
    side = max(2.2, 0.42 * size + 0.7)
    figure = Figure(figsize=(side * columns + 0.8, (side + 0.6) * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = None
    for axis, (name, matrix) in zip(axes, runs.items(), strict=False):
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="equal")
        for i, j in np.ndindex(*matrix.shape):
            if size <= 10:
                value = 100 * matrix[i, j]
                axis.text(
                    j, i, f"{value:.0f}", ha="center", va="center", fontsize=7.5 if size <= 6 else 6,
                    color="white" if matrix[i, j] < 0.6 else INK,
                )  # fmt: skip
        axis.set_title(f"{title_of(name)}\n{100 * matrix[-1].mean():.1f} %", fontsize=9)
        axis.set_xticks(range(size), [str(k + 1) for k in range(size)])
        axis.set_yticks(range(size), [str(k + 1) for k in range(size)])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    for number, axis in enumerate(axes[: len(runs)]):
        if number + columns >= len(runs):
            axis.set_xlabel("tested on context", fontsize=9)
        if number % columns == 0:
            axis.set_ylabel("after learning context", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.6, format=percents())  # type: ignore[arg-type]
    _head(figure, f"{_where(results)}: accuracy on every context as learning goes on")
    return figure


@styled
def forgetting(results: Mapping[str, Any]) -> Figure:
    """Average accuracy over the contexts so far against how many have been learned."""
    runs = by_strategy(results)
    figure, axis = _one(6.4, 3.9)
    ends = []
    for name, records in runs.items():
        colour = colour_of(name, list(runs))
        matrices = [np.array(record["matrix"], float) for record in records]
        if np.isnan(matrices[0][0]).any():
            mean = float(np.mean([m[-1].mean() for m in matrices]))
            axis.axhline(mean, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
            ends.append((len(matrices[0]), mean, title_of(name), colour))
            continue
        values = np.array([[m[k, : k + 1].mean() for k in range(len(m))] for m in matrices])
        x = np.arange(1, values.shape[1] + 1)
        axis.plot(x, values.mean(0), color=colour, marker="o", markersize=3.5)
        if len(values) > 1:
            half = np.array([mean_ci95(column)[1] for column in values.T], float)
            low, high = (np.clip(values.mean(0) + sign * half, 0, 1) for sign in (-1, 1))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((x[-1], values[:, -1].mean(), title_of(name), colour))
    label_ends(axis, ends)
    axis.yaxis.set_major_formatter(percents())
    axis.set_ylim(top=1.01)
    axis.set_xticks(range(1, int(max(end[0] for end in ends)) + 1))
    axis.set_xlabel("contexts learned")
    axis.set_ylabel("average accuracy on contexts so far")
    _head(figure, f"{_where(results)}: {_who_keeps(results)}")
    return figure


@styled
def adaptation(results: Mapping[str, Any]) -> Figure:
    """Accuracy on the context being learned against gradient updates."""
    runs = {name: records for name, records in by_strategy(results).items() if name != "joint"}
    figure, axis = _one(6.4, 3.7)
    ends = []
    for name, records in runs.items():
        curves = [curve for record in records for curve in record["curves"]]
        values = np.array([curve["accuracy"] for curve in curves], float)
        if np.isnan(values).all(axis=0).any():
            values[:, np.isnan(values).all(axis=0)] = 0.0
        mean, steps = np.nanmean(values, axis=0), curves[0]["steps"]
        colour = colour_of(name, list(runs))
        axis.plot(steps, mean, color=colour, marker="o", markersize=3)
        ends.append((steps[-1], mean[-1], title_of(name), colour))
    axis.set_xscale("symlog", linthresh=1)
    measured = sorted({step for records in runs.values() for step in records[0]["curves"][0]["steps"]})
    shown = [b for a, b in zip([0, *measured], measured, strict=False) if b < 1 or b >= 1.4 * a]  # with room for words
    axis.set_xticks(shown, [f"{step}" if step < 1000 else f"{step / 1000:g}k" for step in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    label_ends(axis, ends)
    axis.yaxis.set_major_formatter(percents())
    axis.set_xlabel("gradient updates")
    axis.set_ylabel("accuracy on the new context")
    _head(figure, f"{_where(results)}: how fast a new context is learned")
    return figure


@styled
def memory(results: Mapping[str, Any]) -> Figure:
    """Average accuracy against stored bytes."""
    runs = by_strategy(results)
    figure, axis = _one(6.4, 3.7)
    points, bars = [], []
    for name, records in runs.items():
        stored = (
            np.mean([4 * r["parameters"] + (0 if name == "separate" else r["memory_bytes"]) for r in records]) / 1e6
        )
        if name == "progressive":
            stored = np.mean([4 * r["parameters"] for r in records]) / 1e6
        values = [record["average_accuracy"] for record in records]
        mean, half = mean_ci95(values)
        colour = colour_of(name, list(runs))
        bar = None if half is None else [[mean - max(mean - half, 0)], [min(mean + half, 1) - mean]]
        axis.errorbar(stored, mean, yerr=bar, color=colour, marker="o", markersize=6, capsize=3, elinewidth=1)
        points.append((stored, mean, title_of(name), colour))
        bars.append((stored, mean - (bar[0][0] if bar else 0), mean + (bar[1][0] if bar else 0)))
    axis.set_ylim(axis.get_ylim()[0] - 0.02, axis.get_ylim()[1] + 0.02)
    axis.yaxis.set_major_formatter(percents())
    axis.set_xlabel("stored, MB")
    axis.set_xlim(left=0, right=1.25 * max(point[0] for point in points))
    axis.set_ylabel("average accuracy")
    _head(figure, f"{_where(results)}: accuracy against what is stored")
    label_points(axis, points, bars)
    return figure


def _where(results: Mapping[str, Any]) -> str:
    plan = results["plan"]
    stream = plan["stream"] if isinstance(plan["stream"], str) else "own files"
    return f"{stream}, {plan['kind']}-incremental"


def _who_keeps(results: Mapping[str, Any]) -> str:
    """The strategy that ends highest, without the upper bound, where the seeds tell it apart."""
    ends = {n: v for n, v in values_by_seed(results["runs"], "average_accuracy").items() if n != "joint"}
    best, *others = leaders(ends)
    if len(ends) == 1:
        return f"{title_of(best)} ends at {100 * np.mean(known(ends[best])):.1f} %"
    if others:
        one = len(known(ends[best])) == 1
        why = "one seed, differences are not tested" if one else "the seeds do not tell the best apart"
        return f"accuracy as learning goes on; {why}"
    return f"{title_of(best)} ends highest, at {100 * np.mean(known(ends[best])):.1f} %"


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(
        wrapped(title, int(10.2 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11.5, fontweight="bold"
    )


def label_ends(axis: Axes, ends: list[tuple[float, float, str, str]], offset: int = 6) -> None:
    """Names to the right of points, those of near points moved apart."""
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axis.get_ylim()
    gap = 0.048 * (high - low)
    at, below = [], -math.inf
    for _, y, *_ in ends:
        at.append(below := max(y, below + gap))
    over = max(at[-1] - (high - gap / 2), 0)
    for place, (x, y, name, colour) in zip(at, ends, strict=True):
        shift = (place - over - y) / (high - low) * axis.bbox.height / axis.figure.dpi * 72
        axis.annotate(
            name, (x, y), (offset, shift), textcoords="offset points", color=colour, fontsize=8.5, va="center",
            annotation_clip=False,
        )  # fmt: skip


def label_points(
    axis: Axes, points: list[tuple[float, float, str, str]], bars: list[tuple[float, float, float]]
) -> None:
    """Names beside points (x, y, name, colour), none of them on a point, a bar (x, low, high) or another name.

    Each takes the nearest free place in the axes, to the right where it can; from a far one a line leads to the point.
    """
    figure: Any = axis.figure
    figure.draw_without_rendering()  # what is free is known when the axes have their size
    scale, frame = figure.dpi / 72, axis.get_window_extent()
    at = axis.transData.transform([point[:2] for point in points])
    ends = np.array([axis.transData.transform([(x, low), (x, high)]) for x, low, high in bars])
    # (left, low, right, high) in pixels: bars with their caps, and the points on them.
    taken = np.concatenate([np.minimum(ends[:, 0], at) - 5 * scale, np.maximum(ends[:, 1], at) + 5 * scale], 1)
    steps = scale * np.arange(-240, 241, 4)
    shifts = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    for place, (x, y, name, colour) in sorted(zip(at, points, strict=True), key=lambda pair: -pair[1][1]):
        text = axis.annotate(name, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=8.5)
        size = np.array(text.get_window_extent().size)
        corners = place + shifts
        boxes = np.concatenate([corners, corners + size], 1)
        inside = (corners >= frame.min).all(1) & (corners + size <= frame.max).all(1)
        free = inside & ~_overlap(boxes[:, None], taken[None]).any(1)
        near = np.clip(place, boxes[:, :2], boxes[:, 2:])  # where the line to the point would end
        line = near[:, None] + (place - near)[:, None] * np.linspace(0, 1, 12)[:, None]
        names = taken[len(points) :]
        crossed = _overlap(np.concatenate([line, line], 2)[:, :, None], names[None, None]).any(1).sum(1)
        level = 0.2 * np.abs(corners[:, 1] + size[1] / 2 - place[1])
        aside = np.where(corners[:, 0] > place[0], level, 14 * scale)
        cost = np.linalg.norm(near - place, axis=1) + aside + 60 * scale * crossed
        best = int(np.argmin(np.where(free, cost, cost + 1e6)))
        text.set_position(shifts[best] / scale)
        taken = np.concatenate([taken, boxes[best : best + 1]])
        if np.linalg.norm(near[best] - place) > 14 * scale:
            axis.annotate(
                "", (x, y), (near[best] - place) / scale, textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip
            taken = np.concatenate([taken, np.concatenate([line[best], line[best]], 1)])


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether boxes (…, 4) of left, low, right, high have anything in common."""
    return np.asarray(((a[..., :2] <= b[..., 2:]) & (b[..., :2] <= a[..., 2:])).all(-1))
