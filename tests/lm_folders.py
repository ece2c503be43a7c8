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
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_CHAT_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>"]


def write_lm(folder: Path, kind: str, chat_template: str | None = None) -> Path:
    """A folder of a `kind`-type language model.

    With `chat_template` it pads with 3, its configuration's end of text is 2 and its tokenizer's is 5, as in models
    whose base ends texts by another token than their chats.
    """
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
    ends = {"pad_token_id": 3, "eos_token_id": [2]} if chat_template else {}
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], **ends}))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", *(_CHAT_TOKENS if chat_template else [])]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=special)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    if chat_template:
        about |= {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
        (folder / "chat_template.jinja").write_text(chat_template)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def ids() -> mx.array:
    return mx.random.randint(0, 64, (2, 9), key=mx.random.key(3))
