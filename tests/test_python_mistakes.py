"""What one first gets wrong in Python, and what `help` and a notebook show of it."""

from __future__ import annotations

import inspect

import mlx.core as mx
import numpy as np
import pytest

import efficientai_toolkit
from efficientai_toolkit import (
    EWC,
    MAML,
    MLP,
    DoRAAdapter,
    LoRAConfig,
    MAMLLearner,
    MAMLPlusPlusLearner,
    MetaLearningConfig,
    PrototypicalNetwork,
    SimpleClassifier,
    TaskConfig,
    TaskDistribution,
    activate,
    attach,
    count_parameters,
)
from efficientai_toolkit.config import MetaLearningSection
from efficientai_toolkit.errors import AdapterError, ConfigurationError, TaskSamplingError, did_you_mean, nearest
from efficientai_toolkit.learners import LEARNERS, learner_class


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("lam", ["ewc_lambda", "gamma"], "ewc_lambda"),  # what contains it comes before what is spelt alike
        ("rate", ["learning_rate", "rte"], "learning_rate"),
        ("ra", ["rank", "learning_rate"], "rank"),  # two letters are in too much
        ("inner_rl", ["inner_lr", "outer_lr"], "inner_lr"),
        ("xyz", ["inner_lr"], None),
    ],
)
def test_the_nearest_name(name, known, meant):
    assert nearest(name, known) == meant
    said = did_you_mean(name, known)
    assert said.startswith(f"; did you mean {meant!r}? Known: " if meant else ". Known: ")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: MAMLLearner(m, inner_rl=0.1), "MAMLLearner has no option 'inner_rl'; did you mean 'inner_lr'?"),
        (lambda m: MAML(m, lr_iner=0.1), "MAML has no option 'lr_iner'; did you mean 'lr_inner'?"),
        (lambda m: MAML(m, inner_lr=0.1), "MAML has no option 'inner_lr'; did you mean 'lr_inner'?"),
        (lambda m: EWC(m, lam=3), "EWC has no setting 'lam'; did you mean 'ewc_lambda'?"),
        (lambda m: EWC(m, iteration=3), "EWC has no setting 'iteration'; did you mean 'iterations'?"),
        (
            lambda m: DoRAAdapter(m, lora_dropot=0.1),
            "DoRAAdapter has no setting 'lora_dropot'; did you mean 'lora_dropout'? Known: key, lora_alpha",
        ),
        (lambda m: attach(m, "lora"), "such as LoRAConfig(rank=8), got 'lora'"),
        (lambda m: attach(m, {"rank": 2}), "such as LoRAConfig(rank=8), got {'rank': 2}"),
        (lambda m: attach(m, LoRAConfig), "such as LoRAConfig(rank=8), got <class"),
        (lambda m: count_parameters(m, "lora"), "such as LoRAConfig(rank=8), got 'lora'"),
        (lambda m: attach(m, LoRAConfig(), name=3), "adapter name 3 must be an identifier"),
        (lambda m: attach(m, LoRAConfig(), "layrs.*"), "'layrs.*'; did you mean 'layers.*'? It could go to: layers.0"),
        (lambda m: attach(m, LoRAConfig(), "layrs.[78]"), "no module matches 'layrs.[78]'. It could go to: layers.0"),
    ],
)
def test_misspelt_and_mistaken_arguments(call, sentence):
    with pytest.raises((ConfigurationError, AdapterError)) as caught:
        call(SimpleClassifier())
    assert sentence in str(caught.value)


def test_a_misspelt_public_name():
    with pytest.raises(AttributeError, match="no attribute 'RetileLearner'; did you mean 'ReptileLearner'"):
        _ = efficientai_toolkit.RetileLearner
    with pytest.raises(AttributeError, match=r"no attribute 'qqq'$"):
        _ = efficientai_toolkit.qqq


@pytest.mark.parametrize("loss_fn", [2, 0, "mse"])
def test_a_loss_that_is_no_function(loss_fn):
    tasks = TaskDistribution([TaskConfig("a", "linear_classification")])
    with pytest.raises(ConfigurationError, match=f"loss_fn must be a function of .*, got {loss_fn!r}; give what"):
        MAMLLearner(SimpleClassifier()).meta_train(tasks, loss_fn)


