"""Round trips with the real Hugging Face PEFT, on a BERT-type and a Llama-type base of random weights."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.formats import fuse_folder
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.backbones.bert import load_encoder
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update
from lm_folders import write_lm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
IDS = np.array([[5, 9, 33, 7, 12, 21], [8, 14, 6, 30, 11, 17]], dtype=np.int32)
OPTIONS = {
    "lora": {"rank": 4, "alpha": 12.0},
    "rslora": {"rank": 4},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
    "ia3": {},
    "vera": {"rank": 8},
    "prefix": {"length": 5},
    "prefix_mlp": {"length": 5, "hidden": 12},
    "prompt": {"length": 5},
    "p_tuning": {"length": 5, "hidden": 12},
}


@pytest.fixture(scope="module")
def libraries():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    import transformers

    return torch, peft, transformers


@pytest.fixture(scope="module", params=["bert", "llama"])
def base(request, libraries, tmp_path_factory):
    """The folder, our loader, and Transformers' loader of one base."""
    torch, _, transformers = libraries
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        config.initializer_range = 0.2
        transformers.BertModel(config).save_pretrained(folder)
        return folder, lambda: load_encoder(folder), lambda: transformers.AutoModel.from_pretrained(folder).eval()
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")
    write_lm(folder, "llama")
    return (
        folder,
        lambda: mlx_lm.load(str(folder))[0],
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )


def ours(model) -> np.ndarray:
    out = model.encode(mx.array(IDS))[0] if hasattr(model, "encode") else model(mx.array(IDS))
    return np.array(out)


def theirs(torch, model) -> np.ndarray:
    with torch.no_grad():
        ids = torch.tensor(IDS).long()
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].numpy()


def perturbed(model):
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [0.1 * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


@pytest.mark.parametrize("method", OPTIONS)
def test_what_we_export_peft_loads(base, libraries, tmp_path, method):
    torch, peft, _ = libraries
    _, load, load_theirs = base
    model = load()
    plain = ours(model)
    model = perturbed(attach(model, adapter_config(method, **OPTIONS[method])))
    expected = ours(model)
    export_peft(model, tmp_path, base_model="base")
    loaded = peft.PeftModel.from_pretrained(load_theirs(), str(tmp_path)).eval()
    assert np.abs(theirs(torch, loaded) - expected).max() < 1e-4
    assert np.abs(expected[:, -6:] - plain).max() > 1e-3
    assert np.abs(ours(import_peft(load(), tmp_path)) - expected).max() < 1e-5


def peft_configs(peft, bert: bool) -> dict:
    task = {"task_type": "FEATURE_EXTRACTION" if bert else "CAUSAL_LM"}
    pair = ["query", "value"] if bert else ["q_proj", "v_proj"]
    down = "output.dense" if bert else "down_proj"
    return {
        "lora": peft.LoraConfig(r=4, lora_alpha=12, target_modules=pair, **task),
        "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=pair, **task),
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=pair, **task),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=pair, **task),
        "ia3": peft.IA3Config(target_modules=[pair[1]], feedforward_modules=[], **task),
        "ia3_down": peft.IA3Config(target_modules=[pair[1], down], feedforward_modules=[down], **task),
        "vera": peft.VeraConfig(r=8, target_modules=pair, **task),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **task),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **task),
        "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=12, **task),
    }


@pytest.mark.parametrize(
    "method", ["lora", "rslora", "dora", "adalora", "ia3", "ia3_down", "vera", "prefix", "prompt", "p_tuning"]
)
def test_what_peft_writes_we_import(base, libraries, tmp_path, method):
    torch, peft, _ = libraries
    folder, load, load_theirs = base
    config = peft_configs(peft, "bert" in str(folder))[method]
    torch.manual_seed(1)
    model = peft.get_peft_model(load_theirs(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = theirs(torch, model)
    model.save_pretrained(str(tmp_path))
    imported = import_peft(load(), tmp_path)
    assert np.abs(ours(imported) - expected).max() < 1e-4


def test_a_fused_encoder_is_a_transformers_model(base, libraries, tmp_path):
    torch, _, transformers = libraries
    folder, load, _ = base
    model = perturbed(attach(load(), LoRAConfig(rank=4)))
    expected = ours(model)
    fuse_folder(model, folder, tmp_path)
    made = transformers.AutoModel if "bert" in str(folder) else transformers.AutoModelForCausalLM
    assert np.abs(theirs(torch, made.from_pretrained(tmp_path).eval()) - expected).max() < 1e-4


def test_what_has_no_counterpart_is_refused(base, tmp_path):
    _, load, _ = base
    with pytest.raises(AdapterError, match="no counterpart of HoulsbyConfig"):
        export_peft(attach(load(), adapter_config("houlsby")), tmp_path)
    export_peft(attach(load(), LoRAConfig(rank=4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"peft_type": "OFT"}, "'OFT' has no counterpart"),
        ({"bias": "all"}, "bias = 'all' has no counterpart"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"r": 5}, r"not \(5, 32\)"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(AdapterError, match=message):
            import_peft(load(), tmp_path)
    file.write_text(json.dumps({key: value for key, value in good.items() if key != "r"}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json has no 'r'"):
        import_peft(load(), tmp_path)
