"""A tiny BERT folder (random weights, whole words as tokens) and a small file of intents, for tests on texts."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from efficientai_toolkit.backbones.bert import Encoder
from efficientai_toolkit.backbones.bert_config import EncoderConfig

THINGS = {
    "garden": ["rose", "lawn", "tomato", "hedge"],
    "kitchen": ["oven", "stove", "kettle", "pan"],
    "pets": ["cat", "dog", "hamster", "parrot"],
    "bike": ["tyre", "wheel", "brake", "saddle"],
    "music": ["song", "album", "guitar", "drum"],
    "money": ["bank", "card", "loan", "cash"],
    "travel": ["train", "flight", "hotel", "visa"],
    "health": ["fever", "cough", "pill", "nurse"],
}
FRAMES = ["my {}", "the {} please", "what about the {}", "is the {} fine", "look at my {} now"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *" ".join([*FRAMES, "capital of peru"]).replace("{}", "").split()]


def sentences(label: str) -> list[str]:
    return [frame.format(thing) for thing in THINGS[label] for frame in FRAMES]


def write_intents(path: Path, labels=tuple(THINGS)) -> Path:
    rows = [f"{text},{label}" for label in labels for text in sentences(label)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_encoder(folder: Path, *, layers: int = 3, size: int = 32) -> Path:
    """A Hugging Face folder: `config.json`, `model.safetensors`, `tokenizer.json`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True, exist_ok=True)
    words = list(dict.fromkeys([*WORDS, *(thing for things in THINGS.values() for thing in things)]))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * size,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(described))
    model = Encoder(EncoderConfig.from_hugging_face(described), key=mx.random.key(7))
    from mlx.utils import tree_flatten

    weights = {model.hf_name(path): array for path, array in tree_flatten(model.parameters())}
    # Word embeddings of unit size: random features are then about the words, not about what all texts share.
    name = next(name for name in weights if "word_embeddings" in name)
    weights[name] = weights[name] * 50
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def settings(encoder: Path, dataset: Path, folder: Path, algorithm: str = "protonet", **meta_learning) -> dict:
    """A configuration that trains in a second."""
    steps = {} if algorithm == "protonet" else {"num_inner_steps": 3, "inner_lr": 0.1}
    return {
        "meta_learning": {
            "algorithm": algorithm,
            "meta_batch_size": 2,
            "num_meta_iterations": 4,
            "eval_interval": 4,
            "save_interval": 4,
            "outer_lr": 0.003,
            **steps,
            **meta_learning,
        },
        "learner": {"distance_metric": "cosine"} if algorithm == "protonet" else {},
        "task_distribution": {
            "task_families": ["intents"],
            "n_way": 2,
            "k_shot": 2,
            "query_per_class": 3,
            "num_train_tasks": None,
            "num_val_tasks": 4,
            "num_test_tasks": 4,
            "task_params": {"dataset": str(dataset), "max_length": 16},
        },
        "model": {"backbone": "encoder", "source": str(encoder)},
        "adapter": {
            "method": "lora",
            "target_modules": ["layers.2.attention.q_proj", "layers.2.attention.v_proj"],
            "rank": 2,
            "train_head": algorithm != "protonet",
        },
        "logging": {"tensorboard_enabled": False},
        "paths": {"output_dir": str(folder / "runs"), "checkpoint_dir": str(folder / "checkpoints")},
    }
