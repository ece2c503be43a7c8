"""Second order is really second order: finite differences, layers at every order, what breaks the trace, memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import MLP, Conv4, EpisodeStack, FOMAMLLearner, MAMLLearner, mse_loss
from efficientai_toolkit.nn.conv import conv_norm_relu_pool
from efficientai_toolkit.nn.elementwise import add_scaled
from efficientai_toolkit.nn.functional import update
from efficientai_toolkit.nn.layers import EpisodicBatchNorm, Linear, conv2d, max_pool2d, shared_times


def sines(tasks: int = 2, shots: int = 5, seed: int = 0) -> EpisodeStack:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (tasks, 2 * shots, 1)).astype(np.float32)
    y = np.sin(x - rng.uniform(0, 3, (tasks, 1, 1))).astype(np.float32)
    return EpisodeStack(*(mx.array(a) for a in (x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])))


class Smooth(nn.Module):
    """No kinks, so that finite differences mean something."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Linear(1, 12), Linear(12, 1)
        self.body.weight = mx.random.normal((12, 1), key=mx.random.key(1))
        self.head.weight = mx.random.normal((1, 12), key=mx.random.key(2)) * 0.3
        # The default biases are drawn from the global generator, and would differ from run to run.
        self.body.bias, self.head.bias = mx.zeros(12), mx.zeros(1)

    def __call__(self, x):
        return self.head(mx.tanh(self.body(x)))


def test_meta_gradient_agrees_with_finite_differences():
    stack = sines()
    learner = MAMLLearner(Smooth(), inner_lr=0.2, num_inner_steps=3)
    params = dict(learner.meta["model"])
    _, grads = learner.meta_gradient(stack)
    direction = {
        path: mx.random.normal(value.shape, key=mx.random.key(number))
        for number, (path, value) in enumerate(params.items())
    }
    expected = sum(mx.sum(grads[f"model/{path}"] * direction[path]) for path in params).item()

    def loss_at(step: float) -> float:
        model = Smooth()
        update(model, {path: value + step * direction[path] for path, value in params.items()})
        moved = MAMLLearner(model, inner_lr=0.2, num_inner_steps=3)
        return moved.meta_gradient(stack)[0]["query_loss"].item()

    h = 5e-3
    assert (loss_at(h) - loss_at(-h)) / (2 * h) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [Smooth, lambda: MLP(hidden_dim=16)], ids=["tanh", "relu"])
@pytest.mark.parametrize("chunk", [1, 2], ids=["looped", "stacked"])
def test_second_order_is_not_first_order(make, chunk):
    stack = sines()
    options = {"inner_lr": 0.1, "num_inner_steps": 3, "chunk": chunk}
    _, second = MAMLLearner(make(), **options).meta_gradient(stack)
    _, first = FOMAMLLearner(make(), **options).meta_gradient(stack)
    difference = sum(mx.sum(mx.square(second[path] - first[path])) for path in first).item() ** 0.5
    scale = sum(mx.sum(mx.square(first[path])) for path in first).item() ** 0.5
    assert difference > 0.05 * scale


@pytest.mark.parametrize("how", [lambda loss: mx.eval(loss), lambda loss: loss.item()], ids=["eval", "item"])
def test_evaluation_inside_the_trace_raises(how):
    """Under a plain `mx.grad` it would silently turn MAML into FOMAML; the compiled meta-step refuses it."""

    def loss_fn(predictions, targets):
        loss = mse_loss(predictions, targets)
        how(loss)
        return loss

    learner = MAMLLearner(MLP(hidden_dim=8), num_inner_steps=1)
    with pytest.raises((ValueError, RuntimeError), match="eval"):
        learner.meta_train_step(sines(), loss_fn)


# --- layers, each against MLX's own operation at first and second order -----------------------------------------------


def second_order(function):
    """The gradient of a nonlinear function of the gradient, which sees every second derivative."""

    def inner(*arrays):
        return mx.sum(mx.sin(function(*arrays)))

    def outer(*arrays):
        grads = mx.grad(inner, argnums=tuple(range(len(arrays))))(*arrays)
        return sum(mx.sum(mx.sin(g) * g) for g in grads)

    return lambda *arrays: mx.grad(outer, argnums=tuple(range(len(arrays))))(*arrays)


def assert_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert mx.linalg.norm((a - b).reshape(-1)).item() <= tolerance * (1 + mx.linalg.norm(b.reshape(-1)).item())


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


