"""`continual`: one network, one context after the other, by several strategies."""

from __future__ import annotations

import json as plain
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DataDir, Device, Json, Output, Seed, echo_json
from .shown import command, goes_on_by

_DATA, _METHODS, _TRAINING = "Contexts", "Strategies", "Network and training"


def continual(
    context: typer.Context,
    scenario: Annotated[
        str,
        typer.Option(
            "--scenario",
            "-s",
            metavar="STREAM/KIND",
            help="split-mnist, permuted-mnist, split-omniglot, split-cifar100, clinc150, banking77, glue or "
            "superglue; kind task, domain or class.",
            rich_help_panel=_DATA,
        ),
    ] = "split-mnist/task",
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies",
            help="Comma-separated, of naive, ewc, online-ewc, si, lwf, replay, agem, derpp, class-means, progressive, "
            "separate, joint; '+' joins two.",
            rich_help_panel=_METHODS,
        ),
    ] = "naive,ewc,si,lwf,replay,joint",
    seeds: Annotated[
        int, typer.Option("--seeds", help="Repeat with this many seeds, from --seed on.", rich_help_panel=_TRAINING)
    ] = 1,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            help="Own contexts, in their order: .npz with train_x, train_y, test_x, test_y. --scenario is then the "
            "kind alone.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(
            "--contexts", help="Learn this many contexts (default: the stream's own number).", rich_help_panel=_DATA
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            "-n",
            help="Take this many steps a context (default: as published for the stream; else 2000).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            help="Take this many examples a step (default: as published; else 128).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Rate of Adam (default: as published; else 0.001).", rich_help_panel=_TRAINING
        ),
    ] = None,
    hidden_dim: Annotated[
        int | None,
        typer.Option(
            "--hidden-dim",
            help="Units of each of the two hidden layers (default: as published; else 400).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="STRATEGY.NAME=VALUE",
            help="Set an option of a strategy, as in ewc.ewc_lambda=1000, si.si_c=10, replay.capacity=500 "
            "(repeatable; an unknown name lists all).",
            rich_help_panel=_METHODS,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that it runs.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="A run folder: go on where it was stopped.")
    ] = None,
    seed: Seed = None,
    data_dir: DataDir = None,
    output: Output = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Accuracy matrix, forgetting, transfer and speed of each strategy, with figures and a report.

    Stopped at any moment, `--resume RUN` loses at most the context it was at.
    """
    from ..continual.scenarios import KINDS
    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..recipes.continual import experiment, plan_of
    from ..runs.experiment import ExperimentManager, open_run

    select_device(device)
    if resume is not None:
        only_what_resume_takes(context)
        manager = open_run(resume, "continual")
        plan = plan_of(manager.config)
    else:
        stream, _, kind = scenario.partition("/")
        if stream in KINDS:  # of split MNIST, or of the given files
            stream, kind = "split-mnist", stream
        elif files and "scenario" in given_options(context):
            raise ConfigurationError(f"--scenario {scenario} with --file: of own files say only {', '.join(KINDS)}")
        first = 0 if seed is None else seed
        given: dict[str, Any] = {
            "stream": stream if not files else [str(path.resolve()) for path in files],
            "kind": kind or "task",
            "strategies": {name.strip(): {} for name in strategies.split(",") if name.strip()},
            "seeds": list(range(first, first + seeds)),
            "contexts": contexts,
            "iterations": iterations,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "hidden_dim": hidden_dim,
            "quick": quick,
        }
        plan = plan_of({name: value for name, value in given.items() if value is not None}, _options(option or []))
        name = f"Continual_{stream.replace('-', '') if not files else 'files'}_{plan.kind}"
        manager = ExperimentManager(output or "experiments", name, plan.describe())
    try:
        with goes_on_by(command("continual", resume=manager.path, data_dir=data_dir, device=device)):
            results, report = experiment(
                plan, manager, data_dir=data_dir, watch=lambda line: print(line, file=sys.stderr, flush=True)
            )
    except Exception:
        if resume is None:
            manager.discard()
        raise
    if json:
        echo_json({"run": str(manager.path), "report": str(report), "summary": results["summary"]})
        return
    show(results)
    print(f"Run:    {manager.path}")
    print(f"Report: {report}")


def given_options(context: typer.Context) -> dict[str, str]:
    """What is on the command line, not by default: parameter → its flag."""
    found = {str(parameter.name): max(parameter.opts, key=len) for parameter in context.command.params}
    return {n: flag for n, flag in found.items() if getattr(context.get_parameter_source(n), "name", "") != "DEFAULT"}


def only_what_resume_takes(context: typer.Context) -> None:
    """Refuse what a run that goes on would not heed."""
    from ..errors import ConfigurationError

    for name, flag in given_options(context).items():
        if name not in ("resume", "data_dir", "device", "json"):
            raise ConfigurationError(
                f"{flag} cannot be given with --resume: a run keeps its settings; only --data-dir and --device may "
                "change"
            )


def show(results: dict[str, Any]) -> None:
    """A row a strategy."""
    from rich.console import Console
    from rich.table import Table

    from ..continual.figures import title_of

    plan = results["plan"]
    stream = plan["stream"] if isinstance(plan["stream"], str) else "own files"
    table = Table(title=f"{stream}, {plan['kind']}-incremental", title_justify="left")
    table.add_column("strategy")
    columns = {
        "average_accuracy": "accuracy, %",
        "backward_transfer": "BWT, points",
        "forgetting": "forgetting, points",
    }
    for title in (*columns.values(), "time, s"):
        table.add_column(title, justify="right")
    for name, values in results["summary"].items():
        cells = []
        for metric in columns:
            value = values.get(metric)
            half = "" if value is None or value["ci95"] is None else f" ± {100 * value['ci95']:.2f}"
            cells.append("" if value is None else f"{100 * value['mean']:.2f}{half}".replace("-", "−"))
        table.add_row(title_of(name), *cells, f"{values['seconds']['mean']:.1f}")
    Console().print(table)


def _options(given: list[str]) -> dict[str, dict[str, Any]]:
    """`["ewc.ewc_lambda=10"]` → `{"ewc": {"ewc_lambda": 10}}`"""
    from ..errors import ConfigurationError

    options: dict[str, dict[str, Any]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        strategy, dot, name = key.partition(".")
        if not (equals and dot and strategy and name):
            raise ConfigurationError(f"--option {text!r}: expected STRATEGY.NAME=VALUE, such as ewc.ewc_lambda=1000")
        try:
            options.setdefault(strategy, {})[name] = plain.loads(value)
        except ValueError:
            options.setdefault(strategy, {})[name] = value
    return options
