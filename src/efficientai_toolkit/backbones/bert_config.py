"""The BERT family's configurations and module names in Transformers, under one set of names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import ModelError, did_you_mean
from ..nn.activations import gelu, gelu_tanh, relu, silu

# Transformers' names.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The architecture, under one set of names for all families."""

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 1536
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    pad_id: int = 0
    sep_id: int = 102

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> EncoderConfig:
        """From a `config.json`."""
        family = config.get("model_type", "bert")
        if family not in HF_NAMES:
            raise ModelError(f"model type {family!r} is not a BERT-type encoder{did_you_mean(family, HF_NAMES)}")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ModelError(
                f"position_embedding_type {config['position_embedding_type']!r} is not supported: absolute is"
            )
        names = _DISTILBERT_KEYS if family == "distilbert" else _BERT_KEYS
        values = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
        if family == "distilbert":
            values["type_vocab_size"] = 0
        if family == "roberta":
            values = {"pad_id": 1, "type_vocab_size": 1, **values}
        out = cls(family=family, **values)
        if out.activation not in ACTIVATIONS:
            raise ModelError(f"activation {out.activation!r} is not known{did_you_mean(out.activation, ACTIVATIONS)}")
        return out


_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "pad_id": "pad_token_id",
    "sep_id": "sep_token_id",
}
_DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "activation": "activation",
    "pad_id": "pad_token_id",
}

_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_BERT = {
    **_EMBEDDINGS,
    "layers.#.attention": "encoder.layer.#.attention.self",
    "layers.#.attention.q_proj": "encoder.layer.#.attention.self.query",
    "layers.#.attention.k_proj": "encoder.layer.#.attention.self.key",
    "layers.#.attention.v_proj": "encoder.layer.#.attention.self.value",
    "layers.#.attention.o_proj": "encoder.layer.#.attention.output.dense",
    "layers.#.attention_norm": "encoder.layer.#.attention.output.LayerNorm",
    "layers.#.feed_forward.up_proj": "encoder.layer.#.intermediate.dense",
    "layers.#.feed_forward.down_proj": "encoder.layer.#.output.dense",
    "layers.#.output_norm": "encoder.layer.#.output.LayerNorm",
}
_DISTILBERT = {
    **_EMBEDDINGS,
    "layers.#.attention": "transformer.layer.#.attention",
    "layers.#.attention.q_proj": "transformer.layer.#.attention.q_lin",
    "layers.#.attention.k_proj": "transformer.layer.#.attention.k_lin",
    "layers.#.attention.v_proj": "transformer.layer.#.attention.v_lin",
    "layers.#.attention.o_proj": "transformer.layer.#.attention.out_lin",
    "layers.#.attention_norm": "transformer.layer.#.sa_layer_norm",
    "layers.#.feed_forward.up_proj": "transformer.layer.#.ffn.lin1",
    "layers.#.feed_forward.down_proj": "transformer.layer.#.ffn.lin2",
    "layers.#.output_norm": "transformer.layer.#.output_layer_norm",
}
# Module path here -> module path in Transformers, `#` for the layer's number.
HF_NAMES: dict[str, dict[str, str]] = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT}


def hf_name(path: str, family: str) -> str:
    """The path in Transformers of the encoder's module or array at `path`."""
    table = HF_NAMES[family]
    number = re.search(r"(?<=^layers\.)\d+", path)
    generic = re.sub(r"^layers\.\d+", "layers.#", path)
    for cut in range(generic.count(".") + 1):
        module, *leaf = generic.rsplit(".", cut) if cut else [generic]
        if module in table:
            return ".".join([table[module].replace("#", number.group() if number else ""), *leaf])
    return path
