"""PEFT's folders of language models that mlx-lm names otherwise than Transformers, with the real libraries.

And what PEFT saves beside an adapter: an output layer's base, options of its Conv1D, schedules, projections.
"""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.adalora import AdaLoRAConfig
from efficientai_toolkit.adapters.attach import adapters_of
from efficientai_toolkit.adapters.formats import fuse_folder
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.backbones.language_model import load_language_model
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update
from lm_folders import CONFIGS, write_lm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
IDS = np.array([[5, 9, 33, 7, 12, 21], [8, 14, 6, 30, 11, 17]], dtype=np.int32)
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "llama": ["q_proj", "down_proj"],
}
OPTIONS = {
    "lora": {"rank": 4, "alpha": 12.0},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
    "ia3": {"feedforward": ("c_proj", "dense_4h_to_h", "down_proj")},
    "vera": {"rank": 8},
}


@pytest.fixture(scope="module")
def libraries():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")
    return torch, peft


class Base:
    """One set of weights as our language model and as Transformers'."""

    def __init__(self, kind: str, folder):
        import torch
        import transformers

        self.kind, self.folder = kind, folder
        torch.manual_seed(0)
        about = {**CONFIGS[kind], "hidden_act": "gelu_new", "intermediate_size": 128} if kind == "gpt_neox" else None
        config = transformers.AutoConfig.for_model(**(about or CONFIGS[kind]))
        if kind == "gpt_neox":
            config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        config.initializer_range = 0.2
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        write_lm(folder, kind)  # the tokenizer
        self.model.save_pretrained(folder)
        file = str(folder / "model.safetensors")
        weights = {name.removeprefix("transformer."): array for name, array in mx.load(file).items()}  # as the hub's
        mx.eval(weights)
        mx.save_safetensors(file, weights, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))

    def theirs(self):
        import copy

        return copy.deepcopy(self.model)

    def ours(self):
        return load_language_model(self.folder)

    def logits(self, model) -> np.ndarray:
        import torch

        if hasattr(model, "lm"):
            return np.array(model.lm(mx.array(IDS)))
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor(IDS).long()).logits.numpy()


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def base(request, libraries, tmp_path_factory):
    return Base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(libraries, tmp_path_factory):
    return Base("llama", tmp_path_factory.mktemp("llama"))


def perturbed(model):
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [0.1 * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


def shaken(torch, model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def close(a, b) -> bool:
    return np.abs(a - b).max() < 1e-4


def test_both_have_the_same_base(base):
    assert close(base.logits(base.ours()), base.logits(base.theirs()))


@pytest.mark.parametrize("method", OPTIONS)
def test_what_we_export_peft_loads(base, libraries, tmp_path, method):
    _, peft = libraries
    model = attach(base.ours(), adapter_config(method, **OPTIONS[method]), TARGETS[base.kind])
    expected = base.logits(perturbed(model))
    export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        loaded = peft.PeftModel.from_pretrained(base.theirs(), str(tmp_path))
    assert close(base.logits(loaded), expected)
    assert not close(base.logits(base.theirs()), expected)
    loaded.save_pretrained(str(tmp_path / "again"))
    assert close(base.logits(import_peft(base.ours(), tmp_path / "again")), expected)
    assert close(base.logits(import_peft(base.ours(), tmp_path)), expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_what_peft_writes_we_import(base, libraries, tmp_path, method):
    torch, peft = libraries
    targets = {"target_modules": TARGETS[base.kind], "task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, **targets),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=TARGETS[base.kind][1:], **targets),
        "vera": lambda: peft.VeraConfig(r=8, **targets),
    }[method]()
    model = shaken(torch, peft.get_peft_model(base.theirs(), config))
    expected = base.logits(model)
    model.save_pretrained(str(tmp_path))
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] is (base.kind == "gpt2")
    assert close(base.logits(import_peft(base.ours(), tmp_path)), expected)
    assert not close(base.logits(base.ours()), expected)


def test_a_fused_folder_keeps_mlx_lm_s_names(base, tmp_path):
    model = perturbed(attach(base.ours(), LoRAConfig(rank=4), TARGETS[base.kind]))
    fuse_folder(model, base.folder, tmp_path)
    assert close(base.logits(load_language_model(tmp_path)), base.logits(model))


def test_an_adapted_output_layer_brings_its_own_base(llama, libraries, tmp_path):
    torch, peft = libraries
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = shaken(torch, peft.get_peft_model(llama.theirs(), config))
    model.save_pretrained(str(tmp_path))
    arrays = dict(mx.load(str(tmp_path / "adapter_model.safetensors")))
    mx.eval(arrays)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in arrays
    assert close(llama.logits(import_peft(llama.ours(), tmp_path)), llama.logits(model))
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {**arrays, key: arrays[key] + 1})
    ours = llama.ours()
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight is not this base's"):
        import_peft(ours, tmp_path)
    assert adapters_of(ours) is None


def test_vera_without_its_projections_is_said_so(llama, libraries, tmp_path):
    torch, peft = libraries
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM")
    shaken(torch, peft.get_peft_model(llama.theirs(), config)).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"lacks VeRA's shared A and B.*save_projection=True"):
        import_peft(llama.ours(), tmp_path)


@pytest.mark.parametrize(("warmup", "cooldown"), [(400, 600), (1000, 0), (0, 1000)])
def test_a_schedule_without_a_step_between_is_one_that_peft_loads(llama, libraries, tmp_path, warmup, cooldown):
    _, peft = libraries
    config = AdaLoRAConfig(rank=4, warmup=warmup, cooldown=cooldown, total_steps=1000)
    model = perturbed(attach(llama.ours(), config, TARGETS["llama"]))
    export_peft(model, tmp_path)
    assert close(llama.logits(peft.PeftModel.from_pretrained(llama.theirs(), str(tmp_path))), llama.logits(model))
    assert close(llama.logits(import_peft(llama.ours(), tmp_path)), llama.logits(model))
