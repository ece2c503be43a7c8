"""Adapter folders as other libraries leave them: of half precision, and with entries that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapter_models import Decoder, decoder, encoder
from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.attach import adapter_state, adapters_of
from efficientai_toolkit.adapters.formats_mlx import export_mlx_lm, import_mlx_lm
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.backbones.bert import load_encoder
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update
from efficientai_toolkit.runs.exchange import import_adapter, open_adapted
from text_models import write_encoder

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
    "ia3": {},
    "vera": {"rank": 8},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
    "p_tuning": {"length": 3, "hidden": 8},
}


def shaken(model: nn.Module) -> nn.Module:
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [0.1 * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()  # type: ignore[return-value]


def retyped(folder: Path, dtype: mx.Dtype, **more: mx.array) -> None:
    """The folder's arrays, and `more`, in another type."""
    [file] = folder.glob("adapter*.safetensors")
    arrays: Any = mx.load(str(file))
    arrays = {key: array.astype(dtype) for key, array in {**arrays, **more}.items()}
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_peft_adapter_of_half_precision_is_of_the_model_s(tmp_path, method, dtype):
    x = encoder()[1][0]
    model = shaken(attach(encoder()[0], adapter_config(method, **OPTIONS[method])))
    export_peft(model, tmp_path)
    retyped(tmp_path, dtype)
    imported = import_peft(encoder()[0], tmp_path)
    assert {array.dtype for array in adapter_state(imported).values()} == {mx.float32}
    assert apart(imported(x), model(x)) < 0.05 * apart(encoder()[0](x), model(x))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_an_mlx_lm_adapter_of_half_precision_is_of_the_model_s(tmp_path, method, dtype):
    x = decoder()[1][0]
    model = shaken(attach(decoder()[0], adapter_config(method, rank=4), "*_proj"))
    export_mlx_lm(model, tmp_path)
    retyped(tmp_path, dtype)
    imported = import_mlx_lm(decoder()[0], tmp_path)
    assert {array.dtype for array in adapter_state(imported).values()} == {mx.float32}
    assert apart(imported(x), model(x)) < 0.05 * apart(decoder()[0](x), model(x))


def test_a_classifier_of_half_precision_is_of_the_model_s(tmp_path):
    model = shaken(attach(Decoder(), LoRAConfig(rank=4), "q_proj"))
    export_peft(model, tmp_path, task_type="SEQ_CLS")
    weight = mx.random.normal((3, 32), key=mx.random.key(1))
    retyped(tmp_path, mx.bfloat16, **{"base_model.model.score.weight": weight})
    imported = import_peft(Decoder(), tmp_path)
    head = {path: array for path, array in adapter_state(imported).items() if path.startswith("head")}
    assert {path: array.dtype for path, array in head.items()} == {"head.weight": mx.float32, "head.bias": mx.float32}
    np.testing.assert_allclose(head["head.weight"], weight, rtol=1e-2)


def test_the_checkpoint_of_an_adapter_of_half_precision_is_read(tmp_path):
    base = write_encoder(tmp_path / "base")
    model = shaken(attach(load_encoder(base), LoRAConfig(rank=4)))
    export_peft(model, tmp_path / "theirs")
    retyped(tmp_path / "theirs", mx.bfloat16)
    import_adapter(tmp_path / "theirs", "peft", str(base), tmp_path / "mine.npz")
    ids = mx.array([[2, 5, 9, 7, 12, 3]])
    read: Any = open_adapted(tmp_path / "mine.npz").model
    features = model.features(ids)  # type: ignore[operator]
    assert apart(read.features(ids), features) < 0.05 * apart(load_encoder(base).features(ids), features)


def test_arrays_of_whole_numbers_are_refused(tmp_path):
    model = attach(Decoder(), LoRAConfig(rank=4), "q_proj")
    for write, read in ((export_peft, import_peft), (export_mlx_lm, import_mlx_lm)):
        write(model, tmp_path / write.__name__)
        retyped(tmp_path / write.__name__, mx.uint8)
        fresh = Decoder()
        with pytest.raises(AdapterError, match=r"does not fit this model: \S+ is of uint8, not floating-point numbers"):
            read(fresh, tmp_path / write.__name__)
        assert adapters_of(fresh) is None


