"""The MeLPA experiment in figures and words, from its `results.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..continual import figures
from ..continual.figures import by_strategy, colour_of, stamped, title_of
from ..continual.report import reading, table
from ..errors import DataError
from ..files import read_json, write_text
from ..intervals import mean_ci95
from ..runs.plots import INK, percents, save, styled

STORES = ("replay", "derpp")  # methods that keep examples
ABLATION = {
    "melpa-init": "initialisation only",
    "melpa-update": "update rule only",
    "melpa": "both",
    "naive": "neither (standard adapter)",
}


def write(folder: Path | str) -> tuple[Path, list[Path]]:
    """Draw every figure and the report of `folder` again, running nothing.

    Returns:
        `folder/results/results.md` and the figures in `folder/results/figures`.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or results.get("experiment") != "melpa" or not results.get("runs"):
        raise DataError(f"{folder / 'results.json'} holds no finished method of a MeLPA experiment")
    # What the figures of continual learning read of a plan.
    config = results["config"]
    results["plan"] = {"stream": "unseen tasks", "kind": "task", "quick": config["quick"]}
    target = folder / "results" / "figures"
    drawn = figures.draw(results, target)
    own = {
        "meta_learning": (
            meta_learning,
            "Query accuracy of meta-training, all tasks of a sequence with the last adapters.",
        ),
        "ablation": (
            ablation,
            "Each part alone and both: average accuracy and backward transfer (95 % intervals over the seeds, where "
            "there are several).",
        ),
    }
    for name, (function, caption) in own.items():
        if name == "ablation" or results["meta"]:
            drawn[save(stamped(function(results), config["quick"]), target / f"{name}.png")] = caption
    path = folder / "results" / "results.md"
    write_text(path, text(results, {p.relative_to(path.parent): caption for p, caption in drawn.items()}))
    return path, list(drawn)


