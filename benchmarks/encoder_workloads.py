"""The workloads over LoRA on a frozen encoder of MiniLM's shape, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EncoderWorkload:
    title: str
    algorithm: str  # fomaml (first order) or maml (second order)
    adapted: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # layers with LoRA on query and value; the head is trained, too
    inner_lr: float = 0.05
    steps: int = 5
    tasks: int = 4
    support: int = 25
    query: int = 25
    length: int = 32  # tokens a sentence
    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536  # of the feed-forward
    rank: int = 8  # of LoRA, whose scale is 1
    classes: int = 5
    outer_lr: float = 0.001
    eps: float = 1e-3  # of Adam; as in `workloads.Workload`


_TASKS = "LoRA (r = 8) on query and value of {}, encoder 6 × 384, 4 tasks × (25 + 25) sentences of 32 tokens, 5 steps"
ENCODER_WORKLOADS = {
    "d": EncoderWorkload(f"FOMAML, {_TASKS.format('all layers')}", "fomaml"),
    "e": EncoderWorkload(f"MAML, {_TASKS.format('all layers')}, second order", "maml"),
    "f": EncoderWorkload(f"FOMAML, {_TASKS.format('the last two layers')}", "fomaml", (4, 5)),
    "g": EncoderWorkload(f"MAML, {_TASKS.format('the last two layers')}, second order", "maml", (4, 5)),
}


def encoder_arrays(work: EncoderWorkload) -> dict[str, np.ndarray]:
    """`frozen/NAME` as Transformers' `BertModel` names it, `param/…` and `episode/{sx,sy,qx,qy}`, float32 and int32.

    Trained are `param/LAYER.{query,value}.{A,B}`, A (r, in) and B (out, r) as Hugging Face PEFT has them, with B not
    zero, so that no gradient vanishes; and `param/head.{weight,bias}`. Sentences have no pads.
    """
    rng = np.random.default_rng(0)
    made = {f"frozen/{name}": value for name, value in _encoder(rng, work).items()}
    for layer in work.adapted:
        for module in ("query", "value"):
            bound = work.width**-0.5
            made[f"param/{layer}.{module}.A"] = rng.uniform(-bound, bound, (work.rank, work.width))
            made[f"param/{layer}.{module}.B"] = 0.02 * rng.standard_normal((work.width, work.rank))
    made["param/head.weight"] = rng.standard_normal((work.classes, work.width)) * work.width**-0.5
    made["param/head.bias"] = np.zeros(work.classes)
    for part, count in (("s", work.support), ("q", work.query)):
        # Each class speaks a tenth of the vocabulary of its own half of the time, so that there is something to learn.
        labels = np.tile(np.arange(count) % work.classes, (work.tasks, 1))
        own = rng.integers(0, work.vocabulary // 10, (work.tasks, count, work.length)) * 10 + labels[..., None] + 1
        common = rng.integers(1, work.vocabulary, own.shape)
        ids = np.where(rng.random(own.shape) < 0.5, own, common)
        made[f"episode/{part}x"] = np.clip(ids, 1, work.vocabulary - 1)
        made[f"episode/{part}y"] = labels
    return {path: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for path, value in made.items()}


def _encoder(rng: np.random.Generator, work: EncoderWorkload) -> dict[str, np.ndarray]:
    width, weights = work.width, {}

    def normal(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = 0.02 * rng.standard_normal(shape)

    def linear(name: str, n_out: int, n_in: int) -> None:
        normal(name, n_out, n_in)
        weights[f"{name}.bias"] = np.zeros(n_out)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(width), np.zeros(width)

    for table, rows in (("word", work.vocabulary), ("position", 512), ("token_type", 2)):
        normal(f"embeddings.{table}_embeddings", rows, width)
    norm("embeddings.LayerNorm")
    for layer in range(work.layers):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            linear(f"{at}.attention.self.{name}", width, width)
        linear(f"{at}.attention.output.dense", width, width)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", work.hidden, width)
        linear(f"{at}.output.dense", width, work.hidden)
        norm(f"{at}.output.LayerNorm")
    return weights
