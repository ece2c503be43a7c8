"""The convenience classes attach what their names say."""

from __future__ import annotations

import mlx.core as mx
import pytest

from adapter_models import encoder, mlp
from efficientai_toolkit.adapters import adapter_config, wrappers
from efficientai_toolkit.adapters.attach import adapters_of
from efficientai_toolkit.nn.functional import trainable

CASES = [
    (wrappers.LoRAAdapter, {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}, "LoRAConfig"),
    (wrappers.DoRAAdapter, {"r": 4}, "DoRAConfig"),
    (wrappers.AdaLoRAAdapter, {"r": 4}, "AdaLoRAConfig"),
    (wrappers.BottleneckAdapter, {"bottleneck_size": 4, "placement": "pfeiffer"}, "PfeifferConfig"),
    (wrappers.PrefixTuningAdapter, {"prefix_length": 3, "hidden_size": 8}, "PrefixMLPConfig"),
    (wrappers.PrefixTuningAdapter, {"prefix_length": 3}, "PrefixConfig"),
    (wrappers.PromptTuningAdapter, {"prompt_length": 3}, "PromptConfig"),
    (wrappers.PromptTuningAdapter, {"prompt_length": 3, "hidden_size": 8}, "PTuningConfig"),
    (wrappers.BitFitAdapter, {}, "BitFitConfig"),
    (wrappers.IA3Adapter, {}, "IA3Config"),
    (wrappers.CompacterAdapter, {"divisor": 2, "bottleneck_size": 4}, "CompacterConfig"),
    (wrappers.VeRAAdapter, {"r": 8}, "VeRAConfig"),
]


@pytest.mark.parametrize(("made", "arguments", "config"), CASES)
def test_it_attaches_counts_and_comes_off(made, arguments, config):
    model, x = encoder()
    plain = model(x[0])
    wrapper = made(model, **arguments)
    add = {"PrefixTuningAdapter": "add_prefix", "PromptTuningAdapter": "add_prompt"}.get(made.__name__, "add_adapter")
    adapted = getattr(wrapper, add)()
    assert type(adapters_of(adapted).configs["default"]).__name__ == config
    assert sum(a.size for a in trainable(adapted).values()) == wrapper.num_parameters > 0
    assert set(trainable(adapted)) <= set(wrapper.parameters())
    assert mx.array_equal(wrapper.remove()(x[0]), plain)


@pytest.mark.parametrize(
    ("made", "arguments", "method"),
    [
        (wrappers.LoRAAdapter, {}, "lora"),
        (wrappers.DoRAAdapter, {}, "dora"),
        (wrappers.AdaLoRAAdapter, {}, "adalora"),
        *((wrappers.BottleneckAdapter, {"placement": name}, name) for name in ("houlsby", "pfeiffer", "parallel")),
        (wrappers.PrefixTuningAdapter, {}, "prefix"),
        (wrappers.PromptTuningAdapter, {}, "prompt"),
        (wrappers.CompacterAdapter, {}, "compacter"),
        (wrappers.VeRAAdapter, {}, "vera"),
    ],
)
def test_what_is_not_said_is_the_methods_default(made, arguments, method):
    assert made(encoder()[0], **arguments).config == adapter_config(method)


def test_it_merges():
    model, x = mlp()
    wrapper = wrappers.LoRAAdapter(model, r=2)
    adapted = wrapper.add_adapter()
    expected = adapted(x[0])
    assert mx.allclose(wrapper.merge()(x[0]), expected, atol=1e-6)