@styled
def meta_learning(results: Mapping[str, Any]) -> Figure:
    """Accuracy of meta-training against outer steps, a line a variant."""
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    axis, ends = figure.subplots(), []
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in results["meta"]))
    for name in names:
        histories = [h["accuracy"] for key, h in results["meta"].items() if key.rpartition("/")[0] == name]
        values = np.mean([history[: min(map(len, histories))] for history in histories], axis=0)
        window = max(len(values) // 10, 1)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        x = np.arange(window, len(values) + 1)
        colour = colour_of(name, names)
        axis.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(x, smooth, color=colour)
        ends.append((x[-1], smooth[-1], ABLATION.get(name, title_of(name)), colour))
    figures.label_ends(axis, ends)
    axis.yaxis.set_major_formatter(percents())
    axis.set_xlabel("outer steps")
    axis.set_ylabel("query accuracy over the sequence")
    figure.suptitle("Meta-training through sequences of tasks", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


@styled
def ablation(results: Mapping[str, Any]) -> Figure:
    """Bars of average accuracy and BWT: neither part, either, both."""
    runs = by_strategy(results)
    names = [name for name in ("naive", "melpa-init", "melpa-update", "melpa") if name in runs]
    figure = Figure(figsize=(7.6, 0.5 * len(names) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, title in zip(
        axes, ("average_accuracy", "backward_transfer"), ("average accuracy", "backward transfer, points"), strict=True
    ):
        for row, name in enumerate(names):
            mean, half = mean_ci95([record[metric] for record in runs[name]])
            least = 0.0 if metric == "average_accuracy" else -1.0
            bar = None if half is None else [[mean - max(mean - half, least)], [min(mean + half, 1) - mean]]
            end = max(mean if bar is None else mean + bar[1][0], 0)
            axis.barh(
                row, mean, color=colour_of(name, list(runs)), height=0.6, xerr=bar,
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
            )  # fmt: skip
            axis.annotate(
                f"{100 * mean:+.1f}" if metric == "backward_transfer" else f"{100 * mean:.1f} %", (end, row),
                (4, 0), textcoords="offset points", va="center", fontsize=9,
            )  # fmt: skip
        axis.set_title(title)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        points = FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if round(100 * value) else "0")
        axis.xaxis.set_major_formatter(points if axis is axes[1] else percents())
        axis.margins(x=0.2)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), [ABLATION[name] for name in names])
    figure.suptitle("With and without what is meta-learned", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def text(results: Mapping[str, Any], drawn: Mapping[Path, str]) -> str:
    """The report, in Markdown."""
    config, seeds = results["config"], max(v["seeds"] for v in results["summary"].values())
    quick = "**QUICK: made to see that everything runs. These numbers mean nothing.**\n\n" if config["quick"] else ""
    size = f"{config['bottleneck_dim']} wide" if config["adapter_type"] == "pfeiffer" else f"rank {config['lora_rank']}"
    layers = "last layer" if config["upper_layers"] == 1 else f"last {config['upper_layers']} layers"
    lines = [
        "# Meta-learned adapters that keep learning",
        "",
        f"{quick}A frozen encoder ({config['model_name']}) carries {config['adapter_type']} adapters ({size}) in its "
        f"{layers}. It learns {len(results['contexts'])} tasks in turn "
        f"({', '.join(results['contexts'])}), each of {config['way'] * config['shot']} examples "
        f"({config['way']} intents with {config['shot']} each; tasks of GLUE have fewer classes with more). "
        "A task has a head of its own, and is known at test time; the "
        "adapters are shared, so learning a task may spoil those before it. "
        f"{'One seed' if seeds == 1 else f'{seeds} seeds, mean ± 95 % interval'}; classes, texts, weights and batches "
        "change with it.",
        "",
        "MeLPA was meta-trained before, on other intents (CLINC150 without its banking and credit-card domains and "
        f"those above): {config['n_meta_epochs'] * config['steps_per_epoch']} outer steps through sequences of "
        f"{config['sequence']} tasks, {config['inner_steps']} inner steps each. In the test sequence it takes "
        f"{config['inner_steps']} steps a task, on all examples at once. The others take {config['n_epochs_per_task']} "
        f"epochs of batches of {config['batch_size']} with Adam at {config['learning_rate']:g}.",
        "",
        *table(results["summary"]),
        "",
        "BWT is how much accuracy on earlier tasks changed after they were learned, in points (negative: forgotten). "
        "FWT is how much was known of a task before its turn: of MeLPA beyond chance, of the others beyond their "
        "untrained network, so that the two do not compare. "
        "Steps to 90 % are gradient updates after which, at the latest, a new task reaches 90 % of the accuracy that "
        f"it ends with: it is looked at after {', '.join(map(str, probed(results)))} steps, as far as a method goes, "
        f"and not in between. {kept(results)}",
        "",
        *verdict(results["summary"]),
        "",
        *reading(results["summary"]),
    ]
    for path, caption in drawn.items():
        lines += ["", f"![{caption}]({path.as_posix()})", "", f"*{caption}*"]
    return "\n".join(lines) + "\n"


def probed(results: Mapping[str, Any]) -> list[int]:
    """The steps after which any method's accuracy on its new task was taken."""
    return sorted({step for run in results["runs"].values() for curve in run["curves"] for step in curve["steps"]})


def kept(results: Mapping[str, Any]) -> str:
    """What the column of memory counts; runs of before count nothing for MeLPA."""
    ours = [run for key, run in results["runs"].items() if key.startswith("melpa")]
    if not ours:
        return '"Kept" is what a method stores besides the network.'
    counted = "" if any(run["memory_bytes"] for run in ours) else ", are not counted"
    return (
        '"Kept" is what a method stores besides one network; of MeLPA, what it was meta-trained for (an initialisation '
        f"network, rates) and all heads but one{counted}."
    )


def verdict(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether MeLPA is better than the best method that stores no examples, in each of the three respects.

    It is where the 95 % interval of the difference, seed by seed, is above zero.
    """
    rivals = [name for name in summary if name not in STORES and not name.startswith("melpa")]
    if "melpa" not in summary or not rivals:
        return []
    lines = []
    for metric, what, scale, unit, sign in (
        ("average_accuracy", "average accuracy", 100, " %", 1),
        ("backward_transfer", "backward transfer", 100, " points", 1),
        ("steps_to_90_percent", "steps to 90 % of the final accuracy, at the latest", 1, "", -1),
    ):
        means = {n: summary[n][metric]["mean"] for n in rivals if metric in summary[n]}
        if not means or metric not in summary["melpa"]:
            continue
        best = max(means, key=lambda name: sign * means[name])
        ours = summary["melpa"][metric]["mean"]
        values, theirs = (summary[name][metric]["values"] for name in ("melpa", best))
        better = sign * figures.told_apart(values, theirs)
        how = "better than" if better > 0 else "**worse than**" if better < 0 else "not told apart by the seeds from"
        if values == theirs:
            how = "the same as"
        lines.append(
            f"* {what[0].upper()}{what[1:]}: MeLPA {scale * ours:.1f}{unit}, {how} the best method that stores no "
            f"examples ({title_of(best)}, {scale * means[best]:.1f}{unit})."
        )
    return lines
