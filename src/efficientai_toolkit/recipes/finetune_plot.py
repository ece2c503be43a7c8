"""The figure of a fine-tuning: loss and score by epoch, and the score by the number of training texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs.plots import BLUE, GREY, percents, styled
from .finetune import METRIC_NAMES, shown_score


@styled
def learning_curves(
    curve: Sequence[Mapping[str, Any]], metric: str | None = None, by_shots: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """A panel each for what was measured.

    Args:
        curve: rows of `finetune` or `finetune_completions`, in their order.
        metric: of the rows' `score`; none: no row has one.
        by_shots: rows of `learning_curve`.
    """
    scored = [row for row in curve if "score" in row]
    panels = 1 + bool(scored) + bool(by_shots)
    figure = Figure(figsize=(4.2 * panels, 3.1), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    last = curve[-1]
    title = f"After {last['step']} step{'s' * (last['step'] > 1)}: training loss {last['train_loss']:.3g}"
    loss = axes.pop(0)
    _line(loss, [row["epoch"] for row in curve], [row["train_loss"] for row in curve], GREY)
    loss.set(title="training loss", xlabel="epoch", ylim=(0, None))
    if scored and metric:
        when = "" if scored[-1] is last else f" after epoch {scored[-1]['epoch']}"
        title += f", {shown_score(metric, scored[-1]['score'])} on the test texts{when}"
        _line(axes[0], [row["epoch"] for row in scored], [row["score"] for row in scored], BLUE)
        axes[0].set_xlabel("epoch")
    if by_shots:
        shots = [row["shots"] for row in by_shots]
        _line(axes[-1], shots, [row["score"] for row in by_shots], BLUE)
        axes[-1].set_xscale("log")
        axes[-1].set_xticks(shots, [str(shot) for shot in shots])
        axes[-1].minorticks_off()
        axes[-1].set_xlabel("K (training texts of each label)")
    for axis in axes:
        axis.set_title(f"test {METRIC_NAMES[metric or 'accuracy']}")
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.005))  # no score is above 1
        if metric != "matthews":
            axis.yaxis.set_major_formatter(percents())
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    axis.plot(x, y, color=colour, marker="o" if len(x) < 20 else None, markersize=3.5)
    if len(x) == 1:  # integers cannot be kept to where the range is less than one
        axis.set_xticks(x)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
