"""Does every shipped configuration train to its end, with several seeds, without a number that is not finite?

    python benchmarks/stability.py [CONFIG.yaml …] [--seeds 0 1 2] [--json FILE]

Trains each configuration (default: all of `configs/`) over its full length through `runs.train`, in a temporary
folder. After every run the record and its table (.md) are written; a run that is in the record is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientai_toolkit.config import MetaLearningConfig, Override
from efficientai_toolkit.errors import DivergenceError
from efficientai_toolkit.files import read_json, write_json, write_text
from efficientai_toolkit.runs.experiment import system_info
from efficientai_toolkit.runs.train import train

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=sorted((ROOT / "configs").glob("*.yaml")))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "records" / "stability.json")
    options = parser.parse_args()
    record: dict[str, Any] = read_json(options.json) if options.json.is_file() else {"runs": []}
    done = {(run["config"], run["seed"]) for run in record["runs"]}
    for path in options.configs:
        for seed in options.seeds:
            if (path.name, seed) in done:
                continue
            run = trained(path, seed)
            print(json.dumps(run), flush=True)
            about = {key: value for key, value in system_info().items() if key not in ("command", "seed")}
            record = {"command": "python benchmarks/stability.py", "system": about, "runs": [*record["runs"], run]}
            write_json(options.json, record)
            write_text(options.json.with_suffix(".md"), table(record["runs"]))


def trained(path: Path, seed: int) -> dict[str, Any]:
    """What became of the configuration in the file `path` with `seed`; `not_finite` names metrics and iterations."""
    with tempfile.TemporaryDirectory() as folder:
        config = MetaLearningConfig.from_yaml(
            path,
            [
                Override("meta_learning.seed", seed, "--seeds"),
                Override("paths.output_dir", f"{folder}/runs", "stability"),
                Override("paths.checkpoint_dir", f"{folder}/checkpoints", "stability"),
                Override("logging.tensorboard_enabled", False, "stability"),
            ],
        )
        started, stopped, iterations = time.perf_counter(), "", 0
        try:
            report = train(config)
            stopped, iterations = report["stopped"], report["iterations"]
        except DivergenceError as error:
            stopped = str(error).partition(";")[0]
        seconds = time.perf_counter() - started
        rows = [json.loads(line) for file in Path(folder).rglob("metrics.jsonl") for line in file.open()]
    validations = [row for row in rows if "val_loss" in row and row["iteration"]]  # 0 is before the first step
    name = "val_accuracy" if validations and "val_accuracy" in validations[-1] else "val_loss"
    last = validations[-1] if validations else {}
    return {
        "config": path.name,
        "seed": seed,
        "algorithm": config.algorithm,
        "iterations": iterations,
        "of": config.meta_learning.num_meta_iterations,
        "stopped": stopped,
        "not_finite": list(not_finite(rows)),
        "figure": name,
        "unadapted": last.get(f"{name}_before"),
        "last": last.get(name),
        "ci95": last.get(f"{name}_ci95"),
        "seconds": round(seconds, 1),
    }


def not_finite(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for name, value in row.items():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                yield f"{name} at iteration {row.get('iteration')}"


def table(runs: list[dict[str, Any]]) -> str:
    """A line a configuration, its seeds side by side."""
    lines = [
        "| configuration | learner | iterations | seeds | not finite | last validation | seconds |",
        "|---" * 7 + "|",
    ]
    for config in dict.fromkeys(run["config"] for run in runs):
        own = sorted((run for run in runs if run["config"] == config), key=lambda run: run["seed"])
        bad = [text for run in own for text in run["not_finite"]]
        bad += [run["stopped"] for run in own if run["stopped"] != "completed"]
        figures = ", ".join("–" if run["last"] is None else f"{run['last']:.3f}" for run in own)
        cells = [
            f"`{config}`",
            own[0]["algorithm"],
            ", ".join(dict.fromkeys(f"{run['iterations']:,} of {run['of']:,}" for run in own)),
            ", ".join(str(run["seed"]) for run in own),
            "; ".join(bad) or "none",
            f"{own[0]['figure'].removeprefix('val_')} {figures}",
            ", ".join(f"{run['seconds']:,.{0 if run['seconds'] >= 10 else 1}f}" for run in own),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
