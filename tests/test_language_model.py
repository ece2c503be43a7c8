"""Causal language models of mlx-lm: label words, the masked next-token loss, fine-tuning, learners, formats."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import signal
import sys
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.backbones.frozen_prefix import FrozenPrefix, frozen_layers
from efficientai_toolkit.backbones.language_model import (
    LanguageModel,
    label_tokens,
    load_chat_tokenizer,
    load_language_model,
    next_token_loss,
)
from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import CheckpointError, DataError, ModelError
from efficientai_toolkit.nn.functional import functional, trainable
from efficientai_toolkit.pretrained import TextTokenizer, load_tokenizer, resolve
from efficientai_toolkit.recipes.finetune import Task, Texts, finetune
from efficientai_toolkit.recipes.language import finetune_completions, tokenised
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.exchange import export_adapter, fuse
from efficientai_toolkit.runs.train import train
from efficientai_toolkit.tasks.completions import Completion, read_completions
from lm_folders import CHAT_TEMPLATE, write_lm
from text_models import settings, write_encoder, write_intents

ROWS = [
    Completion("the quick brown", " fox jumps"),
    Completion("over the", " lazy dog"),
    Completion("", "brown dog quick fox"),
]
PAIRS = [
    {"prompt": "the quick brown", "completion": "fox jumps"},
    {"prompt": "over the", "completion": "lazy dog"},
]


@pytest.fixture(scope="module")
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, mlx_lm, tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def older(request, mlx_lm, tmp_path_factory):
    """Folders whose embeddings and blocks have names of their own, and whose positions or outputs do, too."""
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
    assert read_completions(path) == [Completion("a", "b"), Completion(None, "c")]
    path.write_text('{"promt": "a", "completion": "b"}\n{"prompt": "a"}\n[1]\n{"text": " "}\nx\n{"text": 3}\n')
    with pytest.raises(DataError) as raised:
        read_completions(path)
    parts = ["unknown key 'promt'", "completion is missing", "list", "text is empty", "not valid JSON"]
    for part in [*(f"line {i}: {what}" for i, what in enumerate(parts, 1)), "(and 1 more)"]:
        assert part in str(raised.value)
    with pytest.raises(DataError, match="there is no file at"):
        read_completions(tmp_path / "none.jsonl")


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def test_the_last_message_of_a_chat_is_its_completion_and_bad_chats_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    asked, answer = [message("system", "a"), message("user", "")], message("assistant", "c")
    path.write_text(json.dumps({"messages": [*asked, answer]}))
    assert read_completions(path) == [Completion(asked, "c")]
    faults = {
        "messages is no list of two at least": [answer],
        "message 1 is 3, expected an object": [3, answer],
        "message 2: unknown key 'tool_calls'": [*asked[:1], message("user", "b", tool_calls=[]), answer],
        "message 1: content is None, not a string": [message("user", None), answer],
        "message 2: content is missing": [asked[0], {"role": "user"}, answer],
        "message 1: role is 'sytem'; did you mean 'system'?": [message("sytem", "a"), answer],
        "the last message is the user's, expected the assistant's": asked,
        "the last message is empty": [*asked, message("assistant", " ")],
    }
    rows = [{"messages": [*asked, answer], "tools": []}, *({"messages": value} for value in faults.values())]
    for fault, row in zip(["unknown key 'tools'", *faults], rows, strict=True):
        path.write_text('{"text": "d"}\n\n' + json.dumps(row))
        with pytest.raises(DataError) as raised:
            read_completions(path)
        assert f"line 3: {fault}" in str(raised.value)


@pytest.fixture
def words(tmp_path):
    """A tokenizer whose tokens are words, behind a start token 1, for at most eight of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 40)}}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path / "tokenizer.json", pad_id=0, end_id=0, max_length=8)


def said(*numbers):
    return " ".join(f"w{i}" for i in numbers)


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "start"),
    [
        (range(2, 7), [30], [1, 2, 3, 4, 5, 6, 30, 0], 6),  # as long as can be
        (range(2, 30), [30, 31], [1, 26, 27, 28, 29, 30, 31, 0], 5),
        (range(2, 5), range(30, 36), [1, 30, 31, 32, 33, 34, 35, 0], 1),
        (range(2, 5), range(20, 30), [1, 2, 3, 4, 20, 21, 22, 23], 4),
        (range(2, 10), range(20, 30), [1, 7, 8, 9, 20, 21, 22, 23], 4),
        ([], range(20, 30), [1, 20, 21, 22, 23, 24, 25, 26], 0),
    ],
)
def test_of_a_long_row_the_completion_stays(words, prompt, completion, ids, start, caplog):
    got, counted = tokenised([Completion(said(*prompt), said(*completion))] * 2, words)
    assert got.tolist() == [ids] * 2
    assert counted[0].tolist() == [i >= start for i in range(8)]
    shorter = len([*prompt]) + len([*completion]) > 6
    assert [record.getMessage()[:53] for record in caplog.records] == [
        "2 of 2 rows are longer than 8 tokens (row 1 is the fi"
    ] * shorter


