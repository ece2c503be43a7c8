"""Soft prompts, prefixes and bottlenecks in language models of mlx-lm, in classification and for completions."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import MAML
from efficientai_toolkit.adapters import ADAPTERS, activate, adapter_config, attach, count_parameters
from efficientai_toolkit.backbones.frozen_prefix import FrozenPrefix
from efficientai_toolkit.backbones.language_model import load_language_model
from efficientai_toolkit.errors import AdapterError, ModelError
from efficientai_toolkit.nn.functional import functional, trainable, update
from efficientai_toolkit.recipes.language import finetune_completions
from efficientai_toolkit.tasks.completions import Completion
from efficientai_toolkit.tasks.episode import Episode
from lm_folders import write_lm

KINDS = ["llama", "qwen3", "gpt2", "gpt_neox"]
PROMPTS = ["prompt", "p_tuning"]
ROWS = [Completion("the quick brown", " fox jumps"), Completion("over the", " lazy dog")]
IDS = mx.array([[3, 9, 4, 8, 5, 7], [6, 5, 4, 2, 2, 2], [7, 2, 2, 2, 2, 2]])  # 2 is the padding


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")
    root = tmp_path_factory.mktemp("models")
    return {kind: write_lm(root / kind, kind) for kind in KINDS}


def made(folder, method: str, targets=None, **options) -> Any:
    """A model with the adapter, moved off its start."""
    model = load_language_model(folder, num_classes=3)
    attach(model, adapter_config(method, **options), targets, train_head=True)
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    moved = {p: a + 0.1 * mx.random.normal(a.shape, key=k) for (p, a), k in zip(params.items(), keys, strict=True)}
    update(model, moved)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_adapter_works_in_it_and_has_the_size_that_is_said(folders, kind, method):
    model = load_language_model(folders[kind], num_classes=3)
    config = adapter_config(method)
    if method.startswith("prefix") and kind in ("gpt2", "gpt_neox"):  # whose queries, keys and values are one layer
        with pytest.raises(AdapterError, match="an attention module is needed"):
            attach(model, config)
        return
    count = count_parameters(model, config)
    attach(model, config)
    if kind == "gpt2" and method in PROMPTS:  # it adds learned positions, as many as there are ids
        for ask in (model, model.next_token_logits):
            for ids in (IDS, IDS[:, :1]):
                with pytest.raises(ModelError, match="looks up its wpe by the length of the text"):
                    ask(ids)
        return
    assert model(IDS).shape == (3, 3)
    assert model.next_token_logits(IDS).shape == (3, 6, 64)
    assert sum(array.size for array in trainable(model).values()) == count


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("method", PROMPTS)
def test_a_prompt_stands_before_the_text(folders, kind, method):
    """What it gives is what the blocks give for the embeddings of the prompt and the text."""
    model = made(folders[kind], method, length=4)
    slot, plain = model.embedding, load_language_model(folders[kind])
    rows = mx.broadcast_to(slot.adapters["default"].tokens(), (3, 4, 32))
    words = mx.concatenate([rows, plain.embedding(IDS)], axis=1)

    class Given(type(plain.embedding)):
        def __call__(self, ids):
            return words

    plain.embedding.__class__ = Given
    filler = mx.zeros((3, 10), mx.int32)
    expected = np.array(plain.lm(filler))[:, 4:]
    np.testing.assert_allclose(np.array(model.next_token_logits(IDS)), expected, atol=1e-5)
    hidden = np.array(plain._hidden(filler))[:, 4:]
    np.testing.assert_allclose(np.array(model.features(IDS)), hidden[[0, 1, 2], [5, 2, 0]], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("method", PROMPTS)
def test_padding_changes_nothing_and_gradients_are_stacked_as_looped(folders, kind, method):
    model = made(folders[kind], method, length=4)
    for row, length in ((1, 3), (2, 1)):
        np.testing.assert_allclose(
            np.array(model(IDS))[row], np.array(model(IDS[row : row + 1, :length]))[0], atol=1e-4
        )
    apply, params = functional(model), trainable(model)
    tasks, y = mx.stack([IDS, IDS[::-1]]), mx.array([[0, 1, 2], [2, 1, 1]])

    def loss(params, x, y):
        return mx.mean(nn.losses.cross_entropy(apply(params, x), y))

    stacked = mx.vmap(mx.grad(loss), (None, 0, 0))(params, tasks, y)
    for task in range(2):
        for path, gradient in mx.grad(loss)(params, tasks[task], y[task]).items():
            assert mx.abs(gradient).max().item() > 0, path
            assert mx.allclose(stacked[path][task], gradient, atol=1e-4).item(), path


@pytest.mark.parametrize("method", PROMPTS)
def test_a_learner_meta_trains_a_prompt_and_adapts_it(folders, method):
    model = load_language_model(folders["llama"], num_classes=3)
    attach(model, adapter_config(method, length=4), train_head=True)
    learner = MAML(model, lr_inner=0.05, lr_outer=0.01, num_inner_steps=2)
    y = mx.array([0, 1, 2])
    episode = Episode(IDS, y, IDS[:, ::-1], y)
    losses = [learner.meta_train_step([episode, episode], None)["query_loss"] for _ in range(10)]
    assert losses[-1] < losses[0]
    adapted = learner.adapt(IDS, y, num_steps=20)
    assert nn.losses.cross_entropy(adapted(IDS), y).mean().item() < nn.losses.cross_entropy(model(IDS), y).mean().item()


@pytest.mark.parametrize("method", [*PROMPTS, "prefix", "parallel"])
def test_completions_are_learned(folders, method):
    done = finetune_completions(ROWS, method, source=folders["llama"], epochs=20, batch_size=2, learning_rate=0.05)
    losses = [row["train_loss"] for row in done.curve]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("weights", [{"default": 1.0}, {"default": 0.5}, {"default": 0.5, "other": 0.5}])
def test_a_generation_cache_is_written_once_by_bottlenecks_on_attention(folders, kind, weights):
    from mlx_lm.models.cache import make_prompt_cache

    model = made(folders[kind], "houlsby", "attention", bottleneck=4)
    attach(model, adapter_config("parallel", bottleneck=4), "attention", name="other")
    activate(model, weights)
    whole, cache = model.lm(IDS), make_prompt_cache(model.lm)
    first, then = model.lm(IDS[:, :4], cache=cache), model.lm(IDS[:, 4:], cache=cache)
    np.testing.assert_allclose(np.array(mx.concatenate([first, then], axis=1)), np.array(whole), atol=1e-4)
    assert cache[0].offset == 6


def test_states_of_another_release_of_mlx_lm_are_not_read(folders, tmp_path, monkeypatch):
    def prefix():
        model = load_language_model(folders["llama"], num_classes=3)
        attach(model, adapter_config("lora"), "lm.model.layers.2.*")
        cached = FrozenPrefix(model, tmp_path)
        cached(IDS)
        return cached.computed

    assert prefix() == 3
    assert prefix() == 0
    monkeypatch.setattr(sys.modules["mlx_lm"], "__version__", "0.0.1")
    assert prefix() == 3
