"""P-tuning: a soft prompt that a small trained network makes (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Count, Positive
from .base import Adapter, Site, kaiming_uniform, linear_from
from .prompt_tuning import Prompt, PromptConfig, embedding_width


class PTuning(Prompt):
    """The prompt as MLP(e): e (P, d) trained, through d → h → h → d with ReLU between.

    Parameters: P · d + (d + 1) h + (h + 1) h + (h + 1) d. Differs from the paper in: no bidirectional LSTM before the
    network (Hugging Face PEFT's default too), and the prompt stands before the input, not between its parts.
    """

    def __init__(self, embedding: mx.array, hidden: int, key: mx.array):
        nn.Module.__init__(self)
        width = embedding.shape[1]
        sizes = [width, hidden, hidden, width]
        self.embedding = embedding
        self.layers = [
            linear_from(kaiming_uniform(k, n, (m, n)), mx.zeros((m,)))
            for n, m, k in zip(sizes[:-1], sizes[1:], mx.random.split(key, 3), strict=True)
        ]

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        start, network = mx.random.split(key)
        width = embedding_width(base)
        return cls(mx.random.normal((config.length, width), key=start), config.hidden or width, network)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        d = embedding_width(base)
        h = config.hidden or d
        return config.length * d + (d + 1) * h + (h + 1) * h + (h + 1) * d

    def tokens(self) -> mx.array:
        x = self.embedding
        for layer in self.layers[:-1]:
            x = mx.maximum(_dense(layer, x), 0)
        return _dense(self.layers[-1], x)


def _dense(layer: nn.Linear, x: mx.array) -> mx.array:
    # Not `addmm`, which `vmap` refuses where the tasks differ in the bias alone: CAVIA's first layer here.
    return x @ layer.weight.T + layer.bias


@dataclass(frozen=True)
class PTuningConfig(PromptConfig):
    """Defaults: Hugging Face PEFT's P-tuning guide: 20 tokens, hidden size 128, 1e-3.

    Args:
        hidden: width of the network; `None` takes the embedding's.
    """

    hidden: Count | None = 128
    learning_rate: Positive = 1e-3

    adapter: ClassVar[type[Adapter]] = PTuning