def test_rows_without_a_token_to_learn_are_named(words):
    from tokenizers import processors

    words.backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    rows = [Completion("w2", "w3"), Completion("", " "), Completion("w2", " ")]
    with pytest.raises(DataError, match="completions: row 2: no token to learn"):
        tokenised(rows, words)


def test_rows_are_closed_by_the_end_of_text_and_filled_up_by_padding(words):
    words.end_id = 39
    ids, counted = tokenised([Completion("w2", "w3"), Completion("w2", "w3 w4 w5"), Completion(None, "w39")], words)
    assert ids.tolist() == [[1, 2, 3, 39, 0, 0, 0, 0], [1, 2, 3, 4, 5, 39, 0, 0], [1, 39, 0, 0, 0, 0, 0, 0]]
    assert counted.sum(1).tolist() == [2, 4, 2]
    words.end_id = None
    with pytest.raises(ModelError, match="names no end of text, so it cannot learn to stop"):
        tokenised(ROWS, words)


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config": {"eos_token": "w7"}, "generation_config": {"eos_token_id": 8}}, 7),
        ({"tokenizer_config": {"eos_token": {"content": "w7"}}}, 7),
        ({"tokenizer_config": {"eos_token": "none"}, "generation_config": {"eos_token_id": [8, 9]}}, 8),
        ({"tokenizer_config": {}, "generation_config": {}}, 5),
        ({}, 5),
    ],
)
def test_the_end_of_text_is_where_mlx_lm_stops(words, tmp_path, files, end):
    about = {"architectures": ["LlamaForCausalLM"], "eos_token_id": [5, 6], "pad_token_id": 3}
    for name, content in {"config": about, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.end_id, tokenizer.pad_id) == (end, 3)
    (tmp_path / "config.json").write_text(json.dumps({**about, "pad_token_id": None}))
    assert load_tokenizer(tmp_path).pad_id == end
    (tmp_path / "config.json").write_text(json.dumps({**about, "architectures": ["BertModel"]}))
    assert load_tokenizer(tmp_path).end_id is None


def test_the_hub_is_asked_for_the_chat_template(monkeypatch, tmp_path):
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, allow_patterns, **_: asked.extend(allow_patterns) or tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("someone/some-model") == tmp_path
    assert any(fnmatch("chat_template.jinja", pattern) for pattern in asked)


class Chat:
    """As mlx-lm's tokenizer: a message is its role (33 the user's, 32 the assistant's), its numbers and 30."""

    bos_token_id, eos_token_ids = 1, {30}

    def __init__(self, asks=(32,), closes=(30,)):
        self.asks, self.closes = list(asks), list(closes)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        ids = [1]
        for each in messages:
            if each["content"] == "bad":
                raise ValueError("roles must alternate")
            ids += [{"user": 33, "assistant": 32}[each["role"]], *map(int, each["content"].split()), *self.closes]
        return ids + self.asks * add_generation_prompt


def test_a_chat_is_counted_after_the_request_for_an_answer(words):
    rows = [Completion("2", "3"), Completion([message("user", "2")], "3"), Completion(None, "w2 w3")]
    for asks, start in (([32], 5), ([32, 38], 5), ([37], 4)):
        ids, counted = tokenised(rows, words, Chat(asks))
        assert ids[:2].tolist() == [[1, 33, 2, 30, 32, 3, 30, 0]] * 2
        assert counted[:2].tolist() == [[start <= i < 7 for i in range(8)]] * 2
        assert ids[2].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
        assert counted[2].tolist() == [i < 4 for i in range(8)]
    ids, counted = tokenised(rows[:2], words, Chat(closes=()))  # a template that never stops is closed
    assert ids.tolist() == [[1, 33, 2, 32, 3, 0, 0, 0]] * 2
    assert counted.sum(1).tolist() == [2, 2]


