"""What every adapter promises, checked for every entry of `ADAPTERS` on every kind of model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from adapter_models import CONVOLUTIONAL, MODELS
from efficientai_toolkit.adapters import (
    ADAPTERS,
    Adapter,
    adapter_config,
    attach,
    count_parameters,
    detach,
    merge,
)
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import clone, functional, trainable, update
from efficientai_toolkit.nn.layers import EpisodicBatchNorm
from efficientai_toolkit.nn.statistics import by_module, by_path, given, recorded

SEQUENCE_ONLY = {"prefix", "prefix_mlp", "prompt", "p_tuning"}
CHANGES_AT_START = SEQUENCE_ONLY
OPTIONS = {
    "pfeiffer": {"reduction": 4},
    "parallel": {"reduction": 4, "activation": "gelu"},  # a lone ReLU may be dead
    "vera": {"rank": 8},
    "compacter": {"divisor": 2, "reduction": 4},
    "adalora": {"rank": 4},
}
TEXT = {"decoder", "quantized", "encoder"}
PAIRS = [(m, k) for m in ADAPTERS for k in MODELS if k in TEXT or m not in SEQUENCE_ONLY]


def targets_of(method: str, kind: str) -> list[str] | None:
    """The method's own choice; of convolutional networks, whose one linear layer is the head, all that it fits."""
    if kind not in CONVOLUTIONAL or method == "bitfit":
        return None
    norms = [path for path, m in MODELS[kind]()[0].named_modules() if isinstance(m, EpisodicBatchNorm)]
    fits = adapter_config(method).adapter.fits(EpisodicBatchNorm(4))
    return ["head", *(norms if fits else ())]


def build(method: str, kind: str, *, perturbed: bool = True):
    """A model with the adapter, the arrays moved off their start so that a zero factor hides nothing; and inputs."""
    model, x = MODELS[kind]()
    config = adapter_config(method, **OPTIONS.get(method, {}))
    before = dict(tree_flatten(model.parameters()))
    plain = model(x[0])
    mx.eval(plain)
    model = attach(model, config, targets_of(method, kind), key=mx.random.key(3))
    if perturbed:
        params = trainable(model)
        keys = mx.random.split(mx.random.key(4), len(params))
        update(
            model,
            {
                path: params[path] + 0.1 * mx.random.normal(params[path].shape, key=k)
                for path, k in zip(params, keys, strict=True)
            },
        )
    return model, x, config, before, plain


