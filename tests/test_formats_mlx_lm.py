"""Round trips with the real mlx-lm: what we write it loads to the same logits, and the other way round."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.attach import slots
from efficientai_toolkit.adapters.formats import fuse_folder
from efficientai_toolkit.adapters.formats_mlx import export_mlx_lm, import_mlx_lm
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.errors import AdapterError, DataNotFoundError, OutputError
from efficientai_toolkit.nn.functional import functional, trainable, update
from lm_folders import ids, write_lm

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, mlx_lm, tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp(request.param), request.param)


def perturbed(model, size=0.1):
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [size * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


def apart(a, b):
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
@pytest.mark.parametrize(
    "targets", [None, "linear", "layers.[12].*_proj", ["layers.0.*.q_proj", "layers.2.mlp.up_proj"]]
)
def test_what_we_export_mlx_lm_loads(mlx_lm, folder, tmp_path, method, targets):
    model, _ = mlx_lm.load(str(folder))
    plain = model(ids())
    model = perturbed(attach(model, adapter_config(method, rank=4), targets))
    expected = model(ids())
    export_mlx_lm(model, tmp_path / "adapter", base_model="base")
    loaded, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    assert apart(loaded(ids()), expected) < 1e-4
    assert apart(plain, expected) > 1e-2
    again = import_mlx_lm(mlx_lm.load(str(folder))[0], tmp_path / "adapter")
    assert apart(again(ids()), expected) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_what_mlx_lm_writes_we_import(mlx_lm, folder, tmp_path, dora):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = mlx_lm.load(str(folder))
    model.freeze()
    parameters = {"rank": 3, "scale": 5.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, {**parameters, "keys": ["self_attn.q_proj", "mlp.down_proj"]}, use_dora=dora)
    perturbed(model)
    expected = model(ids())
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    about = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    ours = import_mlx_lm(mlx_lm.load(str(folder))[0], tmp_path)
    assert len(slots(ours)) == 4
    assert apart(ours(ids()), expected) < 1e-4


def test_a_fused_folder_is_a_model(mlx_lm, folder, tmp_path):
    model, _ = mlx_lm.load(str(folder))
    perturbed(attach(model, LoRAConfig(rank=4)))
    expected = model(ids())
    assert fuse_folder(model, folder, tmp_path / "fused") == {}
    assert apart(model(ids()), expected) == 0
    fused, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    assert apart(fused(ids()), expected) < 1e-4
    assert tokenizer.encode("the fox")
    with pytest.raises(OutputError, match="own folder"):
        fuse_folder(model, folder, folder)


def test_a_quantised_base_fuses_with_a_reported_loss_or_dequantised(mlx_lm, folder, tmp_path):
    quantised = tmp_path / "quantised"
    mlx_lm.convert(str(folder), str(quantised), quantize=True, q_group_size=32, q_bits=8)
    model, _ = mlx_lm.load(str(quantised))
    perturbed(attach(model, LoRAConfig(rank=4), key=mx.random.key(1)))
    expected = model(ids()).astype(mx.float32)
    lost = fuse_folder(model, quantised, tmp_path / "again")
    assert set(lost) == set(slots(model))
    assert all(0 < share < 1 for share in lost.values())
    coarse = apart(mlx_lm.load(str(tmp_path / "again"))[0](ids()), expected)
    assert fuse_folder(model, quantised, tmp_path / "dense", dequantize=True) == {}
    exact = mlx_lm.load(str(tmp_path / "dense"))[0]
    assert type(exact.layers[0].self_attn.q_proj) is nn.Linear
    assert apart(exact(ids()), expected) < 1e-4 < coarse


def test_stacked_tasks_on_a_quantised_language_model(mlx_lm, folder):
    model, _ = mlx_lm.load(str(folder))
    nn.quantize(model, group_size=32, bits=8)
    perturbed(attach(model, LoRAConfig(rank=2)))
    apply, start = functional(model), trainable(model)
    params = {path: mx.stack([a, 1.1 * a]) for path, a in start.items()}
    tokens = mx.stack([ids(), ids()[::-1]])

    def gradient(p, x):
        return mx.grad(lambda p: mx.mean(mx.square(apply(p, x))))(p)

    stacked = mx.vmap(gradient)(params, tokens)
    for i in range(2):
        looped = gradient({path: a[i] for path, a in params.items()}, tokens[i])
        for path in params:
            assert apart(stacked[path][i], looped[path]) < 1e-5


def test_faults_are_named_and_leave_the_model_as_it_was(mlx_lm, folder, tmp_path):
    model, _ = mlx_lm.load(str(folder))
    export_mlx_lm(attach(model, LoRAConfig(rank=4)), tmp_path)
    arrays = dict(mx.load(str(tmp_path / "adapters.safetensors")))
    mx.eval(arrays)
    fresh, _ = mlx_lm.load(str(folder))
    paths = [path for path, _ in tree_flatten(fresh.parameters())]

    def refused(change, message):
        changed = dict(arrays)
        change(changed)
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), changed)
        with pytest.raises(AdapterError, match=message):
            import_mlx_lm(fresh, tmp_path)
        assert [path for path, _ in tree_flatten(fresh.parameters())] == paths

    first = "model.layers.0.self_attn.q_proj.lora_a"
    refused(lambda a: a.pop(first), "q_proj.lora_a is missing")
    refused(lambda a: a.update({first: mx.zeros((7, 4))}), r"lora_a is \(7, 4\), not \(32, 4\)")
    refused(lambda a: a.update({first + "x": a[first]}), "is no adapter array")
    refused(lambda a: a.update({first.replace(".0.", ".9."): a[first]}), "layers.9")
    with pytest.raises(AdapterError, match="mlx-lm has no counterpart of IA3Config"):
        export_mlx_lm(attach(mlx_lm.load(str(folder))[0], adapter_config("ia3")), tmp_path)
    with pytest.raises(DataNotFoundError, match=r"has no adapter_config\.json"):
        import_mlx_lm(fresh, tmp_path / "nowhere")
