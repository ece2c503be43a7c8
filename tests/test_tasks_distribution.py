"""What every family owes to a distribution: purity, sameness of a task, shapes, splits, saving."""

from __future__ import annotations

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientai_toolkit import MAMLLearner, SimpleClassifier
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ConfigurationError, DataError, DataNotFoundError, OutputError, TaskSamplingError
from efficientai_toolkit.tasks import FAMILIES, family
from efficientai_toolkit.tasks.build import build_splits
from efficientai_toolkit.tasks.distribution import TaskConfig, TaskDistribution
from efficientai_toolkit.tasks.seeding import normal, stable_seed, uniform

SYNTHETIC = ["linear_classification", "nonlinear_classification", "sinusoid", "harmonic", "mixed_regression"]


def make(kind: str = "linear_classification", n: int = 6, seed: int = 0, *, endless: bool = False, **sizes):
    sizes = {"num_classes": 2, "input_dim": 2, "support_size": 5, "query_size": 7} | sizes
    return TaskDistribution([TaskConfig(f"t{i}", kind, **sizes) for i in range(n)], seed, endless=endless)


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(np.array(x), np.array(y)) for e, f in zip(a, b, strict=True) for x, y in zip(e, f, strict=True)
    )


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_shapes_and_types(kind):
    tasks = make(kind, num_classes=3, input_dim=4)
    [stack] = tasks.batch_at(0, 4)
    classification = family(kind).classification
    assert tasks.is_classification == classification
    assert stack.support_x.shape == (4, 5, *tasks.input_shape)
    assert stack.query_x.shape == (4, 7, *tasks.input_shape)
    assert tasks.input_shape == ((4,) if classification else (1,))
    assert stack.support_y.shape == ((4, 5) if classification else (4, 5, 1))
    assert stack.query_y.dtype == (mx.int32 if classification else mx.float32)
    assert stack.support_x.dtype == mx.float32
    assert tasks.output_dim == (3 if classification else 1)
    assert all(np.isfinite(np.array(part)).all() for part in stack)


def test_five_examples_of_two_classes():
    _, x, y, _, _ = make().sample_episode()
    assert (x.shape, y.shape) == ((5, 2), (5,))


@pytest.mark.parametrize("kind", SYNTHETIC)
@pytest.mark.parametrize("endless", [False, True])
def test_a_batch_depends_on_its_index_alone(kind, endless, tmp_path):
    tasks = make(kind, endless=endless, seed=7)
    expected = [tasks.batch_at(i, 4) for i in (0, 3, 200)]
    assert not same(expected[0], expected[1])
    again = make(kind, endless=endless, seed=7)
    again.sample_batch(3)
    again.sample_episode()
    tasks.save(tmp_path / "tasks.json")
    others = [again, pickle.loads(pickle.dumps(tasks)), TaskDistribution.load(tmp_path / "tasks.json")]
    for other in others:
        assert all(same(other.batch_at(i, 4), batch) for i, batch in zip((0, 3, 200), expected, strict=True))
    assert not same(make(kind, endless=endless, seed=8).batch_at(0, 4), expected[0])


def test_threads_draw_what_one_thread_draws():
    tasks, again = make(), make()
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda i: tasks.batch_at(97 * i % 1000, 1 + i % 3), range(300)))
        counted = list(pool.map(lambda _: tasks.sample_batch(2), range(64)))
    for i, batch in enumerate(batches):
        assert same(batch, again.batch_at(97 * i % 1000, 1 + i % 3))
    firsts = {float(batch[0].query_x[0, 0, 0].item()) for batch in counted}
    assert firsts == {float(make().batch_at(i, 2)[0].query_x[0, 0, 0].item()) for i in range(64)}


def test_sample_batch_counts_on_through_a_pickle():
    tasks = make()
    assert same(tasks.sample_batch(4), make().batch_at(0, 4))
    assert same(pickle.loads(pickle.dumps(tasks)).sample_batch(4), make().batch_at(1, 4))


