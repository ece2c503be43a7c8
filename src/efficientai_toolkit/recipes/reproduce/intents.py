"""Few-shot intent classification on unseen intents: meta-learned adapters against what a user would do without them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...intervals import mean_ci95
from . import intents_rows as rows
from .episodes import EpisodeLog
from .table import Row, Run, Table, chosen, described, mean_of_seeds, note_on_seeds, trained


class IntentsTable(Table):
    """A line trains once for a data set and is measured in four settings; or it knows all classes (`rows.ALL`)."""

    def more(self, row: Row) -> dict[str, Any]:
        """The adapter, and the configuration of meta-training."""
        meta = row.config["kind"] in rows.META
        return {
            "adapter": rows.ADAPTERS.get(row.config["adapter"] or ""),
            "training": chosen(rows.training(row.config, seed=0)) if meta else None,
        }

    def random(self, row: Row) -> bool:
        """The draws over all classes, meta-training, and an adapter's start; episodes are the same for every seed."""
        kind, adapter = row.config["kind"], row.config["adapter"]
        return row.column == rows.ALL or kind in rows.META or (kind == "finetune" and adapter is not None)

    def measure(self, row: Row, run: Run) -> dict[str, Any]:
        """Accuracy in each setting, or of each draw over all classes."""
        if row.column == rows.ALL:
            return _all_classes(row, run)
        protocol = {**self.protocol(row), "seed": run.seed, "quick": run.quick}
        log = EpisodeLog(
            run.folder / "episodes" / f"{run.name}.json", protocol, run.watch.say if run.watch else lambda _: None
        )
        return _few_classes(row, run, log)

    def markdown(self, found: Sequence[Mapping[str, Any]]) -> str:
        """Unseen intents, other divisions of the classes, and all intents at once."""
        text = self.heading(found) + _unseen(found, rows.NAMES.values())
        if any(record["column"] in rows.DIVISIONS.values() for record in found):
            text += ["", rows.ABOUT_DIVISIONS, "", *_unseen(found, rows.DIVISIONS.values())]
        every = [record for record in found if record["column"] == rows.ALL]
        if every:
            sources = "; ".join(dict.fromkeys(record["source"] for record in every if record["source"]))
            text += ["", rows.ABOUT_ALL + (f" Published: {sources}." if sources else ""), ""]
            text += ["| | accuracy | published | draws |", "|---|---|---|---|"]
            for line, own in _by_line(every):
                paper = "" if own[0]["paper"] is None else f"{own[0]['paper']:.1f}"
                draws = sum(len(record["accuracies"]) for record in own)
                text.append(f"| {line} | {_cell([r['ours'] for r in own])} | {paper} | {draws} |")
        if note := note_on_seeds(found):
            text += ["", *note]
        return "\n".join(text) + "\n"


def _unseen(found: Sequence[Mapping[str, Any]], names: Collection[str]) -> list[str]:
    """A table of the columns `names`, each in four settings."""
    columns = [(name, setting) for name in names for setting in rows.SHOWN]
    text = ["| | " + " | ".join(f"{name}, {setting}" for name, setting in columns) + " | training |"]
    text += ["|---" * (len(columns) + 2) + "|"]
    for line, own in _by_line([record for record in found if record["column"] in names]):
        cells = [_cell([r["settings"][s] for r in own if r["column"] == n and s in r["settings"]]) for n, s in columns]
        seconds = max(record["train_seconds"] for record in own)
        text.append(f"| {line} | " + " | ".join(cells) + f" | {seconds:.0f} s |")
    return text


