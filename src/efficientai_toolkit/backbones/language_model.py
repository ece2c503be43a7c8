"""Causal language models of mlx-lm as classifiers by label words, and their next-token loss.

Any folder that `mlx_lm.load` loads is a model here; adapters and learners work on it as on every other module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from ..nn.losses import target_logits
from ..pretrained import TextTokenizer, is_language_model, load_tokenizer, resolve


class LanguageModelConfig(NamedTuple):
    """What tells one language model from another."""

    hidden_size: int
    num_layers: int
    vocab_size: int


class LanguageModel(nn.Module):
    """A causal language model that tells labels apart by the word that would come next.

    The features of a text are the hidden state at its last token, from which the model predicts what follows. With
    label words, row c of `head` starts as the output embedding of word c, so that `head(features)` are the next-token
    logits of the words; trained, the head moves from there. Without, its rows are small and random.

    Args:
        lm: of mlx-lm: `lm.model(ids)` are the hidden states (N, L, d).
        pad_id: what short texts are filled up with on the right. Attention is causal, so no mask is needed.
        num_classes: rows of the head.
        key: of the rows without a label word.

    Raises:
        ModelError: the model's hidden states or output embedding cannot be found.
    """

    inner = "lm."  # where the model of other libraries' files stands in this one: their names go without it

    def __init__(self, lm: Any, pad_id: int, num_classes: int = 2, *, key: mx.array | None = None):
        super().__init__()
        if not callable(getattr(lm, "model", None)) or not hasattr(lm.model, "embed_tokens"):
            raise ModelError(f"{type(lm).__module__} keeps its hidden states elsewhere than in `model`; not supported")
        self.lm, self.pad_id = lm, pad_id
        # The input embedding knows both sizes, quantised or not.
        rows = lm.model.embed_tokens(mx.array([0]))
        vocabulary = lm.model.embed_tokens.weight.shape[0]
        self.config = LanguageModelConfig(rows.shape[-1], len(lm.model.layers), vocabulary)
        self.head = nn.Linear(self.config.hidden_size, num_classes)
        bound = self.config.hidden_size**-0.5
        shape = (num_classes, self.config.hidden_size)
        self.head.weight = mx.random.uniform(-bound, bound, shape, key=mx.random.key(0) if key is None else key)
        self.head.bias = mx.zeros((num_classes,))

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, from the embedding up."""
        return self.lm.model.layers

    def __call__(self, ids: mx.array) -> mx.array:
        """ids (N, L) → logits of the classes (N, C)."""
        return self.head(self.features(ids))

    def features(self, ids: mx.array) -> mx.array:
        """ids (N, L), right-padded → float32 hidden states (N, d) at each text's last token."""
        places = mx.arange(ids.shape[-1])
        last = mx.max(mx.where(ids != self.pad_id, places, 0), axis=-1)
        here = (places == last[:, None]).astype(mx.float32)
        # A sum over one-hot rows, unlike a gather, behaves under every transform.
        return mx.sum(here[..., None] * self.lm.model(ids).astype(mx.float32), axis=1)

    def next_token_logits(self, ids: mx.array) -> mx.array:
        """ids (N, L) → logits of the token after each (N, L, V)."""
        return self.lm(ids)

    def label_rows(self, words: Sequence[Sequence[int]]) -> mx.array:
        """(C, d) rows of the output embedding, of words of several tokens the mean.

        `features @ rows.T` are then the next-token logits of the words (a word's mean over its tokens).
        """
        output = self.lm.lm_head if "lm_head" in self.lm else self.lm.model.embed_tokens
        output = output.base if "base" in output else output
        chosen = mx.array([token for tokens in words for token in tokens])
        if isinstance(output, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            parts = (output[name][chosen] for name in ("weight", "scales", "biases"))
            rows = mx.dequantize(*parts, group_size=output.group_size, bits=output.bits)
        else:
            rows = output.weight[chosen]
        owner = [number for number, tokens in enumerate(words) for _ in tokens]
        members = (mx.array(owner) == mx.arange(len(words))[:, None]).astype(mx.float32)
        return members @ rows.astype(mx.float32) / mx.sum(members, axis=1, keepdims=True)


def load_language_model(
    source: str | Path,
    *,
    num_classes: int = 2,
    label_words: Sequence[str] | None = None,
    key: mx.array | None = None,
) -> LanguageModel:
    """The language model of a folder or hub name, as mlx-lm loads it.

    Args:
        source: a folder with `config.json` and safetensors; or a hub name.
        num_classes: rows of the head; with `label_words` as many as these.
        label_words: of each class: the head starts at their rows of the output embedding.
        key: of rows without a word.

    Raises:
        ModelError: mlx-lm is not installed or does not know this architecture.
    """
    try:
        from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError("language models need mlx-lm: pip install 'efficientai-toolkit[lm]'") from error
    folder = resolve(source)
    if not is_language_model(folder):
        raise ModelError(f"{folder} holds no causal language model; encoders are loaded by backbone 'encoder'")
    try:
        lm, _ = load_model(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(f"mlx-lm does not load {folder}: {error}") from error
    tokenizer = load_tokenizer(folder)
    model = LanguageModel(lm, tokenizer.pad_id, len(label_words) if label_words else num_classes, key=key)
    if label_words:
        model.head.weight = model.label_rows(label_tokens(tokenizer, label_words))
    return model


def label_tokens(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each label word as it follows on a text (" lost card"), underscores read as spaces.

    Raises:
        ModelError: a word has none.
    """
    found = [
        tokenizer.backend.encode(" " + " ".join(word.split("_")).strip(), add_special_tokens=False).ids
        for word in words
    ]
    for word, tokens in zip(words, found, strict=True):
        if not tokens:
            raise ModelError(f"the label {word!r} has no token")
    return found


def next_token_loss(logits: mx.array, ids: mx.array, counted: mx.array) -> mx.array:
    """Mean cross entropy of each counted token given those before it.

    Args:
        logits: (N, L, V).
        ids: (N, L).
        counted: (N, L) which tokens are to be predicted; prompts and padding are not. The first never is.
    """
    logits, targets = logits[:, :-1].astype(mx.float32), ids[:, 1:]
    weight = counted[:, 1:].astype(mx.float32)
    losses = mx.logsumexp(logits, axis=-1) - target_logits(logits, targets)
    return mx.sum(weight * losses) / mx.maximum(mx.sum(weight), 1)