@pytest.mark.parametrize("endless", [True, False])
def test_what_is_sampled_after_training_was_not_trained_on(endless):
    tasks, n = make(endless=endless), 3
    learner = MAMLLearner(SimpleClassifier(hidden_dim=4), num_inner_steps=1, compile=False)
    tasks.sample_batch(n)
    for iterations in (5, 2):
        learner.meta_train(tasks, num_iterations=iterations, meta_batch_size=n)
    assert same(tasks.sample_batch(n), make(endless=endless).batch_at(7, n))
    learner.iteration = 0
    learner.meta_train(tasks, num_iterations=1, meta_batch_size=n)
    assert same(tasks.sample_batch(n), tasks.batch_at(8, n))
    assert same(tasks.batch_at(0, n), make(endless=endless).batch_at(0, n))


def test_a_task_stays_itself_and_its_points_are_fresh():
    tasks = make(support_size=200, query_size=200)
    for task_id in ("t0", "t3"):
        config, x, y, _, _ = tasks.sample_episode(task_id)
        assert config.task_id == task_id
        _, x2, y2, _, _ = tasks.sample_episode(task_id)
        assert not np.array_equal(x, x2)
        # A hyperplane fitted to the first draw divides the second; that of another task does not.
        weights = np.linalg.lstsq(_with_one(x), 2.0 * np.array(y) - 1, rcond=None)[0]
        assert np.mean((_with_one(x2) @ weights > 0) == np.array(y2)) > 0.93
    _, x3, y3, _, _ = tasks.sample_episode("t1")
    assert np.mean((_with_one(x3) @ weights > 0) == np.array(y3)) < 0.9


def test_a_sinusoid_stays_itself():
    tasks = make("sinusoid", support_size=100, query_size=100)
    (_, x, y, _, _), (_, x2, y2, _, _) = tasks.sample_episode("t2"), tasks.sample_episode("t2")
    waves = [np.hstack([np.sin(a), np.cos(a)]) for a in (np.array(x), np.array(x2))]
    weights = np.linalg.lstsq(waves[0], np.array(y), rcond=None)[0]
    np.testing.assert_allclose(waves[1] @ weights, np.array(y2), atol=1e-4)


def test_the_seed_of_a_task_is_its_own():
    a = TaskDistribution([TaskConfig("a", "sinusoid", task_params={"seed": 5})], seed=1)
    b = TaskDistribution([TaskConfig("b", "sinusoid", task_params={"seed": 5})], seed=2)
    tasks = [d._stacks[0].cells[0].tasks for d in (a, b)]
    assert tasks[0] == tasks[1]
    fixed = TaskConfig("b", "sinusoid", task_params={"seed": 5, "amplitude": 2.0})
    p = TaskDistribution([fixed])._stacks[0].cells[0].tasks
    assert p["amplitude"] == 2.0
    assert p["phase"] == tasks[0]["phase"]  # fixing one quantity leaves the others


def test_an_endless_distribution_draws_fresh_tasks_that_can_be_drawn_again():
    tasks = make("sinusoid", 1, endless=True)
    configs = [tasks.sample_episode()[0] for _ in range(50)]
    assert len({config.task_id for config in configs}) == 50
    amplitudes = np.abs(np.array(make("sinusoid", 1, endless=True, query_size=300).batch_at(0, 200)[0].query_y)).max(1)
    assert amplitudes.min() < 0.5
    assert amplitudes.max() > 4.5
    once = TaskDistribution(configs[:1]).sample_episode()
    twice = TaskDistribution(configs[:1], seed=9).sample_episode()
    assert once[0].task_params["seed"] == twice[0].task_params["seed"]


def test_a_batch_of_all_tasks_draws_each_once():
    tasks = TaskDistribution([TaskConfig(f"t{i}", "sinusoid", task_params={"amplitude": i + 1}) for i in range(20)])
    y = np.abs(np.array(TaskDistribution(tasks.configs).batch_at(0, 20)[0].query_y)).max((1, 2))
    assert sorted(np.ceil(y - 1e-3).astype(int)) == list(range(1, 21))


