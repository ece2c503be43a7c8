"""A run at a glance: its plots, and one HTML file that holds them with the tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import read_json, write_json, write_text
from ..intervals import difference, interval, mean_ci95
from .build import Built, build_learner, build_model, checkpoint_file, restore
from .evaluate import Evaluation, draw, evaluate_built, seen
from .experiment import ExperimentManager


class Report(NamedTuple):
    html: Path
    plots: list[Path]
    evaluation: dict[str, Any]


class Plot(NamedTuple):
    title: str  # what is to be seen, with its numbers
    caption: str  # what is drawn


def write_report(
    run: str | Path, *, built: Built | None = None, episodes: int | None = None, data_dir: str | None = None
) -> Report:
    """Evaluate the best checkpoint of the run folder `run` on its test tasks; write `plots/` and `report.html`.

    The same learner as it was before meta-training is measured on the same episodes, so that what training brought is
    told from what adaptation does by itself.

    Args:
        run: a run folder.
        built: its best checkpoint, where it is loaded already.
        episodes: test episodes behind curves and distribution; default: the configuration's.
        data_dir: where the data sets are, if not where they were in training.
    """
    from ..config import Override

    manager = ExperimentManager.open(run)
    if built is None:
        moved = [] if data_dir is None else [Override("paths.data_dir", data_dir, f"--data-dir {data_dir}")]
        built = restore(checkpoint_file(manager.path), moved)
    evaluation = evaluate_built(built, episodes=episodes)
    start = start_values(built, evaluation) if built.learner.iteration else None
    plots = draw_plots(manager, built, evaluation, start)
    other = "" if episodes in (None, built.config.evaluation.episodes) else f"_episodes={episodes}"  # as in `evaluate`
    path = manager.path / f"evaluation{other}.json"
    # That of `evaluate` says more, and stays while it is of this checkpoint.
    if not path.is_file() or read_json(path).get("iteration") != evaluation.report["iteration"]:
        write_json(path, evaluation.report)
    page = manager.path / "report.html"
    write_text(page, _page(manager, evaluation, start, plots))
    return Report(page, list(plots), evaluation.report)


def start_values(built: Built, evaluation: Evaluation) -> dict[str, np.ndarray]:
    """`step_{k}_loss`, `step_{k}_acc` (episodes,) of the learner before meta-training, on the evaluation's episodes."""
    report, splits = evaluation.report, built.splits
    model = build_model(built.config, splits.train.input_shape, max(split.output_dim for split in splits))
    learner = build_learner(built.config, model)
    parts = [
        learner.evaluate_per_task(stacks, None, report["steps"], transductive=report["transductive"])
        for stacks, _ in draw(splits.test, report["episodes"])
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw_plots(
    run: ExperimentManager, built: Built, evaluation: Evaluation, start: Mapping[str, np.ndarray] | None = None
) -> dict[Path, Plot]:
    """Every plot that fits the run's tasks, in `plots/`.

    Args:
        run: the run folder.
        built: its learner.
        evaluation: of the learner.
        start: `start_values`.
    """
    from . import plots
    from .samples import sample_tasks

    learner, tasks, report = built.learner, built.splits.test, evaluation.report
    metric = report["headline"]["metric"]
    short, trained = "acc" if metric == "accuracy" else "loss", report["trained_steps"]
    figures: dict[str, tuple[Any, str, str]] = {}

    panels = training_panels(run)
    if panels:
        title = _training_title(panels)
        figures["training_curves"] = (
            plots.training_curves(panels, title),
            title,
            "After adaptation: training tasks (running mean) and held-out tasks (95 % band)."
            + (" Iteration 0 is before meta-training." if _from_the_start(panels) else ""),
        )
    before, after = (evaluation.per_task[f"step_{k}_{short}"] for k in (0, trained))
    fits = not np.array_equal(before, after)  # a closed form and prototypes have no steps to show
    if fits and np.isfinite(after).any() and np.isfinite(before).any():
        curves = {learner.algorithm: _curve(evaluation.steps, evaluation.per_task, short, evaluation.tasks)}
        title = f"{_steps(trained).capitalize()}: {metric} {_shown(before, metric)} → {_shown(after, metric)}"
        first = None if start is None else _curve(report["steps"], start, short, evaluation.tasks)
        # One that diverges would leave no room for the other.
        if start is not None and first is not None and max(first.y) < 30 * max(curves[learner.algorithm].y):
            curves["before meta-training"] = first
            title = f"{metric.capitalize()} after {_steps(trained)}: {_shown(after, metric)}"
            title += f", {_shown(start[f'step_{trained}_{short}'], metric)} before meta-training"
        figures["adaptation_curve"] = (
            plots.adaptation_curves(curves, metric, title, trained_steps=trained),
            title,
            f"Mean over {seen(report)}, with its 95 % band.",
        )
    if np.isfinite(after).any():
        better = (after > before).mean() if short == "acc" else (after < before).mean()
        of = "tasks" if report["tasks"] == report["episodes"] else "episodes"
        title = f"{metric.capitalize()} by {of.removesuffix('s')}"
        if fits:
            title = f"Adaptation helps in {100 * better:.0f} % of the {of}"
        figures[f"{metric}_distribution"] = (
            plots.metric_distribution(before if fits else None, after, metric, title, of=of),
            title,
            seen(report) + (f", before and after {_steps(trained)}." if fits else "."),
        )
    caption = "Tasks that training never saw, from badly to well adapted."
    samples: Any = sample_tasks(learner, tasks, 6 if not tasks.is_classification else 4)
    if samples and isinstance(samples[0], plots.RegressionTask):
        title = f"{len(samples[0].support_x)} examples, {_steps(trained)}: functions before and after adaptation"
        figures["predictions"] = (plots.predictions(samples, title), title, caption)
    elif samples and isinstance(samples[0], plots.PlaneTask):
        title = f"{len(samples[0].support_x)} examples, {_steps(trained)}: accuracy before and after adaptation"
        figures["decision_regions"] = (plots.decision_regions(samples, title), title, caption)
    elif samples:
        task = samples[len(samples) // 2]
        right = int((task.predicted == task.query_y).sum())
        title = f"A typical unseen task: {right} of {len(task.query_y)} queries right"
        text = "Green: right. Red: wrong, with what was predicted."
        figures["image_task"] = (plots.image_task(task, title), title, text)
    return {plots.save(figure, run.plots / f"{name}.png"): Plot(*texts) for name, (figure, *texts) in figures.items()}


def training_panels(run: ExperimentManager) -> dict[str, dict[str, Any]]:
    """Loss, and accuracy where there is one: metric → name → curve, as `plots.training_curves` takes them."""
    from .plots import Curve

    history = run.history()
    panels: dict[str, dict[str, Any]] = {}
    for metric in ("loss", "accuracy"):
        curves = {}
        for name, key in (("training", f"query_{metric}"), ("validation", f"val_{metric}")):
            if key in history:
                xs, ys = history[key]
                spread = f"{key}_ci95"
                band = dict(zip(*history[spread], strict=True)) if spread in history else {}
                curves[name] = Curve(xs, ys, [band.get(x, 0.0) for x in xs] if band else None)
        if curves:
            panels[metric] = curves
    return panels


def _training_title(panels: Mapping[str, Mapping[str, Any]]) -> str:
    metric = "accuracy" if "accuracy" in panels else "loss"
    curve = panels[metric].get("validation")
    if curve is None:
        return f"{metric} after adaptation, on training tasks"
    ends = [interval(curve.y[i], curve.band and curve.band[i], percent=metric == "accuracy") for i in (0, -1)]
    return f"Held-out {metric} after adaptation: {' → '.join(ends[: len(curve.y)])}"


def _from_the_start(panels: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether there is a validation from before the first iteration, which runs of older versions do not have."""
    return any(0 in curves["validation"].x for curves in panels.values() if "validation" in curves)


def _shown(values: np.ndarray, metric: str) -> str:
    """The mean of what is finite."""
    return interval(float(np.mean(values, where=np.isfinite(values))), None, percent=metric == "accuracy")


def _curve(steps: Sequence[int], values: Mapping[str, np.ndarray], kind: str, tasks: Sequence[str] | None) -> Any:
    from .plots import Curve

    means, widths = zip(*(mean_ci95(values[f"step_{k}_{kind}"], tasks) for k in steps), strict=True)
    return Curve(steps, means, np.array(widths, float).tolist())


def _steps(count: int) -> str:
    return "one inner step" if count == 1 else f"{count} inner steps"


# --- HTML ------------------------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --line: #dcdce0; --paper: #ffffff; --card: #f6f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a2a2aa; --line: #38383d; --paper: #151517; --card: #1f1f23; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.lead { font-size: 1.15rem; margin: .4rem 0 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; } tr.trained td { font-weight: 600; }
figure { margin: 1.25rem 0 2rem; } figure img { max-width: 100%; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: .5rem; box-sizing: border-box; }
details { margin-top: .75rem; } pre { background: var(--card); padding: 1rem; border-radius: 6px; overflow-x: auto;
  font-size: .85rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; }
  figure, table { break-inside: avoid; } pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def _page(
    run: ExperimentManager,
    evaluation: Evaluation,
    start: Mapping[str, np.ndarray] | None,
    plots: Mapping[Path, Plot],
) -> str:
    import yaml

    report, system = evaluation.report, run.system
    device = system.get("device") or {}
    facts = {
        "Algorithm": report["algorithm"],
        "Task families": ", ".join(report.get("families", [])),
        **_training(run, report["iteration"]),
        "Trainable parameters": f"{report['trainable_parameters']:,}",
        "Adapting to one task": f"{1e3 * report['seconds_per_task']:.1f} ms, "
        f"{report['peak_memory_bytes_per_task'] / 1e6:.2f} MB at the peak",
        "Machine": f"{device.get('name', '?')}, {device.get('cores', '?')} cores, {device.get('blas', '?')}",
        "Versions": ", ".join(f"{k} {v}" for k, v in (system.get("versions") or {}).items() if v),
        "Seed": system.get("seed"),
        **({"Commit": system["git_commit"][:12]} if system.get("git_commit") else {}),
        "Started": system.get("started", "?"),
    }
    sections = [
        f"<h1>{_text(run.name.replace('_', ' '))}</h1><p class='lead'>{_text(_lead(evaluation, start))}</p>"
        f"<p class='soft'>{_text(run.path.name)}</p>",
        "<h2>Unseen tasks</h2>" + _steps_table(evaluation, start),
        *(_figure(path, plot.title, plot.caption) for path, plot in plots.items()),
        *_comparison(run),
        "<h2>Run</h2><div class='scroll'><table>"
        + "".join(f"<tr><th scope='row'>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts.items())
        + "</table></div>",
        "<details><summary>Configuration</summary><pre>"
        + _text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        + "</pre></details>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(run.path.name)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _lead(evaluation: Evaluation, start: Mapping[str, np.ndarray] | None) -> str:
    """What the learner reaches, and how much of it meta-training brought, by the differences of each episode."""
    report = evaluation.report
    head, share = report["headline"], report["headline"]["metric"] == "accuracy"
    value = interval(head["mean"], head["ci95"], percent=share)
    by = f"after {_steps(head['steps'])}" if report["adapts_by_steps"] else "after adaptation in closed form"
    lead = f"{value} {head['metric']} {by} on {seen(report)}."
    if start is None:
        return lead
    name = f"step_{head['steps']}_{'acc' if share else 'loss'}"
    if not (np.isfinite(start[name]).all() and np.isfinite(evaluation.per_task[name]).all()):
        return lead
    before = interval(*mean_ci95(start[name], evaluation.tasks), percent=share)
    change = difference(*mean_ci95(evaluation.per_task[name] - start[name], evaluation.tasks), percent=share)
    return f"{lead} Before meta-training the same learner reaches {before} there; the difference is {change}."


def _training(run: ExperimentManager, iteration: int) -> dict[str, str]:
    """What `train` says of its run."""
    path = run.path / "full_report.json"
    done = read_json(path) if path.is_file() else {}
    total, seconds, best = done.get("iterations"), done.get("seconds"), done.get("best") or {}
    facts = {"Meta-iterations": f"{iteration:,}" + (f", the best by validation of {total:,}" if total else "")}
    if seconds:
        facts["Training and validation"] = f"{seconds:,.1f} s"
    found = [
        f"{name} {interval(best[f'val_{name}'], best.get(f'val_{name}_ci95'), percent=name == 'accuracy')}"
        for name in ("accuracy", "loss")
        if f"val_{name}" in best
    ]
    return {**facts, **({"Validation then": ", ".join(found)} if found else {})}


def _steps_table(evaluation: Evaluation, start: Mapping[str, np.ndarray] | None) -> str:
    report = evaluation.report
    metrics, extrapolated = report["metrics"], set(report["extrapolated_steps"])
    kinds = [kind for kind in ("acc", "loss") if f"step_{report['steps'][0]}_{kind}" in metrics]
    names = {"acc": "accuracy", "loss": "loss"}
    rows = []
    for k in report["steps"] if report["adapts_by_steps"] else [report["trained_steps"]]:
        trained = k == report["trained_steps"]
        note = " (trained)" if trained else " (extrapolated)" if f"step_{k}_loss" in extrapolated else ""
        own = {kind: (metrics[f"step_{k}_{kind}"], metrics[f"step_{k}_{kind}_ci95"]) for kind in kinds}
        first = {kind: mean_ci95(start[f"step_{k}_{kind}"], evaluation.tasks) for kind in kinds} if start else {}
        cells = "".join(
            f"<td class='n'>{interval(*found[kind], percent=kind == 'acc')}</td>"
            for kind in kinds
            for found in (own, first)
            if found
        )
        rows.append(f"<tr{' class=trained' if trained else ''}><th scope='row' class='n'>{k}{note}</th>{cells}</tr>")
    when = ("",) if start is None else ("", ", before meta-training")
    head = "".join(f"<th scope='col' class='n'>{names[kind]}{text}</th>" for kind in kinds for text in when)
    table = f"<table><tr><th scope='col' class='n'>inner steps</th>{head}</tr>{''.join(rows)}</table>"
    return f"<div class='scroll'>{table}</div><p class='soft'>Means with their 95 % intervals.</p>"


def _figure(path: Path, title: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><img alt='{_text(title)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _comparison(run: ExperimentManager) -> list[str]:
    """The plot that `compare` left in the run folder, where it did."""
    picture, results = run.plots / "comparison.png", run.path / "comparison.json"
    if not (picture.is_file() and results.is_file()):
        return []
    text = str(read_json(results).get("title", "Against baselines"))
    return ["<h2>Against baselines</h2>" + _figure(picture, text, text)]


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
