"""Metrics on a hand-made matrix, memories by their statistics, scenarios by their tables."""

from __future__ import annotations

import numpy as np
import pytest

from efficientai_toolkit.continual import metrics
from efficientai_toolkit.continual.memory import Memory
from efficientai_toolkit.continual.scenarios import Part, Scenario, split_by_class
from efficientai_toolkit.continual.streams import banking77, build_scenario, clinc150, files, hashed_words
from efficientai_toolkit.errors import ConfigurationError, DataError, DataNotFoundError

R = np.array([[0.90, 0.30, 0.20], [0.95, 0.80, 0.40], [0.70, 0.75, 0.85]])
UNTRAINED = [0.5, 0.25, 0.1]


def test_every_metric_by_hand():
    assert metrics.average_accuracy(R) == pytest.approx((0.70 + 0.75 + 0.85) / 3)
    assert metrics.backward_transfer(R) == pytest.approx(((0.70 - 0.90) + (0.75 - 0.80)) / 2)
    assert metrics.forward_transfer(R, UNTRAINED) == pytest.approx(((0.30 - 0.25) + (0.40 - 0.10)) / 2)
    assert metrics.forgetting(R) == pytest.approx(((0.95 - 0.70) + (0.80 - 0.75)) / 2)
    assert metrics.learning_accuracy(R) == pytest.approx((0.90 + 0.80 + 0.85) / 3)


def test_summary_says_none_where_there_is_nothing():
    found = metrics.summary(np.array([[np.nan, np.nan], [0.5, 0.7]]))  # as of joint training
    assert found.pop("average_accuracy") == pytest.approx(0.6)
    assert set(found.values()) == {None}
    assert metrics.summary([[0.8]])["backward_transfer"] is None


def test_adaptation_speed_by_hand():
    curves = [
        {"steps": [0, 1, 5, 9], "accuracy": [0.1, 0.5, 0.9, 1.0]},
        {"steps": [0, 1, 5, 9], "accuracy": [0.8, 0.2, 0.6, 0.8]},
    ]
    assert metrics.adaptation_speed(curves) == (5 + 0) / 2
    assert metrics.steps_to([0, 3], [0.1, 0.2], 0.5) is None


def offered(n: int, groups: int = 1, first: int = 0) -> dict[str, np.ndarray]:
    x = np.arange(first, first + n, dtype=np.uint8 if n < 256 else np.int32)[:, None]
    return {"x": x, "y": np.arange(n, dtype=np.int32) % groups, "context": np.zeros(n, np.int32)}


def test_reservoir_is_uniform_over_everything_seen():
    """χ² over how often each of 60 rows is kept by a reservoir of 15, 3,000 times."""
    rng, counts, trials = np.random.default_rng(0), np.zeros(60), 3000
    for _ in range(trials):
        memory = Memory(15)
        for start in range(0, 60, 7):  # in batches, as training offers them
            memory.add(offered(min(7, 60 - start), first=start), rng)
        kept = memory.rows()["x"].ravel()
        assert len(np.unique(kept)) == 15
        counts[kept] += 1
    expected = trials * 15 / 60
    # Sampled without replacement: the statistic is χ² with 59 degrees of freedom times 1 − 15/60. 99.9 %: 98.3.
    assert ((counts - expected) ** 2 / expected).sum() / (1 - 15 / 60) < 98.3
    assert (counts > 0).all()


def test_balanced_memory_is_a_uniform_sample_of_each_group():
    rng, counts, trials = np.random.default_rng(0), np.zeros(40), 2000
    for _ in range(trials):
        memory = Memory(10, "balanced")
        memory.add(offered(40, groups=2), rng)
        rows = memory.rows()
        assert np.bincount(rows["y"]).tolist() == [5, 5]
        counts[rows["x"].ravel()] += 1
    expected = trials * 5 / 20
    assert ((counts - expected) ** 2 / expected).sum() / (1 - 5 / 20) < 72.1  # 38 degrees of freedom, 99.9 %