def test_tasks_of_one_shape_make_one_stack_and_of_two_shapes_two():
    def mixed(*sizes):
        kinds = ["linear_classification", "nonlinear_classification"]
        return TaskDistribution(
            [TaskConfig(f"{k}{s}{i}", k, 2, 2, s, 9) for k in kinds for s in sizes for i in range(3)]
        )

    [stack] = mixed(5).batch_at(3, 8)
    assert stack.support_x.shape == (8, 5, 2)
    for index in range(40):
        stacks = mixed(5, 10).batch_at(index, 7)
        sizes = [len(stack.support_x) for stack in stacks]
        assert sum(sizes) == 7
        assert set(sizes) == {3, 4}  # the even share, to within one task
    with pytest.raises(TaskSamplingError, match="different shapes"):
        _ = TaskDistribution(
            [TaskConfig("a", "linear_classification", 2, 2), TaskConfig("b", "linear_classification", 2, 3)]
        ).input_shape


@given(
    kind=st.sampled_from(SYNTHETIC),
    ways=st.integers(2, 7),
    dim=st.integers(2, 12),
    support=st.integers(1, 20),
    query=st.integers(1, 20),
    n=st.integers(1, 9),
    count=st.integers(1, 5),
    index=st.integers(0, 10**9),
    endless=st.booleans(),
)
def test_any_sizes_can_be_drawn(kind, ways, dim, support, query, n, count, index, endless):
    tasks = make(kind, count, endless=endless, num_classes=ways, input_dim=dim, support_size=support, query_size=query)
    [stack] = tasks.batch_at(index, n)
    assert stack.support_x.shape[:2] == (n, support)
    assert stack.query_x.shape[:2] == (n, query)
    for part in stack:
        assert np.isfinite(np.array(part)).all()
    if tasks.is_classification:
        labels = np.concatenate([np.array(stack.support_y), np.array(stack.query_y)], 1)
        assert labels.min() >= 0
        assert labels.max() < ways
        if support >= ways:
            assert all(len(np.unique(row)) == ways for row in np.array(stack.support_y))


def test_split_tasks_shares_no_task_and_keeps_them_as_they_were():
    tasks = make(n=20)
    train, held_out = tasks.split_tasks(0.8)
    ids = [{config.task_id for config in part.configs} for part in (train, held_out)]
    assert (len(ids[0]), len(ids[1])) == (16, 4)
    assert not ids[0] & ids[1]
    for part in (train, held_out):
        for config in part.configs:
            assert part.task_seed(config) == tasks.task_seed(config)
    assert not same(train.batch_at(0, 2), held_out.batch_at(0, 2))
    again, _ = make(n=20).split_tasks(0.8)
    assert same(again.batch_at(5, 4), train.batch_at(5, 4))


def test_split_of_an_endless_distribution_has_other_tasks():
    train, held_out = make("sinusoid", 1, endless=True).split_tasks(0.5)
    drawn = [np.array(part.batch_at(0, 16)[0].query_y).max((1, 2)) for part in (train, held_out)]
    assert not np.intersect1d(*drawn).size


@pytest.mark.parametrize("name", ["tasks.json", "tasks.npz", "tasks.pkl", "tasks"])
def test_saved_files_are_never_pickles(name, tmp_path):
    tasks = TaskDistribution(
        [
            TaskConfig(
                "a", "linear_classification", task_params={"translation": np.array([1.0, 2.0]), "seed": np.int64(3)}
            )
        ]
    )
    tasks.save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data[:2] == b"PK" if name.endswith("npz") else json.loads(data)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)
    loaded = TaskDistribution.load(tmp_path / name)
    assert same(loaded.batch_at(0, 1), tasks.batch_at(0, 1))
    config, *episode = loaded.sample_episode()
    assert config.task_id == "a"
    assert episode[0].shape == (5, 2)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", ["tasks.json", "tasks.npz", "tasks.pkl"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_whatever_its_name(name, protocol, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(DataError, match=r"is a pickle, and loading a pickle runs whatever code is in it"):
        TaskDistribution.load(tmp_path / name)