def _few_classes(row: Row, run: Run, log: EpisodeLog) -> dict[str, Any]:
    from ..intents import SETTINGS

    kind = row.config["kind"]
    bench = _bench(row, run)
    measure, details = _method(row, run)
    # Steps over a hundred texts an episode would take hours on a CPU.
    settings = [s for s in SETTINGS if kind not in rows.BY_STEPS or s.way * s.shot <= rows.STEPS_ON]
    settings = settings[:1] if run.quick else settings
    results, per_episode, took = {}, {}, {}
    for setting in settings:
        count = 8 if run.quick else rows.COMPARED if kind == "finetune" else rows.EPISODES
        accuracies, took[setting.name] = log.measure(
            setting.name, partial(measure, bench), bench.episodes(setting, count)
        )
        mean, ci95 = mean_ci95(accuracies)
        results[setting.name] = {"metric": "accuracy", "mean": mean, "ci95": ci95, "episodes": len(accuracies)}
        # Percent, for paired comparisons; one string, or the record would have a line for each.
        per_episode[setting.name] = " ".join(f"{100 * accuracy:g}" for accuracy in np.round(accuracies, 4))
    outside = kind in ("prototypes", "protonet") and row.config["dataset"] == "clinc150"
    log.close()
    return {
        "ours": results[settings[0].name],
        "settings": results,
        "per_episode": per_episode,
        "measure_seconds": took,
        **(_outside(measure, bench, run.data_dir) if outside else {}),
        **details,
    }


def _bench(row: Row, run: Run, **options: Any) -> Any:
    from ..intents import Bench

    divided = {"split_seed": row.config["split_seed"]} if "split_seed" in row.config else {}
    return Bench(row.config["dataset"], run.data_dir, tokenizer=rows.SOURCE, **divided, **options)


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
    seeds = range(run.seed * draws, (run.seed + 1) * draws)
    details: dict[str, Any] = {"train_seconds": 0.0}
    if config["kind"] == "finetune":
        training = dict(config["training"], **({"epochs": 1} if run.quick else {}))
        found = recipe.finetuned(task, rows.ADAPTERS[config["adapter"]], shots, seeds, source=rows.SOURCE, **training)
        details["training"] = training
    else:
        model, details = _frozen() if config["kind"] == "logistic" else _meta_learned(config, run, rows.TRANSFER)
        found = recipe.logistic(model, rows.SOURCE, task, shots, seeds)
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
    import mlx.core as mx

    from ...adapters import adapter_config, attach
    from ...backbones.bert import load_encoder
    from .. import intents as recipe
    from ..episode_finetune import finetune

    kind, config = row.config["kind"], row.config
    if kind in ("prototypes", "centred", "logistic"):
        model, details = _frozen()
        compare = recipe.logistic_regression if kind == "logistic" else recipe.prototypes
        known = _bench(row, run, split="train") if kind == "centred" else None
        return _Encoded(model, compare, known), details
    if kind == "finetune":
        model = load_encoder(rows.SOURCE, num_classes=5)
        if config["adapter"]:
            options = dict(rows.ADAPTERS[config["adapter"]])
            method, targets = options.pop("method"), options.pop("target_modules")
            key = mx.random.key(run.seed)
            attach(model, adapter_config(method, **options), targets, key=key, train_head=True)
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

    model = load_encoder(rows.SOURCE)
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
    from ...runs.loaded import load_learner

    settings = rows.training(config, seed=run.seed, quick=run.quick)
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
    """`compare` on features that are computed once; centred by those of the classes of `known`, where it is given."""

    def __init__(self, model: Any, compare: Any, known: Any = None):
        self.model, self.compare, self.known = model, compare, known
        self.z: np.ndarray | None = None

    def features(self, bench: Any) -> np.ndarray:
        from ..intents import centred, encode

        if self.z is None:
            self.z = encode(self.model, bench)
            if self.known is not None:
                self.z = centred(self.z, encode(self.model, self.known)[self.known.rows()])
        return self.z

    def __call__(self, bench: Any, episodes: Any) -> np.ndarray:
        return self.compare(self.features(bench), episodes)


def _outside(measure: Any, bench: Any, data_dir: Path | None) -> dict[str, Any]:
    """How well "none of these" is told, on CLINC150's out-of-scope queries: train and val calibrate, test measures."""
    from ...pretrained import load_tokenizer
    from ...tasks.intents import out_of_scope
    from ...tasks.storage import data_root
    from ..intents import Setting, encode_ids, none_of_these

    texts, tokenizer = out_of_scope(data_root(data_dir)), load_tokenizer(rows.SOURCE, max_length=64)
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
    rows=rows.ROWS,
    evaluation={},
    percent=True,
)
