"""Causal language models of mlx-lm: label words, the masked next-token loss, fine-tuning, learners, formats."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.backbones.language_model import label_tokens, load_language_model, next_token_loss
from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import CheckpointError, DataError, ModelError
from efficientai_toolkit.nn.functional import functional, trainable
from efficientai_toolkit.pretrained import load_tokenizer
from efficientai_toolkit.recipes.finetune import Task, Texts, finetune
from efficientai_toolkit.recipes.language import finetune_completions, tokenised
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.exchange import export_adapter, fuse
from efficientai_toolkit.runs.train import train
from efficientai_toolkit.tasks.completions import Completion, read_completions
from lm_folders import write_lm
from text_models import settings, write_encoder, write_intents

ROWS = [
    Completion("the quick brown", " fox jumps"),
    Completion("over the", " lazy dog"),
    Completion("", "brown dog quick fox"),
]


@pytest.fixture(scope="module")
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, mlx_lm, tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("models") / request.param, request.param)


# --- without mlx-lm ------------------------------------------------------------------------------------------------


def test_the_loss_counts_what_is_to_be_predicted_and_nothing_else():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    counted = np.array([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]], bool)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # Of row 1 the first token is counted too, but nothing stands before it.
    expected = -np.mean([log_p[0, 1, ids[0, 2]], log_p[0, 2, ids[0, 3]], log_p[1, 3, ids[1, 4]]])
    arrays = mx.array(logits), mx.array(ids), mx.array(counted)
    assert next_token_loss(*arrays).item() == pytest.approx(expected, rel=1e-5)
    gradient = np.array(mx.grad(next_token_loss)(*arrays))
    moved = np.zeros((2, 5), bool)
    moved[0, 1], moved[0, 2], moved[1, 3] = True, True, True
    assert np.array_equal(np.abs(gradient).sum(-1) > 0, moved)


def test_bad_rows_of_completions_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"text": "c"}\n')
    assert read_completions(path) == [Completion("a", "b"), Completion("", "c")]
    path.write_text('{"promt": "a", "completion": "b"}\n{"prompt": "a"}\n[1]\n{"text": " "}\nx\n{"text": 3}\n')
    with pytest.raises(DataError) as raised:
        read_completions(path)
    parts = ["unknown key 'promt'", "completion is missing", "list", "text is empty", "not valid JSON"]
    for part in [*(f"line {i}: {what}" for i, what in enumerate(parts, 1)), "(and 1 more)"]:
        assert part in str(raised.value)
    with pytest.raises(DataError, match="there is no file at"):
        read_completions(tmp_path / "none.jsonl")


def test_options_for_labels_are_refused_with_completions(tmp_path):
    asked = ["--data", "a.jsonl", "--model", "m", "--output", str(tmp_path / "out"), "--completions", "--shots", "1"]
    done = CliRunner().invoke(app, ["finetune", *asked])
    assert done.exit_code == 2
    assert "--shots is for texts with labels" in " ".join(done.output.split())


# --- with it -------------------------------------------------------------------------------------------------------


def test_classes_are_the_next_token_logits_of_their_words(folder):
    words, texts = ["fox", "dog", "over_lazy"], ["the quick brown", "jumps over the lazy dog and the fox"]
    model, tokenizer = load_language_model(folder, label_words=words), load_tokenizer(folder)
    ids, tokens = tokenizer(texts), label_tokens(tokenizer, words)
    assert tokenizer.pad_id == 2  # the end of text: there is no padding token
    got = np.array(model(ids))
    for row, text in enumerate(texts):
        alone = tokenizer.backend.encode(text).ids
        logits = np.array(model.next_token_logits(mx.array([alone])))[0, -1]
        expected = [logits[each].mean() for each in tokens]
        np.testing.assert_allclose(got[row], expected, atol=1e-4)
    dense = np.array(model.label_rows(tokens))
    nn.quantize(model.lm, group_size=32, bits=8)
    np.testing.assert_allclose(np.array(model.label_rows(tokens)), dense, atol=0.02)


@pytest.mark.parametrize("method", ["lora", "ia3", "pfeiffer", "vera"])
def test_adapters_sit_in_it_and_gradients_are_stacked_as_looped(folder, method):
    model = load_language_model(folder, num_classes=3)
    attach(model, adapter_config(method), train_head=True)
    params = trainable(model)
    assert {path.partition(".")[0] for path in params} == {"lm", "head"}
    apply, ids = functional(model), mx.random.randint(3, 64, (2, 4, 8), key=mx.random.key(1))
    y = mx.array([[0, 1, 2, 0], [1, 1, 2, 0]])

    def loss(params, x, y):
        return mx.mean(nn.losses.cross_entropy(apply(params, x), y))

    stacked = mx.vmap(mx.grad(loss), (None, 0, 0))(params, ids, y)
    for task in range(2):
        alone = mx.grad(loss)(params, ids[task], y[task])
        for path, gradient in alone.items():
            assert mx.allclose(stacked[path][task], gradient, atol=1e-4).item(), path


def test_prompts_are_masked_and_the_end_is_learned(folder):
    tokenizer = load_tokenizer(folder)
    ids, counted = tokenised(ROWS, tokenizer)
    for row, (prompt, completion) in enumerate(ROWS):
        before, after = (tokenizer.backend.encode(text).ids if text else [] for text in (prompt, completion))
        assert ids[row, : len(before) + len(after)].tolist() == [*before, *after]
        assert counted[row].sum() == len(after) + 1
        assert not counted[row, : len(before)].any()
        assert ids[row, len(before) + len(after)] == tokenizer.pad_id


def test_fine_tuned_completions_are_what_mlx_lm_then_says(mlx_lm, folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row._asdict()) + "\n" for row in ROWS))
    files = ["--data", str(data), "--model", str(folder), "--output", str(tmp_path / "out")]
    numbers = ["--epochs", "200", "--batch-size", "3", "--learning-rate", "0.01"]
    result = CliRunner().invoke(app, ["finetune", "--completions", *files, *numbers])
    assert result.exit_code == 0, result.output
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())["curve"]
    # Rows of norm 0.6 in the output embedding keep logits within 3 or so, and the loss above about 0.7.
    assert curve[-1]["train_loss"] < 0.2 * curve[0]["train_loss"]
    done = finetune_completions(ROWS, source=str(folder), epochs=200, batch_size=3, learning_rate=0.01)
    assert [row["train_loss"] for row in done.curve] == [row["train_loss"] for row in curve]
    theirs, tokenizer = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "out"))
    ids = mx.array([tokenizer.encode("the quick brown")])
    np.testing.assert_allclose(np.array(theirs(ids)), np.array(done.model.next_token_logits(ids)), atol=1e-4)
    said = mlx_lm.generate(theirs, tokenizer, "over the", max_tokens=12)
    assert said.replace(" ", "") == "lazydog"


def test_fine_tuning_by_label_words_is_kept_and_predicts(folder, tmp_path):
    texts = [f"{a} {b}" for a in ("the", "over", "quick") for b in ("fox", "dog", "jumps fox", "lazy dog")]
    labels = np.array([int("dog" in text) for text in texts], np.int32)
    task = Task(Texts(texts, labels), Texts(texts, labels), ["fox", "dog"])
    done = finetune(task, "lora", source=str(folder), epochs=15, batch_size=6, learning_rate=0.01, max_length=32)
    assert done.curve[-1]["score"] == 1.0
    done.adapted.save(tmp_path / "mine")
    found = AdaptedTask.load(tmp_path / "mine").predict(texts)
    assert [label for label, _ in found] == [task.names[y] for y in labels]
    other = shutil.copytree(folder, tmp_path / "other")
    arrays = {name: a + 0.1 for name, a in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(other / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights of .* are others"):
        AdaptedTask.load(tmp_path / "mine", source=str(other))


@pytest.mark.parametrize("algorithm", ["protonet", "fomaml"])
def test_a_learner_meta_trains_over_it_and_adapts_to_new_labels(mlx_lm, folder, tmp_path, algorithm):
    given = settings(folder, write_intents(tmp_path / "mine.csv"), tmp_path, algorithm)
    given["model"] = {"backbone": "language_model", "source": str(folder)}
    given["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    report = train(MetaLearningConfig.from_dict(given), name="lm")
    texts = ["the fox", "quick fox", "lazy dog", "brown dog"]
    adapted = adapt_checkpoint(report["run"], texts, ["fox", "fox", "dog", "dog"])
    adapted.save(tmp_path / "mine")
    again = AdaptedTask.load(tmp_path / "mine")
    assert again.predict(texts) == adapted.predict(texts)
    # What goes to mlx-lm is the adapter without our head or prototypes.
    export_adapter(tmp_path / "mine", "mlx-lm", tmp_path / "adapter")
    theirs, tokenizer = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    ids = mx.array([tokenizer.encode("the lazy fox")])
    ours = np.array(again.model.next_token_logits(ids))
    np.testing.assert_allclose(np.array(theirs(ids)), ours, atol=1e-4)
    fuse(tmp_path / "mine", tmp_path / "fused")
    np.testing.assert_allclose(np.array(mlx_lm.load(str(tmp_path / "fused"))[0](ids)), ours, atol=1e-4)


def test_what_is_no_language_model_is_said(mlx_lm, folder, tmp_path):
    with pytest.raises(ModelError, match="holds no causal language model"):
        load_language_model(write_encoder(tmp_path / "encoder"))
    with pytest.raises(ModelError, match="the label '_' has no token"):
        load_language_model(folder, label_words=["fox", "_"])