@pytest.mark.parametrize("names", [["a", "b"], {"a": "x"}, {"a": float("nan")}, {"a": mx.array(float("inf"))}, 3])
def test_weights_of_adapters(names):
    model = MLP(4, 3, 8)
    for name in "ab":
        attach(model, LoRAConfig(rank=2), "linear", name=name)
    before = [slot.active for slot in model.layers]
    with pytest.raises(AdapterError, match="takes a name, a mapping of names to finite weights"):
        activate(model, names)
    assert [slot.active for slot in model.layers] == before
    assert activate(model, {"a": mx.array(0.5), "b": 2}).layers[0].active == (("a", 0.5), ("b", 2.0))


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_the_signature_names_every_argument(algorithm):
    """`help` and the API page show the algorithm's options with their defaults, as they are in `build`."""
    made = learner_class(algorithm)
    shown = inspect.signature(made).parameters
    assert {name: shown[name].default for name in made.option_names()} == made.option_names()
    assert list(shown)[:4] == ["model", "inner_lr", "outer_lr", "num_inner_steps"]
    assert {"seed", "head", "gradient_clip", "chunk", "compile"} <= shown.keys()
    assert "options" not in shown


def test_the_signature_of_other_names_and_of_ones_own():
    assert list(inspect.signature(MAML).parameters)[:4] == ["model", "lr_inner", "lr_outer", "num_inner_steps"]
    assert inspect.signature(PrototypicalNetwork).parameters["distance_metric"].default == "euclidean"

    class Own(MAMLLearner):
        def __init__(self, model, inner_lr=0.5):
            super().__init__(model, inner_lr)

    assert list(inspect.signature(Own).parameters) == ["model", "inner_lr"]


def test_a_learner_says_what_it_is():
    model = SimpleClassifier(2, 8, 2)
    assert repr(MAMLLearner(model, inner_lr=0.1, first_order=True)) == (
        "MAMLLearner(inner_lr=0.1, outer_lr=0.001, num_inner_steps=5, first_order=True; iteration 0, 114 trainable)"
    )
    assert "outer_lr=0.01, num_inner_steps=5, cosine_iterations=9;" in repr(
        MAMLPlusPlusLearner(model, outer_lr=0.01, cosine_iterations=9)
    )


def test_settings_of_a_configuration():
    with pytest.raises(ConfigurationError, match="inner_lr should be a valid number, got the text 'nan'"):
        MetaLearningConfig(inner_lr="nan")
    for name in ("inner_lr", "outer_lr"):
        with pytest.raises(ConfigurationError, match=f"{name} should be at least 1e-12: .*, got 1e-300"):
            MetaLearningConfig(**{name: 1e-300})
    config = MetaLearningConfig()
    assert not set(MetaLearningSection.model_fields) & set(MetaLearningConfig.model_fields)
    assert config.outer_lr == config.meta_learning.outer_lr


@pytest.mark.parametrize("given", ["configs/default.yaml", {"meta_learning": {}}])
def test_train_asks_for_a_configuration(given):
    with pytest.raises(ConfigurationError, match=r"expected a MetaLearningConfig \(from_yaml reads a file"):
        efficientai_toolkit.train(given)


def test_evaluate_asks_for_episodes():
    with pytest.raises(TaskSamplingError, match="expected a list of episodes, or a stack of them, got 3"):
        MAMLLearner(SimpleClassifier()).evaluate(3)


def test_a_setting_of_an_adapter_is_named_by_its_section():
    config = MetaLearningConfig.from_dict({"adapter": {"method": "lora", "rank": -3}})
    with pytest.raises(AdapterError, match="section adapter: LoRAConfig: rank should be"):
        efficientai_toolkit.train(config)


@pytest.mark.parametrize("weight", [0.5, 1, True, np.float32(0.5), np.array(0.5), np.bool_(True), mx.array(0.5)])
def test_a_weight_is_any_number(weight):
    model = attach(SimpleClassifier(), LoRAConfig(rank=2))
    assert activate(model, {"default": weight}) is model


@pytest.mark.parametrize("weight", ["0.5", float("nan"), 10**400, 1j, mx.array([0.5, 0.6]), None])
def test_a_weight_is_finite(weight):
    with pytest.raises(AdapterError, match="a mapping of names to finite weights"):
        activate(attach(SimpleClassifier(), LoRAConfig(rank=2)), {"default": weight})


def test_a_learner_can_be_shown_before_it_is_made():
    assert "MAMLLearner" in repr(MAMLLearner.__new__(MAMLLearner))
