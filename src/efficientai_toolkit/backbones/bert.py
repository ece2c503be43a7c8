"""BERT-family encoders (Devlin et al. 2019; BERT, DistilBERT, MiniLM, RoBERTa) from a Hugging Face folder.

The input is one array of token ids (N, L), padded with `pad_id`: the mask, the positions and the segments are
derived from it, so that an encoder is a pure function of (parameters, x) like every other backbone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ConfigurationError, ModelError, did_you_mean
from ..nn.attention import LayerNorm, Projection, scaled_dot_product_attention
from ..pretrained import TextTokenizer, load_tokenizer, read_json, read_weights, resolve
from .bert_config import ACTIVATIONS, EncoderConfig, hf_name
from .bert_names import plain_name

POOLINGS = ("mean", "cls")
# What a checkpoint may hold besides the encoder: other heads, and buffers of older versions.
_OTHER_PARTS = re.compile(r"(pooler|cls|lm_head|classifier|pre_classifier|vocab_\w+|qa_outputs)\.|.*\.position_ids$")


class Attention(nn.Module):
    """Multi-head self-attention with the argument order and cache protocol of mlx-lm's, so that adapters fit both."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = Projection(size, size)
        self.k_proj = Projection(size, size)
        self.v_proj = Projection(size, size)
        self.o_proj = Projection(size, size)

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """x (N, L, d), mask broadcastable to (N, heads, L, L), True where attended → (N, L, d)"""
        n, length, size = x.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(n, length, self.num_heads, -1).transpose(0, 2, 1, 3)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(n, length, size))


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by the residual sum and a layer norm."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.output_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.output_norm(x + self.feed_forward(x))