def test_of_a_long_chat_the_start_and_the_answer_stay(words, caplog):
    rows = [Completion(" ".join(map(str, range(2, 20))), answer) for answer in ("20 21", "20 21 22 23 24 25 26 27")]
    ids, counted = tokenised(rows, words, Chat())
    assert ids.tolist() == [[1, 18, 19, 30, 32, 20, 21, 30], [1, 19, 30, 32, 20, 21, 22, 23]]
    assert counted.sum(1).tolist() == [3, 4]
    assert "2 of 2 rows are longer than 8 tokens (row 1 is the first)" in caplog.text


def test_chats_that_the_template_cannot_write_are_named(words):
    with pytest.raises(DataError, match=r"row 2: the model's chat template refuses it \(roles must alternate\)"):
        tokenised([Completion("2", "3"), Completion("bad", "3")], words, Chat())
    with pytest.raises(DataError, match="row 2 holds messages, which only a chat template can write"):
        tokenised([Completion("2", "3"), Completion([message("user", "2")], "3")], words)


def test_the_chat_template_is_left_out_of_completions_alone(tmp_path):
    asked = ["--data", "a.csv", "--model", "m", "--output", str(tmp_path / "out"), "--no-chat-template"]
    done = CliRunner().invoke(app, ["finetune", *asked])
    assert done.exit_code == 2
    assert "--no-chat-template is for --completions" in " ".join(done.output.split())


def test_options_for_labels_are_refused_with_completions(tmp_path):
    asked = ["--data", "a.jsonl", "--model", "m", "--output", str(tmp_path / "out"), "--completions", "--shots", "1"]
    done = CliRunner().invoke(app, ["finetune", *asked])
    assert done.exit_code == 2
    assert "--shots is for texts with labels" in " ".join(done.output.split())


# --- with it -------------------------------------------------------------------------------------------------------


def test_classes_are_the_next_token_logits_of_their_words(folder):
    _check_classes(folder)


def test_embeddings_and_blocks_are_found_under_any_name(older):
    _check_classes(older)
    model = load_language_model(older)
    assert model.config == (32, 3, 64, 2)
    assert model.embedding.weight.shape == (64, 32)
    assert load_tokenizer(older).max_length == 64
    attach(model, adapter_config("lora"), "lm.model.h.2.*")
    assert mx.isfinite(model(mx.array([[3, 4, 2]]))).all().item()


def _check_classes(folder):
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


TALKS = [
    {"messages": [message("system", "the lazy fox"), message("user", "over the"), message("assistant", "brown dog")]},
    {
        "messages": [
            message("user", "dog"),
            message("assistant", "fox"),
            message("user", "the"),
            message("assistant", "lazy fox"),
        ]
    },
]


@pytest.fixture(scope="module")
def talker(mlx_lm, tmp_path_factory):
    """A folder with a chat template, whose padding is not its end of text."""
    return write_lm(tmp_path_factory.mktemp("models") / "talker", "llama", CHAT_TEMPLATE)


def test_chats_have_the_tokens_and_the_mask_of_mlx_lm(mlx_lm, talker, folder, tmp_path):
    datasets = importlib.import_module("mlx_lm.tuner.datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, *TALKS]))
    ids, counted = tokenised(
        read_completions(tmp_path / "rows.jsonl"), load_tokenizer(talker), load_chat_tokenizer(talker)
    )
    theirs = mlx_lm.load(str(talker))[1]
    pairs = datasets.CompletionsDataset(PAIRS, theirs, "prompt", "completion", mask_prompt=True)
    talks = datasets.ChatDataset(TALKS, theirs, mask_prompt=True)
    expected = [*map(pairs.process, PAIRS), *map(talks.process, TALKS)]
    for row, (tokens, start) in enumerate(expected):
        assert ids[row].tolist() == tokens + [3] * (len(ids[row]) - len(tokens))
        assert counted[row].tolist() == [start <= i < len(tokens) for i in range(len(ids[row]))]
    assert load_chat_tokenizer(folder) is None


@pytest.mark.parametrize("flags", [[], ["--no-chat-template"]])
def test_a_chat_model_says_the_completion_and_stops(talker, tmp_path, capsys, monkeypatch, flags):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    files = ["--data", str(data), "--model", str(talker), "--output", str(tmp_path / "out")]
    numbers = ["--epochs", "150", "--batch-size", "2", "--learning-rate", "0.01"]
    result = CliRunner().invoke(app, ["finetune", "--completions", *files, *numbers, *flags])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "curve.json").read_text())["chat_template"] is (not flags)
    command = result.output.splitlines()[-1].removeprefix("Use it: ").removesuffix(" --prompt …")
    assert ("--ignore-chat-template" in command) == bool(flags)
    generate = importlib.import_module("mlx_lm.generate")
    for row in PAIRS:
        asked = [*shlex.split(command), "--prompt", row["prompt"], "--max-tokens", "12", "--verbose", "False"]
        monkeypatch.setattr("sys.argv", asked)
        generate.main()
        assert capsys.readouterr().out.replace(" ", "").strip() == row["completion"].replace(" ", "")


