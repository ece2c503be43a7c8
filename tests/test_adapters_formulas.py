"""Each method's own equations, against direct evaluations of the papers' formulas."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapter_models import decoder, encoder
from efficientai_toolkit.adapters import activate, adapter_config, attach, count_parameters
from efficientai_toolkit.adapters.adalora import AdaLoRAConfig, allot, budget, init_importance, orthogonality
from efficientai_toolkit.adapters.attach import slots
from efficientai_toolkit.adapters.quantized import dense_weight
from efficientai_toolkit.adapters.widths import width_in, width_out
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update


def perturbed(model, size=0.3):
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [size * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


def close(a, b, atol=1e-5):
    return np.abs(np.array(a) - np.array(b)).max() < atol


def on_a_layer(method, **options):
    """The slot on one 8 → 12 layer, its adapter, and inputs (5, 8)."""
    mx.random.seed(0)
    layer = nn.Linear(8, 12)
    slot = perturbed(attach(layer, adapter_config(method, **options), "linear"))
    return layer, slot, slot.adapters["default"], mx.random.normal((5, 8), key=mx.random.key(9))


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_bottleneck_is_down_activation_up_behind_the_layer(activation):
    layer, slot, adapter, x = on_a_layer("houlsby", bottleneck=4, activation=activation)
    h = layer(x)
    f = {"relu": nn.relu, "gelu": nn.gelu, "tanh": mx.tanh}[activation]
    hidden = f(h @ adapter.down.weight.T + adapter.down.bias)
    assert close(slot(x), h + hidden @ adapter.up.weight.T + adapter.up.bias)
    assert adapter.down.weight.shape == (4, 12)


def test_parallel_reads_what_the_base_reads():
    layer, slot, adapter, x = on_a_layer("parallel", bottleneck=4, scale=2.0)
    assert close(slot(x), layer(x) + 2 * adapter.up(nn.relu(adapter.down(x))))
    model, _ = decoder()
    attach(model, adapter_config("parallel", bottleneck=4))
    assert set(slots(model)) == {"layers.0.mlp", "layers.1.mlp"}
    assert (width_in(model.layers[0].mlp.base), width_out(model.layers[0].mlp.base)) == (32, 32)


def test_placements_are_the_papers():
    expected = {
        "houlsby": {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")},
        "pfeiffer": {f"layers.{i}.mlp.down_proj" for i in (0, 1)},
        "prefix": {f"layers.{i}.self_attn" for i in (0, 1)},
        "prompt": {"embed_tokens"},
    }
    for method, paths in expected.items():
        model, _ = decoder()
        assert set(slots(attach(model, adapter_config(method)))) == paths


@pytest.mark.parametrize("rank", [1, 2])
def test_compacter_is_a_bottleneck_of_kronecker_sums(rank):
    layer, slot, adapter, x = on_a_layer("compacter", divisor=4, reduction=1.5, rank=rank)
    h, shared = np.array(layer(x)), slot["adapter_shared"]["default"]

    def matrix(phm, rule):
        a, s, t = np.array(rule), np.array(phm.left), np.array(phm.right)
        return sum(np.kron(a[i], s[i] @ t[i]) for i in range(4))

    down, up = matrix(adapter.down, shared.down), matrix(adapter.up, shared.up)
    assert down.shape == (12, 8)
    assert up.shape == (8, 12)
    assert close(adapter.down.weight(), down)
    hidden = np.array(nn.gelu(mx.array(h @ down + np.array(adapter.down.bias))))
    assert close(slot(x), h + hidden @ up + np.array(adapter.up.bias))


def test_compacter_counts_and_shares_its_rules_once():
    model, _ = decoder()
    config = adapter_config("compacter", divisor=4, bottleneck=8)
    expected = 2 * 4**3 + 4 * (2 * (32 + 8) + 8 + 32)
    assert count_parameters(model, config) == expected
    attach(model, config)
    params = trainable(model)
    assert sum(a.size for a in params.values()) == expected
    rules = [path for path in params if path.startswith("adapter_shared")]
    assert rules == ["adapter_shared.default.down", "adapter_shared.default.up"]
    owners = {id(slot.adapters["default"].down.owner.module) for slot in slots(model).values()}
    assert owners == {id(model["adapter_shared"]["default"])}
    with pytest.raises(AdapterError, match=r"divisor 5 does not divide the width 32 of 'layers\.0"):
        attach(model := decoder()[0], adapter_config("compacter", divisor=5))
    assert not slots(model)


def test_bitfit_has_the_gradient_of_the_biases_themselves():
    model, x = encoder()
    x = x[0]
    biases = {path: a for path, a in trainable(model).items() if path.endswith("bias")}
    from efficientai_toolkit.nn.functional import functional

    def loss(apply):
        return lambda p: mx.mean(mx.square(apply(p, x)))

    expected = mx.grad(loss(functional(model)))(biases)
    attach(model, adapter_config("bitfit"))
    grads = mx.grad(loss(functional(model)))(trainable(model))
    assert len(grads) == len(expected)
    assert sum(a.size for a in grads.values()) == sum(a.size for a in biases.values())
    for path, grad in grads.items():
        assert close(grad, expected[path.replace(".adapters.default", "")], 1e-6)


def test_linear_adapter_is_its_residual_form():
    layer, slot, adapter, x = on_a_layer("linear")
    h = layer(x)
    assert close(slot(x), h + h @ adapter.weight + adapter.bias)


def test_ia3_scales_outputs_but_inputs_on_the_feed_forward():
    model, _ = decoder()
    attach(model, adapter_config("ia3"))
    scaled = {path: slot.adapters["default"].scales_input for path, slot in slots(model).items()}
    assert scaled == {
        f"layers.{i}.{name}": name == "mlp.down_proj"
        for i in (0, 1)
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def test_dora_is_magnitude_times_direction():
    layer, slot, adapter, x = on_a_layer("dora", rank=3, alpha=6)
    weight = np.array(layer.weight) + 2 * (np.array(adapter.lora_a) @ np.array(adapter.lora_b)).T
    weight = np.array(adapter.m)[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert close(slot(x), np.array(x) @ weight.T + np.array(layer.bias))


def test_vera_shares_one_frozen_pair():
    model, x = decoder()
    attach(model, adapter_config("vera", rank=8), ["q_proj", "up_proj", "down_proj"])
    pair = model["adapter_shared"]["default"]
    assert (pair.a.shape, pair.b.shape) == ((64, 8), (8, 64))
    before = [np.array(pair.a), np.array(pair.b)]
    perturbed(model)
    assert close(pair.a, before[0], 1e-12)
    slot = slots(model)["layers.1.mlp.up_proj"]
    adapter, x = slot.adapters["default"], mx.random.normal((5, 32))
    expected = slot.base(x) + ((x @ pair.a[:32]) * adapter.d) @ pair.b * adapter.b
    assert close(slot(x), expected)


def test_adalora_budget_falls_cubically():
    config = AdaLoRAConfig(rank=12, target_rank=8, warmup=10, cooldown=20, total_steps=130)
    assert [budget(config, step, 5) for step in (0, 9, 10, 110, 130)] == [60, 60, 60, 40, 40]
    assert budget(config, 60, 5) == round(40 + 20 * 0.5**3)
    ranks = [budget(config, step, 5) for step in range(131)]
    assert ranks == sorted(ranks, reverse=True)


def test_adalora_keeps_the_most_important_triplets():
    config = AdaLoRAConfig(rank=3, target_rank=1, warmup=0, cooldown=0, total_steps=2, interval=1)
    paths = [f"layers.{i}.adapters.default.lora_" for i in (0, 1)]
    rng = np.random.default_rng(0)
    params = {f"{p}a": mx.array(rng.normal(size=(4, 3)).astype(np.float32)) for p in paths}
    params |= {f"{p}b": mx.array(rng.normal(size=(3, 5)).astype(np.float32)) for p in paths}
    params |= {f"{p}e": mx.array(rng.normal(size=3).astype(np.float32)) for p in paths}
    grads = {path: mx.array(rng.normal(size=a.shape).astype(np.float32)) for path, a in params.items()}
    state = init_importance(params)
    kept, state = allot(config, params, grads, state, step=2)

    def score(p):
        def s(leaf):
            sensitivity = np.abs(np.array(params[p + leaf]) * np.array(grads[p + leaf]))
            mean = 0.15 * sensitivity
            return mean * 0.15 * np.abs(sensitivity - mean)

        return s("e") + s("a").mean(axis=0) + s("b").mean(axis=1)

    scores = np.stack([score(p) for p in paths])
    expected = scores >= np.sort(scores.ravel())[-2]
    assert np.array_equal(np.stack([np.array(kept[p + "e"]) != 0 for p in paths]), expected)
    assert all(kept[path] is params[path] for path in params if not path.endswith("e"))
    warm = AdaLoRAConfig(rank=3, target_rank=1, warmup=5, cooldown=0, total_steps=10, interval=1)
    same, _ = allot(warm, params, grads, init_importance(params), step=2)
    assert all(same[path] is params[path] for path in params)


def test_adalora_orthogonality_is_zero_for_orthonormal_factors():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0].astype(np.float32)
    params = {"x.lora_a": mx.array(q), "x.lora_b": mx.array(q.T), "x.lora_e": mx.ones(3)}
    assert orthogonality(params).item() < 1e-5
    doubled = {**params, "x.lora_a": mx.array(q * 2**0.5)}
    assert orthogonality(doubled).item() == pytest.approx(3**0.5 / 2, rel=1e-4)  # the mean of P's and Q's


def test_prefix_attention_is_attention_over_the_longer_sequence():
    model, _ = encoder()
    attach(model, adapter_config("prefix", length=3))
    perturbed(model)
    attention = model.layers[0].attention
    prefix = attention.adapters["default"]
    x = mx.random.normal((2, 5, 32), key=mx.random.key(1))
    mask = mx.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) > 0
    base, out = attention.base, np.array(attention(x, mask[:, None, None, :]))
    q, k, v = (np.array(layer(x)) for layer in (base.q_proj, base.k_proj, base.v_proj))
    for row in range(2):
        n = int(mask[row].sum().item())
        keys = np.concatenate([np.array(prefix.prefix_keys), k[row, :n]])
        values = np.concatenate([np.array(prefix.prefix_values), v[row, :n]])
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            logits = q[row][:, part] @ keys[:, part].T / 8**0.5
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ values[:, part])
        expected = base.o_proj(mx.array(np.concatenate(heads, axis=1)))
        assert close(out[row], expected)


def test_prefix_on_mlx_s_own_attention():
    mx.random.seed(0)
    attention = nn.MultiHeadAttention(16, 4)
    x = mx.random.normal((2, 5, 16))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(5)
    plain = attention(x, x, x, mask)
    slot = perturbed(attach(attention, adapter_config("prefix", length=3)))
    prefix = slot.adapters["default"]

    def heads(y):
        return mx.unflatten(y, -1, (4, 4)).transpose(0, 2, 1, 3)

    def before(y, more):
        return heads(mx.concatenate([mx.broadcast_to(more, (2, 3, 16)), y], axis=1))

    keys = before(attention.key_proj(x), prefix.prefix_keys)
    values = before(attention.value_proj(x), prefix.prefix_values)
    logits = heads(attention.query_proj(x)) @ keys.swapaxes(-1, -2) / 2 + mx.pad(mask, [(0, 0), (3, 0)])
    expected = attention.out_proj((mx.softmax(logits, axis=-1) @ values).transpose(0, 2, 1, 3).flatten(-2, -1))
    assert close(slot(x, x, x, mask), expected)
    activate(slot, None)
    assert close(slot(x, x, x, mask), plain)


def test_a_generation_cache_holds_the_prefix_once():
    mlx_cache = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed (extra `lm`)")
    model, _ = decoder()
    attach(model, adapter_config("prefix", length=3))
    perturbed(model)
    attention = model.layers[0].self_attn
    x = mx.random.normal((1, 6, 32), key=mx.random.key(2))
    whole = attention(x, "causal")
    cache = mlx_cache.KVCache()
    parts = [attention(x[:, :4], "causal", cache)] + [attention(x[:, i : i + 1], None, cache) for i in (4, 5)]
    assert cache.offset == 9
    assert close(mx.concatenate(parts, axis=1), whole)


def test_a_soft_prompt_is_seen_but_not_pooled():
    model, x = encoder()
    ids = x[0]
    attach(model, adapter_config("prompt", length=4))
    hidden, mask = model.encode(ids)
    assert hidden.shape == (4, 11, 32)
    assert mask[:, :4].all().item()
    weight = np.array(mask[:, 4:])[..., None]
    assert close(model.features(ids), (np.array(hidden[:, 4:]) * weight).sum(1) / weight.sum(1))


def test_outputs_of_another_length_cannot_be_weighted():
    model, _ = encoder()
    attach(model, adapter_config("prompt", length=2), name="one")
    attach(model, adapter_config("prompt", length=2), name="two")
    with pytest.raises(AdapterError, match="lengthens the sequence"):
        activate(model, {"one": 0.5, "two": 0.5})
    activate(model, "one")


def test_quantised_weights_are_what_the_kernel_multiplies_by():
    layer = nn.Linear(64, 32).to_quantized(32, 4)
    x = mx.random.normal((3, 64))
    assert close(layer(x) - layer.bias, x @ dense_weight(layer).T, 1e-4)