class Embeddings(nn.Module):
    """Words + positions + segments, normalised. Soft prompts make the words longer than the ids, on the left."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_positions, size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.norm = LayerNorm(size, eps=config.layer_norm_eps)
        self.config = config

    def __call__(self, ids: mx.array, start: int = 0) -> tuple[mx.array, mx.array]:
        """ids (N, L) → embeddings (N, P + L, d) and mask (N, P + L), P the length of a soft prompt

        Positions count from `start`, the length of a prefix that attention puts before the tokens.
        """
        config = self.config
        words = self.word_embeddings(ids)
        mask = ids != config.pad_id
        prompt = words.shape[-2] - ids.shape[-1]
        if prompt:
            mask = mx.concatenate([mx.ones((ids.shape[0], prompt), dtype=mx.bool_), mask], axis=1)
        total = start + words.shape[-2]
        if total > self.longest:
            raise ModelError(f"{total} tokens (prompt and prefix included) are more than this encoder's {self.longest}")
        if config.family == "roberta":  # positions count from pad_id + 1, and a pad stays at pad_id
            positions = (mx.cumsum(mask.astype(mx.int32), axis=1) + start) * mask + config.pad_id
        else:
            positions = mx.arange(start, total)
        x = words + self.position_embeddings(positions)
        if "token_type_embeddings" in self:
            segments = mx.zeros((1, words.shape[-2]), dtype=mx.int32)
            if config.type_vocab_size > 1:  # everything behind the first separator is segment 1
                ends = (ids == config.sep_id).astype(mx.int32)
                segments = ((mx.cumsum(ends, axis=1) - ends) > 0) & (ids != config.pad_id)
                segments = mx.pad(segments.astype(mx.int32), [(0, 0), (prompt, 0)])
            x = x + self.token_type_embeddings(segments)
        return self.norm(x), mask

    @property
    def longest(self) -> int:
        """How many tokens the position table allows."""
        config = self.config
        return config.max_positions - (config.pad_id + 1 if config.family == "roberta" else 0)


class Encoder(nn.Module):
    """Token ids (N, L) → pooled features (N, d) → head (N, `num_classes`).

    Args:
        config: the architecture.
        num_classes: size of a linear head; `None` for none: the output is then the features.
        pooling: `mean` over the tokens (without pads and soft prompts), or `cls`, the first token.
        normalize: scale the features to length 1.
        key: for the weights (normal of 0.02 as in BERT).
    """

    def __init__(
        self,
        config: EncoderConfig,
        num_classes: int | None = None,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        key: mx.array | None = None,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigurationError(f"pooling {pooling!r} is not known{did_you_mean(pooling, POOLINGS)}")
        if config.hidden_size % config.num_heads:
            raise ConfigurationError(f"hidden size {config.hidden_size} is not a multiple of {config.num_heads} heads")
        self.config, self.pooling, self.normalize = config, pooling, normalize
        self.embeddings = Embeddings(config)
        self.layers = [EncoderLayer(config) for _ in range(config.num_layers)]
        self.head = nn.Identity() if num_classes is None else nn.Linear(config.hidden_size, num_classes)
        self.resumes_at = 0
        self._start(mx.random.key(0) if key is None else key)

    def _start(self, key: mx.array) -> None:
        modules: list[Any] = [m for _, m in sorted(self.named_modules()) if isinstance(m, (nn.Linear, nn.Embedding))]
        for module, k in zip(modules, mx.random.split(key, len(modules)), strict=True):
            module.weight = 0.02 * mx.random.normal(module.weight.shape, key=k)
            if "bias" in module:
                module.bias = mx.zeros_like(module.bias)

    def _embed(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        before = getattr(self.layers[0].attention, "prefix_length", 0) if self.layers else 0
        return self.embeddings(ids, before)

    def encode(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """ids (N, L), or what `prefix` gave → last hidden states (N, P + L, d) and mask (N, P + L)"""
        if mx.issubdtype(x.dtype, mx.floating):
            h, mask, start = x[..., :-1].astype(self.embeddings.norm.weight.dtype), x[..., -1] > 0, self.resumes_at
        else:
            (h, mask), start = self._embed(x), 0
        for layer in self.layers[start:]:
            h = layer(h, mask[:, None, None, :])
        return h, mask

    def prefix(self, ids: mx.array, layers: int) -> mx.array:
        """The first `layers` layers on ids (N, L) → (N, L, d + 1): hidden states, and the mask as last channel.

        One array, so that it takes the place of the ids: the model goes on from layer `resumes_at` when it is given
        floats. What is frozen below the first adapter is then computed once per example, not once per step.
        """
        h, mask = self._embed(ids)
        for layer in self.layers[:layers]:
            h = layer(h, mask[:, None, None, :])
        return mx.concatenate([h, mask[..., None].astype(h.dtype)], axis=-1)

    def features(self, x: mx.array) -> mx.array:
        """(N, L) → (N, d)"""
        h, mask = self.encode(x)
        prompt = h.shape[1] - x.shape[1]
        h, mask = h[:, prompt:], mask[:, prompt:]
        if self.pooling == "cls":
            pooled = h[:, 0]
        else:
            weight = mask[..., None].astype(h.dtype)
            pooled = mx.sum(h * weight, axis=1) / mx.maximum(mx.sum(weight, axis=1), 1)
        if self.normalize:
            pooled = pooled * mx.rsqrt(mx.sum(mx.square(pooled), axis=-1, keepdims=True) + 1e-24)
        return pooled

    def __call__(self, x: mx.array) -> mx.array:
        """(N, L) → (N, `num_classes`), or the features where there is no head"""
        return self.head(self.features(x))

    def hf_name(self, path: str) -> str:
        """The path in Transformers of the module or array at `path` here."""
        return hf_name(path, self.config.family)


def load_encoder(
    source: str | Path,
    num_classes: int | None = None,
    *,
    pooling: str | None = None,
    normalize: bool = False,
    dtype: mx.Dtype = mx.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    key: mx.array | None = None,
) -> Encoder:
    """A pre-trained encoder.

    Args:
        source: a Hugging Face folder, an installed package or a hub name; see `pretrained.resolve`.
        num_classes, normalize, key: see `Encoder`; the key is for the head.
        pooling: `None` takes what the folder says (`1_Pooling/config.json`), else `mean`.

    Raises:
        ModelError: another kind of model, or weights that do not fit its configuration.
    """
    folder = resolve(source, revision=revision, cache_dir=cache_dir)
    config = EncoderConfig.from_hugging_face(read_json(folder / "config.json"))
    if (folder / "tokenizer.json").is_file():
        config = dataclasses.replace(config, sep_id=_separator(folder / "tokenizer.json", config.sep_id))
    if pooling is None:
        described = folder / "1_Pooling" / "config.json"
        says_cls = described.is_file() and read_json(described).get("pooling_mode_cls_token", False)
        pooling = "cls" if says_cls else "mean"
    model = Encoder(config, num_classes, pooling=pooling, normalize=normalize, key=key)
    load_weights(model, read_weights(folder), dtype)
    mx.eval(model.parameters())
    return model


def load_weights(model: Encoder, weights: dict[str, mx.array], dtype: mx.Dtype = mx.float32) -> None:
    """Write a Transformers checkpoint's arrays into the encoder; its own head stays.

    Raises:
        ModelError: with every missing, unknown and misshapen array.
    """
    clean = {}
    for name, array in weights.items():
        name = plain_name(name)
        if not _OTHER_PARTS.match(name):
            clean[name] = array
    flat: Any = tree_flatten(model.parameters())
    own = {model.hf_name(path): (path, array) for path, array in flat if not path.startswith("head.")}
    faults = [f"{name} is missing" for name in own if name not in clean]
    faults += [f"{name} is not part of this encoder" for name in clean if name not in own]
    faults += [
        f"{name} is {tuple(clean[name].shape)} where the configuration says {tuple(array.shape)}"
        for name, (_, array) in own.items()
        if name in clean and clean[name].shape != array.shape
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ModelError(f"the weights do not fit the encoder: {'; '.join(faults[:5])}{more}")
    model.load_weights([(path, clean[name].astype(dtype)) for name, (path, _) in own.items()], strict=False)


def _separator(file: Path, default: int) -> int:
    tokens = {t["content"]: t["id"] for t in read_json(file).get("added_tokens", [])}
    return tokens.get("[SEP]", tokens.get("</s>", default))


def embed(model: Encoder, tokenizer: TextTokenizer, texts: Sequence[str], *, batch_size: int = 64) -> mx.array:
    """Features (N, d) of texts, in batches of similar length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[mx.array] = []
    for start in range(0, len(order), batch_size):
        batch = model.features(tokenizer([texts[i] for i in order[start : start + batch_size]]))
        mx.eval(batch)
        rows.append(batch)
    back = sorted(range(len(order)), key=order.__getitem__)
    return mx.concatenate(rows)[mx.array(back)]


__all__ = ["Encoder", "EncoderConfig", "embed", "load_encoder", "load_tokenizer", "load_weights"]
