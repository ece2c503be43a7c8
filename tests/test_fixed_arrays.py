"""An adapter's own arrays that no training changes, in a checkpoint beside the trained ones."""

from __future__ import annotations

import mlx.core as mx
import pytest

from efficientai_toolkit import CheckpointError, LoRAConfig, MAMLLearner, SimpleClassifier, VeRAConfig, activate, attach
from efficientai_toolkit.adapters.fixed import fixed_arrays, split_fixed
from efficientai_toolkit.checkpoint import write_npz

A, B = "adapter_shared.default.a", "adapter_shared.default.b"


def vera(seed: int) -> MAMLLearner:
    model = attach(SimpleClassifier(2, 8, 2), VeRAConfig(rank=3), "layers.*", key=mx.random.key(seed), train_head=True)
    return MAMLLearner(model, num_inner_steps=1, compile=False)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]) for name in one)


def test_a_learner_takes_them_over(tmp_path):
    first, second = vera(1), vera(2)
    assert set(fixed_arrays(first.model)) == {f"fixed/{A}", f"fixed/{B}"}
    assert not same(fixed_arrays(first.model), fixed_arrays(second.model))
    arrays = {**first.state(), **fixed_arrays(first.model)}
    write_npz(tmp_path / "c.npz", arrays, {"learner": {**first.describe(), "task_bytes": {"(4, 2)": 64}}})
    second.load(tmp_path / "c.npz")
    assert same(fixed_arrays(first.model), fixed_arrays(second.model))
    assert second.describe()["task_bytes"] == {"(4, 2)": 64}


def test_a_saved_learner_has_them_in_its_file(tmp_path):
    first, second = vera(1), vera(2)
    first.save(tmp_path / "c.npz")
    second.load(tmp_path / "c.npz")
    assert same(fixed_arrays(first.model), fixed_arrays(second.model))


def test_a_file_from_before_it_had_them_is_refused(tmp_path):
    learner = vera(0)
    write_npz(tmp_path / "old.npz", learner.state(), {"learner": learner.describe()})
    with pytest.raises(CheckpointError, match="lacks the fixed arrays of its adapter"):
        learner.load(tmp_path / "old.npz")


def test_those_of_an_adapter_of_any_name_are_kept_while_it_acts(tmp_path):
    def two(key: int) -> MAMLLearner:
        model = SimpleClassifier(2, 8, 2)
        attach(model, LoRAConfig(rank=2), "layers.*", name="a", train_head=True)
        attach(model, VeRAConfig(rank=3), "layers.*", key=mx.random.key(key), name="b", train_head=True)
        return MAMLLearner(model, num_inner_steps=1, compile=False)

    first, second = two(1), two(2)
    assert set(fixed_arrays(first.model)) == {"fixed/adapter_shared.b.a", "fixed/adapter_shared.b.b"}
    first.save(tmp_path / "c.npz")
    second.load(tmp_path / "c.npz")
    assert same(fixed_arrays(first.model), fixed_arrays(second.model))
    assert fixed_arrays(activate(first.model, "a")) == {}
    assert set(fixed_arrays(activate(first.model, {"a": 0.5, "b": 0.5}))) == set(fixed_arrays(second.model))


@pytest.mark.parametrize("fault", ["a fixed one is cut", "one fixed one is missing", "a trained one is cut"])
def test_what_does_not_fit_changes_nothing(fault):
    first, second = vera(1), vera(2)
    before, own = second.state(), fixed_arrays(second.model)
    arrays = {**first.state(), **fixed_arrays(first.model)}
    if fault == "one fixed one is missing":
        del arrays[f"fixed/{A}"]
    else:
        name = f"fixed/{A}" if fault == "a fixed one is cut" else next(n for n in arrays if n.startswith("model/"))
        arrays[name] = arrays[name][:1]
    with pytest.raises(CheckpointError, match="does not fit this"):
        second.load_state(arrays)
    assert same(before, second.state())
    assert same(own, fixed_arrays(second.model))


def test_a_model_without_an_adapter_has_none():
    model = SimpleClassifier()
    assert fixed_arrays(model) == {}
    trained = {"model/head.bias": mx.zeros(2)}
    assert split_fixed(model, trained) == ({}, trained)
    with pytest.raises(CheckpointError, match=r"1 arrays are unknown, first 'fixed/x'"):
        split_fixed(model, {**trained, "fixed/x": mx.zeros(2)})
