"""The report of a continual-learning experiment in words and tables, from `results.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_json, write_text
from .figures import draw, known, leaders, title_of

_KINDS = {
    "task": "each context has outputs of its own, and at test time the context is known",
    "domain": "all contexts share their outputs, and the context is not known",
    "class": "each context has classes of its own, and the context must be recognised too",
}
_COLUMNS = (
    ("average_accuracy", "average accuracy", 100, "%", 2),
    ("backward_transfer", "BWT", 100, "", 2),
    ("forward_transfer", "FWT", 100, "", 2),
    ("forgetting", "forgetting", 100, "", 2),
    ("learning_accuracy", "learning accuracy", 100, "%", 2),
    ("steps_to_90_percent", "steps to 90 %", 1, "", 0),
    ("parameters", "parameters", 1, "", 0),
    ("memory_bytes", "kept, MB", 1e-6, "", 2),
    ("seconds", "seconds", 1, "", 0),
)


def write(folder: Path | str) -> tuple[Path, list[Path]]:
    """Draw every figure and the report of `folder/results.json` again, running nothing.

    Returns:
        `folder/results.md` and the figures in `folder/figures`.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or results.get("experiment") != "continual" or not results.get("runs"):
        raise DataError(f"{folder / 'results.json'} holds no finished run of a continual-learning experiment")
    figures = draw(results, folder / "figures")
    path = folder / "results.md"
    write_text(path, text(results, {figure.relative_to(folder): caption for figure, caption in figures.items()}))
    return path, list(figures)


def text(results: Mapping[str, Any], figures: Mapping[Path, str]) -> str:
    """The report, in Markdown."""
    plan, contexts = results["plan"], results["contexts"]
    stream = plan["stream"] if isinstance(plan["stream"], str) else _count(len(plan["stream"]), "file")
    seeds = len(plan["seeds"])
    quick = "**QUICK: made to see that everything runs. These numbers mean nothing.**\n\n" if plan["quick"] else ""
    lines = [
        f"# Continual learning: {stream}, {plan['kind']}-incremental",
        "",
        f"{quick}One network learns {_count(len(contexts), 'context')} in turn ({', '.join(contexts)}"
        f"{'; the order of the first seed' if seeds > 1 else ''}): {_KINDS[plan['kind']]}. "
        f"Each is trained for {plan['iterations']:,} steps of at most {plan['batch_size']} examples with Adam at "
        f"{plan['learning_rate']:g}; the network is a multilayer perceptron of {plan['num_layers']} × "
        f"{plan['hidden_dim']} units. {_exceptions(plan, results['summary'], len(contexts))}"
        f"{'One seed' if seeds == 1 else f'{seeds} seeds, mean ± 95 % interval'}.",
        "",
        *table(results["summary"]),
        "",
        *_words(results["summary"]),
        "",
        *reading(results["summary"]),
    ]
    for path, caption in figures.items():
        lines += ["", f"![{caption}]({path.as_posix()})", "", f"*{caption}*"]
    options = {name: given for name, given in plan["strategies"].items() if given}
    if options:
        lines += ["", "## Settings", ""]
        lines += [f"* {title_of(name)}: {', '.join(f'{k} = {v}' for k, v in o.items())}" for name, o in options.items()]
    return "\n".join(lines) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _exceptions(plan: Mapping[str, Any], summary: Mapping[str, Any], contexts: int) -> str:
    """What is otherwise in some of the strategies, as sentences with a blank behind them."""
    said = []
    if "joint" in summary:
        said.append(f"Joint training takes {plan['iterations'] * contexts:,} steps on all contexts at once. ")
    if "progressive" in summary:
        width = plan["strategies"].get("progressive", {}).get("hidden_size", plan["hidden_dim"])
        said.append(f"Progressive networks grow a column of 2 × {width} units a context. ")
    if "separate" in summary:
        said.append("Separate weights are a network a context. ")
    return "".join(said)