CONVOLUTIONS = [(3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 1, 0), (5, 2, 2)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), CONVOLUTIONS)
def test_conv2d_is_mlx_at_second_order(kernel, stride, padding):
    x, w = normal(2, 7, 6, 3), normal(4, kernel, kernel, 3, seed=1) * 0.3

    def ours(x, w):
        return conv2d(x, w, stride, padding)

    def mlx(x, w):
        return mx.conv2d(x, w, stride=stride, padding=padding)

    assert_close([ours(x, w)], [mlx(x, w)])
    assert_close(second_order(ours)(x, w), second_order(mlx)(x, w))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (3, 1)])
def test_conv2d_stacked_is_looped_at_second_order(axes):
    tasks = 3
    x = [normal(2, 6, 5, 2, seed=i) for i in range(tasks)]
    w = [normal(4, 3, 3, 2, seed=9 + i) * 0.3 for i in range(tasks)]
    x, w = (values if axis is not None else [values[0]] * tasks for values, axis in zip((x, w), axes, strict=True))
    function = second_order(lambda x, w: conv2d(x, w, 1, 1))
    looped = [mx.stack(parts) for parts in zip(*(function(a, b) for a, b in zip(x, w, strict=True)), strict=True)]
    arguments = [
        values[0] if axis is None else mx.stack(values, axis=axis) for values, axis in zip((x, w), axes, strict=True)
    ]
    assert_close(mx.vmap(function, in_axes=axes)(*arguments), looped)


def test_conv2d_nests():
    """vmap in vmap, and a gradient outside of both."""
    x, w = normal(2, 3, 1, 5, 5, 2), normal(3, 4, 3, 3, 2, seed=1) * 0.3
    one = mx.grad(lambda x, w: mx.sum(mx.sin(conv2d(x, w, 1, 1))), argnums=1)
    nested = mx.vmap(mx.vmap(one), in_axes=(0, None))
    looped = mx.stack([mx.stack([one(x[i, j], w[j]) for j in range(3)]) for i in range(2)])
    assert_close([nested(x, w)], [looped])
    outside = mx.grad(lambda w: mx.sum(mx.sin(nested(x, w))))(w)
    expected = mx.stack(
        [mx.grad(lambda v, j=j: sum(mx.sum(mx.sin(one(x[i, j], v))) for i in range(2)))(w[j]) for j in range(3)]
    )
    assert_close([outside], [expected])


