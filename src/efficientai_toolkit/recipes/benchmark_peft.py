"""Meta-learning over LoRA on an encoder of MiniLM's shape: how long a meta-step takes, with what memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..adapters import attach
from ..adapters.lora import LoRAConfig
from ..backbones.bert import Encoder
from ..backbones.bert_config import EncoderConfig
from ..backbones.frozen_prefix import FrozenPrefix
from ..devices import select_device
from ..errors import ToolkitError
from ..learners.base import MetaLearner
from ..learners.fomaml import FOMAMLLearner
from ..learners.maml import MAMLLearner
from ..tasks.episode import EpisodeStack
from .benchmark import Batches, Workload, default_device_kept, devices_of, machine, measure, seconds_of


class Size(NamedTuple):
    """A meta-batch of 5-way tasks and the encoder that it goes through."""

    encoder: EncoderConfig
    tasks: int  # of a meta-step
    sentences: int  # of a support set, and of a query set
    tokens: int  # of a sentence
    steps: int  # of the inner loop


FULL = Size(EncoderConfig(), tasks=4, sentences=25, tokens=32, steps=5)  # the configuration's defaults are MiniLM's
QUICK = Size(
    EncoderConfig(vocab_size=200, hidden_size=16, num_heads=2, intermediate_size=32, max_positions=16),
    tasks=2,
    sentences=5,
    tokens=8,
    steps=2,
)
CLASSES = 5
PEFT_LEARNERS: dict[str, type[MetaLearner]] = {"fomaml": FOMAMLLearner, "maml": MAMLLearner}  # first, second order
UPPER = 2  # layers with adapters where the frozen ones below are computed once


def meta_batch(size: Size) -> EpisodeStack:
    """Random sentences without pads: ids (tasks, sentences, tokens), labels (tasks, sentences)."""
    rng = np.random.default_rng(0)
    shape = (size.tasks, size.sentences, size.tokens)
    special = 1 + size.encoder.sep_id if size.encoder.sep_id < size.encoder.vocab_size else 1
    support, query = (mx.array(rng.integers(special, size.encoder.vocab_size, shape, np.int32)) for _ in range(2))
    labels = mx.tile(mx.arange(size.sentences) % CLASSES, (size.tasks, 1))
    return EpisodeStack(support, labels, query, labels)


def describe(size: Size) -> str:
    """The workload in a line."""
    shape = size.encoder
    return (
        f"LoRA (r = 8, query and value) on an encoder of {shape.num_layers} layers × {shape.hidden_size}, "
        f"{size.tasks} tasks × ({size.sentences} + {size.sentences}) sentences of {size.tokens} tokens, "
        f"{size.steps} inner steps; × faster: than the same adapters without the cache"
    )


def lora(learner: Callable[..., MetaLearner], size: Size, upper: bool, cached: bool) -> tuple[MetaLearner, Batches]:
    """A learner over LoRA (r = 8, query and value) and the head, and its meta-batches.

    Args:
        learner: its class.
        size: of the model and the tasks.
        upper: adapters in the last two layers, rather than in all.
        cached: look the frozen layers' outputs up for every meta-batch, rather than compute them in every step.
    """
    model = Encoder(size.encoder, CLASSES)
    layers = range(size.encoder.num_layers)[-UPPER if upper else 0 :]
    targets = [f"layers.{layer}.attention.{name}" for layer in layers for name in ("q_proj", "v_proj")]
    attach(model, LoRAConfig(rank=8), targets, train_head=True)
    stacks = [meta_batch(size)]
    made = learner(model, 0.05, 0.001, size.steps)
    if not cached:
        return made, lambda index: stacks
    prefix = FrozenPrefix(model)
    return made, lambda index: prefix.episodes(stacks)


def peft_workloads(size: Size) -> list[tuple[str, Workload]]:
    """(setting, workload): both orders × adapters in all layers, in the last two, and there with the cache."""
    settings = {"all layers": (False, False), "last two layers": (True, False), "last two, cache": (True, True)}
    return [
        (setting, Workload(name, setting, size.tasks, lambda cls=cls, where=where: lora(cls, size, *where)))
        for name, cls in PEFT_LEARNERS.items()
        for setting, where in settings.items()
    ]


def benchmark_peft(
    *,
    device: str | None = None,
    seconds: float | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Every workload on one device.

    Args:
        device: default: the GPU where there is one.
        seconds: of timing, a workload; at least three meta-steps.
        quick: a tiny encoder: it shows that everything runs, and no more.
        only: `fomaml` or `maml`; both where empty.
        each: called with every result as it comes.

    Raises:
        ToolkitError: `only` names something else.

    Returns:
        the machine, what the `workload` is, and `peft`: a row a workload as `measure` has them, with its `adapters`
        and, with the cache, `speedup`: how many times as long the step without it takes.
    """
    size, seconds = QUICK if quick else FULL, seconds_of(seconds, quick)
    if unknown := sorted(set(only) - set(PEFT_LEARNERS)):
        known = ", ".join(PEFT_LEARNERS)
        raise ToolkitError(f"no workload over LoRA is called {', '.join(unknown)}; there are {known}")
    rows: list[dict[str, Any]] = []
    with default_device_kept():
        select_device(devices_of(device)[0])
        for setting, work in peft_workloads(size):
            if only and work.name not in only:
                continue
            row = {"name": work.name, "adapters": setting, **measure(work, seconds)}
            if setting.endswith("cache"):
                row["speedup"] = rows[-1]["ms"]["median"] / row["ms"]["median"]
            rows.append(row)
            if each is not None:
                each(row)
        about = machine()
    return {**about, "workload": describe(size), "peft": rows}
