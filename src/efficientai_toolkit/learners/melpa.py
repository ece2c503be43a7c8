"""MeLPA: meta-learned personalised adapters. An initialisation network and an update rule, trained not to forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigurationError, ModelError, TaskSamplingError
from ..nn.functional import Parameters
from ..nn.layers import shared_times
from ..nn.losses import LossFn, accuracy, has_accuracy, is_classification
from ..precision import widened
from ..tasks.episode import EpisodeStack, as_stacks
from .base import Episodes, MetaLearner
from .inner_loop import inner_loop
from .learner import Learner, Meta, Metrics, Problem, mean_gradient, through_adaptation
from .metric import cosine_head, head_shape, one_hot
from .update_rules import UpdateRule, lslr, sgd

INITIALISATIONS = ("network", "universal", "fixed")
UPDATES = ("rates", "optimizer", "fixed")
# Logit scale of a head made of class means, at its start (cosine 1 is a logit of 10).
_SCALE = 10.0


def learned_optimizer(num_steps: int, learning_rate: float, hidden_dim: int = 8) -> UpdateRule:
    """θ ← θ − α[layer, step] (g + rms(g) u(g, m, θ)): a small network u, the same for every coordinate.

    u sees the gradient, its running mean and the weight, each divided by its root mean square over the array. Its
    last layer starts at zero, so the rule starts as `lslr`. Arrays: `rate.PATH`, `net.0.weight`, `net.0.bias`,
    `net.1.weight`.

    Reference: Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, NeurIPS.
    """
    rates = lslr(num_steps, learning_rate)

    def init(params, *, key):
        return rates.init(params, key=key) | {
            "net.0.weight": mx.random.normal((hidden_dim, 3), key=key),
            "net.0.bias": mx.zeros((hidden_dim,)),
            "net.1.weight": mx.zeros((hidden_dim,)),
        }

    def start(params):
        return {path: mx.zeros_like(widened(p)) for path, p in params.items()}

    def update(rule, state, grads, params, step):
        grads = {path: widened(grads[path]) for path in params}
        mean = {path: 0.9 * m + 0.1 * grads[path] for path, m in state.items()}
        steps = {}
        for path, p in params.items():
            size = _rms(grads[path])
            seen = mx.stack([grads[path] / size, mean[path] / size, widened(p) / _rms(p)], axis=-1)
            hidden = mx.tanh(seen @ rule["net.0.weight"].T + rule["net.0.bias"])
            steps[path] = grads[path] + size * (hidden @ rule["net.1.weight"])
        return rates.update(rule, {}, steps, params, step)[0], mean

    return UpdateRule(update, init, start)


def _rms(x: mx.array) -> mx.array:
    return mx.sqrt(mx.mean(mx.square(widened(x))) + 1e-12)


class MeLPALearner(MetaLearner):
    """θ₀ = f(context; Θ), θ ← U(∇L, θ, step; Φ); Θ and Φ are meta-learned through sequences of tasks.

    The context is the mean feature vector of the support set. A code z = tanh(W c + b) moves every adapter array by a
    linear decoder, from a start that is meta-learned too; the head is made of the support's class means. In a
    sequence the second task goes on from the adapters that the first one left, with a head of its own, and the outer
    loss is the mean over *all* tasks of the sequence with the *last* adapters: what the update rule destroys of
    earlier tasks costs.

    Options:
        initialisation: "network" (of the task's context), "universal" (one meta-learned start for all tasks) or
            "fixed" (the model's own weights, which are not meta-learned: the ablation "update only").
        update: "rates" (learned, by array and step), "optimizer" (`learned_optimizer`) or "fixed" (`inner_lr`: the
            ablation "initialisation only").
        head_from_means: begin the head at the class means of the support's features, where the targets are classes
            and the model has a trainable linear head; not with the initialisation "fixed".
        latent_dim: size of z.
        sequence: tasks learned in a row; the meta-batch size must be a multiple of it.
        first_order: count inner gradients as constants. The rule and the start are still learned.

    Attach adapters to a frozen model first: what is trainable is what adapts.

    >>> model = attach(encoder, PfeifferConfig(bottleneck=64), "layers.[45].feed_forward", train_head=True)
    >>> learner = MeLPALearner(model, inner_lr=0.01, num_inner_steps=5, sequence=2)

    Differs from other meta-learners in: the start of an adapter depends on the task, and the outer loss counts
    earlier tasks (as in Javed & White 2019, Meta-learning representations for continual learning).
    """

    algorithm = "melpa"
    per_step_rule = True

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.01,
        outer_lr: Any = 0.001,
        num_inner_steps: int = 5,
        *,
        chunk: int | None = None,
        **options: Any,
    ):
        # A sequence is one graph.
        super().__init__(
            model, inner_lr, outer_lr, num_inner_steps, chunk=_chunk(chunk, options.get("sequence", 1)), **options
        )

    def build(
        self,
        *,
        initialisation: str = "network",
        update: str = "rates",
        head_from_means: bool = True,
        latent_dim: int = 8,
        sequence: int = 1,
        first_order: bool = False,
    ) -> Learner:
        if initialisation not in INITIALISATIONS:
            raise ConfigurationError(f"initialisation={initialisation!r}: use one of {', '.join(INITIALISATIONS)}")
        if update not in UPDATES:
            raise ConfigurationError(f"update={update!r}: use one of {', '.join(UPDATES)}")
        if latent_dim < 1 or sequence < 1:
            raise ConfigurationError(f"latent_dim and sequence must be at least 1, got {latent_dim} and {sequence}")
        rules = {
            "rates": lambda: lslr(self.num_inner_steps, self.inner_lr),
            "optimizer": lambda: learned_optimizer(self.num_inner_steps, self.inner_lr),
            "fixed": lambda: sgd(self.inner_lr),
        }
        rule = rules[update]()
        try:
            head: tuple[str, str] | None = head_shape(self._model, self._head)
        except ModelError:
            head = None
        means = head if head_from_means and initialisation != "fixed" else None
        self._begin, self._sequence = _beginning(initialisation, means), sequence
        begin = self._begin

        def init(params, *, key):
            rule_key, code_key = mx.random.split(key)
            own = dict(rule.init(params, key=rule_key))
            if means:
                own["log_scale"] = mx.log(mx.array(_SCALE))
            if initialisation == "network":
                if head is None:
                    raise ModelError("the initialisation network needs a trainable linear head, to know the features")
                width = params[head[0]].shape[1]
                own["code.weight"] = mx.random.normal((latent_dim, width), key=code_key) * width**-0.5
                own["code.bias"] = mx.zeros((latent_dim,))
                own |= {f"decode.{p}": mx.zeros((*a.shape, latent_dim)) for p, a in params.items() if p not in head}
            return {"model": params, "rule": own}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None, start=None):
            return inner_loop(
                problem.loss,
                begin(problem, meta, support_x, support_y, start),
                support_x,
                support_y,
                rule=rule,
                rule_params=meta["rule"],
                num_steps=num_steps,
                second_order=not first_order,
                key=key,
                each=each,
            )

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            if sequence == 1:
                return through_adaptation(
                    learner, problem, meta, stack, keys=keys, num_steps=num_steps, iteration=iteration
                )
            rows = EpisodeStack(*(a.reshape(-1, sequence, *a.shape[1:]) for a in stack))

            def one(meta, sx, sy, qx, qy, key):
                return _sequence_loss(adapt, problem, meta, (sx, sy, qx, qy), num_steps, key, problem.head_paths)

            return mean_gradient(one, meta, rows, keys[::sequence])

        return Learner(adapt, init, meta_grad=meta_grad)

    def meta_update(
        self, stacks: Sequence[EpisodeStack], loss_fn: LossFn | None = None, *, support_loss: bool = False
    ) -> Metrics:
        return super().meta_update(self._in_sequences(stacks), loss_fn, support_loss=support_loss)

    def meta_gradient(self, episodes: Episodes, loss_fn: LossFn | None = None) -> tuple[Metrics, Parameters]:
        return super().meta_gradient(self._in_sequences(as_stacks(episodes)), loss_fn)

    def _in_sequences(self, stacks: Sequence[EpisodeStack]) -> list[EpisodeStack]:
        """The stacks cut into chunks of whole sequences."""
        for stack in stacks:
            if stack.num_tasks % self._sequence:
                raise TaskSamplingError(
                    f"{stack.num_tasks} tasks do not make sequences of {self._sequence}; "
                    "give a multiple as meta_batch_size"
                )
        if self._sequence == 1:
            return list(stacks)
        return [part for stack in stacks for part in stack.chunks(self.chunk or self._sequence, self._sequence)]

    def begin(self, support_x: mx.array, support_y: mx.array, params: Parameters | None = None) -> Parameters:
        """The weights before the first step: of a first task, or with `params` of one that follows on them."""
        return self._begin(self.problem(), self.meta, support_x, support_y, params)

    def learn_next(
        self,
        params: Parameters | None,
        support_x: mx.array,
        support_y: mx.array,
        num_steps: int | None = None,
        each: Callable[[int, Parameters], None] | None = None,
    ) -> Parameters:
        """Learn one more task: from `params`, the weights that the task before left (None: it is the first)."""
        steps = self.num_inner_steps if num_steps is None else num_steps
        return self.learner.adapt(
            self.problem(), self.meta, support_x, support_y, key=None, num_steps=steps, each=each, start=params
        )


def _chunk(chunk: int | None, sequence: Any) -> int | None:
    if not isinstance(sequence, int) or sequence <= 1:
        return chunk
    return sequence if chunk is None else -(-chunk // sequence) * sequence


def _beginning(initialisation: str, means: tuple[str, str] | None) -> Callable[..., Parameters]:
    def begin(problem: Problem, meta: Meta, x: mx.array, y: mx.array, start: Parameters | None = None) -> Parameters:
        rule = meta["rule"]

        def decoded(path: str, code: mx.array) -> mx.array:
            matrix = rule[f"decode.{path}"]
            return shared_times(code[None], matrix.reshape(-1, matrix.shape[-1]).T).reshape(matrix.shape[:-1])

        params = meta["model"] if start is None else start
        if initialisation == "fixed" and start is None:
            params = {path: mx.stop_gradient(p) for path, p in params.items()}
        network = initialisation == "network" and start is None
        head = means if is_classification(y) else None
        if not network and head is None:
            return params
        # One pass for both: the head's class means are those of the features before the decoder moved the adapters.
        z = problem.features(params, x).reshape(x.shape[0], -1)
        if network:
            context = mx.stop_gradient(mx.mean(widened(z), axis=0))
            code = mx.tanh(rule["code.weight"] @ (context / _rms(context)) + rule["code.bias"])
            params = {
                p: (a + decoded(p, code)).astype(a.dtype) if f"decode.{p}" in rule else a for p, a in params.items()
            }
        if head is None:
            return params
        weight, bias = head
        support = one_hot(y, params[weight].shape[0])
        rows, biases = cosine_head(z, support, mx.exp(rule["log_scale"]))
        return {**params, weight: rows.astype(params[weight].dtype), bias: biases.astype(params[bias].dtype)}

    return begin


def _sequence_loss(adapt: Callable, problem: Problem, meta: Meta, tasks: tuple, num_steps: int, key, head_paths):
    """Mean query loss of all tasks of a sequence with the last adapters, each with its own head."""
    sx, sy, qx, qy = tasks
    count = sx.shape[0]
    keys = mx.random.split(key, 2 * count)
    fast: Any = None
    heads: list[Parameters] = []
    for k in range(count):
        fast = adapt(problem, meta, sx[k], sy[k], key=keys[k], num_steps=num_steps, start=fast)
        heads.append({path: fast[path] for path in head_paths})
    losses, correct = [], []
    for k, head in enumerate(heads):
        predictions = problem.apply({**fast, **head}, qx[k], key=keys[count + k])
        losses.append(problem.criterion(predictions, qy[k]))
        if has_accuracy(predictions, qy[k]):
            correct.append(accuracy(predictions, qy[k]))
    loss = sum(losses[1:], losses[0]) / count
    still = {path: mx.stop_gradient(p) for path, p in fast.items()}
    metrics = {
        "query_loss": loss,
        "support_loss": problem.criterion(problem.apply(still, sx[-1]), sy[-1]),
        "earlier_loss": losses[0],
    }
    if correct:
        metrics["query_accuracy"] = sum(correct[1:], correct[0]) / count
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}