def test_ring_keeps_the_latest_of_each_group():
    memory = Memory(6, "ring", per_group=3)
    memory.add(offered(20, groups=2), np.random.default_rng(0))
    rows = memory.rows()
    assert sorted(rows["x"][rows["y"] == 0].ravel().tolist()) == [14, 16, 18]
    assert sorted(rows["x"][rows["y"] == 1].ravel().tolist()) == [15, 17, 19]


def test_groups_share_the_capacity_and_give_up_rows():
    memory, rng = Memory(12, "balanced"), np.random.default_rng(0)
    memory.add(offered(20, groups=1), rng)
    assert len(memory) == 12
    for context in (1, 2):
        memory.add({**offered(20, groups=1), "context": np.full(20, context, np.int32)}, rng)
    assert np.bincount(memory.rows()["context"]).tolist() == [4, 4, 4]


@pytest.mark.parametrize("policy", ["reservoir", "ring", "balanced"])
def test_memory_is_bounded_and_says_its_bytes(policy):
    memory, rng = Memory(30, policy), np.random.default_rng(0)
    for _ in range(5):
        memory.add({"x": np.zeros((50, 4, 4), np.uint8), **{k: offered(50, 3)[k] for k in ("y", "context")}}, rng)
        assert len(memory) <= 30
        assert memory.nbytes == 30 * (16 + 4 + 4)
    drawn = memory.draw(12, rng)
    assert drawn["x"].shape == (12, 4, 4)
    assert len(memory.draw(1000, rng)["y"]) == len(memory)
    other = Memory(30, policy)
    other.load_state(memory.state())
    assert {n: a.tolist() for n, a in other.rows().items()} == {n: a.tolist() for n, a in memory.rows().items()}


def test_memory_refuses_nonsense():
    with pytest.raises(ConfigurationError, match="did you mean 'ring'"):
        Memory(3, "rings")
    with pytest.raises(ConfigurationError, match="needs places"):
        Memory(0)
    with pytest.raises(ConfigurationError, match="no groups"):
        Memory(3, per_group=1)


def parts(sizes=(2, 3)) -> tuple[Part, ...]:
    return tuple(
        Part.of(f"c{n}", np.ones((6, 2)) * n, np.arange(6) % size, np.ones((6, 2)), np.arange(6) % size)
        for n, size in enumerate(sizes)
    )