def test_a_pickle_inside_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "tasks.npz", header=np.array([Bomb()], object))
    with pytest.raises(DataError, match="holds pickled objects"):
        TaskDistribution.load(tmp_path / "tasks.npz")


@given(st.binary(max_size=60), st.integers(0, 10**6))
def test_damaged_files_are_one_sentence(tmp_path_factory, junk, place):
    folder, sentences = tmp_path_factory.mktemp("damaged"), []
    for name in ("tasks.json", "tasks.npz"):
        make(n=2).save(folder / name)
        data = (folder / name).read_bytes()
        place %= len(data)
        for damaged in (junk, data[:place], data[:place] + junk + data[place + 1 :]):
            (folder / name).write_bytes(damaged)
            try:
                TaskDistribution.load(folder / name).batch_at(0, 1)
            except (DataError, TaskSamplingError) as error:
                sentences.append(str(error))
    assert sentences
    assert not any("\n" in sentence for sentence in sentences)


def test_documents_that_do_not_fit(tmp_path):
    path = tmp_path / "tasks.json"
    make().save(path)
    good = json.loads(path.read_text())
    for change, words in (
        ({"format": "other"}, "its field 'format'"),
        ({"version": 99}, "version 99"),
        ({"seed": "x"}, "its field 'seed' is not a int"),
        ({"configs": [{"task_id": "a"}]}, "task 0"),
        ({"configs": [{**good["configs"][0], "shots": 3}]}, "shots"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=words):
            TaskDistribution.load(path)
    with pytest.raises(DataNotFoundError, match="no task distribution"):
        TaskDistribution.load(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make().save(tmp_path / "file" / "tasks.json")


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: make().sample_episode("t00"), "unknown task_id 't00'; did you mean 't0'?"),
        (lambda: make("sinusiod"), "unknown task family 'sinusiod'; did you mean 'sinusoid'?"),
        (lambda: TaskDistribution([]), "at least one TaskConfig"),
        (lambda: TaskDistribution([TaskConfig("a", "sinusoid")] * 2), "two tasks are called 'a'"),
        (lambda: make(num_classes=1), "1 classes in 2 dimensions"),
        (lambda: make(input_dim=1), "2 classes in 1 dimensions"),
        (lambda: make(support_size=0), "support_size is 0; expected a whole number, at least 1"),
        (lambda: make(query_size=2.5), "query_size is 2.5"),
        (lambda: TaskConfig("", "sinusoid"), "task_id is ''"),
        (lambda: TaskConfig("a", "sinusoid", task_params=3), "task_params is 3"),
        (lambda: make().batch_at(-1, 4), "batch -1 of 4 tasks"),
        (lambda: make().batch_at(0, 0), "batch 0 of 0 tasks"),
        (lambda: make().split_tasks(1.0), "train_ratio is 1.0"),
        (lambda: make(n=1).split_tasks(), "one task cannot be split"),
        (
            lambda: make(task_params={"rotation": 1}),
            "unknown task parameter 'rotation'; did you mean 'rotation_angle'?",
        ),
        (lambda: make(task_params={"rotation_angle": float("nan")}), "rotation_angle is nan; expected a number"),
        (lambda: make(task_params={"label_noise": 2}), "label_noise is 2; expected a number in [0, 1]"),
        (lambda: make(task_params={"translation": [1, 2, 3]}), "expected a number, or 2 of them"),
        (lambda: make(task_params={"seed": "x"}), "seed is 'x'; expected a whole number"),
        (lambda: make("nonlinear_classification", task_params={"kind": "moon"}), "did you mean 'moons'?"),
        (lambda: make("sinusoid", task_params={"amplitude": [5, 1]}), "expected a number or a pair low ≤ high"),
        (lambda: make("sinusoid", task_params={"noise": -1}), "noise is -1"),
        (lambda: make("mixed_regression", task_params={"kinds": ["sin"]}), "did you mean 'sine'?"),
        (lambda: make("mixed_regression", task_params={"kinds": []}), "expected some of sine, line, quadratic"),
        (
            lambda: TaskDistribution([TaskConfig("a", "sinusoid"), TaskConfig("b", "linear_classification")]),
            "a distribution holds one or the other",
        ),
    ],
)
def test_mistakes_are_told(action, sentence):
    with pytest.raises(TaskSamplingError) as caught:
        action()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_family_in_the_table_can_be_loaded():
    for name in FAMILIES:
        assert issubclass(family(name), object)
        assert family(name).__doc__


