"""Three scenarios of continual learning: the protocol of van de Ven, Tuytelaars & Tolias (2022)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...continual.figures import title_of
from ...continual.metrics import average_accuracy
from ...continual.run import Plan
from ...continual.run import run as run_plan
from ...intervals import mean_ci95
from ..continual import plan_of
from .table import Row, Run, Table

SOURCE = "van de Ven & Tolias 2019 (replay: van de Ven, Tuytelaars & Tolias 2022), means of 20 seeds"
KINDS = ("task", "domain", "class")

# Published average accuracies in percent, task / domain / class.
SPLIT: dict[str, tuple[float, float, float]] = {
    "naive": (87.19, 59.21, 19.90),
    "ewc": (98.64, 63.95, 20.01),
    "si": (99.09, 65.36, 19.99),
    "lwf": (99.57, 71.50, 23.85),
    "replay": (98.98, 93.75, 88.79),
    "joint": (99.66, 98.42, 97.94),
}
PERMUTED: dict[str, tuple[float | None, ...]] = {
    "naive": (81.79, 78.51, 17.26),
    "ewc": (94.74, 94.31, 25.04),
    "si": (94.75, 95.33, 29.31),
    "lwf": (69.84, 72.64, 22.64),
    "replay": (None, None, None),
    "joint": (97.68, 97.59, 97.59),
}
SEEDS = {"split-mnist": 3, "permuted-mnist": 1}


def _rows(stream: str, published: dict[str, Any], title: str) -> tuple[Row, ...]:
    return tuple(
        Row(
            name=f"{stream.partition('-')[0]}-{kind}-{strategy}",
            line=title_of(strategy),
            column=f"{title}, {kind}-incremental",
            config={"stream": stream, "kind": kind, "strategy": strategy},
            paper=values[index],
            source=SOURCE,
        )
        for index, kind in enumerate(KINDS)
        for strategy, values in published.items()
    )


class ContinualTable(Table):
    """Rows are strategies in a scenario; each is run with several seeds, `--seed 1` with as many others."""

    def plan(self, row: Row, *, seed: int, quick: bool) -> Plan:
        """What a row runs."""
        stream = row.config["stream"]
        count = 1 if quick else SEEDS[stream]
        return plan_of(
            {
                "stream": stream,
                "kind": row.config["kind"],
                "strategies": {row.config["strategy"]: {}},
                "seeds": range(seed * count, (seed + 1) * count),
                **({"quick": True} if quick else {}),
            }
        )

    def more(self, row: Row) -> dict[str, Any]:
        """The whole plan, with the strategy's own defaults."""
        return {"plan": self.plan(row, seed=0, quick=False).describe()}

    def measure(self, row: Row, run: Run) -> dict[str, Any]:
        """Every seed of a row, learned from the context on where it was stopped.

        Its run folder is of this plan alone: another (of changed settings, or a quick one) begins anew.
        """
        plan = self.plan(row, seed=run.seed, quick=run.quick)
        digest = hashlib.sha256(json.dumps(plan.describe(), sort_keys=True).encode()).hexdigest()[:8]
        folder = run.folder / "runs" / f"{run.name}-{digest}"
        results = run_plan(plan, folder, data_dir=run.data_dir, watch=lambda line: print(line, flush=True))
        found = results["summary"][row.config["strategy"]]
        accuracy = found["average_accuracy"]
        return {
            "ours": {
                "metric": "accuracy",
                "mean": accuracy["mean"],
                "ci95": accuracy["ci95"],
                "steps": plan.iterations,
                "seeds": found["seeds"],
            },
            "train_seconds": found["seconds"]["mean"],
            "iterations": plan.iterations,
            "config": plan.describe(),
            "evaluation": {"summary": found, "contexts": results["contexts"], "runs": results["runs"]},
        }

    def markdown(self, found: Sequence[Mapping[str, Any]]) -> str:
        """The table as it stands: a line a strategy, a column a scenario."""
        cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for record in found:
            cells.setdefault((record["line"], record["column"]), []).append(record)
        columns = [c for c in dict.fromkeys(row.column for row in self.rows) if any(c == column for _, column in cells)]
        lines = [name for name in dict.fromkeys(row.line for row in self.rows) if any(name == n for n, _ in cells)]
        text = self.heading(found)
        text += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for line in lines:
            text.append(f"| {line} | " + " | ".join(_cell(cells.get((line, column), [])) for column in columns) + " |")
        text += ["", "Published: " + "; ".join(dict.fromkeys(record["source"] for record in found)) + "."]
        return "\n".join(text) + "\n"


def _cell(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    accuracies = [average_accuracy(run["matrix"]) for r in records for run in r["evaluation"]["runs"].values()]
    mean, ci95 = mean_ci95(accuracies)
    half = "" if ci95 is None else f" ± {100 * ci95:.2f}"
    paper = records[0]["paper"]
    published = "" if paper is None else f" ({paper:.2f})"
    return f"**{100 * mean:.2f}**{half}{published}" + (f", {len(accuracies)} seeds" if len(records) > 1 else "")


TABLE = ContinualTable(
    name="continual",
    title="Continual learning",
    about=(
        "Average accuracy in percent over all contexts after the last, ± 95 % interval over the seeds; the published "
        "number in brackets. Split-MNIST: three seeds (order of the digits, weights, batches), five contexts of two "
        "digits, MLP 784-400-400, 2,000 steps of 128 images a context, Adam at 0.001. Permuted-MNIST: one seed, ten "
        "contexts, MLP 1024-1000-1000, 5,000 steps, 0.0001. Joint training takes the steps of all contexts at once. "
        "Replay keeps 100 images a class (permuted: 10)."
    ),
    base={},
    evaluation={},
    rows=(*_rows("split-mnist", SPLIT, "Split"), *_rows("permuted-mnist", PERMUTED, "Permuted")),
    percent=True,
)
