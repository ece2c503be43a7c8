"""Options of strategies and their combinations: refused in a sentence, or meaning what they say."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import SimpleClassifier
from efficientai_toolkit.continual import build_learner
from efficientai_toolkit.continual.memory import Memory
from efficientai_toolkit.continual.run import Plan, _learner
from efficientai_toolkit.continual.strategy import join
from efficientai_toolkit.errors import ConfigurationError
from efficientai_toolkit.recipes.melpa import MeLPAConfig

JOINED = ("ewc", "si", "lwf", "replay", "agem", "derpp")


def model() -> SimpleClassifier:
    return SimpleClassifier(4, 5, 4, 1, key=mx.random.key(0))


def rows(seed: int, classes: tuple[int, int] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(24, 4)).astype(np.float32), rng.choice(classes, 24).astype(np.int32)


def filled(memory: Memory, contexts: int, seed: int = 0) -> Memory:
    """After `contexts` of two classes each, whose inputs are their class."""
    rng = np.random.default_rng(seed)
    for context in range(contexts):
        y = rng.permutation(np.repeat([2 * context, 2 * context + 1], 10)).astype(np.int32)
        x = y[:, None].astype(np.float32)
        memory.add({"x": x, "y": y, "context": np.full(20, context, np.int32)}, rng)
    return memory


@pytest.mark.parametrize("policy", ["balanced", "ring"])
def test_a_memory_of_fewer_places_than_classes_stays_full(policy):
    memory = filled(Memory(4, policy), 6)
    kept = memory.rows()
    assert len(memory) == len(kept["y"]) == len(set(kept["y"].tolist())) == 4
    assert np.array_equal(kept["x"][:, 0], kept["y"])
    again = Memory(4, policy)
    again.load_state(memory.state())
    for one in (memory, again):
        filled(one, 8, seed=3)
    assert all(np.array_equal(a, again.rows()[name]) for name, a in memory.rows().items())


@pytest.mark.parametrize("policy", ["balanced", "ring"])
def test_every_class_is_as_likely_to_be_among_those_kept(policy):
    counts = np.zeros(12)
    for seed in range(600):
        counts[filled(Memory(4, policy), 6, seed).rows()["y"]] += 1
    assert np.abs(counts / 600 - 4 / 12).max() < 4 * (2 / 9 / 600) ** 0.5


@pytest.mark.parametrize("name", ["+".join(pair) for pair in itertools.permutations(JOINED, 2)])
def test_every_pair_learns_in_both_orders(name):
    learner = build_learner(name, model(), iterations=2, batch_size=8, kind="class", seed=0, compile=False)
    for seed in range(3):
        assert np.isfinite(learner.learn(*rows(seed, (seed, seed + 1)))["loss"])


def extended(name: str) -> dict:
    """What the strategies of `name` make of a batch of 8 rows in the third context."""
    learner = build_learner(name, model(), iterations=4, batch_size=8, kind="class", seed=0, compile=False)
    for seed in range(2):
        learner.learn(*rows(seed))
    strategies = learner.strategies.values()
    x, y = rows(5)
    batch = {"x": x[:8], "y": y[:8], "context": np.full(8, 2, np.int32), "weight": np.full(8, 1 / 8, np.float32),
             "current": np.ones(8, bool)}  # fmt: skip
    if "replay" in learner.strategies:
        learner.strategies["replay"]._former = 2
    for strategy in strategies:
        batch = strategy.extend(batch, np.random.default_rng(0))
    return batch


def test_a_combination_draws_and_weighs_the_same_in_both_orders():
    for name in ("replay+derpp", "derpp+replay"):
        batch = extended(name)
        assert len(batch["y"]) == 8 + 8 + 2 * 8
        assert batch["current"].sum() == 8
        assert batch["weight"][:8].sum() == pytest.approx(1 / 3)
        assert batch["weight"].sum() == pytest.approx(1.5)  # 1/3 + 2/3 of replay, and β of DER++
    for name in ("derpp+agem", "agem+derpp", "replay+agem"):
        assert len(extended(name)["reference"]["y"]) == 8


def test_what_holds_other_rows_is_not_joined():
    reference = {"y": np.zeros(3, np.int32)}
    joined = join([{"y": np.zeros(2, np.int32), "reference": reference}, {"y": np.ones(1, np.int32)}])
    assert joined["reference"] is reference
    assert joined["y"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ewc+ewc", "'ewc\\+ewc' joins a strategy with itself"),
        ("joint+ewc", "'joint' is learning without a strategy"),
        ("replay+naive", "'naive' is learning without a strategy"),
    ],
)
def test_what_cannot_be_joined_is_said(name, said):
    with pytest.raises(ConfigurationError, match=said):
        Plan(strategies={name: {}})


@pytest.mark.parametrize(
    ("strategy", "option", "value"),
    [
        *(("replay", "capacity", value) for value in (0, 2.5, "3")),
        *((name, "replay_size", value) for name in ("replay", "agem", "derpp") for value in (-3, 0, 2.5)),
        *(("ewc", "fisher_samples", value) for value in (-5, 0, 2.5)),
        ("replay", "per_group", 1.5),
        ("ewc", "ewc_lambda", float("inf")),
        ("si", "si_c", float("nan")),
        ("progressive", "hidden_size", 2.5),
    ],
)
def test_an_impossible_option_is_refused_before_anything_is_trained(strategy, option, value):
    with pytest.raises(ConfigurationError, match=option):
        Plan(strategies={"naive": {}, strategy: {option: value}})


@pytest.mark.parametrize(
    "changed",
    [{"seeds": (-1,)}, {"seeds": (0.5,)}, *({name: 0} for name in ("hidden_dim", "num_layers", "contexts")),
     {"iterations": 2.5}, {"batch_size": -1}, {"learning_rate": float("inf")}],
)  # fmt: skip
def test_an_impossible_plan_is_refused(changed):
    with pytest.raises(ConfigurationError, match=next(iter(changed)).removesuffix("s")):
        Plan(**changed)


def test_a_seed_of_melpa_is_checked():
    with pytest.raises(ConfigurationError, match="seed must be a whole number"):
        MeLPAConfig(seeds=(-1,))


def test_columns_are_as_wide_as_the_plan_says():
    plan = Plan(strategies={"progressive": {}, "ewc": {}}, hidden_dim=7)
    assert _learner(plan, "progressive", model(), seed=0).hidden_size == 7
    plan = Plan(strategies={"progressive": {"hidden_size": 9}}, hidden_dim=7)
    assert _learner(plan, "progressive", model(), seed=0).hidden_size == 9
