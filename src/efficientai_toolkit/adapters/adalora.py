"""AdaLoRA: a low-rank change in SVD form, ranks allotted by importance (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from ..nn.functional import Parameters
from ..settings import Count, Positive, Share, Steps
from .base import Adapter, Site, Training, linear_from
from .lora import LoRA, LoRAConfig
from .quantized import in_features, out_features


class AdaLoRA(LoRA):
    """y = base(x) + s · ((dropout(x) P) ⊙ λ) Q,  s = α / r with r the rank at the start.

    P = `lora_a` (in, r), λ = `lora_e` (r,), Q = `lora_b` (r, out); P and Q are normal of 0.02 and λ zero, so that the
    output is the base's at the start. Parameters: r · (in + out + 1). `orthogonality` keeps P and Q near orthonormal;
    `allot` moves the ranks to where they matter, after each optimiser step.
    """

    def __init__(self, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float):
        super().__init__(lora_a, lora_b, scale, dropout)
        self.lora_e = mx.zeros((lora_a.shape[1],))

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        key_a, key_b = mx.random.split(key)
        a = 0.02 * mx.random.normal((in_features(base), config.rank), key=key_a)
        b = 0.02 * mx.random.normal((config.rank, out_features(base)), key=key_b)
        return cls(a, b, config.scale, config.dropout)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return config.rank * (in_features(base) + out_features(base) + 1)

    def delta(self) -> mx.array:
        return self.scale * ((self.lora_a * self.lora_e) @ self.lora_b).T

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        y = base(x)
        z = ((self.dropout(x) @ self.lora_a) * self.lora_e) @ self.lora_b
        return y + (self.scale * z).astype(y.dtype)

    def fuse(self, base: Any) -> nn.Linear:
        return linear_from(base.weight + self.delta().astype(base.weight.dtype), base.get("bias"))


@dataclass(frozen=True)
class AdaLoRAConfig(LoRAConfig):
    """Defaults: the paper's for DeBERTaV3-base on MNLI (its appendix): every linear layer, rank 12 at the start for 8
    at the end, β = 0.85, orthogonality 0.1, 5e-4. α is the starting rank, so that the scale is 1. The shares of the
    schedule are this toolkit's, for short runs; the paper's MNLI run warms up for a tenth and cools down over more
    than half.

    The schedule belongs to plain fine-tuning (`finetune`), which scales it to its own number of steps. Meta-training
    (`train`) takes the SVD form at its fixed starting rank: over a few inner steps there is nothing to allot, and
    `target_rank`, `warmup`, `cooldown`, `total_steps`, `interval`, the betas and `orthogonality` have no effect.

    Args:
        rank: of each layer at the start.
        target_rank: the mean rank at the end; `None` takes two thirds of `rank`.
        warmup, cooldown: steps before pruning starts and after it ends.
        total_steps: of the training that `warmup`, `cooldown` and `interval` are said for.
        interval: steps between prunings.
        beta1, beta2: of the smoothed importance and its uncertainty.
        orthogonality: weight of the regulariser.
    """

    rank: Count = 12
    alpha: Positive = 12.0
    target_rank: Count | None = None
    warmup: Steps = 100
    cooldown: Steps = 300
    total_steps: Count = 1000
    interval: Count = 10
    beta1: Share = 0.85
    beta2: Share = 0.85
    orthogonality: Annotated[float, Field(ge=0)] = 0.1

    adapter: ClassVar[type[Adapter]] = AdaLoRA
    targets: ClassVar = (("linear",),)

    def __post_init__(self):
        super().__post_init__()
        self.require(self.final_rank <= self.rank, "target_rank must be at most rank")
        self.require(self.warmup + self.cooldown <= self.total_steps, "warmup + cooldown must fit in total_steps")

    @property
    def final_rank(self) -> int:
        return self.target_rank if self.target_rank is not None else max(1, self.rank * 2 // 3)

    def training(self, total_steps: int) -> Training:
        """Orthogonality in the loss, and the budget allotted after each step, by the schedule scaled to this run."""
        warmup, cooldown, interval = (
            steps * total_steps // self.total_steps for steps in (self.warmup, self.cooldown, self.interval)
        )
        config = replace(self, warmup=warmup, cooldown=cooldown, interval=max(interval, 1), total_steps=total_steps)
        return Training(
            penalty=lambda params: config.orthogonality * orthogonality(params),
            init=init_importance,
            update=lambda params, grads, state, step: allot(config, params, grads, state, step),
        )


class Importance(NamedTuple):
    """Smoothed sensitivity |w · ∇w| and its uncertainty, by parameter path."""

    mean: Parameters
    spread: Parameters


def init_importance(params: Parameters) -> Importance:
    """Zero for every AdaLoRA array of `params`."""
    zeros = {path: mx.zeros_like(params[path]) for group in _triplets(params) for path in group}
    return Importance(zeros, zeros)


def budget(config: AdaLoRAConfig, step: int, num_layers: int) -> int:
    """How many singular values all layers keep together after `step`: the paper's cubic schedule (its eq. 12)."""
    first, last = config.rank * num_layers, config.final_rank * num_layers
    span = config.total_steps - config.warmup - config.cooldown
    done = 1.0 if span <= 0 else min(max((step - config.warmup) / span, 0.0), 1.0)
    if step < config.warmup:
        return first
    return round(last + (first - last) * (1 - done) ** 3)


