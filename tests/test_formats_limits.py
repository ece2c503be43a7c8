"""Where our adapters and the formats of other libraries differ, without those libraries: names, options, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from typer.testing import CliRunner

from adapter_models import Decoder, encoder
from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.adalora import AdaLoRAConfig
from efficientai_toolkit.adapters.attach import adapters_of, slots
from efficientai_toolkit.adapters.formats import fuse_folder, hf_name
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.adapters.ia3 import IA3Config
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.adapters.prefix import PrefixConfig
from efficientai_toolkit.cli import app
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update


class Inside(nn.Module):
    """A language model's place for one of mlx-lm's."""

    inner = "lm."

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc = Block(), nn.Linear(6, 3)

    def __call__(self, x):
        return self.fc(self.block.fc(x))


def moved(model: nn.Module) -> nn.Module:
    update(model, {path: array + 0.1 for path, array in trainable(model).items()})
    return model


def about(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("gpt2", "model.h.2.attn.c_attn", "transformer.h.2.attn.c_attn"),
        ("gpt_neox", "model.h.1.mlp.dense_4h_to_h", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("gpt_neox", "model.embed_out", "embed_out"),
        ("gpt_neox", "model.embed_in", "gpt_neox.embed_in"),
        ("llama", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("llama", "lm_head", "lm_head"),
    ],
)
def test_a_module_has_the_name_that_transformers_gives_it(kind, ours, theirs):
    lm = Decoder()
    lm.model_type = kind
    assert hf_name(lm, ours) == theirs
    assert hf_name(Inside(lm), f"lm.{ours}") == theirs


def test_conv1d_s_option_is_written_and_read(tmp_path):
    for kind, expected in (("gpt2", True), ("llama", False)):
        lm = Decoder()
        lm.model_type = kind
        model = moved(attach(Inside(lm), LoRAConfig(rank=2), "q_proj"))
        export_peft(model, tmp_path / kind)
        assert about(tmp_path / kind)["fan_in_fan_out"] is expected
        again = import_peft(Inside(Decoder()), tmp_path / kind)
        for path, slot in slots(again).items():
            own = slots(model)[path].adapters["default"]
            assert mx.array_equal(slot.adapters["default"].lora_a, own.lora_a)


def test_a_prefix_in_some_layers_is_not_written(tmp_path):
    model = attach(encoder()[0], PrefixConfig(3), "layers.1.attention")
    with pytest.raises(AdapterError, match="prefixes in all layers, and 'default' has them in 1 of 2"):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("warmup", "cooldown", "total"), [(400, 600, 1001), (1000, 0, 1001), (400, 599, 1000)])
def test_a_schedule_has_a_step_for_its_budget(tmp_path, warmup, cooldown, total):
    config = AdaLoRAConfig(rank=4, warmup=warmup, cooldown=cooldown, total_steps=1000)
    export_peft(attach(encoder()[0], config, "query"), tmp_path)
    written = about(tmp_path)
    assert (written["tinit"], written["tfinal"], written["total_step"]) == (warmup, cooldown, total)
    assert written["tinit"] < written["total_step"] - written["tfinal"]


def test_the_base_s_own_weight_in_a_file_is_left_out(tmp_path):
    model = moved(attach(Decoder(), LoRAConfig(rank=2), "q_proj"))
    export_peft(model, tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    arrays = dict(mx.load(file))
    mx.eval(arrays)
    stem = "base_model.model.layers.0.self_attn.q_proj.base_layer."
    own = model.layers[0].self_attn.q_proj.base  # type: ignore[attr-defined]
    saved = {**arrays, stem + "weight": own.weight, stem + "bias": own.bias}
    mx.save_safetensors(file, saved)
    base = Decoder()
    base.update({"layers": [{"self_attn": {"q_proj": {"weight": own.weight, "bias": own.bias}}}]})
    assert set(slots(import_peft(base, tmp_path))) == set(slots(model))
    for leaf, fault in (("weight", own.weight + 1), ("bias", own.bias + 1), ("weight", own.weight[:3])):
        mx.save_safetensors(file, {**saved, stem + leaf: fault})
        fresh = Decoder()
        fresh.update({"layers": [{"self_attn": {"q_proj": {"weight": own.weight, "bias": own.bias}}}]})
        with pytest.raises(AdapterError, match=rf"q_proj\.base_layer\.{leaf} is not this base's"):
            import_peft(fresh, tmp_path)
        assert adapters_of(fresh) is None
    mx.save_safetensors(file, {**arrays, stem + "other": own.bias})
    with pytest.raises(AdapterError, match=r"base_layer\.other has no place"):
        import_peft(Decoder(), tmp_path)


def test_vera_without_its_projections_is_said_so(tmp_path):
    export_peft(attach(encoder()[0], adapter_config("vera", rank=4)), tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    arrays = {key: array for key, array in mx.load(file).items() if "vera_lambda" in key}
    assert arrays
    mx.eval(arrays)
    mx.save_safetensors(file, arrays)
    with pytest.raises(AdapterError, match=r"lacks VeRA's shared A and B.*save_projection=True"):
        import_peft(encoder()[0], tmp_path)


def test_a_feedforward_s_whole_path_is_that_layer_only(tmp_path):
    config = IA3Config(feedforward=(".fc",))
    model = moved(attach(Net(), config, ["fc", "block.fc"]))
    scaled = {path: slot.adapters["default"].scales_input for path, slot in slots(model).items()}
    assert scaled == {"fc": True, "block.fc": False}
    export_peft(model, tmp_path)
    again = import_peft(Net(), tmp_path)
    x = mx.ones((2, 4))
    update(again, {"fc.base.weight": model.fc.base.weight, "fc.base.bias": model.fc.base.bias})  # type: ignore[attr-defined]
    own = model.block.fc.base  # type: ignore[attr-defined]
    update(again, {"block.fc.base.weight": own.weight, "block.fc.base.bias": own.bias})
    assert mx.allclose(again(x), model(x), atol=1e-6)
    ends = attach(Net(), IA3Config(feedforward=("fc",)), ["fc", "block.fc"])
    assert all(slot.adapters["default"].scales_input for slot in slots(ends).values())


def test_a_merge_that_adds_arrays_is_not_written(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    (source / "config.json").write_text("{}")
    lm = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    attach(model := Inside(lm), adapter_config("linear"), "linear")
    with pytest.raises(AdapterError, match=r"no place for what folding the adapter in adds: lm\.layers\.0\.bias; keep"):
        fuse_folder(model, source, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    model = Inside(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)))
    fuse_folder(attach(model, adapter_config("linear"), "lm.layers.1"), source, tmp_path / "fused")
    assert set(mx.load(str(tmp_path / "fused" / "model.safetensors"))) == {  # type: ignore[arg-type]
        "layers.0.weight",
        "layers.1.weight",
        "layers.1.bias",
    }


def test_completions_by_a_method_that_cannot_be_written_are_not_begun(tmp_path, monkeypatch):
    from efficientai_toolkit.recipes import language

    monkeypatch.setattr(language, "finetune_completions", lambda *_, **__: pytest.fail("it was trained"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for method in ("ia3", "linear", "prefix", "vera", "houlsby"):
        given = ["--data", str(tmp_path / "rows.jsonl"), "--method", method, "--output", str(tmp_path / "out")]
        done = CliRunner().invoke(app, ["finetune", "--completions", "--model", "gpt2", *given])
        assert done.exit_code == 2
        assert "mlx-lm has no counterpart of" in done.output
    assert not (tmp_path / "out").exists()
