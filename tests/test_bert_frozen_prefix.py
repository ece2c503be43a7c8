"""The frozen prefix gives the same losses and gradients, computes each example once, and never serves another model."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from adapter_models import encoder
from efficientai_toolkit.adapters import activate, adapter_config, attach
from efficientai_toolkit.backbones import frozen_prefix
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


def test_a_model_of_half_precision_goes_on_in_it():
    model, (ids, *_) = adapted()
    model.set_dtype(mx.bfloat16)
    plain, cached = model(ids), model(FrozenPrefix(model)(ids))
    assert cached.dtype == plain.dtype == mx.bfloat16
    assert mx.array_equal(cached, plain).item()


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


def test_what_another_device_or_precision_gave_is_not_read(tmp_path, monkeypatch):
    model, _ = adapted()

    def folder(device, tf32):
        with monkeypatch.context() as patch:
            patch.setattr(mx, "default_device", lambda: device)
            patch.setenv("MLX_ENABLE_TF32", tf32)
            return FrozenPrefix(model, tmp_path)._folder

    assert len({folder(mx.gpu, "0"), folder(mx.gpu, "1"), folder(mx.cpu, "0"), folder(mx.cpu, "1")}) == 3


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"damaged",
        lambda data: b"",
        lambda data: data[:-4],
        lambda data: data + data[-4:],
        lambda data: b"PK\x03\x04" + data[4:],
        lambda data: data.replace(b", 33), }           ", b"33333333333, 33), }"),
        lambda data: saved(np.load(io.BytesIO(data)).astype(np.complex64)),
        lambda data: saved(np.load(io.BytesIO(data)).view(np.int32)),
        lambda data: saved(np.full_like(np.load(io.BytesIO(data)), np.nan)),
        lambda data: data[:128] + bytes(len(data) - 128),
        lambda data: data[:-40] + bytes(40),
    ],
)
def test_a_damaged_file_is_computed_anew_and_mended(tmp_path, damage):
    model, x = adapted()
    h = FrozenPrefix(model, tmp_path)(x)
    file = next(tmp_path.rglob("*.npy"))
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    second = FrozenPrefix(model, tmp_path)
    assert mx.allclose(second(x), h, atol=1e-6)
    assert second.computed == 1
    third = FrozenPrefix(model, tmp_path)
    assert mx.allclose(third(x), h, atol=1e-6)
    assert third.computed == 0


def test_pads_within_a_text_are_no_damage(tmp_path):
    model, x = adapted()
    x = mx.where(mx.arange(7) == 2, model.config.pad_id, x)
    h = FrozenPrefix(model, tmp_path)(x)
    second = FrozenPrefix(model, tmp_path)
    assert mx.array_equal(second(x), h)
    assert second.computed == 0


def test_a_folder_that_cannot_be_written_is_done_without_and_said_once(tmp_path, caplog):
    model, x = adapted()
    expected = FrozenPrefix(model)(x)
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        prefix = FrozenPrefix(model, tmp_path / "file")
        assert mx.array_equal(prefix(x), expected)
        prefix(x[::-1])
        assert prefix.computed == 12
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"cannot be kept in {tmp_path / 'file'} (Not a directory), so they are kept in memory" in record.getMessage()


def test_the_disk_is_bounded_and_the_oldest_go_first(tmp_path):
    model, x = adapted()
    size = 7 * 33 * 4
    stale = tmp_path / "another model" / "ab"
    stale.mkdir(parents=True)
    for i in range(10):
        (stale / f"{i}.npy").write_bytes(bytes(size))
        os.utime(stale / f"{i}.npy", (i, i))
    limit = 12 * (size + 128)
    prefix = FrozenPrefix(model, tmp_path, max_disk_bytes=limit)
    prefix(x)

    def used():
        return sum(file.stat().st_size for file in tmp_path.rglob("*.npy"))

    assert used() <= 1.25 * limit
    assert not (stale / "0.npy").exists()
    assert FrozenPrefix(model, tmp_path, max_disk_bytes=limit)(x).shape == (3, 4, 7, 33)


def test_the_folder_is_looked_at_first_and_then_after_every_eighth(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(frozen_prefix, "_trim_folder", lambda folder, limit: looked.append(folder))
    model, x = adapted()
    row = (x.shape[-1]) * 33 * 4
    FrozenPrefix(model, tmp_path, max_disk_bytes=8 * 4 * row)(x)  # 12 rows of at most `row` bytes, and 4 to an eighth
    assert 1 < len(looked) <= 3


def test_a_folder_that_is_cleared_meanwhile_is_made_again(tmp_path, monkeypatch, caplog):
    model, x = adapted()
    prefix = FrozenPrefix(model, tmp_path)
    replace, calls = os.replace, []

    def cleared(part, file):
        calls.append(file)
        if len(calls) == 1:
            shutil.rmtree(tmp_path)
        replace(part, file)

    monkeypatch.setattr(os, "replace", cleared)
    prefix(x)
    assert len([*tmp_path.rglob("*.npy")]) == 11
    assert not caplog.records


def test_processes_may_share_a_folder(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import efficientai_toolkit
from test_bert_frozen_prefix import FrozenPrefix, adapted, mx
model, x = adapted()
expected = FrozenPrefix(model)(x)
for _ in range(5):
    assert mx.allclose(FrozenPrefix(model, sys.argv[2], max_disk_bytes=4000)(x), expected, atol=1e-5)
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in running]
    assert said == ["", ""]
    assert [process.returncode for process in running] == [0, 0]


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


def test_another_adapter_that_acts_below_is_refused(tmp_path):
    model, x = adapted()
    attach(model, adapter_config("lora", rank=2), "q_proj", name="everywhere")
    activate(model, "default")
    prefix = FrozenPrefix(model, tmp_path)
    plain = prefix(x[0])
    activate(model, "everywhere")
    for ids in x[:2]:  # of which the first are in memory
        with pytest.raises(ModelError, match="below all that acts"):
            prefix(ids)
    assert prefix.computed == 4
    activate(model, None)
    assert mx.array_equal(prefix(x[0]), plain)
    model.layers[0].attention_norm.unfreeze()
    with pytest.raises(ModelError, match="below all that acts"):
        prefix(x[0])


def test_states_are_of_the_layer_that_the_model_goes_on_from():
    model, x = adapted()
    first = FrozenPrefix(model)
    activate(model, None)
    assert FrozenPrefix(model).layers == model.resumes_at == 2
    with pytest.raises(ModelError, match="make a new one"):
        first(x[0])


def test_every_change_of_a_frozen_weight_is_seen():
    model, x = adapted()
    prefix, layer = FrozenPrefix(model), model.layers[0].attention.q_proj
    prefix(x[0])
    for _ in range(6):  # a freed array's address is used again
        layer.weight = layer.weight * 1.5
        mx.eval(layer.weight)
        with pytest.raises(ModelError, match="have changed"):
            prefix(x[0])


def test_another_precision_of_the_weights_has_a_folder_of_its_own(tmp_path):
    models = [adapted() for _ in range(2)]
    for model, _ in models:
        model.set_dtype(mx.bfloat16)
    (half, x), (whole, _) = models
    whole.set_dtype(mx.float32)  # the same values
    FrozenPrefix(half, tmp_path)(x)
    prefix = FrozenPrefix(whole, tmp_path)
    assert mx.abs(whole(prefix(x)[0]) - whole(x[0])).max().item() < 1e-5
    assert prefix.computed == 12


def test_hidden_states_of_another_format_are_not_read(tmp_path, monkeypatch):
    model, x = adapted()
    FrozenPrefix(model, tmp_path)(x)
    monkeypatch.setattr(frozen_prefix, "_FORMAT", frozen_prefix._FORMAT + 1)
    prefix = FrozenPrefix(model, tmp_path)
    prefix(x)
    assert prefix.computed == 12