def rewritten(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}
SAID = r"/adapter_config\.json: "


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora_parameters": [1]}, SAID + r"lora_parameters should be a valid dictionary, given \[1\]"),
        ({"lora_parameters": LORA | {"rank": "8"}}, SAID + "lora_parameters: rank should be a valid int.*, given '8'"),
        ({"lora_parameters": LORA | {"rank": True}}, SAID + "lora_parameters: rank should be a valid integer, given T"),
        ({"lora_parameters": LORA | {"rank": 0}}, SAID + "lora_parameters: rank should be greater than or equal to 1"),
        ({"lora_parameters": LORA | {"scale": "20"}}, SAID + "lora_parameters: scale should be a valid nu.*given '20'"),
        ({"lora_parameters": LORA | {"scale": -1}}, SAID + "lora_parameters: scale should be greater than 0, given -1"),
        ({"lora_parameters": LORA | {"scale": float("nan")}}, SAID + "lora_parameters: scale should be a finite numbe"),
        ({"lora_parameters": LORA | {"dropout": [0]}}, SAID + r"lora_parameters: dropout should be .*given \[0\]"),
        ({"lora_parameters": LORA | {"scale": None}}, r"has no lora_parameters\.scale or rank"),
        ({"lora_parameters": None}, r"has no lora_parameters\.scale or rank"),
        ({"fine_tune_type": ["lora"]}, SAID + r"fine_tune_type should be a valid string, given \['lora'\]"),
        ({"fine_tune_type": "full"}, "fine_tune_type 'full' is no adapter"),
    ],
)
def test_an_mlx_lm_entry_that_cannot_be_is_said(tmp_path, change, sentence):
    export_mlx_lm(attach(Decoder(), LoRAConfig(rank=4), "q_proj"), tmp_path)
    rewritten(tmp_path, change)
    model = Decoder()
    with pytest.raises(AdapterError, match=sentence):
        import_mlx_lm(model, tmp_path)
    assert adapters_of(model) is None


def test_mlx_lm_entries_that_are_null_are_absent(tmp_path):
    export_mlx_lm(attach(Decoder(), LoRAConfig(rank=4, alpha=8.0), "q_proj"), tmp_path)
    rewritten(tmp_path, {"fine_tune_type": None, "lora_parameters": {"rank": None, "scale": 2, "dropout": None}})
    attached = adapters_of(import_mlx_lm(Decoder(), tmp_path))
    assert attached is not None
    assert attached.configs["default"] == LoRAConfig(rank=4, alpha=8.0)


@pytest.mark.parametrize(
    ("method", "change", "sentence"),
    [
        ("lora", {"peft_type": ["LORA"]}, SAID + r"peft_type should be a valid string, given \['LORA'\]"),
        ("lora", {"peft_type": None}, "PEFT method None has no counterpart"),
        ("lora", {"modules_to_save": "score"}, SAID + "modules_to_save should be a valid list, given 'score'"),
        ("lora", {"modules_to_save": [1]}, SAID + r"modules_to_save should be a valid string, given \[1\]"),
        ("lora", {"r": "8"}, SAID + "r should be a valid integer, given '8'"),
        ("lora", {"r": None}, r"adapter_config\.json has no 'r'"),
        ("lora", {"r": 0}, r"adapter_config\.json cannot be used: LoRAConfig: rank should be greater than or equal to"),
        ("lora", {"lora_alpha": "16"}, SAID + "lora_alpha should be a valid number, given '16'"),
        ("lora", {"lora_alpha": True}, SAID + "lora_alpha should be a valid number, given True"),
        ("lora", {"lora_dropout": {}}, SAID + r"lora_dropout should be a valid number, given \{\}"),
        ("lora", {"use_dora": "no"}, SAID + "use_dora should be a valid boolean, given 'no'"),
        ("lora", {"use_rslora": 1}, SAID + "use_rslora should be a valid boolean, given 1"),
        ("adalora", {"tinit": "1", "tfinal": "2"}, SAID + "tinit should be a valid integer, given '1'"),
        ("adalora", {"target_r": [4]}, SAID + r"target_r should be a valid integer, given \[4\]"),
        ("adalora", {"total_step": "many"}, SAID + "total_step should be a valid integer, given 'many'"),
        ("vera", {"d_initial": "0.1"}, SAID + "d_initial should be a valid number, given '0.1'"),
        ("prompt", {"num_virtual_tokens": "3"}, SAID + "num_virtual_tokens should be a valid integer, given '3'"),
    ],
)
def test_a_peft_entry_that_cannot_be_is_said(tmp_path, method, change, sentence):
    export_peft(attach(encoder()[0], adapter_config(method, **OPTIONS[method])), tmp_path)
    rewritten(tmp_path, change)
    model = encoder()[0]
    with pytest.raises(AdapterError, match=sentence):
        import_peft(model, tmp_path)
    assert adapters_of(model) is None


def test_peft_entries_that_are_null_are_absent(tmp_path):
    export_peft(attach(encoder()[0], adapter_config("adalora", rank=4)), tmp_path)
    names = ("modules_to_save", "lora_dropout", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "bias")
    rewritten(tmp_path, dict.fromkeys(names))
    attached = adapters_of(import_peft(encoder()[0], tmp_path))
    assert attached is not None
    config: Any = attached.configs["default"]
    assert (config.dropout, config.target_rank, config.warmup, config.beta1) == (0.0, 4, 0, 0.85)