# Numbers that belong to a task


def test_numbers_of_a_task_are_the_same_for_ever():
    assert stable_seed(0, "task", "a") == 321974423663818910
    np.testing.assert_array_equal(uniform(np.array([0, 1]), "x")[:, 0], [0.03466611413515608, 0.8201123613820129])
    u = uniform(np.arange(50_000), "x", 2)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.02
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, 0], uniform(np.arange(50_000), "y")[:, 0])[0, 1]) < 0.02
    np.testing.assert_allclose(np.histogram(u, 20, (0, 1))[0] / 5000, 1, atol=0.06)
    z = normal(np.arange(50_000), "x", 2)
    np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=0.01)


# From a configuration


def splits(**section):
    return build_splits(MetaLearningConfig(task_distribution=section).task_distribution, seed=3)


def test_the_published_defaults():
    train, val, test = splits()
    assert (len(train), len(val)) == (100, 20)
    assert {c.task_family for c in train.configs} == {"linear_classification", "nonlinear_classification"}
    [stack] = train.batch_at(0, 4)
    assert stack.support_x.shape == (4, 5, 2)
    assert stack.query_x.shape == (4, 50, 2)
    seeds = [{part.task_seed(c) for c in part.configs} for part in (train, val, test)]
    assert not seeds[0] & seeds[1] | seeds[0] & seeds[2] | seeds[1] & seeds[2]
    assert same(splits().test.batch_at(0, 50), test.batch_at(0, 50))


def test_null_train_tasks_are_endless():
    train, val, _ = splits(task_families=["sinusoid"], num_train_tasks=None, k_shot=10, query_size=10)
    assert train.endless
    assert not val.endless
    assert len(np.unique(np.array(train.batch_at(0, 500)[0].query_y).max((1, 2)))) == 500


def test_task_params_reach_the_families_that_have_them():
    train, _, _ = splits(task_params={"kind": "moons", "label_noise": 0.1})
    for config in train.configs:
        assert config.task_params["label_noise"] == 0.1
        assert ("kind" in config.task_params) == (config.task_family == "nonlinear_classification")
    with pytest.raises(
        ConfigurationError, match="none of linear_classification, nonlinear_classification has 'amplitude'"
    ):
        splits(task_params={"amplitude": 1})
    with pytest.raises(ConfigurationError, match="has 'seed'"):
        splits(task_params={"seed": 1})


def test_drawing_is_cheap():
    # Loose bounds: about 30 and 85 µs where this was written.
    for tasks, n, bound in (
        (make(n=100, query_size=20), 4, 500e-6),
        (make("sinusoid", 1, endless=True, support_size=10, query_size=10), 25, 1e-3),
    ):
        tasks.batch_at(0, n)
        start = time.perf_counter()
        for index in range(300):
            tasks.batch_at(index, n)
        assert (time.perf_counter() - start) / 300 < bound


def _with_one(x) -> np.ndarray:
    return np.hstack([np.array(x), np.ones((len(x), 1))])


def test_an_unknown_task_among_many_names_the_nearest_and_not_all():
    tasks = TaskDistribution([TaskConfig(f"task_{i}", "linear_classification") for i in range(100)])
    with pytest.raises(TaskSamplingError, match=r"did you mean 'task_99'\? .*… \(100 in all\)") as error:
        tasks.sample_episode("tsk_99")
    assert len(str(error.value)) < 500
