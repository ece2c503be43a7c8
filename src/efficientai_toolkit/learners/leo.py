"""Latent embedding optimisation (Rusu et al. 2019): inner steps in a low-dimensional code of the weights."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..backbones.mlp import MLP
from ..errors import ConfigurationError, ModelError, TaskSamplingError
from ..nn.activations import relu
from ..nn.functional import Parameters, locate, trainable
from ..nn.head import find_head
from ..nn.layers import shared_times
from ..nn.losses import is_classification
from ..settings import Count, NonNegative, Positive, Steps
from ..tasks.episode import Episode
from .base import MetaLearner
from .inner_loop import inner_loop
from .learner import Learner, Problem, mean_gradient, query_metrics
from .metric import head_shape, one_hot
from .update_rules import UpdateRule, clip_scale

CODE, DECODER, OFFSET, ROWS, RATES = "/code", "/decoder", "/offset", "/rows", "/rates"  # no path has a slash


def kl_to_standard_normal(mean: mx.array, std: mx.array) -> mx.array:
    """KL(N(`mean`, `std`²) ‖ N(0, 1)), summed over the last axis, mean over the others."""
    return mx.mean(mx.sum(0.5 * (mx.square(mean) + mx.square(std) - 1) - mx.log(std), axis=-1))


def decorrelation(rows: mx.array) -> mx.array:
    """Mean square by which the correlations of the rows (L, P) differ from the identity."""
    rows = rows * mx.rsqrt(mx.sum(mx.square(rows), axis=-1, keepdims=True) + 1e-12)
    return mx.mean(mx.square(rows @ rows.T - mx.eye(rows.shape[0])))


def clipped_sgd(log_rates: str, largest: float | None) -> UpdateRule:
    """θ ← θ − exp(ρ) g, g the gradient with its norm over all arrays at most `largest`, ρ the rule's `log_rates`."""

    def update(rule, state, grads, params, step):
        rates = mx.exp(rule[log_rates])
        if largest is not None:
            rates = clip_scale({path: grads[path] for path in params}, largest) * rates
        return {path: (p - rates * grads[path]).astype(p.dtype) for path, p in params.items()}, state

    return UpdateRule(update)