def _words(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the columns of the table are, of those that it has."""
    shown = {metric for values in summary.values() for metric in values}
    points = {
        "backward_transfer": "BWT is how much accuracy on earlier contexts changed after they were learned (negative: "
        "forgotten)",
        "forward_transfer": "FWT how much was known of a context before its turn",
        "forgetting": "forgetting the fall from the best accuracy that a context ever had",
    }
    told = [what for metric, what in points.items() if metric in shown]
    sentences = [f"{', '.join(told)}; all in percentage points."] if told else []
    if "learning_accuracy" in shown:
        sentences.append("Learning accuracy is that on each context right after it was learned.")
    if "steps_to_90_percent" in shown:
        sentences.append(
            "Steps to 90 % are gradient updates after which, at the latest, a new context reaches 90 % of the accuracy "
            "that it ends with: it is looked at after 1, 2, 5, 10, … steps and after the last."
        )
    sentences.append('"Kept" is what a strategy stores besides the network.')
    return [" ".join(sentences)]


def table(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row a strategy, a column a metric."""
    columns = [column for column in _COLUMNS if any(column[0] in values for values in summary.values())]
    lines = ["| | " + " | ".join(title for _, title, *_ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, values in summary.items():
        cells = []
        for metric, _, scale, unit, digits in columns:
            value = values.get(metric)
            if value is None:
                cells.append("")
                continue
            cell = f"{scale * value['mean']:,.{digits}f}"
            if value["ci95"] is not None and metric not in ("parameters", "memory_bytes", "seconds"):
                cell += f" ± {scale * value['ci95']:,.{digits}f}"
            cells.append(f"{cell} {unit}".rstrip())
        lines.append(f"| {title_of(name)} | " + " | ".join(cells) + " |")
    return lines


def reading(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the table says, in sentences; one is the best only where the seeds tell it apart from all others."""
    ends = {n: v["average_accuracy"]["mean"] for n, v in summary.items() if n != "joint"}
    first = leaders({n: summary[n]["average_accuracy"]["values"] for n in ends})
    sentences = []
    if len(ends) > 1 and len(known(summary[first[0]]["average_accuracy"]["values"])) == 1:
        return ["One seed: differences between strategies are not tested."]
    if len(first) > 1:
        shown = ", ".join(f"{title_of(name)} {100 * ends[name]:.1f} %" for name in first)
        sentences.append(f"The seeds do not tell apart which strategy ends highest: {shown}.")
    elif len(ends) > 1:
        best = first[0]
        sentences.append(f"Of the strategies, {title_of(best)} ends highest, at {100 * ends[best]:.1f} %")
        if "naive" in ends and best != "naive":
            sentences[-1] += f", {100 * (ends[best] - ends['naive']):.1f} points above plain fine-tuning"
        if "joint" in summary:
            gap = 100 * (summary["joint"]["average_accuracy"]["mean"] - ends[best])
            where = f"{gap:.1f} points below" if gap >= 0 else f"{-gap:.1f} points above"
            sentences[-1] += f" and {where} joint training"
        sentences[-1] += "."
    lost = {n: v["backward_transfer"] for n, v in summary.items() if "backward_transfer" in v}
    least = leaders({name: value["values"] for name, value in lost.items()}) if len(lost) > 1 else []
    shown = ", ".join(f"{title_of(name)} {100 * lost[name]['mean']:+.1f}" for name in least)
    if len(least) > 1:
        sentences.append(
            f"Nor which forgets least (BWT in points: {shown})."
            if len(first) > 1
            else f"The seeds do not tell apart which forgets least (BWT in points: {shown})."
        )
    elif least:
        name = title_of(least[0])
        sentences.append(f"{name[0].upper()}{name[1:]} forgets least (BWT {100 * lost[least[0]]['mean']:+.1f} points).")
    return [" ".join(sentences)] if sentences else []
