"""`train`: meta-train from a configuration, or go on with a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError, OutputError, ToolkitError
from ..files import disk_is_full
from .options import Config, DataDir, Device, Json, Output, Seed, Set, echo_json, load_config, overrides
from .shown import command


def train(
    config: Config = None,
    algorithm: Annotated[str | None, typer.Option("--algorithm", "-a", help="Learner; `info` lists them.")] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", "-n", help="Outer steps in all (default: the configuration's).")
    ] = None,
    seed: Seed = None,
    data_dir: DataDir = None,
    output: Output = None,
    sets: Set = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="A run folder: go on from its newest checkpoint.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="First part of the run folder's name.")] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Afterwards test, draw plots and write an HTML report.")
    ] = True,
    device: Device = None,
    json: Json = False,
) -> None:
    """Meta-train; without options on the embedded default, in seconds.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    from ..devices import select_device

    select_device(device)
    flags = overrides(
        sets,
        algorithm=("meta_learning.algorithm", algorithm),
        iterations=("meta_learning.num_meta_iterations", iterations),
        seed=("meta_learning.seed", seed),
        data_dir=("paths.data_dir", data_dir),
        output=("paths.output_dir", output),
    )
    if resume is not None:
        _only_what_resume_takes(config=config, algorithm=algorithm, seed=seed, output=output, name=name, set=sets)
        done = _run(None, resume, flags, name, json)
    else:
        done = _run(load_config(config, flags), None, (), name, json)
    interrupted = done["stopped"] == "interrupted"
    if not json:
        _tell(done)
    if report and not interrupted:
        from ..runs.report import write_report

        try:
            page = write_report(done["run"], data_dir=None if data_dir is None else str(data_dir)).html
        except ToolkitError as error:  # what was learned is safe
            again = command("report", done["run"], data_dir=data_dir)
            print(f"Warning: no report: {error}. The run is whole; later: {again}", file=sys.stderr)
        else:
            done["report"] = str(page)
            if not json:
                print(f"Report:     {page}")
    if json:
        echo_json(done)
    if interrupted:
        raise SystemExit(130)


def _run(config: Any, resume: Path | None, flags: Any, name: str | None, json: bool) -> dict[str, Any]:
    from ..runs import train as loop
    from .progress import watch

    # Where standard output is for the JSON line, progress goes to standard error.
    look = watch(sys.stderr if json else sys.stdout)
    try:
        if resume is not None:
            return loop.resume(resume, flags, watch=look)
        return loop.train(config, name=name, watch=look)
    except OutputError as error:
        if look.run is None or not disk_is_full(error):
            raise
        raise OutputError(f"{error}, then go on with `{command('train', resume=look.run)}`") from error


def _only_what_resume_takes(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ConfigurationError(
                f"--{name} cannot be given with --resume: a run keeps its settings; "
                "only --iterations, --data-dir and --device may change"
            )


def _tell(report: dict[str, Any]) -> None:
    from .progress import validation

    at = report["iterations"]
    if report["stopped"] == "interrupted":
        print(f"Stopped at iteration {at} of {report['of']}; everything is saved. Go on with:")
        print(f"  {command('train', resume=report['run'])}")
        return
    early = {"patience": "no better for long enough", "target_accuracy": "the target accuracy is reached"}
    why = f" ({early[report['stopped']]})" if report["stopped"] in early else ""
    print(f"Done after {at} iterations{why} in {report['seconds']:.1f} s.")
    if report["best"]:
        print(f"Best at iteration {report['best']['iteration']}, {validation(report['best'])}")
    print(f"Run folder: {report['run']}")
    print(f"Evaluate:   {command('evaluate', checkpoint=report['run'])}")
