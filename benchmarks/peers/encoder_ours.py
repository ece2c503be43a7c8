"""This project: LoRA on an encoder, with or without the cache of the frozen layers below the first adapter."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.backbones.bert import Encoder, load_weights
from efficientai_toolkit.backbones.bert_config import EncoderConfig
from efficientai_toolkit.backbones.frozen_prefix import FrozenPrefix
from efficientai_toolkit.learners.fomaml import FOMAMLLearner
from efficientai_toolkit.learners.maml import MAMLLearner
from efficientai_toolkit.nn.functional import update
from efficientai_toolkit.tasks.episode import EpisodeStack

PROJECTIONS = {"query": "q_proj", "value": "v_proj"}


def make(work, arrays, contestant):
    config = EncoderConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        num_layers=work.layers,
        num_heads=work.heads,
        intermediate_size=work.hidden,
        sep_id=-1,  # one segment: Transformers derives none from the ids
    )
    model = Encoder(config, work.classes)
    load_weights(model, {path[7:]: mx.array(value) for path, value in arrays.items() if path.startswith("frozen/")})
    targets = [f"layers.{layer}.attention.{name}" for layer in work.adapted for name in PROJECTIONS.values()]
    attach(model, adapter_config("lora", rank=work.rank, alpha=work.rank), targets, train_head=True)
    update(model, dict(_ours(path[6:], value) for path, value in arrays.items() if path.startswith("param/")))
    cls = MAMLLearner if work.algorithm == "maml" else FOMAMLLearner
    adam = optim.Adam(work.outer_lr, eps=work.eps, bias_correction=True)
    learner = cls(model, work.inner_lr, work.outer_lr, work.steps, outer_optimizer=adam)
    stacks = [EpisodeStack(*(mx.array(arrays[f"episode/{part}"]) for part in ("sx", "sy", "qx", "qy")))]
    prefix = FrozenPrefix(model) if contestant.endswith("cache") else None

    def steps(count):
        """Query loss of the last of `count` meta-steps; the sentences are looked up in the cache for every one."""
        metrics = {}
        for _ in range(count):
            metrics = learner.meta_update(stacks if prefix is None else prefix.episodes(stacks))
            mx.eval(learner.meta, metrics)
        return metrics["query_loss"].item()

    return steps


def _ours(path, value):
    """`LAYER.query.A` (r, in) → `layers.LAYER.attention.q_proj.adapters.default.lora_a` (in, r)"""
    array = mx.array(value)
    if path.startswith("head."):
        return path, array
    layer, module, factor = path.split(".")
    name = f"layers.{layer}.attention.{PROJECTIONS[module]}.adapters.default.lora_{factor.lower()}"
    return name, mx.contiguous(array.T)
