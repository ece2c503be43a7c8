"""The diagonal of the Fisher information: mean squares of *per-example* gradients, not squares of a batch's mean."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..errors import ConfigurationError, did_you_mean
from ..nn.functional import Parameters, functional, locate
from .loss import as_input, masked

LABELS = ("all", "true", "sample", "predicted")
# Rows whose gradients are held at once: of every weight, and where only those of layer outputs are.
_ROWS, _ROWS_FACTORED = 16, 256


def fisher_diagonal(
    model: nn.Module,
    params: Parameters,
    x: np.ndarray,
    y: np.ndarray | None = None,
    active: np.ndarray | mx.array | None = None,
    *,
    labels: str = "all",
    rng: np.random.Generator | None = None,
    factored: bool | None = None,
) -> Parameters:
    """F_i = 1/N Σ_n Σ_c q(c | x_n) (∂ log p(c | x_n) / ∂θ_i)².

    Args:
        model, params: the classifier, and the weights of which (and at which) F is taken.
        x: (N, …).
        y: (N,) classes; needed for `labels="true"`.
        active: (C,) or (N, C), the classes over which p is normalised; default all.
        labels: q, the label distribution: "all" is the model's own p (the Fisher information itself), "sample"
            draws one label a row from p (unbiased, C times cheaper), "predicted" takes the likeliest, "true" the
            given one (the empirical Fisher).
        rng: for "sample".
        factored: take weights' squared gradients as products of the squares of a layer's inputs and output
            gradients: the same numbers at the cost of one batch gradient, for models in which all of `params`
            are of `nn.Linear` layers called once on (N, in). Default: where that holds; elsewhere `vmap(grad)`.

    Reference: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, PNAS;
        van de Ven (2025), On the computation of the Fisher information in continual learning.
    """
    if labels not in LABELS:
        raise ConfigurationError(f"labels={labels!r} is no way to choose labels{did_you_mean(labels, LABELS)}")
    if labels == "true" and y is None:
        raise ConfigurationError("labels='true' needs the labels y")
    if len(x) == 0:
        raise ConfigurationError("the Fisher information of no examples was asked for")
    if factored is None:
        factored = _factors(model, params, x)
    rows = _ROWS_FACTORED if factored else _ROWS
    squares = _factored_squares(model, labels) if factored else _squares(functional(model), labels)
    rng = rng or np.random.default_rng(0)
    total = tree_map(mx.zeros_like, params)
    count = len(x)
    masks = np.ones((1, 1), bool) if active is None else np.array(active)
    masks = masks if masks.ndim == 2 and len(masks) == count else np.broadcast_to(masks, (count, masks.shape[-1]))
    given = np.zeros(count, np.int32) if y is None else np.asarray(y, np.int32)
    for first in range(0, count, rows):
        part = np.arange(first, first + rows)
        # The last rows are filled up with repetitions that do not count: one shape is one compilation.
        counts = mx.array((part < count).astype(np.float32))
        part = np.minimum(part, count - 1)
        noise = mx.array(rng.random((rows, 1), dtype=np.float32))
        total = squares(params, total, *(mx.array(a[part]) for a in (x, given, masks)), noise, counts)
        mx.eval(total)
    return {path: value / count for path, value in total.items()}


def _label_weights(logits: mx.array, labels: str, y: mx.array, noise: mx.array) -> mx.array:
    """q (N, C)."""
    p = mx.softmax(logits, axis=-1)
    if labels == "all":
        return p
    classes = mx.arange(logits.shape[-1])
    if labels == "sample":
        y = mx.minimum(mx.sum(mx.cumsum(p, axis=-1) < noise, axis=-1), logits.shape[-1] - 1)
    elif labels == "predicted":
        y = mx.argmax(logits, axis=-1)
    return (classes == y[:, None]).astype(mx.float32)


def _log_p(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _squares(apply: Callable, labels: str) -> Callable:
    """(params, total, rows …) -> total + Σ over rows, through the gradient of every row."""

    def squares(params, total, x, y, active, noise, counts):
        x = as_input(x)
        logits = masked(apply(params, x), active)
        weights = counts[:, None] * _label_weights(logits, labels, y, noise)

        def log_p(params, row, mask, one_hot):
            return mx.sum(_log_p(masked(apply(params, row[None]), mask[None]))[0] * one_hot)

        def of_row(row, mask, weight):
            gradient = mx.grad(log_p)
            if labels != "all":  # one label a row: `weight` is its one-hot, or 0
                return tree_map(mx.square, gradient(params, row, mask, weight))
            classes = mx.vmap(gradient, in_axes=(None, None, None, 0))(params, row, mask, mx.eye(weight.shape[0]))
            return tree_map(lambda g: mx.tensordot(weight, mx.square(g), axes=1), classes)

        more = mx.vmap(of_row)(x, active, weights)
        return {path: total[path] + mx.sum(rows, axis=0) for path, rows in more.items()}

    return squares


class _Probe(nn.Module):
    """Stands where a linear layer stands, adds a probe to its output and remembers its input."""

    def __init__(self, layer: nn.Linear, probes: dict[str, mx.array] | None, path: str, seen: dict[str, mx.array]):
        super().__init__()
        self.call = (layer, probes, path, seen)

    def __call__(self, x: mx.array) -> mx.array:
        layer, probes, path, seen = self.call
        if x.ndim != 2 or path in seen:
            raise _NotFactored
        seen[path] = x
        y = layer(x)
        return y if probes is None else y + probes[path]


class _NotFactored(Exception):
    pass


def _layers(model: nn.Module, params: Parameters) -> list[str] | None:
    """Paths of the linear layers that own all of `params`, or None."""
    paths = list(dict.fromkeys(path.rpartition(".")[0] for path in params))
    if not {path.rpartition(".")[2] for path in params} <= {"weight", "bias"}:
        return None
    for path in paths:
        container, name = locate(model, path) if path else (None, None)
        if container is None or not isinstance(container[name], nn.Linear):
            return None
    return paths


def _probed(model: nn.Module, params: Parameters, x: mx.array, probes: dict[str, mx.array] | None):
    """(outputs, inputs of each layer), with `probes` added to the outputs of the layers."""
    seen: dict[str, mx.array] = {}
    held = []
    try:
        for path in dict.fromkeys(path.rpartition(".")[0] for path in params):
            container, name = locate(model, path)
            layer = container[name]
            held.append((container, name, layer))
            own = {p.rpartition(".")[2]: value for p, value in params.items() if p.rpartition(".")[0] == path}
            call = functional(layer)
            container[name] = _Probe(lambda x, call=call, own=own: call(own, x), probes, path, seen)  # type: ignore[arg-type]
        return model(x), seen
    finally:
        for container, name, layer in held:
            container[name] = layer


def _factors(model: nn.Module, params: Parameters, x: np.ndarray) -> bool:
    """Whether the products are right here: structure first, then the numbers of two rows (a model may mix rows)."""
    paths = _layers(model, params)
    if paths is None:
        return False
    try:
        outputs, seen = _probed(model, params, as_input(mx.array(x[:2])), None)
    except _NotFactored:
        return False
    if outputs.ndim != 2 or len(seen) != len(paths):
        return False
    n = len(outputs)
    rows = (
        mx.array(x[:2]),
        mx.zeros((n,), dtype=mx.int32),
        mx.ones((n, 1), dtype=mx.bool_),
        mx.zeros((n, 1)),
        mx.ones((n,)),
    )
    zeros = tree_map(mx.zeros_like, params)
    fast, slow = (
        {p: np.array(square) for p, square in squares(params, zeros, *rows).items()}
        for squares in (_factored_squares(model, "predicted"), _squares(functional(model), "predicted"))
    )
    return all(np.allclose(fast[p], slow[p], rtol=1e-3, atol=1e-3 * slow[p].max()) for p in params)


def _factored_squares(model: nn.Module, labels: str) -> Callable:
    """The same sum from (Σ_c q_c δ_c²)ᵀ a²: the gradient of a row's weights is the outer product δ aᵀ."""

    def squares(params, total, x, y, active, noise, counts):
        x = as_input(x)
        logits, inputs = _probed(model, params, x, None)
        logits = masked(logits, active)
        weights = counts[:, None] * _label_weights(logits, labels, y, noise)
        zero = {path: mx.zeros((x.shape[0], width_of(path))) for path in inputs}

        def log_p(probes, labels):
            outputs, _ = _probed(model, params, x, probes)
            return mx.sum(_log_p(masked(outputs, active)) * labels)

        if labels == "all":
            each = mx.broadcast_to(mx.eye(logits.shape[-1])[:, None], (logits.shape[-1], *logits.shape))
            classes = mx.vmap(mx.grad(log_p), in_axes=(None, 0))(zero, each)  # (C, N, width) of each layer
            deltas = {p: mx.sum(weights.T[..., None] * mx.square(d), axis=0) for p, d in classes.items()}
        else:
            deltas = tree_map(mx.square, mx.grad(log_p)(zero, weights))
        new = dict(total)
        for path, a in inputs.items():
            for name, value in ((f"{path}.weight", deltas[path].T @ mx.square(a)), (f"{path}.bias", deltas[path])):
                if name in total:
                    new[name] = total[name] + (value if name.endswith("weight") else mx.sum(value, axis=0))
        return new

    def width_of(path):
        container, name = locate(model, path)
        return container[name].weight.shape[0]

    return squares