def test_messages_need_a_chat_template(talker, folder):
    rows = [Completion([message("user", "over the")], "dog")]
    for source, chat_template in ((folder, True), (talker, False)):
        with pytest.raises(DataError, match="row 1 holds messages, which only a chat template can write"):
            finetune_completions(rows, source=str(source), chat_template=chat_template, epochs=1)


def test_a_tokenizer_that_mlx_lm_does_not_load_is_said(mlx_lm, talker, tmp_path):
    other = shutil.copytree(talker, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="mlx-lm does not load the tokenizer of"):
        load_chat_tokenizer(other)


def test_interrupted_completions_keep_what_was_learned(folder, tmp_path, monkeypatch):
    from efficientai_toolkit.cli import finetune as command

    def interrupt(start, *rest):
        if start == "epoch 1/50":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "_say", interrupt)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    files = ["--data", str(data), "--model", str(folder), "--output", str(tmp_path / "my model")]
    done = CliRunner().invoke(app, ["finetune", "--completions", *files, "--epochs", "50", "--batch-size", "1"])
    assert done.exit_code == 130, done.output
    report = json.loads((tmp_path / "my model" / "curve.json").read_text())
    assert [row["step"] for row in report["curve"]] == [len(PAIRS), len(PAIRS) + 1]
    assert (tmp_path / "my model" / "adapters.safetensors").is_file()
    words = shlex.split(done.stdout.splitlines()[-1].removeprefix("Use it: "))
    assert words[words.index("--adapter-path") + 1] == str(tmp_path / "my model")


def test_completions_that_are_stopped_before_the_first_step_learn_nothing(folder):
    with pytest.raises(KeyboardInterrupt):
        finetune_completions(ROWS, source=str(folder), stop=lambda: True)


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


def test_a_base_without_quantisation_biases_gives_its_label_rows(folder):
    model, tokens = load_language_model(folder), [[3, 5], [7]]
    dense = np.array(model.label_rows(tokens))
    nn.quantize(model.lm, group_size=32, bits=4, mode="mxfp4")
    rows = np.array(model.label_rows(tokens))
    assert "biases" not in model.embedding
    np.testing.assert_allclose(rows, dense, atol=0.2 * np.abs(dense).max())


def test_a_model_of_another_layout_is_refused_by_what_is_missing():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Embedding(8, 4)

    with pytest.raises(ModelError, match="has no module with an input embedding and a list of blocks"):
        LanguageModel(Recurrent(), 0)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.blocks = nn.Embedding(8, 4), [nn.Linear(4, 4)]

        def __call__(self, ids, cache=None):
            return self.wte.as_linear(self.wte(ids)), None

    with pytest.raises(ModelError, match="the model is no module with an input embedding"):
        LanguageModel(Inner(), 0)


def test_mlx_norms_are_given_float32_and_a_norm_of_the_model_s_own_stays(monkeypatch):
    class Own(nn.RMSNorm):
        pass

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.blocks = nn.Embedding(8, 4), [nn.RMSNorm(4), nn.LayerNorm(4)]
            self.norm, self.own = nn.RMSNorm(4), Own(4)

        def __call__(self, ids, cache=None):
            h = self.wte(ids)
            for block in self.blocks:
                h = block(h)
            return self.norm(h)

    lm, given = Body(), []
    lm.set_dtype(mx.float16)
    paths = [path for path, _ in tree_flatten(lm.parameters())]
    model = LanguageModel(lm, 0)
    for name in ("rms_norm", "layer_norm"):
        mlx = getattr(mx.fast, name)
        monkeypatch.setattr(mx.fast, name, lambda x, *rest, mlx=mlx: given.append(x.dtype) or mlx(x, *rest))
    assert model._hidden(mx.array([[1, 2]])).dtype == mx.float16
    assert given == [mx.float32] * 3
    assert type(lm.own) is Own
    assert [path for path, _ in tree_flatten(lm.parameters())] == paths


