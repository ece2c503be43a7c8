"""Tiny model folders with random weights and a trained tokenizer, as mlx-lm and Transformers load them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
CONFIGS = {
    "llama": {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "qwen3": {
        **SIZES,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        "head_dim": 8,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 64,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_ctx": 64,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
    },
}


def write_lm(folder: Path, kind: str) -> Path:
    """A folder of a `kind`-type language model."""
    import importlib

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)  # of what the model itself draws
    model = module.Model(module.ModelArgs.from_dict(CONFIGS[kind]))
    flat = dict(tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(0), len(flat))
    weights = {n: a + 0.1 * mx.random.normal(a.shape, key=k) for (n, a), k in zip(flat.items(), keys, strict=True)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def ids() -> mx.array:
    return mx.random.randint(0, 64, (2, 9), key=mx.random.key(3))
