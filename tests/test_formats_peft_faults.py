"""Hugging Face PEFT's folders without the library: what is read as it is meant, and what is refused.

The names and shapes are those that PEFT 0.21 writes for a BERT-type encoder and a Llama-type classifier.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapter_models import Decoder, encoder
from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.attach import adapter_state, adapters_of, detach, slots
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.adapters.lora import LoRAConfig
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update

QUERY = "base_model.model.encoder.layer.{}.attention.self.query.lora_{}"


def perturbed(model: nn.Module) -> nn.Module:
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    noise = [0.1 * mx.random.normal(a.shape, key=k) for a, k in zip(params.values(), keys, strict=True)]
    update(model, {path: params[path] + n for path, n in zip(params, noise, strict=True)})
    return model


def rewrite(folder: Path, arrays=None, **about) -> None:
    """Other entries of the configuration, and other arrays, in the folder."""
    file, data = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**data, **about}))
    if arrays is not None:
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, {"format": "pt"})


def read(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = mx.load(str(folder / "adapter_model.safetensors"))  # type: ignore[assignment]
    mx.eval(arrays)
    return arrays


class CausalClassifier(Decoder):
    """A decoder under the names of our language models: the base is `lm`, the head is ours."""

    inner = "lm."

    def __init__(self, num_classes: int = 3):
        super().__init__(num_classes=num_classes)
        self.lm = Decoder()

    def __call__(self, ids):
        return self.head(self.lm.features(ids))


@pytest.fixture
def lora_folder(tmp_path):
    model = perturbed(attach(encoder()[0], LoRAConfig(rank=4), "query"))
    export_peft(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"])
def test_an_adapter_of_a_changed_base_is_refused(lora_folder, start):
    rewrite(lora_folder, init_lora_weights=start)
    model = encoder()[0]
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{start}' changed the base.*path_initial_model_for"):
        import_peft(model, lora_folder)
    assert adapters_of(model) is None


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_is_read(lora_folder, start):
    rewrite(lora_folder, init_lora_weights=start)
    import_peft(encoder()[0], lora_folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [3]),
        ("trainable_token_indices", [1]),
        ("kasa_config", {"a": 1}),
    ],
)
def test_a_variant_without_counterpart_is_refused(lora_folder, option, value):
    rewrite(lora_folder, **{option: value})
    with pytest.raises(AdapterError, match=f"{option} = .* has no counterpart"):
        import_peft(encoder()[0], lora_folder)


def test_adalora_after_its_schedule_is_what_is_left_of_it(tmp_path):
    model = perturbed(attach(encoder()[0], adapter_config("adalora", rank=4), "query"))
    left = {0: [False, False, True, True], 1: [False] * 4}
    for path, slot in slots(model).items():
        adapter: Any = slot.adapters["default"]
        adapter.lora_e *= mx.array(left[int(path.split(".")[1])])
    x = encoder()[1][0]
    expected = model(x)
    export_peft(model, tmp_path)
    arrays = read(tmp_path)
    for layer, ranks in left.items():  # PEFT writes the triplets that are left, and a list that says which
        some = mx.array([i for i, kept in enumerate(ranks) if kept], dtype=mx.int32)
        for leaf, axis in (("A", 0), ("B", 1), ("E", 0)):
            name = QUERY.format(layer, leaf)
            arrays[name] = mx.contiguous(mx.take(arrays[name], some, axis=axis))
    pattern = {QUERY.format(layer, "E").removeprefix("base_model.model."): ranks for layer, ranks in left.items()}
    rewrite(tmp_path, arrays, rank_pattern=pattern)
    imported = import_peft(encoder()[0], tmp_path)
    assert mx.allclose(imported(x), expected, atol=1e-5)
    assert not mx.allclose(imported(x), encoder()[0](x), atol=1e-3)
    rewrite(tmp_path, {**arrays, QUERY.format(0, "E"): arrays[QUERY.format(0, "E")][:1]})
    with pytest.raises(AdapterError, match=r"lora_E is \(1, 1\), not \(4, 1\)"):
        import_peft(encoder()[0], tmp_path)


@pytest.mark.parametrize("change", [{"lora_alpha": -1}, {"r": 0}, {"use_dora": True, "use_rslora": True}])
def test_a_configuration_that_cannot_be_is_said_with_its_folder(lora_folder, change):
    rewrite(lora_folder, **change)
    with pytest.raises(AdapterError, match=rf"{lora_folder}: adapter_config\.json cannot be used"):
        import_peft(encoder()[0], lora_folder)


def saved_as_classifier(folder: Path, family: str, module: str, **parts: mx.array) -> None:
    arrays = {key.replace("base_model.model.", f"base_model.model.{family}"): a for key, a in read(folder).items()}
    arrays |= {f"base_model.model.{module}.{part.replace('_', '.')}": array for part, array in parts.items()}
    rewrite(folder, arrays, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])


def test_a_classifier_over_a_pooler_is_refused_and_its_adapter_taken_alone(lora_folder):
    x = encoder()[1][0]
    expected = import_peft(encoder()[0], lora_folder)(x)
    saved_as_classifier(lora_folder, "bert.", "classifier", weight=mx.ones((3, 32)), bias=mx.zeros((3,)))
    with pytest.raises(AdapterError, match=r"BERT's reads its pooler.*head=False.* learned anew"):
        import_peft(encoder()[0], lora_folder)
    assert mx.array_equal(import_peft(encoder()[0], lora_folder, head=False)(x), expected)
    bare = encoder()[0]
    bare.head = nn.Identity()
    assert import_peft(bare, lora_folder)(x).shape[-1] == 32


def test_a_classifier_of_one_dense_layer_becomes_the_adapter_s_head(tmp_path):
    x = mx.array([[1, 2, 3, 4]])
    model = perturbed(attach(CausalClassifier(), LoRAConfig(rank=4), "lm.*.q_proj"))
    export_peft(model, tmp_path)
    weight = mx.random.normal((3, 32), key=mx.random.key(3))
    saved_as_classifier(tmp_path, "", "score", weight=weight)
    base = CausalClassifier()
    base.lm = model.lm  # type: ignore[attr-defined]
    features = model.lm.features(x)  # type: ignore[attr-defined]
    detach(model)
    plain = base(x)
    imported = import_peft(base, tmp_path)
    assert mx.allclose(imported(x), features @ weight.T, atol=1e-5)
    assert {"head.weight", "head.bias"} <= adapter_state(imported).keys() & trainable(imported).keys()
    assert mx.array_equal(detach(imported)(x), plain)
    with pytest.raises(AdapterError, match=r"classifier of shape \(3, 32\), .* has \(2, 32\); .*num_classes=3"):
        import_peft(CausalClassifier(2), tmp_path)
    saved_as_classifier(tmp_path, "", "score", dense_weight=mx.ones((32, 32)), out_proj_weight=weight)
    with pytest.raises(AdapterError, match="more than one dense layer"):
        import_peft(CausalClassifier(), tmp_path)
    rewrite(tmp_path, modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"modules_to_save = \['embed_tokens'\] has no counterpart"):
        import_peft(CausalClassifier(), tmp_path)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_language_model_without_an_output_layer_is_causal(tmp_path, method):
    targets = "lm.*.self_attn" if method == "prefix" else "lm.*.q_proj"
    export_peft(attach(CausalClassifier(), adapter_config(method), targets), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    export_peft(attach(encoder()[0], LoRAConfig()), tmp_path / "encoder")
    written = json.loads((tmp_path / "encoder" / "adapter_config.json").read_text())
    assert written["task_type"] == "FEATURE_EXTRACTION"


def test_a_head_of_another_adapter_does_not_stay_in_the_folder(tmp_path):
    export_peft(attach(encoder()[0], LoRAConfig(), train_head=True), tmp_path)
    assert (tmp_path / "head.safetensors").is_file()
    export_peft(attach(encoder()[0], LoRAConfig()), tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