# --- the cache of frozen blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_going_on_from_the_frozen_blocks_gives_the_same_features_and_gradients(mlx_lm, tmp_path, kind):
    model: Any = load_language_model(write_lm(tmp_path / kind, kind), num_classes=3)
    blocks = f"{model.body_path}.{model.stack}".strip(".")
    attach(model, adapter_config("lora"), [f"lm.{blocks}.2.*"], train_head=True)
    assert frozen_layers(model) == 2
    ids = mx.random.randint(3, 64, (2, 4, 8), key=mx.random.key(1))
    ids = mx.where(mx.arange(8) < mx.array([[3], [8], [5], [1]]), ids, 2)
    prefix = FrozenPrefix(model)
    h = prefix(ids)
    assert h.shape == (2, 4, 8, 33)
    assert prefix.computed == 8
    apply, start = functional(model), {path: a + 0.05 for path, a in trainable(model).items()}

    def loss(params, x):
        return mx.mean(mx.square(apply(params, x)))

    cached, plain = (mx.vmap(mx.value_and_grad(loss), (None, 0))(start, x) for x in (h, ids))
    np.testing.assert_allclose(np.array(cached[0]), np.array(plain[0]), rtol=1e-5)
    for path, gradient in plain[1].items():
        assert mx.allclose(cached[1][path], gradient, rtol=1e-4, atol=1e-5).item(), path
    assert all(isinstance(block, nn.Module) for block in model.layers)  # nobody stands in for them any longer


@pytest.mark.parametrize(
    ("method", "targets", "expected"),
    [
        ("lora", "lm.model.layers.1.*", 1),
        ("lora", "head", 2),
        ("lora", "lm_head", 2),
        ("lora", "q_proj", 0),
        ("prompt", None, 0),
    ],
)
def test_how_much_of_it_is_frozen(mlx_lm, tmp_path, method, targets, expected):
    model: Any = load_language_model(write_lm(tmp_path / "llama", "llama"))
    attach(model, adapter_config(method), targets)
    assert frozen_layers(model) == expected


def test_a_model_whose_blocks_read_more_than_the_last_is_not_cached(mlx_lm, tmp_path):
    model: Any = load_language_model(write_lm(tmp_path / "llama", "llama"))
    inner = model.lm.model

    class Skipping(type(inner)):
        def __call__(self, ids, cache=None):
            return super().__call__(ids, cache) + self.embed_tokens(ids)

    inner.__class__ = Skipping
    attach(model, adapter_config("lora"), "lm.model.layers.2.*")
    assert not model.can_resume(2)
    assert frozen_layers(model) == 0


def test_fine_tuning_over_it_has_the_same_losses_as_without(folder, monkeypatch):
    texts = [f"{a} {b}" for a in ("the", "over", "quick") for b in ("fox", "dog", "jumps fox", "lazy dog")]
    task = Task(Texts(texts, np.array([int("dog" in t) for t in texts], np.int32)), None, ["fox", "dog"])
    options = {"source": str(folder), "target_modules": ["lm.model.layers.2.*"], "epochs": 3, "batch_size": 4}
    made = []
    monkeypatch.setattr(
        "efficientai_toolkit.recipes.intents.FrozenPrefix", lambda *a: made.append(0) or FrozenPrefix(*a)
    )
    cached = finetune(task, "lora", **options).curve
    assert made
    monkeypatch.setattr("efficientai_toolkit.recipes.finetune.prefix_of", lambda model: lambda ids: ids)
    plain = finetune(task, "lora", **options).curve
    mine, theirs = ([row["train_loss"] for row in curve] for curve in (cached, plain))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_what_is_no_language_model_is_said(mlx_lm, folder, tmp_path):
    with pytest.raises(ModelError, match="holds no causal language model"):
        load_language_model(write_encoder(tmp_path / "encoder"))
    (tmp_path / "olmo").mkdir()
    (tmp_path / "olmo" / "config.json").write_text('{"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}')
    mx.save_safetensors(str(tmp_path / "olmo" / "model.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(ModelError, match="without a package of that model's own"):
        load_language_model(tmp_path / "olmo")
    with pytest.raises(ModelError, match="the label '_' has no token"):
        load_language_model(folder, label_words=["fox", "_"])
