"""Prompt tuning: trained vectors before the embedded input (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Count, Positive
from .base import Adapter, AdapterConfig, Site

_COMMON = 5000  # Lester et al. start from the embeddings of the most common tokens, which have the lowest ids


def embedding_width(base: Any) -> int:
    return base.dims if isinstance(base, nn.QuantizedEmbedding) else base.weight.shape[-1]


class Prompt(Adapter):
    """ids (…, L) → [prompt; base(ids)] (…, P + L, d): the model sees P more tokens on the left.

    The shipped encoders mask, place and pool accordingly, and `LanguageModel` keeps what belongs to the last L (the
    logits of the model in it gain P leading positions); it refuses a model with learned positions, such as GPT-2. For
    training and scoring: incremental generation would repeat the prompt at every token.
    Starts as the embeddings of random common tokens. Parameters: P · d.
    """

    wants: ClassVar[str] = "a word embedding"
    combines: ClassVar[bool] = False

    def __init__(self, prompt: mx.array):
        super().__init__()
        self.prompt = prompt

    @classmethod
    def fits(cls, base: Any) -> bool:
        return isinstance(base, (nn.Embedding, nn.QuantizedEmbedding))

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        tokens = mx.random.randint(0, min(_COMMON, base.weight.shape[0]), (config.length,), key=key)
        return cls(base(tokens).astype(mx.float32))

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return config.length * embedding_width(base)

    def tokens(self) -> mx.array:
        """(P, d)"""
        return self.prompt

    def __call__(self, base: Any, ids: mx.array) -> mx.array:
        x = base(ids)
        prompt = self.tokens().astype(x.dtype)
        prompt = mx.broadcast_to(prompt, (*x.shape[:-2], *prompt.shape))
        return mx.concatenate([prompt, x], axis=-2)


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """Default: 20 tokens, the least that the paper finds enough, and 3e-2: Hugging Face PEFT's for Adam (the paper's
    0.3 is for Adafactor).

    Args:
        length: P.
    """

    length: Count = 20
    learning_rate: Positive = 3e-2

    adapter: ClassVar[type[Adapter]] = Prompt
    targets: ClassVar = (("word_embedding",), ("embedding",))