def test_outputs_of_the_three_kinds():
    task, domain, classes = (Scenario("s", kind, parts()) for kind in ("task", "domain", "class"))
    assert (task.num_outputs, domain.num_outputs, classes.num_outputs) == (5, 3, 5)
    assert set(task.train(1)[1].tolist()) == {2, 3, 4}
    assert set(domain.train(1)[1].tolist()) == {0, 1, 2}
    for learned in (0, 1):
        np.testing.assert_array_equal(task.masks(learned), [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
        assert domain.masks(learned).all()
        assert classes.masks(learned).all()
    seen = Scenario("s", "class", parts(), active="seen")
    np.testing.assert_array_equal(seen.masks(0), [[1, 1, 0, 0, 0]] * 2)
    assert seen.masks(1).all()
    assert seen.test_mask(0).all()
    assert task.test_mask(1).tolist() == [False, False, True, True, True]


def test_split_by_class_relabels_in_the_order_of_the_group():
    x, y = np.arange(6)[:, None], np.array([7, 3, 7, 1, 3, 9])
    first, second = split_by_class(["a", "b"], (x, y), (x, y), [[7, 1], [9, 3]])
    assert first.train()[0].ravel().tolist() == [0, 2, 3]
    assert first.train()[1].tolist() == [0, 0, 1]
    assert second.test()[1].tolist() == [1, 1, 0]


def test_split_and_permuted_mnist(data_dir):
    split = build_scenario("split-mnist", "domain", data_dir=data_dir, seed=1)
    assert (len(split), split.num_outputs, split.input_shape) == (5, 2, (784,))
    digits = [int(d) for name in split.names for d in name.split("/")]
    assert sorted(digits) == list(range(10))
    assert sum(len(split.train(k)[1]) for k in range(5)) == 60_000
    assert sum(len(split.test(k)[1]) for k in range(5)) == 10_000
    assert split.names != build_scenario("split-mnist", data_dir=data_dir, seed=2).names
    permuted = build_scenario("permuted-mnist", "class", data_dir=data_dir, contexts=3)
    assert (permuted.num_outputs, permuted.input_shape) == (30, (1024,))
    (a, ya), (b, yb) = permuted.test(0), permuted.test(2)
    assert not np.array_equal(a[0], b[0])
    np.testing.assert_array_equal(np.sort(a[:9]), np.sort(b[:9]))
    np.testing.assert_array_equal(ya + 20, yb)


def test_intents_by_domain_and_by_group(data_dir):
    domains = clinc150(data_dir, seed=0)
    assert len(domains) == 10
    assert {part.num_classes for part in domains} == {15}
    assert domains[0].train()[0].shape == (1500, 2048)
    assert sum(part.num_classes for part in banking77(data_dir, seed=0)) == 77


def test_benchmarks_of_text_as_sequences_of_tasks(data_dir):
    parts = build_scenario("superglue", "task", data_dir=data_dir).parts
    assert len({part.name for part in parts}) == len(parts) >= 3
    assert {part.num_classes for part in parts} == {2, 3}  # CB has three
    assert all(len(part.train()[1]) and len(part.test()[1]) for part in parts)


def test_hashed_words_are_unit_vectors_that_know_words():
    a, b, c = hashed_words(["Book a flight to Rome!", "book a flight to rome", "what's my balance"], 512)
    assert np.linalg.norm(a) == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(a, b)
    assert a @ b > 0.99 > 0.3 > abs(a @ c)


def test_a_users_files(tmp_path):
    for name in ("one", "two"):
        np.savez(tmp_path / f"{name}.npz", train_x=np.ones((4, 3)), train_y=[0, 1, 0, 1], test_x=np.ones((2, 3)),
                 test_y=[1, 0])  # fmt: skip
    scenario = build_scenario([tmp_path / "one.npz", tmp_path / "two.npz"], "class")
    assert (scenario.names, scenario.num_outputs) == (["one", "two"], 4)
    np.savez(tmp_path / "bad.npz", trainx=np.ones(3))
    with pytest.raises(DataError, match="no array 'train_x'; did you mean 'trainx'"):
        files([tmp_path / "bad.npz"])
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(DataError, match=r"no \.npz of plain arrays"):
        files([tmp_path / "text.npz"])
    with pytest.raises(DataNotFoundError, match="is not there"):
        files([tmp_path / "gone.npz"])
    with pytest.raises(ConfigurationError, match="did you mean 'split-mnist'"):
        build_scenario("split-mnits")
    with pytest.raises(ConfigurationError, match="did you mean 'task'"):
        build_scenario([tmp_path / "one.npz"], "taks")
    with pytest.raises(DataError, match="integers from 0"):
        Part.of("x", np.ones((2, 3)), [0, -1], np.ones((2, 3)), [0, 1])


def test_split_cifar100_reads_the_binary_version(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, count in (("train", 50_000), ("test", 10_000)):
        records = np.zeros((count, 3074), np.uint8)
        records[:, 1] = np.arange(count) % 100
        records[:100, 2:] = rng.integers(0, 256, (100, 3072))
        records.tofile(folder / f"{name}.bin")
    scenario = build_scenario("split-cifar100", "task", data_dir=tmp_path)
    assert (len(scenario), scenario.num_outputs, scenario.input_shape) == (10, 100, (32, 32, 3))
    (folder / "train.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes"):
        build_scenario("split-cifar100", "task", data_dir=tmp_path)
