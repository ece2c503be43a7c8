"""Attaching, choosing, combining, merging and taking off adapters; and what the errors say."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from adapter_models import decoder, mlp, quantized_decoder
from efficientai_toolkit.adapters import (
    activate,
    adapter_config,
    adapter_state,
    attach,
    count_parameters,
    detach,
    load_adapter_state,
    merge,
    quantization_loss,
)
from efficientai_toolkit.adapters.attach import flat_parameters, slots
from efficientai_toolkit.adapters.lora import LoRAConfig, RsLoRAConfig
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import clone, functional, trainable, update


def with_noise(model, seed=5, size=0.1):
    params = trainable(model)
    keys = mx.random.split(mx.random.key(seed), len(params))
    update(
        model, {p: a + size * mx.random.normal(a.shape, key=k) for (p, a), k in zip(params.items(), keys, strict=True)}
    )
    return model


ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
BLOCK = [*ATTENTION, "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}),
        ("q_proj", {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ("layers.1.*_proj", {f"layers.1.{name}" for name in BLOCK}),
        (
            ["layers.0.mlp.up_proj", "feedforward_out"],
            {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"},
        ),
        ("head", {"head"}),
    ],
)
def test_targets_by_default_name_glob_and_kind(targets, expected):
    model, _ = decoder()
    attach(model, LoRAConfig(rank=2), targets)
    assert set(slots(model)) == expected


def test_linear_leaves_the_output_layer_alone():
    model, _ = decoder()
    attach(model, LoRAConfig(rank=2), "linear")
    assert len(slots(model)) == 12
    assert "head" not in slots(model)


def test_nothing_matched_lists_what_could():
    model, _ = decoder()
    with pytest.raises(
        AdapterError,
        match=r"no module matches 'q_prj'; did you mean 'q_proj'.*layers\.0\.self_attn\.q_proj.*by kind: .*query",
    ) as error:
        attach(model, LoRAConfig(), "q_prj")
    assert "norm1" not in str(error.value)
    assert not slots(model)
    assert sum(a.size for a in trainable(model).values()) > 0


def test_a_model_without_a_place_says_what_is_needed():
    with pytest.raises(AdapterError, match="a linear layer is needed"):
        attach(nn.Sequential(nn.ReLU()), LoRAConfig())


def test_the_model_itself_can_be_the_layer():
    layer = nn.Linear(4, 3)
    x = mx.random.normal((2, 4))
    model = attach(layer, LoRAConfig(rank=2), "linear")
    assert set(trainable(model)) == {"adapters.default.lora_a", "adapters.default.lora_b"}
    with_noise(model)
    expected = model(x)
    merged = merge(model)
    assert isinstance(merged, nn.Linear)
    assert mx.allclose(merged(x), expected, atol=1e-6)
    assert set(trainable(merged)) == {"weight", "bias"}


def test_lora_is_the_paper_s_equation_and_scalings():
    layer = nn.Linear(6, 5)
    x = mx.random.normal((7, 6), key=mx.random.key(0))
    for config, scale in ((LoRAConfig(rank=4, alpha=8), 2.0), (RsLoRAConfig(rank=4, alpha=8), 4.0)):
        model = with_noise(attach(layer, config, "linear"))
        a, b = model.adapters["default"].lora_a, model.adapters["default"].lora_b
        assert mx.allclose(model(x), layer(x) + scale * (x @ a @ b), atol=1e-5)
        detach(model)


def test_train_head_adds_exactly_the_head():
    model, _ = mlp()
    attach(model, LoRAConfig(rank=2), train_head=True)
    assert {p for p in trainable(model) if ".adapters." not in p} == {"head.weight", "head.bias"}
    state = adapter_state(model)
    assert {"head.weight", "head.bias"} <= set(state)
    with pytest.raises(AdapterError, match="no module 'hed' in this model; did you mean 'head'"):
        attach(mlp()[0], LoRAConfig(), train_head="hed")
    with pytest.raises(AdapterError, match="'head' is quantised and cannot be trained"):
        attach(quantized_decoder()[0], LoRAConfig(rank=2), train_head=True)


def test_a_trained_head_is_its_adapter_s_own():
    model, x = mlp()
    x, plain = x[0], mlp()[0](x[0])
    before = flat_parameters(model)
    attach(model, LoRAConfig(rank=2), name="a", train_head=True)
    with_noise(model, 1)
    a, head_a = model(x), model.head.weight
    attach(model, LoRAConfig(rank=2), name="b", train_head=True)
    assert mx.array_equal(model.head.weight, before["head.weight"])  # not where a left it
    with_noise(model, 2)
    b = model(x)
    attach(model, adapter_config("bitfit"), name="c")
    assert mx.array_equal(model(x), plain)
    for name, expected in (("a", a), ("b", b), (None, plain), ("c", plain), ("a", a)):
        assert mx.array_equal(activate(model, name)(x), expected)
    assert mx.array_equal(adapter_state(model, "b")["head.weight"], adapter_state(clone(model), "b")["head.weight"])
    assert mx.array_equal(activate(clone(model), "b")(x), b)
    activate(model, {"a": 0.25, "b": 0.75})
    deltas = [adapter_state(model, n)["head.weight"] - before["head.weight"] for n in "ab"]
    assert mx.allclose(model.head.weight, before["head.weight"] + 0.25 * deltas[0] + 0.75 * deltas[1], atol=1e-6)
    assert not any(path.startswith("head.") for path in trainable(model))
    assert mx.array_equal(activate(model, "a").head.weight, head_a)
    assert {"head.base.weight", "head.base.bias"} <= trainable(model).keys()  # c has a slot around it
    detach(model, "a")
    assert mx.array_equal(model(x), plain)
    assert mx.array_equal(activate(model, "b")(x), b)
    detach(model)
    after = flat_parameters(model)
    assert all(mx.array_equal(after[path], before[path]) for path in before)
    assert trainable(model).keys() == before.keys()


def test_a_head_of_an_inactive_adapter_is_written_and_merged_ones_stay():
    model, x = mlp()
    attach(model, LoRAConfig(rank=2), name="a", train_head=True)
    with_noise(model, 1)
    state, expected = adapter_state(model, "a"), model(x[0])
    other, _ = mlp()
    attach(other, LoRAConfig(rank=2), name="a", train_head=True)
    attach(other, LoRAConfig(rank=3), name="b", train_head=True)
    other_b = with_noise(other, 2)(x[0])
    load_adapter_state(other, state, "a")
    assert mx.array_equal(other(x[0]), other_b)
    assert mx.array_equal(activate(other, "a")(x[0]), expected)
    assert mx.allclose(merge(other)(x[0]), expected, atol=1e-5)


def test_several_adapters_switch_and_combine_by_weight():
    model, x = decoder()
    x = x[0]
    plain = model(x)
    attach(model, LoRAConfig(rank=2), name="one")
    with_noise(model, 1)
    one = model(x)
    attach(model, adapter_config("ia3"), "v_proj", name="two")
    with_noise(model, 2)
    two = model(x)
    assert all(".adapters.two." in path for path in trainable(model))
    activate(model, "one")
    assert mx.array_equal(model(x), one)
    assert all(".adapters.one." in path for path in trainable(model))
    activate(model, None)
    assert mx.array_equal(model(x), plain)
    assert not trainable(model)
    activate(model, {"one": 1.0, "two": 0.0})
    assert mx.allclose(model(x), one, atol=1e-5)
    activate(model, {"one": 0.3, "two": 0.7})
    mixed = model(x)
    assert {path.split(".adapters.")[1].split(".")[0] for path in trainable(model)} == {"one", "two"}
    assert mx.allclose(merge(model)(x), mixed, atol=1e-5)
    assert not mx.allclose(mixed, one, atol=1e-3)
    assert not mx.allclose(mixed, two, atol=1e-3)


def test_weighted_lora_is_the_weighted_sum_of_deltas():
    layer = nn.Linear(4, 4)
    x = mx.random.normal((2, 4))
    model = with_noise(attach(layer, LoRAConfig(rank=2), "linear", name="a"), 1)
    model = with_noise(attach(model, LoRAConfig(rank=3), "linear", name="b"), 2)
    activate(model, {"a": 0.5, "b": 2.0})
    deltas = {name: adapter.delta() for name, adapter in model.adapters.items()}
    assert mx.allclose(model(x), layer(x) + x @ (0.5 * deltas["a"] + 2 * deltas["b"]).T, atol=1e-5)


def test_detaching_one_keeps_the_other():
    model, x = decoder()
    attach(model, LoRAConfig(rank=2), name="one")
    with_noise(model)
    one = model(x[0])
    attach(model, LoRAConfig(rank=2), name="two")
    detach(model, "two")
    activate(model, "one")
    assert mx.array_equal(model(x[0]), one)
    with pytest.raises(AdapterError, match=r"no adapter named 'two'\. Known: one"):
        activate(model, "two")


def test_names_are_checked():
    model, _ = mlp()
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(AdapterError, match="already has an adapter named 'default'"):
        attach(model, LoRAConfig(rank=2))
    with pytest.raises(AdapterError, match="must be an identifier"):
        attach(model, LoRAConfig(rank=2), name="a.b")
    with pytest.raises(AdapterError, match="attach one first"):
        detach(mlp()[0])


def test_options_are_checked():
    with pytest.raises(AdapterError, match="no option 'rnk'; did you mean 'rank'"):
        adapter_config("lora", rnk=3)
    with pytest.raises(AdapterError, match="no adapter method 'lra'; did you mean 'lora'"):
        adapter_config("lra")
    with pytest.raises(AdapterError, match="LoRAConfig: rank should be greater than or equal to 1, got 0"):
        LoRAConfig(rank=0)


@pytest.mark.parametrize(
    ("method", "option", "value", "said"),
    [
        ("lora", "alpha", "abc", "should be a valid number"),
        ("lora", "alpha", None, "should be a valid number"),
        ("lora", "alpha", float("inf"), "should be a finite number"),
        ("lora", "rank", 2.5, "should be a valid integer"),
        ("lora", "dropout", 1.0, "should be less than 1"),
        ("lora", "learning_rate", "x", "should be a valid number"),
        ("lora", "learning_rate", 0.0, "should be greater than 0"),
        ("dora", "rank", 0, "should be greater than or equal to 1"),
        ("adalora", "interval", 0, "should be greater than or equal to 1"),
        ("adalora", "target_rank", 13, "target_rank must be at most rank"),
        ("vera", "d_initial", "x", "should be a valid number"),
        ("houlsby", "bottleneck", 2.5, "should be a valid integer"),
        ("houlsby", "scale", "x", "should be a valid number"),
        ("houlsby", "activation", "sine", "activation must be one of"),
        ("compacter", "divisor", 0, "should be greater than or equal to 1"),
        ("prefix", "length", 2.5, "should be a valid integer"),
        ("p_tuning", "hidden", -1, "should be greater than or equal to 1"),
        ("bitfit", "learning_rate", -1, "should be greater than 0"),
        ("ia3", "feedforward", 3, "should be a valid tuple"),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(method, option, value, said):
    with pytest.raises(AdapterError, match=f"{option}.*{said}|{said}.*{option}"):
        adapter_config(method, **{option: value})


def test_options_from_a_file_take_their_types():
    config = adapter_config("ia3", feedforward=["down_proj"], learning_rate=1)
    assert (config.feedforward, config.learning_rate) == (("down_proj",), 1.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("targets", [[], (), [""], "", [3], 3])
def test_targets_that_are_none_are_refused(targets):
    with pytest.raises(AdapterError, match=r"target_modules is .*; expected paths, globs or kinds"):
        attach(mlp()[0], LoRAConfig(rank=2), targets)


def test_state_round_trips_and_says_what_does_not_fit():
    model, x = decoder()
    with_noise(attach(model, LoRAConfig(rank=2), key=mx.random.key(7)))
    other, _ = decoder()
    attach(other, LoRAConfig(rank=2))
    load_adapter_state(other, adapter_state(model))
    assert mx.array_equal(other(x[0]), model(x[0]))
    wide, _ = decoder()
    attach(wide, LoRAConfig(rank=3), "q_proj")
    with pytest.raises(AdapterError, match=r"not in this model.*lora_a is \(32, 2\), this model's is \(32, 3\)"):
        load_adapter_state(wide, adapter_state(model))


def test_the_same_key_gives_the_same_adapter_and_another_key_another():
    states = [adapter_state(attach(decoder()[0], LoRAConfig(rank=2), key=mx.random.key(k))) for k in (0, 0, 1)]
    path = "layers.0.self_attn.q_proj.adapters.default.lora_a"
    assert mx.array_equal(states[0][path], states[1][path])
    assert not mx.array_equal(states[0][path], states[2][path])
    assert not mx.array_equal(states[0][path], states[0][path.replace("q_proj", "v_proj")])


def test_dropout_draws_from_the_key_and_each_task_from_its_own():
    layer = attach(nn.Linear(8, 8), LoRAConfig(rank=4, dropout=0.5), "linear")
    with_noise(layer)
    apply, params = functional(layer), trainable(layer)
    x = mx.ones((3, 2, 8))
    assert mx.array_equal(apply(params, x[0]), apply(params, x[0]))
    keys = mx.random.split(mx.random.key(0), 3)
    masked = mx.vmap(lambda x, key: apply(params, x, key=key))(x, keys)
    assert not mx.allclose(masked[0], masked[1])
    assert mx.allclose(masked[1], apply(params, x[1], key=keys[1]), atol=1e-6)


def test_a_quantised_base_merges_to_quantised_or_dense_and_reports_the_loss():
    model, x = quantized_decoder()
    with_noise(attach(model, LoRAConfig(rank=2)), size=0.3)
    x, expected = x[0], model(x[0])
    losses = quantization_loss(model)
    assert set(losses) == set(slots(model))
    assert all(0 < loss < 1 for loss in losses.values())
    merged = merge(model)
    assert isinstance(merged.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert 0 < mx.abs(merged(x) - expected).max().item() < 0.05
    dense, _ = quantized_decoder()
    with_noise(attach(dense, LoRAConfig(rank=2)), size=0.3)
    dense = merge(dense, dequantize=True)
    assert type(dense.layers[0].self_attn.q_proj) is nn.Linear
    assert mx.allclose(dense(x), expected, atol=1e-5)


def test_quantised_layers_get_their_fast_kernel_back():
    model, _ = quantized_decoder()
    attach(model, LoRAConfig(rank=2))
    assert not any(type(m) is nn.QuantizedLinear for m in model.modules())
    detach(model)
    assert type(model.layers[0].mlp.up_proj) is nn.QuantizedLinear


def test_count_parameters_changes_nothing():
    model, _ = decoder()
    before = [path for path, _ in tree_flatten(model.parameters())]
    assert count_parameters(model, LoRAConfig(rank=4)) == 4 * 4 * (32 + 32)
    assert [path for path, _ in tree_flatten(model.parameters())] == before


def test_a_slot_passes_the_base_s_attributes_on():
    model, _ = decoder()
    attach(model, LoRAConfig(rank=2), "q_proj")
    slot = model.layers[0].self_attn.q_proj
    assert slot.weight.shape == (32, 32)
    with pytest.raises(AttributeError):
        _ = slot.no_such_thing