def allot(
    config: AdaLoRAConfig, params: Parameters, grads: Mapping[str, mx.array], importance: Importance, step: int
) -> tuple[Parameters, Importance]:
    """One allocation step: (params, importance) → the same, with the least important singular values set to zero.

    The score of a triplet is s(λᵢ) + mean s(Pᵢ) + mean s(Qᵢ) with s = mean × spread (its eqs. 8 … 11). A pruned value
    may return: its gradient goes on. In the cooldown the importance stands still, and with it which values are left.
    Pure, so that it may be traced.
    """
    mean, spread = dict(importance.mean), dict(importance.spread)
    scores = []
    groups = _triplets(params)
    last = config.total_steps - config.cooldown  # step that decides which values stay
    for group in groups:
        for path in group if step <= last else ():
            sensitivity = mx.abs(params[path] * grads[path])
            mean[path] = config.beta1 * mean[path] + (1 - config.beta1) * sensitivity
            spread[path] = config.beta2 * spread[path] + (1 - config.beta2) * mx.abs(sensitivity - mean[path])
        a, b, e = (mean[path] * spread[path] for path in group)
        scores.append(e + mx.mean(a, axis=0) + mx.mean(b, axis=1))
    state = Importance(mean, spread)
    pruning = step >= config.warmup and step % config.interval == 0
    if not (groups and (pruning or step >= last)):
        return params, state
    # By place in the order, not by a threshold: scores may be equal, and the budget is kept all the same.
    places = mx.argsort(mx.argsort(-mx.concatenate(scores)))
    kept = mx.split(places < budget(config, step, len(groups)), len(groups))
    pruned = {group[2]: mx.where(left, params[group[2]], 0) for group, left in zip(groups, kept, strict=True)}
    return {**params, **pruned}, state


def orthogonality(params: Parameters) -> mx.array:
    """Mean over the P and Q of ‖PᵀP − I‖ + ‖QQᵀ − I‖ (Frobenius): add `config.orthogonality` times it to the loss."""
    terms = []
    for a, b, _ in _triplets(params):
        for gram in (params[a].T @ params[a], params[b] @ params[b].T):
            terms.append(mx.sqrt(mx.sum(mx.square(gram - mx.eye(gram.shape[0]))) + 1e-12))
    return sum(terms, start=mx.array(0.0)) / max(len(terms), 1)


def _triplets(params: Mapping[str, mx.array]) -> list[tuple[str, str, str]]:
    stems = [path[: -len("lora_e")] for path in params if path.endswith("lora_e")]
    return [(f"{stem}lora_a", f"{stem}lora_b", f"{stem}lora_e") for stem in stems]
