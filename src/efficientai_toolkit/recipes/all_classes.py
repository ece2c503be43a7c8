"""A few examples of every class of a data set, measured on its whole test set: no class is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backbones.bert import Encoder, embed, load_encoder
from ..pretrained import load_tokenizer
from .finetune import Task, Texts, drawn, finetune
from .intents import encode_ids, fit_logistic

# Weights of the cross entropy that logistic regression chooses from.
_C = (1.0, 3.0, 10.0, 30.0, 100.0)
_LENGTH = 64  # tokens after which a text is cut


class Measured(NamedTuple):
    """Accuracy on the test set by draw, and what was chosen before the first of them."""

    accuracies: list[float]
    chosen: dict[str, Any]


def validation(task: Task, shots: int, seed: int, limit: int = 1500) -> Task:
    """A draw of `shots` examples a class that is measured on (at most `limit`) training texts outside of it.

    What a method must choose is chosen here, so that the test set decides nothing. Other draws share texts with it.
    """
    own = drawn(task, shots, seed)
    used = set(own.train.texts)
    rest = [i for i, text in enumerate(task.train.texts) if text not in used]
    order = np.random.default_rng(seed).permutation(rest)[:limit].tolist()
    return own._replace(test=task.train.take(order))


def logistic(model: Encoder, source: str, task: Task, shots: int, seeds: Sequence[int]) -> Measured:
    """Logistic regression on the unit features of `model`; its weight `c` is the best on a validation draw.

    Args:
        model: gives the features.
        source: whose tokenizer it reads with.
        task: with test texts.
        shots: examples of each class.
        seeds: of the draws.
    """
    tokenizer = load_tokenizer(source, max_length=_LENGTH)

    def features(texts: Texts | None) -> np.ndarray:
        assert texts is not None
        return encode_ids(model, np.array(tokenizer(list(texts.texts))), tokenizer.pad_id)

    c, scores = _best_c(features, task, shots, seeds[0])
    held = features(task.test)
    accuracies = []
    for seed in seeds:
        part = drawn(task, shots, seed)
        accuracies.append(_fitted(part, c, features(part.train), held))
    return Measured(accuracies, {"c": c, "validation_accuracy": scores})


def finetuned(
    task: Task, adapter: dict[str, Any], shots: int, seeds: Sequence[int], *, source: str, **settings: Any
) -> Measured:
    """An adapter (`method`, `target_modules`, options) fine-tuned on each draw, from a logistic regression as head.

    Args:
        task, shots, seeds: see `logistic`; the weight of the regression is chosen as there.
        adapter: what is trained besides the head.
        source: the encoder.
        settings: of `finetune`.
    """
    options = dict(adapter)
    method, targets = options.pop("method"), options.pop("target_modules")
    frozen, tokenizer = load_encoder(source), load_tokenizer(source, max_length=_LENGTH)

    def raw(texts: Texts | None) -> np.ndarray:
        assert texts is not None
        return np.array(embed(frozen, tokenizer, list(texts.texts)))  # type: ignore[arg-type]

    c, scores = _best_c(lambda texts: _unit(raw(texts)), task, shots, seeds[0])
    accuracies = []
    for seed in seeds:
        part = drawn(task, shots, seed)
        z = raw(part.train)
        weight, bias = fit_logistic(_unit(z), part.train.labels, len(part.names), c=c)
        head = weight / np.linalg.norm(z, axis=1).mean(), bias  # the model's head takes features of their own length
        done = finetune(
            part, method, target_modules=targets, options=options, source=source, max_length=_LENGTH, seed=seed,
            head=head, measure_each=False, **settings,
        )  # fmt: skip
        accuracies.append(done.curve[-1]["score"])
    return Measured(accuracies, {"c": c, "validation_accuracy": scores})


def _best_c(
    features: Callable[[Texts | None], np.ndarray], task: Task, shots: int, seed: int
) -> tuple[float, dict[str, float]]:
    """The weight with the best accuracy on a validation draw that none of the measured ones is; all accuracies."""
    choice = validation(task, shots, 1_000_000 + seed)
    z, held = features(choice.train), features(choice.test)
    scores = {c: _fitted(choice, c, z, held) for c in _C}
    return max(scores, key=scores.__getitem__), {f"{c:g}": score for c, score in scores.items()}


def _fitted(part: Task, c: float, z: np.ndarray, held: np.ndarray) -> float:
    assert part.test is not None
    weight, bias = fit_logistic(z, part.train.labels, len(part.names), c=c)
    return float(((held @ weight.T + bias).argmax(1) == part.test.labels).mean())


def _unit(z: np.ndarray) -> np.ndarray:
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