class Target(NamedTuple):
    """Which weights are decoded, from codes (K, L) each to a row of (K, P)."""

    shapes: dict[str, tuple[int, ...]]  # "all": the model's arrays, K = 1; "head": its weight and bias, K classes
    per_class: bool

    @property
    def codes(self) -> int:
        return next(iter(self.shapes.values()))[0] if self.per_class else 1

    @property
    def sizes(self) -> list[int]:
        """What of a row each array takes."""
        return [math.prod(shape) // self.codes for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def weights(self, rows: mx.array) -> Parameters:
        """(K, P) → arrays by path"""
        *ends, _ = itertools.accumulate(self.sizes)
        parts = mx.split(rows, ends, axis=1)
        return {path: part.reshape(shape) for (path, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def rows(self, arrays: Parameters) -> mx.array:
        """Arrays by path → (K, P)"""
        return mx.concatenate([arrays[path].reshape(self.codes, -1) for path in self.shapes], axis=1)


def output_size(model: nn.Module, head: str | None) -> int:
    """Numbers in one output, by the rows of the head's weight, trained or not."""
    path = find_head(model, head)
    container, name = locate(model, path)
    weight = getattr(container[name], "weight", None)
    if weight is None:
        raise ModelError(
            f"LEO encodes pairs (x, y), and the head {path!r} does not say y's size; name a linear layer by head='…'"
        )
    return weight.shape[0]


def encode(arrays: Parameters, examples: mx.array, groups: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and deviation (K, L) of the codes, from what there is of each example (S, E), in `groups` (K, S).

    The relation network sees every pair of encoded examples; group k's code is the mean over pairs whose first is of
    k. Its first layer is linear in each half of a pair and its last in all, so they are taken before and after there
    are pairs.
    """
    z = shared_times(examples, arrays["encoder.weight"].T)
    first, second = mx.split(arrays["relation.layers.0.weight"], 2, axis=1)
    pairs = (shared_times(z, first.T) + arrays["relation.layers.0.bias"])[:, None] + shared_times(z, second.T)[None]
    hidden = relu(pairs).reshape(-1, pairs.shape[-1])  # (S · S, 2 L)
    hidden = relu(shared_times(hidden, arrays["relation.layers.1.weight"].T) + arrays["relation.layers.1.bias"])
    share = groups / mx.maximum(mx.sum(groups, axis=1, keepdims=True), 1)
    related = share @ mx.mean(hidden.reshape(*pairs.shape[:2], -1), axis=1)
    moments = mx.addmm(arrays["relation.head.bias"], related, arrays["relation.head.weight"].T)
    mean, log_std = mx.split(moments, 2, axis=-1)
    return mean, mx.exp(mx.clip(log_std, -10, 3))


class LEOLearner(MetaLearner):
    """LEO: a task's support is encoded to a latent code z ~ N(μ, σ²); weights are decoded from z; `num_inner_steps`
    gradient steps move z, then `finetune_steps` move the decoded weights. Encoder, relation network, decoder, features
    and all inner rates are meta-learned, on L_query + β KL + γ ‖sg(z′) − z‖² + the decoder's orthogonality penalty.

    Codes and weights are sampled while meta-training; `adapt` and `evaluate` take the means. Numbers of steps are of
    latent steps, and the fine-tuning follows each: `step_0` of `evaluate` is after it. With `num_inner_steps=0` the
    latent steps are left out (the paper's ablation).

    Options:
        decodes: "head": each class has a code, from which its row of the head is decoded (classification on
            features, as in the paper's images); "all": each task has one code, from its pairs (x, y), and every
            weight is decoded, as an offset from the model's own (regression).
        input_dim: size of x, for "all"; by default the model's attribute `input_dim`.
        latent_dim: size of z.
        hidden_dim: width of the relation network.
        finetune_steps: steps in weight space after those in latent space.
        finetune_lr: the learned rates of fine-tuning at their start; that of the latent steps starts at `inner_lr`.
        inner_clip: largest norm of an inner gradient, so that no task's code is thrown far; None leaves it alone.
        kl_weight, encoder_penalty, orthogonality: β, γ, and the weight of the decoder's penalty.

    Reference: A. Rusu, D. Rao, J. Sygnowski, O. Vinyals, R. Pascanu, S. Osindero, R. Hadsell, *Meta-Learning with
    Latent Embedding Optimization*, ICLR 2019, arXiv:1807.05960. Differs from the paper in: the head has a bias; the
    KL is in closed form, not by one sample; the decoded weights' deviations do not depend on the code; fine-tuning
    has a rate for each array, rates are learned by their logarithms, inner gradients are clipped; features are
    trained along (freeze them for the paper's setting).
    """

    algorithm = "leo"

    def build(
        self,
        *,
        decodes: str = "head",
        input_dim: Count | None = None,
        latent_dim: Count = 16,
        hidden_dim: Count = 32,
        finetune_steps: Steps = 5,
        finetune_lr: Positive = 0.001,
        inner_clip: Positive | None = 10.0,
        kl_weight: NonNegative = 0.001,
        encoder_penalty: NonNegative = 1e-9,
        orthogonality: NonNegative = 0.1,
    ) -> Learner:
        if decodes not in ("head", "all"):
            raise ConfigurationError(f"decodes must be 'head' or 'all', got {decodes!r}")
        shapes = {path: tuple(p.shape) for path, p in trainable(self._model).items()}
        per_class = decodes == "head"
        if per_class:
            decoded = head_shape(self._model, self._head)
            target, example_dim = Target({path: shapes[path] for path in decoded}, True), shapes[decoded[0]][1]
        else:
            target = Target(shapes, False)
            given = getattr(self._model, "input_dim", None) if input_dim is None else input_dim
            if given is None:
                raise ModelError(
                    f"LEO encodes pairs (x, y), and {type(self._model).__name__} does not say x's size; "
                    "give input_dim=…"
                )
            example_dim = given + output_size(self._model, self._head)
        sizes = (2 * latent_dim, 2 * latent_dim, hidden_dim)
        latent_rule, finetune_rule = clipped_sgd("log_rate", inner_clip), clipped_sgd(RATES, inner_clip)

        def init(params, *, key):
            keys = mx.random.split(key, 3)
            scale = (2 / (latent_dim + target.size)) ** 0.5
            relation = trainable(MLP(*sizes, key=keys[1]))
            # Codes begin nearly certain, as in the authors' code: sampling is learned, not unlearned.
            relation["head.weight"] = 0.1 * relation["head.weight"]
            relation["head.bias"] = mx.concatenate([mx.zeros(latent_dim), mx.full((latent_dim,), -3.0)])
            rule = {
                "encoder.weight": mx.random.normal((latent_dim, example_dim), key=keys[0]) * example_dim**-0.5,
                **{f"relation.{path}": p for path, p in relation.items()},
                "decoder.mean": mx.random.normal((latent_dim, target.size), key=keys[2]) * scale,
                "decoder.log_std": mx.full((target.size,), math.log(0.1 * scale)),
                "log_rate": mx.array(math.log(self.inner_lr)),
                **{f"log_rate.{path}": mx.array(math.log(finetune_lr)) for path in target.shapes},
            }
            return {"model": params, "rule": rule}

        def decode(p: Parameters) -> mx.array:
            return p[OFFSET] + shared_times(p[CODE], p[DECODER])

        def with_rows(p: Parameters, rows: mx.array) -> Parameters:
            """The model's own weights, but for those in `rows`."""
            decoded = target.weights(rows)
            own = {path: value for path, value in p.items() if not path.startswith("/")}
            return {path: decoded.get(path, value).astype(value.dtype) for path, value in own.items()}

        def run(problem: Problem, meta, support_x, support_y, *, key, num_steps, each=None, sampled=False):
            """Fast weights, and the penalties on the way."""
            model, arrays = meta["model"], meta["rule"]
            if per_class:
                if not is_classification(support_y):
                    raise TaskSamplingError("LEO with decodes='head' is for classes; for regression use decodes='all'")
                examples = problem.features(model, support_x)
                groups = one_hot(support_y, target.codes).T
            else:
                if is_classification(support_y):
                    raise TaskSamplingError("LEO with decodes='all' is for regression; for classes use decodes='head'")
                size = support_x.shape[0]
                examples = mx.concatenate([support_x.reshape(size, -1), support_y.reshape(size, -1)], axis=-1)
                if examples.shape[1] != example_dim:
                    raise ModelError(
                        f"LEO was made for pairs (x, y) of {example_dim} numbers, and these have {examples.shape[1]}; "
                        "input_dim is the size of x"
                    )
                groups = mx.ones((1, size))
            mean, std = encode(arrays, examples, groups)
            code_key, noise_key, inner_key = mx.random.split(mx.random.key(0) if key is None else key, 3)
            code, offset = mean, mx.zeros((target.codes, target.size)) if per_class else target.rows(model)
            if sampled:
                code = mean + std * mx.random.normal(mean.shape, key=code_key)
                noise = mx.random.normal(offset.shape, key=noise_key)
                offset = offset + mx.exp(arrays["decoder.log_std"]) * noise
            start = {**model, DECODER: arrays["decoder.mean"], OFFSET: offset, CODE: code}
            rates = [
                mx.full((size,), arrays[f"log_rate.{path}"])
                for path, size in zip(target.shapes, target.sizes, strict=True)
            ]

            def latent_loss(p, x, y, *, key=None):
                return problem.loss(with_rows(p, decode(p)), x, y, key=key)

            def row_loss(p, x, y, *, key=None):
                return problem.loss(with_rows(p, p[ROWS]), x, y, key=key)

            def finetuned(p):
                fast = inner_loop(
                    row_loss,
                    {**model, ROWS: decode(p)},
                    support_x,
                    support_y,
                    rule=finetune_rule,
                    rule_params={RATES: mx.concatenate(rates)},
                    num_steps=finetune_steps,
                    adapts=(ROWS,),
                    key=inner_key,
                )
                return with_rows(fast, fast[ROWS])

            end = inner_loop(
                latent_loss,
                start,
                support_x,
                support_y,
                rule=latent_rule,
                rule_params=arrays,
                num_steps=num_steps,
                adapts=(CODE,),
                key=inner_key,
                each=None if each is None else lambda k, p: each(k, finetuned(p)),
            )
            penalty = (
                kl_weight * kl_to_standard_normal(mean, std)
                + encoder_penalty * mx.mean(mx.square(mx.stop_gradient(end[CODE]) - start[CODE]))
                + orthogonality * decorrelation(arrays["decoder.mean"])
            )
            return finetuned(end), penalty

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            return run(problem, meta, support_x, support_y, key=key, num_steps=num_steps, each=each)[0]

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            def task(meta, sx, sy, qx, qy, key):
                inner, outer = mx.random.split(key)
                fast, penalty = run(problem, meta, sx, sy, key=inner, num_steps=num_steps, sampled=True)
                loss, metrics = query_metrics(learner, problem, fast, Episode(sx, sy, qx, qy), outer)
                return loss + penalty, metrics

            return mean_gradient(task, meta, stack, keys)

        return Learner(adapt, init, meta_grad=meta_grad)