def stripped(model) -> dict[str, mx.array]:
    """The base's own arrays under their own paths."""
    return {
        path.replace(".base", "").removeprefix("base."): array
        for path, array in tree_flatten(model.parameters())
        if ".adapters." not in f".{path}" and not path.startswith("adapter_shared")
    }


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_output_is_unchanged_at_the_start(method, kind):
    model, x, _, _, plain = build(method, kind, perturbed=False)
    difference = mx.abs(model(x[0]) - plain).max().item()
    if method in CHANGES_AT_START:
        assert difference > 0
    else:
        assert difference < 1e-5


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_trainable_is_exactly_the_adapter_and_its_count_is_the_formula(method, kind):
    model, _, config, _, _ = build(method, kind)
    params = trainable(model)
    assert params
    assert all(".adapters.default." in f".{path}" or path.startswith("adapter_shared.") for path in params)
    fresh, _ = MODELS[kind]()
    assert sum(a.size for a in params.values()) == count_parameters(fresh, config, targets_of(method, kind))


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_base_is_bitwise_unchanged_and_detach_restores_everything(method, kind):
    original, x = MODELS[kind]()
    was_trainable = set(trainable(original))
    model, x, _, before, plain = build(method, kind)
    mx.eval(mx.grad(lambda p: mx.sum(functional(model)(p, x[0]) ** 2))(trainable(model)))
    after = stripped(model)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[path], before[path]) for path in before)
    restored = detach(model)
    assert dict(tree_flatten(restored.parameters())).keys() == before.keys()
    assert set(trainable(restored)) == was_trainable
    assert mx.array_equal(restored(x[0]), plain)
    assert [type(m) for m in restored.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_every_array_gets_a_gradient(method, kind):
    model, x, *_ = build(method, kind)
    grads = mx.grad(lambda p: mx.sum(mx.square(functional(model)(p, x[0]))))(trainable(model))
    silent = [path for path, g in grads.items() if not mx.abs(g).max().item() > 0]
    assert not silent


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_every_array_has_an_effect(method, kind):
    model, x, *_ = build(method, kind)
    apply, params = functional(model), trainable(model)
    plain = apply(params, x[0])
    keys = dict(zip(params, mx.random.split(mx.random.key(5), len(params)), strict=True))
    for path, array in params.items():
        if method == "bitfit" and path.endswith("k_proj.adapters.default.bias"):
            continue  # it adds the same to every score of a query, which the softmax takes away
        moved = array + mx.random.normal(array.shape, key=keys[path])
        assert mx.abs(apply({**params, path: moved}, x[0]) - plain).max().item() > 1e-6, path


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_stacked_gradients_of_both_orders_equal_the_loop(method, kind):
    model, x, *_ = build(method, kind)
    apply, start = functional(model), trainable(model)
    params = {path: mx.stack([a, a * 1.1, a * 0.9]) for path, a in start.items()}

    def loss(p, x):
        return mx.mean(mx.square(apply(p, x)))

    def adapted_loss(p, x):
        grads = mx.grad(loss)(p, x)
        return loss({path: a - 0.05 * grads[path] for path, a in p.items()}, x)

    for function in (mx.grad(loss), mx.grad(adapted_loss)):
        stacked = mx.vmap(function)(params, x)
        looped = [function({path: a[i] for path, a in params.items()}, x[i]) for i in range(3)]
        for path in params:
            expected = mx.stack([g[path] for g in looped])
            scale = max(1.0, mx.abs(expected).max().item())
            assert mx.abs(stacked[path] - expected).max().item() < 2e-5 * scale, path


# DoRA's norm is a constant by definition, which a difference quotient does not know; nor does it know the kinks of
# ReLU and pooling, of which the convolutional networks have many.
@pytest.mark.parametrize(("method", "kind"), [p for p in PAIRS if p[0] != "dora" and p[1] not in CONVOLUTIONAL])
def test_second_order_differs_from_first_and_matches_finite_differences(method, kind):
    model, x, *_ = build(method, kind)
    apply, start = functional(model), trainable(model)

    def loss(p):
        return mx.mean(mx.square(apply(p, x[0])))

    def meta(p, stop=False):
        grads = mx.grad(loss)(p)
        return loss({k: a - 0.02 * (mx.stop_gradient(grads[k]) if stop else grads[k]) for k, a in p.items()})

    grads = mx.grad(meta)(start)
    norm = mx.sqrt(sum(mx.sum(g * g) for g in grads.values()))
    direction = {k: g / norm for k, g in grads.items()}
    eps = 3e-3
    up = meta({k: a + eps * direction[k] for k, a in start.items()})
    down = meta({k: a - eps * direction[k] for k, a in start.items()})
    assert ((up - down) / (2 * eps)).item() == pytest.approx(norm.item(), rel=1e-2, abs=1e-4)
    first_order = mx.grad(lambda p: meta(p, stop=True))(start)
    assert any(mx.abs(g - first_order[path]).max().item() > 1e-5 * norm.item() for path, g in grads.items())


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_fused_equals_unfused(method, kind):
    model, x, config, *_ = build(method, kind)
    if type(config).adapter.fuse is Adapter.fuse:
        with pytest.raises(AdapterError, match="no merge"):
            merge(model)
        return
    before = model(x[0])
    fused = merge(model, dequantize=True)
    assert mx.abs(fused(x[0]) - before).max().item() < 1e-5 * max(1.0, mx.abs(before).max().item())
    assert not any("adapters" in path for path, _ in tree_flatten(fused.parameters()))


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[1] in CONVOLUTIONAL])
def test_by_given_statistics_an_image_is_answered_as_among_others(method, kind):
    model, x, *_ = build(method, kind)
    with recorded() as seen:
        model(x[0])
    with given(by_module(model, by_path(model, seen))):
        together, alone = model(x[1]), model(x[1][:1])
    assert mx.abs(together[:1] - alone).max().item() < 1e-5


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_clone_is_whole_and_apart(method, kind):
    model, x, *_ = build(method, kind)
    twin = clone(model)
    assert mx.array_equal(twin(x[0]), model(x[0]))
    before = twin(x[0])
    update(model, {path: array + 0.5 for path, array in trainable(model).items()})
    assert mx.array_equal(twin(x[0]), before)
    update(twin, {path: array + 0.5 for path, array in trainable(twin).items()})
    assert mx.abs(twin(x[0]) - model(x[0])).max().item() < 1e-6


@pytest.mark.parametrize("method", ADAPTERS)
def test_learning_lowers_the_loss_and_only_moves_the_adapter(method):
    model, x, _, before, _ = build(method, "decoder", perturbed=False)
    y = mx.array([0, 1, 2, 0])
    apply, params = functional(model), trainable(model)

    def loss(p):
        return nn.losses.cross_entropy(apply(p, x[0]), y, reduction="mean")

    first = loss(params).item()
    for _ in range(10):
        grads = mx.grad(loss)(params)
        size = mx.sqrt(sum(mx.sum(g * g) for g in grads.values()))
        params = {k: a - 0.1 * grads[k] / mx.maximum(size, 1e-6) for k, a in params.items()}
    assert loss(params).item() < first
    assert all(mx.array_equal(stripped(model)[path], before[path]) for path in before)
