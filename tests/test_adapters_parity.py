"""The same numbers as Hugging Face PEFT, from fixtures that `fixtures_peft/make.py` made with it.

PEFT's arrays are written into our adapters; outputs and gradients must agree to 1e-4, counts exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from efficientai_toolkit.adapters import adapter_config, attach, count_parameters
from efficientai_toolkit.adapters.attach import slots
from efficientai_toolkit.backbones.bert import Encoder, load_weights
from efficientai_toolkit.backbones.bert_config import EncoderConfig
from efficientai_toolkit.nn.functional import functional, trainable

FIXTURES = Path(__file__).parent / "fixtures_peft"
OPTIONS = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "adalora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "vera": {"rank": 8},
    "prefix": {"length": 5},
    "prefix_mlp": {"length": 5, "hidden": 12},
    "prompt": {"length": 5},
    "p_tuning": {"length": 5, "hidden": 12},
}
TARGETS = {name: ["query", "value"] for name in ("lora", "rslora", "dora", "adalora", "vera")}
TARGETS["ia3"] = ["key", "value", "feedforward_out"]
CASES = [(kind, method) for kind in ("bert", "llama") for method in OPTIONS]


def load(kind: str):
    arrays, metadata = mx.load(str(FIXTURES / f"{kind}.safetensors"), return_metadata=True)
    return arrays, json.loads(metadata["about"])


def under(arrays: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def base_model(kind: str, arrays, config):
    """The base with the fixture's weights, and a name map from its paths to Transformers'."""
    if kind == "bert":
        model = Encoder(EncoderConfig.from_hugging_face(config))
        load_weights(model, under(arrays, "base"))
        return model, model.hf_name
    llama = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed (extra `lm`)")
    model = llama.Model(llama.ModelArgs.from_dict({**config, "rope_theta": 10000.0, "model_type": "llama"}))
    model.load_weights(list(under(arrays, "base").items()))
    return model, lambda path: path


def output(kind: str, model, params, ids):
    if kind == "bert":
        return functional(model, "encode")(params, ids)[0]
    return functional(model)(params, ids)


def converted(method: str, model, hf_name, given: dict[str, mx.array]) -> dict[str, mx.array]:
    """PEFT's arrays (or gradients) under our paths, in our shapes."""
    given = {name.replace(".default", ""): a for name, a in given.items()}
    out = {}
    for index, (path, slot) in enumerate(slots(model).items()):
        stem, theirs = f"{path}.adapters.default", f"base_model.model.{hf_name(path)}"
        layer = {n.removeprefix(f"{theirs}."): a for n, a in given.items() if n.startswith(f"{theirs}.")}
        if method in ("lora", "rslora", "dora"):
            out[f"{stem}.lora_a"], out[f"{stem}.lora_b"] = layer["lora_A.weight"].T, layer["lora_B.weight"].T
            if method == "dora":
                out[f"{stem}.m"] = layer["lora_magnitude_vector.weight"]
        elif method == "adalora":
            out[f"{stem}.lora_a"], out[f"{stem}.lora_b"] = layer["lora_A"].T, layer["lora_B"].T
            out[f"{stem}.lora_e"] = layer["lora_E"][:, 0]
        elif method == "ia3":
            out[f"{stem}.ia3"] = layer["ia3_l"].reshape(-1)
            assert (layer["ia3_l"].shape[0] == 1) == slot.adapters["default"].scales_input
        elif method == "vera":
            out[f"{stem}.d"], out[f"{stem}.b"] = layer["vera_lambda_d"], layer["vera_lambda_b"]
            if "vera_A" in layer:
                pair = slot.adapters["default"].owner.module
                assert pair.a.T.shape == layer["vera_A"].shape
                pair.a, pair.b = layer["vera_A"].T, layer["vera_B"].T
        elif method == "prefix":
            table = mx.split(given["prompt_encoder.embedding.weight"], 2 * len(slots(model)), axis=1)
            out[f"{stem}.prefix_keys"], out[f"{stem}.prefix_values"] = table[2 * index], table[2 * index + 1]
        elif method == "prompt":
            out[f"{stem}.prompt"] = given["prompt_encoder.embedding.weight"]
        elif method == "p_tuning":
            out[f"{stem}.embedding"] = given["prompt_encoder.embedding.weight"]
            for ours, number in enumerate((0, 2, 4)):
                for leaf in ("weight", "bias"):
                    out[f"{stem}.layers.{ours}.{leaf}"] = given[f"prompt_encoder.mlp_head.{number}.{leaf}"]
    if method == "prefix_mlp":
        stem = "adapter_shared.default"
        out[f"{stem}.embedding"] = given["prompt_encoder.embedding.weight"]
        for ours, number in (("up", 0), ("down", 2)):
            for leaf in ("weight", "bias"):
                out[f"{stem}.{ours}.{leaf}"] = given[f"prompt_encoder.transform.{number}.{leaf}"]
    return out


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_outputs_and_counts_equal_peft(kind, method):
    arrays, about = load(kind)
    model, hf_name = base_model(kind, arrays, about["config"])
    config = adapter_config(method, **OPTIONS[method])
    assert count_parameters(model, config, TARGETS.get(method)) == about["trainable"][method]
    attach(model, config, TARGETS.get(method))
    params = converted(method, model, hf_name, under(arrays, f"{method}/arrays"))
    assert params.keys() == trainable(model).keys()
    out, expected = output(kind, model, params, arrays["ids"]), arrays[f"{method}/out"]
    assert out.shape == expected.shape
    assert mx.abs(out - expected).max().item() < 1e-4
    assert mx.abs(out - output(kind, model, {}, arrays["ids"])).max().item() > 1e-3


@pytest.mark.parametrize(("kind", "method"), [(k, m) for k in ("bert", "llama") for m in ("lora", "dora")])
def test_gradients_equal_peft(kind, method):
    arrays, about = load(kind)
    model, hf_name = base_model(kind, arrays, about["config"])
    attach(model, adapter_config(method, **OPTIONS[method]), TARGETS[method])
    params = converted(method, model, hf_name, under(arrays, f"{method}/arrays"))
    expected = converted(method, model, hf_name, under(arrays, f"{method}/grads"))
    grads = mx.grad(lambda p: mx.mean(mx.square(output(kind, model, p, arrays["ids"]))))(params)
    assert grads.keys() == expected.keys()
    for path, grad in grads.items():
        scale = max(1.0, mx.abs(expected[path]).max().item())
        assert mx.abs(grad - expected[path]).max().item() < 1e-4 * scale, path
