"""The frozen prefix gives the same losses and gradients, computes each example once, and never serves another model."""

from __future__ import annotations

import mlx.core as mx
import pytest

from adapter_models import encoder
from efficientai_toolkit.adapters import activate, adapter_config, attach
from efficientai_toolkit.backbones.frozen_prefix import FrozenPrefix, frozen_layers
from efficientai_toolkit.errors import ModelError
from efficientai_toolkit.nn.functional import functional, trainable
from efficientai_toolkit.tasks.episode import Episode


def adapted(targets="layers.1.attention.*_proj"):
    model, x = encoder()
    attach(model, adapter_config("lora", rank=2), targets, train_head=True)
    return model, x


@pytest.mark.parametrize(
    ("method", "targets", "expected"),
    [
        ("lora", "layers.1.*", 1),
        ("lora", "q_proj", 0),
        ("lora", "head", 2),
        ("prompt", None, 0),
        ("bitfit", None, 0),
        ("prefix", "layers.1.attention", 1),
        ("prefix_mlp", None, 0),
    ],
)
def test_how_much_is_frozen(method, targets, expected):
    model, _ = encoder()
    attach(model, adapter_config(method), targets)
    assert frozen_layers(model) == expected


def test_the_same_outputs_and_gradients_of_both_orders():
    model, x = adapted()
    prefix = FrozenPrefix(model)
    assert prefix.layers == model.resumes_at == 1
    h = prefix(x)
    assert h.shape == (3, 4, 7, 33)
    assert mx.abs(model(h[0]) - model(x[0])).max().item() < 1e-5
    apply, start = functional(model), trainable(model)
    params = {path: mx.stack([a + 0.1, a, a - 0.1]) for path, a in start.items()}

    def meta(p, x):
        grads = mx.grad(lambda p: mx.mean(mx.square(apply(p, x))))(p)
        return mx.mean(mx.square(apply({k: a - 0.05 * grads[k] for k, a in p.items()}, x)))

    cached, plain = mx.vmap(mx.grad(meta))(params, h), mx.vmap(mx.grad(meta))(params, x)
    for path in params:
        scale = max(1.0, mx.abs(plain[path]).max().item())
        assert mx.abs(cached[path] - plain[path]).max().item() < 1e-5 * scale


def test_each_example_is_computed_once_whatever_its_padding():
    model, x = adapted()
    prefix = FrozenPrefix(model)
    first = prefix(x[0])
    assert prefix.computed == 4
    again = prefix(mx.pad(x[0], [(0, 0), (0, 2)]))
    assert prefix.computed == 4
    assert mx.array_equal(again[:, :7], first)
    assert mx.abs(model(again) - model(first)).max().item() < 1e-6
    prefix(mx.concatenate([x[0], x[0][::-1], x[1]]))
    assert prefix.computed == 8


def test_episodes_are_replaced_whole():
    model, x = adapted()
    y = mx.zeros((3, 4), dtype=mx.int32)
    (episode,) = FrozenPrefix(model).episodes([Episode(x, y, x, y)])
    assert episode.support_x.shape == episode.query_x.shape == (3, 4, 7, 33)
    assert episode.support_y is y


def test_on_disk_it_survives_but_not_for_another_model(tmp_path):
    model, x = adapted()
    first = FrozenPrefix(model, tmp_path)
    h = first(x)
    second = FrozenPrefix(adapted()[0], tmp_path)
    assert mx.array_equal(second(x), h)
    assert second.computed == 0
    other, _ = adapted()
    other.layers[0].feed_forward.up_proj.bias = other.layers[0].feed_forward.up_proj.bias + 1
    third = FrozenPrefix(other, tmp_path)
    assert not mx.allclose(third(x), h, atol=1e-3)
    assert third.computed == 12
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(b"damaged")
    fourth = FrozenPrefix(adapted()[0], tmp_path)
    assert mx.array_equal(fourth(x), h)
    assert fourth.computed == 12


def test_memory_is_bounded():
    model, x = adapted()
    prefix = FrozenPrefix(model, max_bytes=5 * 7 * 33 * 4)
    expected = FrozenPrefix(model)(x)
    assert mx.abs(prefix(x) - expected).max().item() < 1e-5
    assert prefix._bytes <= prefix.max_bytes
    assert prefix._bytes == sum(row.nbytes for row in prefix._rows.values())


def test_what_cannot_be_cached_is_refused():
    model, x = adapted("q_proj")
    with pytest.raises(ModelError, match="nothing is frozen below"):
        FrozenPrefix(model)
    activate(model, None)
    model, x = adapted()
    prefix = FrozenPrefix(model)
    model.embeddings.norm.bias = model.embeddings.norm.bias + 1
    with pytest.raises(ModelError, match="have changed"):
        prefix(x)
