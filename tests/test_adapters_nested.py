"""Adapters and trained heads inside one another, and parts of a model that are adapted by themselves."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapter_models import decoder
from efficientai_toolkit.adapters import activate, adapter_config, adapter_state, attach, count_parameters, detach
from efficientai_toolkit.adapters.attach import flat_parameters
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.adapters.wrappers import BitFitAdapter
from efficientai_toolkit.backbones.mlp import MLP
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update

INNER, OUTER = "layers.1.layers.1", "layers.1"


def two_deep() -> nn.Module:
    mx.random.seed(3)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))


def moved(model: nn.Module) -> nn.Module:
    update(model, {path: array + 0.1 for path, array in trainable(model).items()})
    return model


@pytest.mark.parametrize(("first", "second"), [(INNER, OUTER), (OUTER, INNER)])
def test_a_trained_head_in_or_around_another_is_refused(first, second):
    model = two_deep()
    attach(model, LoRAConfig(rank=2), "layers.0", name="a", train_head=first)
    before, acting = flat_parameters(model), trainable(model).keys()
    with pytest.raises(AdapterError, match=rf"'{second}' and '{first}', which another adapter trains, lie one in"):
        attach(model, LoRAConfig(rank=2), "layers.0", name="b", train_head=second)
    assert flat_parameters(model).keys() == before.keys()
    assert trainable(model).keys() == acting


def test_a_head_whose_adapter_is_gone_is_in_nobody_s_way():
    model, x = two_deep(), mx.ones((1, 4))
    plain = model(x)
    attach(model, LoRAConfig(rank=2), "layers.0", name="kept")
    moved(attach(model, LoRAConfig(rank=2), "layers.0", name="a", train_head=OUTER))
    detach(model, "a")
    moved(attach(model, LoRAConfig(rank=2), "layers.0", name="b", train_head=INNER))
    b = model(x)
    assert mx.array_equal(activate(model, None)(x), plain)
    assert mx.array_equal(activate(model, "b")(x), b)
    assert mx.array_equal(detach(model)(x), plain)


def test_training_a_head_leaves_the_adapters_in_it_alone():
    model = two_deep()
    attach(model, LoRAConfig(rank=2), INNER, name="b")
    attach(model, LoRAConfig(rank=2), "layers.0", name="a", train_head=OUTER)
    own = {f"{OUTER}.layers.{i}.{leaf}" for i in ("0", "1.base") for leaf in ("weight", "bias")}
    assert {path for path in trainable(model) if "adapters" not in path} == own
    assert {path for path in trainable(model) if "adapters" in path} == {
        path for path in adapter_state(model, "a") if "adapters" in path
    }
    activate(model, {"a": 1.0, "b": 0.5})
    assert trainable(model).keys() == own | {p for n in "ab" for p in adapter_state(model, n) if "adapters" in p}


def test_a_part_that_is_adapted_by_itself_is_refused():
    model, x = decoder()
    moved(attach(model.layers[0], LoRAConfig(rank=2), "q_proj"))
    expected = model(x[0])
    for name in ("default", "other"):
        with pytest.raises(AdapterError, match=r"'layers\.0.*' has adapters that were attached to a part"):
            attach(model, LoRAConfig(rank=2), "q_proj", name=name)
    assert mx.array_equal(model(x[0]), expected)
    detach(model.layers[0])
    attach(model, LoRAConfig(rank=2), "q_proj")
    with pytest.raises(AdapterError, match=r"'self_attn\.q_proj' has adapters that were attached to a part"):
        attach(model.layers[0], LoRAConfig(rank=2), "v_proj")
    attach(model, LoRAConfig(rank=2), "v_proj", name="other")  # the whole, again


def test_a_part_under_a_name_that_the_whole_has_is_refused():
    model, _ = decoder()
    attach(model, LoRAConfig(rank=2), "layers.1.*.q_proj", name="a")
    attach(model.layers[0], LoRAConfig(rank=2), "q_proj", name="a")
    with pytest.raises(AdapterError, match=r"'layers\.0' has adapters that were attached to a part"):
        attach(model, LoRAConfig(rank=2), "layers.1.*.v_proj", name="b")


def test_a_layer_that_is_its_own_model_is_one_part_of_another():
    layer = attach(nn.Linear(4, 4), LoRAConfig(rank=2), "linear")
    with pytest.raises(AdapterError, match=r"'layers\.0' has adapters"):
        attach(nn.Sequential(layer, nn.Linear(4, 3)), LoRAConfig(rank=2), "layers.1", name="b")


def test_a_trained_head_is_not_counted_as_the_adapter_s():
    model = MLP(6, 3, 16, 2, key=mx.random.key(1))
    whole, without = (count_parameters(model, adapter_config("bitfit"), train_head=head) for head in (False, True))
    assert whole - without == 3
    adapter = BitFitAdapter(model, train_head=True)
    adapted = adapter.add_adapter()
    assert adapter.num_parameters == without
    assert sum(a.size for a in trainable(adapted).values()) == without + 16 * 3 + 3
