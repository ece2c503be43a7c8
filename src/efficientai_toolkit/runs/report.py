"""A run at a glance: its plots, and one HTML file that holds them with the tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import read_json, write_json, write_text
from ..intervals import mean_ci95
from .build import Built, checkpoint_file, restore
from .evaluate import Evaluation, evaluate_built, seen
from .experiment import ExperimentManager


class Report(NamedTuple):
    html: Path
    plots: list[Path]
    evaluation: dict[str, Any]


def write_report(
    run: str | Path, *, built: Built | None = None, episodes: int = 200, data_dir: str | None = None
) -> Report:
    """Evaluate the best checkpoint of the run folder `run` on its test tasks; write `plots/` and `report.html`.

    Args:
        run: a run folder.
        built: its best checkpoint, where it is loaded already.
        episodes: test episodes behind curves and distribution.
        data_dir: where the data sets are, if not where they were in training.
    """
    from ..config import Override

    manager = ExperimentManager.open(run)
    if built is None:
        moved = [] if data_dir is None else [Override("paths.data_dir", data_dir, f"--data-dir {data_dir}")]
        built = restore(checkpoint_file(manager.path), moved)
    evaluation = evaluate_built(built, episodes=episodes)
    plots = draw_plots(manager, built, evaluation)
    if not (manager.path / "evaluation.json").is_file():  # that of `evaluate` has more episodes
        write_json(manager.path / "evaluation.json", evaluation.report)
    page = manager.path / "report.html"
    write_text(page, _page(manager, evaluation.report, plots))
    return Report(page, list(plots), evaluation.report)


def draw_plots(run: ExperimentManager, built: Built, evaluation: Evaluation) -> dict[Path, str]:
    """Every plot that fits the run's tasks, in `plots/`: path → caption."""
    from . import plots
    from .samples import sample_tasks

    learner, tasks, report = built.learner, built.splits.test, evaluation.report
    metric = report["headline"]["metric"]
    short, trained = "acc" if metric == "accuracy" else "loss", report["trained_steps"]
    figures: dict[str, tuple[Any, str]] = {}

    panels = training_panels(run)
    if panels:
        title = _training_title(panels)
        figures["training_curves"] = (
            plots.training_curves(panels, title),
            "After adaptation: training tasks (running mean) and held-out tasks (95 % band).",
        )
    before, after = (evaluation.per_task[f"step_{k}_{short}"] for k in (0, trained))
    fits = not np.array_equal(before, after)  # a closed form and prototypes have no steps to show
    if fits and np.isfinite(after).any() and np.isfinite(before).any():
        means = [mean_ci95(evaluation.per_task[f"step_{k}_{short}"], evaluation.tasks) for k in evaluation.steps]
        curve = plots.Curve(
            evaluation.steps, [mean for mean, _ in means], np.array([ci95 for _, ci95 in means], float).tolist()
        )
        title = _gain(before, after, metric, trained)
        figures["adaptation_curve"] = (
            plots.adaptation_curves({learner.algorithm: curve}, metric, title, trained_steps=trained),
            f"Mean over {seen(report)}, with its 95 % band.",
        )
    if np.isfinite(after).any():
        better = (after > before).mean() if short == "acc" else (after < before).mean()
        of = "tasks" if report["tasks"] == report["episodes"] else "tasks' episodes"
        title = f"Adaptation helps on {better:.0%} of the unseen {of}" if fits else f"{metric.capitalize()} by task"
        figures[f"{metric}_distribution"] = (
            plots.metric_distribution(before if fits else None, after, metric, title),
            seen(report) + (f", before and after {_steps(trained)}." if fits else "."),
        )
    caption = "Tasks that training never saw, from badly to well adapted."
    samples: Any = sample_tasks(learner, tasks, 6 if not tasks.is_classification else 4)
    if samples and isinstance(samples[0], plots.RegressionTask):
        title = f"{len(samples[0].support_x)} examples, {_steps(trained)}: functions before and after adaptation"
        figures["predictions"] = (plots.predictions(samples, title), caption)
    elif samples and isinstance(samples[0], plots.PlaneTask):
        title = f"{len(samples[0].support_x)} examples, {_steps(trained)}: accuracy before and after adaptation"
        figures["decision_regions"] = (plots.decision_regions(samples, title), caption)
    elif samples:
        task = samples[len(samples) // 2]
        right = int((task.predicted == task.query_y).sum())
        title = f"A typical unseen task: {right} of {len(task.query_y)} queries right"
        figures["image_task"] = (plots.image_task(task, title), "Green: right. Red: wrong, with what was predicted.")
    return {plots.save(figure, run.plots / f"{name}.png"): text for name, (figure, text) in figures.items()}


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
    best = max(curve.y) if metric == "accuracy" else min(curve.y)
    first, best = (f"{v:.1%}" if metric == "accuracy" else f"{v:.3g}" for v in (curve.y[0], best))
    return f"Held-out {metric} after adaptation: {first if len(curve.y) == 1 else f'{first} → {best} at best'}"


def _gain(before: np.ndarray, after: np.ndarray, metric: str, steps: int) -> str:
    start, end = (float(np.nanmean(np.where(np.isfinite(v), v, np.nan))) for v in (before, after))
    values = (f"{start:.1%}", f"{end:.1%}") if metric == "accuracy" else (f"{start:.3g}", f"{end:.3g}")
    return f"{_steps(steps).capitalize()}: {metric} {values[0]} → {values[1]}"


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
"""


def _page(run: ExperimentManager, report: Mapping[str, Any], plots: Mapping[Path, str]) -> str:
    import yaml

    head = report["headline"]
    value = _cell(head["mean"], head["ci95"], "acc" if head["metric"] == "accuracy" else "loss")
    lead = f"{value} {head['metric']} after {_steps(head['steps'])} on {seen(report)}"
    system = run.system
    device = system.get("device") or {}
    facts = {
        "Algorithm": report["algorithm"],
        "Task families": ", ".join(report.get("families", [])),
        "Meta-iterations": f"{report['iteration']:,} (the best checkpoint)",
        "Trainable parameters": f"{report['trainable_parameters']:,}",
        "Adapting to one task": f"{1e3 * report['seconds_per_task']:.1f} ms, "
        f"{report['peak_memory_bytes_per_task'] / 1e6:.2f} MB at the peak",
        "Machine": f"{device.get('name', '?')}, {device.get('cores', '?')} cores, {device.get('blas', '?')}",
        "Versions": ", ".join(f"{k} {v}" for k, v in (system.get("versions") or {}).items() if v),
        "Seed, commit": f"{system.get('seed')}, {(system.get('git_commit') or 'none')[:12]}",
        "Started": system.get("started", "?"),
    }
    sections = [
        f"<h1>{_text(run.name.replace('_', ' '))}</h1><p class='lead'>{_text(lead)}.</p>"
        f"<p class='soft'>{_text(run.path.name)}</p>",
        "<h2>Unseen tasks</h2>" + _steps_table(report),
        *(
            f"<figure><img alt='{_text(caption)}' src='data:image/png;base64,"
            f"{base64.b64encode(path.read_bytes()).decode()}'><figcaption>{_text(caption)}</figcaption></figure>"
            for path, caption in plots.items()
        ),
        *_comparison(run),
        "<h2>Run</h2><div class='scroll'><table>"
        + "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts.items())
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


def _steps_table(report: Mapping[str, Any]) -> str:
    metrics, extrapolated = report["metrics"], set(report["extrapolated_steps"])
    kinds = [kind for kind in ("acc", "loss") if f"step_{report['steps'][0]}_{kind}" in metrics]
    names = {"acc": "accuracy", "loss": "loss"}
    rows = []
    for k in report["steps"]:
        trained = k == report["trained_steps"]
        note = " (trained)" if trained else " (extrapolated)" if f"step_{k}_loss" in extrapolated else ""
        cells = "".join(
            f"<td class='n'>{_cell(metrics[f'step_{k}_{kind}'], metrics[f'step_{k}_{kind}_ci95'], kind)}</td>"
            for kind in kinds
        )
        rows.append(f"<tr{' class=trained' if trained else ''}><td class='n'>{k}{note}</td>{cells}</tr>")
    head = "".join(f"<th class='n'>{names[kind]} ± 95 %</th>" for kind in kinds)
    table = f"<table><tr><th class='n'>inner steps</th>{head}</tr>{''.join(rows)}</table>"
    return f"<div class='scroll'>{table}</div>"


def _comparison(run: ExperimentManager) -> list[str]:
    """The plot that `compare` left in the run folder, where it did."""
    picture, results = run.plots / "comparison.png", run.path / "comparison.json"
    if not (picture.is_file() and results.is_file()):
        return []
    data = base64.b64encode(picture.read_bytes()).decode()
    text = str(read_json(results).get("title", "Against baselines"))
    return [
        f"<h2>Against baselines</h2><figure><img alt='{_text(text)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{_text(text)}</figcaption></figure>"
    ]


def _cell(mean: float | None, ci95: float | None, kind: str) -> str:
    if mean is None:
        return "not finite"
    scale, unit, digits = (100, " %", 1) if kind == "acc" else (1, "", 4)
    return f"{scale * mean:.{digits}f}{unit}" + ("" if ci95 is None else f" ± {scale * ci95:.{digits}f}")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