def plain_block(x, w, scale, shift):
    norm = EpisodicBatchNorm(w.shape[0])
    norm.weight, norm.bias = scale, shift
    y = nn.relu(norm(mx.conv2d(x, w, padding=1)))
    n, height, width, channels = y.shape
    y = y[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
    return mx.max(y, axis=(2, 4))


@pytest.mark.parametrize("size", [(6, 6), (7, 5)], ids=["even", "odd"])
def test_fused_block_is_the_plain_one_at_second_order(size):
    x, w = normal(3, *size, 2), normal(4, 3, 3, 2, seed=1) * 0.3
    scale, shift = mx.array([1.2, -0.8, 0.5, 1.0]), normal(4, seed=2) * 0.1
    assert_close([conv_norm_relu_pool(x, w, scale, shift)], [plain_block(x, w, scale, shift)])
    ours, plain = (second_order(f)(x, w, scale, shift) for f in (conv_norm_relu_pool, plain_block))
    assert_close(ours, plain, 1e-4)


def test_fused_block_stacks():
    x, w = normal(3, 2, 6, 6, 2), normal(3, 4, 3, 3, 2, seed=1) * 0.3
    scale, shift = normal(3, 4, seed=3), normal(3, 4, seed=2) * 0.1
    function = second_order(conv_norm_relu_pool)
    looped = [
        mx.stack(parts) for parts in zip(*(function(x[i], w[i], scale[i], shift[i]) for i in range(3)), strict=True)
    ]
    assert_close(mx.vmap(function)(x, w, scale, shift), looped, 1e-4)


def test_linear_is_mlx_at_second_order():
    x, w, b = normal(3, 4, 5), normal(6, 5, seed=1), normal(6, seed=2)

    def of(kind):
        layer = kind(5, 6)

        def function(x, w, b):
            layer.weight, layer.bias = w, b
            return layer(x)

        return second_order(function)

    assert_close(of(Linear)(x, w, b), of(nn.Linear)(x, w, b))


TIES = [
    # rows of a 2 × 2 window, and where PyTorch's max_pool2d sends its gradient
    ([[1, 1], [1, 1]], [[1, 0], [0, 0]]),
    ([[0, 2], [2, 2]], [[0, 1], [0, 0]]),
    ([[0, 1], [2, 2]], [[0, 0], [1, 0]]),
    ([[3, 1], [2, 3]], [[1, 0], [0, 0]]),
    ([[0, 3], [3, 0]], [[0, 1], [0, 0]]),
]


@pytest.mark.parametrize(("window", "expected"), TIES)
def test_max_pool_sends_its_gradient_to_the_first_of_ties(window, expected):
    x = mx.array(window, dtype=mx.float32)[None, :, :, None]
    assert mx.grad(lambda x: mx.sum(max_pool2d(x)))(x)[0, :, :, 0].tolist() == expected


# --- memory -----------------------------------------------------------------------------------------------------------


def images(tasks: int) -> EpisodeStack:
    pixels, labels = normal(tasks, 5, 28, 28, 1), mx.tile(mx.arange(5), (tasks, 1))
    return EpisodeStack(pixels, labels, pixels, labels)


@pytest.mark.parametrize(
    ("make", "stack"),
    [(lambda: MLP(hidden_dim=40), sines(1, 100)), (lambda: Conv4(hidden_dim=8), images(1))],
    ids=["mlp", "conv4"],
)
def test_memory_does_not_grow_with_inner_steps(make, stack, peak_bytes):
    def peak(num_steps: int, **options) -> int:
        learner = MAMLLearner(make(), inner_lr=0.01, num_inner_steps=num_steps, chunk=1, compile=False, **options)
        learner.meta_train_step(stack)
        return peak_bytes(lambda: learner.meta_train_step(stack))

    assert peak(20) <= 1.5 * peak(5)
    # what checkpointing is for:
    assert peak(20, checkpoint=False) > 2 * peak(5, checkpoint=False)


def test_looped_conv4_needs_the_memory_of_one_task(peak_bytes):
    def needed(tasks: int) -> int:
        learner = MAMLLearner(Conv4(hidden_dim=16), inner_lr=0.1, num_inner_steps=1, chunk=1, compile=False)
        stack = images(tasks)
        mx.eval(stack)
        learner.meta_train_step(stack)
        return peak_bytes(lambda: learner.meta_train_step(stack))

    assert needed(8) <= 1.3 * needed(2)


def _stacked_hessian_products(function, shared, own, weights):
    """Value, gradient and a Hessian-vector product of Σ_tasks Σ sin(function(shared, own)) · weights, as one vector."""

    def loss(shared, own):
        return mx.sum(mx.sin(mx.vmap(function, in_axes=(None, 0))(shared, own)) * weights)

    def slope(shared, own):
        grads = mx.grad(loss, argnums=(0, 1))(shared, own)
        return mx.concatenate([g.reshape(-1) for g in grads])

    first = slope(shared, own)
    direction = mx.sin(mx.arange(first.size).astype(mx.float32))
    second = mx.grad(lambda *args: mx.sum(slope(*args) * direction), argnums=(0, 1))(shared, own)
    return mx.concatenate([loss(shared, own).reshape(1), first, *(g.reshape(-1) for g in second)])


@pytest.mark.parametrize("nested", [False, True], ids=["outside", "inner gradient"])
@pytest.mark.parametrize("case", ["add_scaled", "shared_times"])
def test_what_tasks_share_is_differentiated_as_by_mlx(case, nested):
    keys = mx.random.split(mx.random.key(0), 3)
    x = mx.random.normal((5, 3, 4), key=keys[0])
    ours, plain, shared = {
        "add_scaled": (lambda b, a: add_scaled(mx.sin(a), b, a), lambda b, a: mx.sin(a) + b * a, mx.array(0.3)),
        "shared_times": (
            lambda b, a: shared_times(a, b),
            lambda b, a: a @ b,
            mx.random.normal((4, 4), key=keys[1]),
        ),
    }[case]
    weights = mx.random.normal(x.shape, key=keys[2])

    def of(function):
        # An inner step, as learners take it: its gradient is differentiated again.
        if nested:
            return lambda b, a: a - mx.grad(lambda a: mx.sum(mx.square(function(b, a))))(a)
        return function

    found = _stacked_hessian_products(of(ours), shared, x, weights)
    expected = _stacked_hessian_products(of(plain), shared, x, weights)
    assert mx.linalg.norm(found - expected).item() < 1e-5 * mx.linalg.norm(expected).item()
