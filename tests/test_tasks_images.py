"""The image families: episodes on a set whose pixels tell the class, the real data, and files in every format."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import DataError, DataNotFoundError, TaskSamplingError
from efficientai_toolkit.tasks import storage
from efficientai_toolkit.tasks.build import build_splits
from efficientai_toolkit.tasks.cifar_fs import _SPLIT_SHA256, CifarFS
from efficientai_toolkit.tasks.classes import distinct
from efficientai_toolkit.tasks.distribution import TaskConfig, TaskDistribution
from efficientai_toolkit.tasks.fc100 import _TEST, _VAL, FC100
from efficientai_toolkit.tasks.image_folder import ImageFolder
from efficientai_toolkit.tasks.images import ImageFamily, ImageSet, decode
from efficientai_toolkit.tasks.mini_imagenet import MiniImageNet
from efficientai_toolkit.tasks.mnist import Mnist, read_idx
from efficientai_toolkit.tasks.omniglot import Omniglot
from efficientai_toolkit.tasks.unpickling import plain_pickle

CLASSES, EACH = 12, 9


class Marked(ImageFamily):
    """Image 3 × 3: the top row holds its class, the middle one its number; the rest is zero."""

    def read(self):
        images = np.zeros((CLASSES * EACH, 3, 3, 1), np.uint8)
        images[:, 0, :, 0] = np.repeat(np.arange(CLASSES), EACH)[:, None] + 1
        images[:, 1, :, 0] = np.tile(np.arange(EACH), CLASSES)[:, None] + 1
        order = np.random.default_rng(0).permutation(len(images))
        splits = {"train": np.arange(6), "val": np.arange(6, 9), "test": np.arange(9, 12)}
        return ImageSet.from_labels(
            images[order], np.repeat(np.arange(CLASSES), EACH)[order], [f"class {c}" for c in range(CLASSES)], splits
        )


def marked(n: int = 4, way: int = 3, *, endless: bool = False, seed: int = 0, **params) -> TaskDistribution:
    params = {"k_shot": 2, "query_per_class": 3} | params
    configs = [TaskConfig(f"t{i}", "marked", way, task_params=params) for i in range(n)]
    return TaskDistribution(configs, seed, endless=endless, families={"marked": Marked()})


def pixels(x) -> np.ndarray:
    return np.round(np.array(x) * 255).astype(int)


@given(
    way=st.integers(2, 6),
    shot=st.integers(1, 5),
    query=st.integers(1, 4),
    n=st.integers(1, 5),
    index=st.integers(0, 10**6),
    endless=st.booleans(),
)
def test_an_episode_shows_each_class_and_no_image_twice(way, shot, query, n, index, endless):
    tasks = marked(3, way, endless=endless, k_shot=shot, query_per_class=query)
    [stack] = tasks.batch_at(index, n)
    assert stack.support_x.shape == (n, way * shot, 3, 3, 1)
    assert stack.query_x.shape == (n, way * query, 3, 3, 1)
    assert tasks.output_dim == way
    x = pixels(np.concatenate([stack.support_x, stack.query_x], 1))
    y = np.concatenate([stack.support_y, stack.query_y], 1)
    for images, labels in zip(x, y, strict=True):
        classes = [set(images[labels == label, 0].ravel()) for label in range(way)]
        assert all(len(each) == 1 for each in classes)  # one class under a label
        assert len(set.union(*classes)) == way  # and another under every other
        assert len({tuple(image.ravel()) for image in images}) == len(images)
    np.testing.assert_array_equal(np.bincount(np.array(stack.support_y[0])), [shot] * way)


def test_a_fixed_task_keeps_its_classes_and_draws_fresh_images():
    tasks = marked()
    (_, x, _, _, _), (_, x2, _, _, _) = tasks.sample_episode("t1"), tasks.sample_episode("t1")
    np.testing.assert_array_equal(pixels(x)[:, 0], pixels(x2)[:, 0])
    assert not np.array_equal(x, x2)
    other = tasks.sample_episode("t2")[1]
    assert not np.array_equal(pixels(x)[:, 0], pixels(other)[:, 0])


def test_every_class_and_image_comes_about_equally_often():
    [stack] = marked(1, 3, endless=True).batch_at(0, 4000)
    x = pixels(stack.support_x)
    for row, n in ((0, 6), (1, EACH)):
        np.testing.assert_allclose(np.bincount(x[:, :, row, 0, 0].ravel() - 1) * n / (4000 * 6), 1, atol=0.08)


def test_rotations_are_classes_of_their_own():
    [stack] = marked(1, 24, endless=True, rotations=True, k_shot=2, query_per_class=1).batch_at(0, 20)
    for images in pixels(stack.support_x)[..., 0].reshape(20, 24, 2, 3, 3):
        found = set()
        for pair in images:
            turns = [k for k in range(4) if all((np.rot90(image, -k)[2] == 0).all() for image in pair)]
            upright = [[np.rot90(image, -k)[0, 0] for image in pair] for k in turns]
            assert len(turns) == 1  # both shots turned alike
            assert upright[0][0] == upright[0][1]
            found.add((turns[0], upright[0][0]))
        assert len(found) == 24  # all 6 classes × 4 turns


@given(n=st.integers(1, 40), extra=st.integers(0, 400), seed=st.integers(0, 2**60))
def test_classes_are_different_and_any(n, extra, seed):
    found = distinct(np.arange(seed, seed + 50, dtype=np.uint64), n, n + extra)
    assert found.shape == (50, n)
    assert found.min() >= 0
    assert found.max() < n + extra
    assert all(len(set(row)) == n for row in found.tolist())
    np.testing.assert_array_equal(distinct(np.array([seed + 7], np.uint64), n, n + extra)[0], found[7])


def test_every_class_comes_equally_often_in_a_large_pool():
    found = distinct(np.arange(20000, dtype=np.uint64), 5, 50)
    for place in range(5):
        np.testing.assert_allclose(np.bincount(found[:, place], minlength=50) / 400, 1, atol=0.2)


def test_splits_and_parts_share_no_class():
    def classes(tasks):
        return set(pixels(tasks.batch_at(0, 200)[0].support_x)[:, :, 0].ravel())

    assert classes(marked(1, endless=True)) == set(range(1, 7))
    assert classes(marked(1, endless=True, split="val")) == {7, 8, 9}
    assert classes(marked(1, endless=True, split="test")) == {10, 11, 12}
    train, held_out = marked(1, 2, endless=True, rotations=True).split_tasks(0.5)
    assert classes_of_turned(train).isdisjoint(classes_of_turned(held_out))
    assert len(classes_of_turned(train)) == 3
    first, second = train.split_tasks(2 / 3)
    assert first.configs[0].task_params["part"] == pytest.approx([0, 1 / 3])
    assert classes_of_turned(first) | classes_of_turned(second) == classes_of_turned(train)
    with pytest.raises(TaskSamplingError, match="has 1 of the data set's 12 classes, and a task needs at least 2"):
        marked(2, 2, part=second.configs[0].task_params["part"])


def classes_of_turned(tasks) -> set[int]:
    x = pixels(tasks.batch_at(0, 100)[0].support_x)[..., 0].reshape(-1, 3, 3)
    return {int(np.rot90(image, -k)[0, 0]) for image in x for k in range(4) if (np.rot90(image, -k)[2] == 0).all()}


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (
            lambda: marked(k_shot=8),
            "class 'class 0' has 9 images, and an episode needs 11 of each class (8 support + 3 q",
        ),
        (lambda: marked(way=7), "7 classes asked for; expected 2 to 6, the classes of its split 'train'"),
        (lambda: marked(split="tset"), "unknown split 'tset'; did you mean 'test'?"),
        (lambda: marked(k_shot=0), "k_shot is 0; expected a whole number, at least 1"),
        (lambda: marked(rotations=90), "rotations is 90; expected true or false"),
        (lambda: marked(part=[0.5, 0.2]), "part is [0.5, 0.2]"),
        (lambda: marked(shots=1), "unknown task parameter 'shots'; did you mean 'k_shot'?"),
        (
            lambda: TaskDistribution([TaskConfig("a", "marked", 3, 1, 5, 6)], families={"marked": Marked()}),
            "5 examples cannot be shared out over 3 classes; set task_params['k_shot']",
        ),
    ],
)
def test_mistakes_are_told(action, sentence):
    with pytest.raises(TaskSamplingError) as caught:
        action()
    assert sentence in str(caught.value)


def test_pickling_leaves_the_images_behind(tmp_path):
    tasks = marked()
    assert len(pickle.dumps(tasks)) < 2000
    other = pickle.loads(pickle.dumps(tasks))
    np.testing.assert_array_equal(other.batch_at(3, 2)[0].query_x, tasks.batch_at(3, 2)[0].query_x)


# Real data


@pytest.fixture(scope="module")
def omniglot(data_dir):
    if not (data_dir / "omniglot").is_dir():
        pytest.skip(f"no omniglot/ in {data_dir}")
    return Omniglot(data_dir)


def test_omniglot_has_its_characters(omniglot):
    data = omniglot.read()
    assert data.images.shape == (32460, 28, 28, 1)
    assert len(data.names) == 1623
    assert len({name.split("/")[1] for name in data.names}) == 50
    assert np.unique(np.diff(data.starts)).tolist() == [20]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 1100, "val": 100, "test": 423}
    assert len(np.unique(np.concatenate([*data.splits.values()]))) == 1623
    # Ink is bright, thin and in the middle; the background is black.
    assert 0.04 < data.images.mean() / 255 < 0.12
    assert np.median(data.images) == 0
    assert data.images.max(axis=(1, 2, 3)).min() > 128
    # Grey edges: the resize does not alias.
    assert np.mean((data.images > 20) & (data.images < 235)) > 0.04


def test_omniglot_by_alphabet(omniglot):
    data = omniglot.read("alphabet")
    alphabets = {k: {data.names[c].split("/")[1] for c in v} for k, v in data.splits.items()}
    assert {k: len(v) for k, v in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert not alphabets["train"] & alphabets["val"]
    assert not (alphabets["train"] | alphabets["val"]) & alphabets["test"]
    assert sum(len(v) for v in data.splits.values()) == 1623


def test_omniglot_from_a_configuration(omniglot, data_dir):
    section = {
        "task_families": ["omniglot"],
        "n_way": 5,
        "k_shot": 1,
        "query_per_class": 3,
        "num_train_tasks": None,
        "task_params": {"train_n_way": 20, "train_query_per_class": 2},
    }
    config = MetaLearningConfig(task_distribution=section).task_distribution
    train, val, test = build_splits(config, data_dir=data_dir, seed=1)
    assert train.batch_at(0, 2)[0].support_x.shape == (2, 20, 28, 28, 1)
    assert train.batch_at(0, 2)[0].query_x.shape == (2, 40, 28, 28, 1)
    assert val.batch_at(0, 2)[0].query_x.shape == (2, 15, 28, 28, 1)
    assert (test.input_shape, test.output_dim, train.output_dim) == ((28, 28, 1), 5, 20)
    again = build_splits(config, data_dir=data_dir, seed=1).test
    np.testing.assert_array_equal(again.batch_at(4, 3)[0].query_x, test.batch_at(4, 3)[0].query_x)
    x = np.array(train.batch_at(0, 2)[0].query_x)
    assert x.min() == 0
    assert x.max() == 1


def test_characters_are_alike_within_a_class(omniglot):
    configs = [TaskConfig(f"t{i}", "omniglot", 5, task_params={"k_shot": 5, "query_per_class": 5}) for i in range(100)]
    [stack] = TaskDistribution(configs, families={"omniglot": omniglot}).batch_at(0, 100)
    support, query = (np.array(x).reshape(100, -1, 784) for x in (stack.support_x, stack.query_x))
    distance = ((query[:, :, None] - support[:, None]) ** 2).sum(-1)
    guess = np.take_along_axis(np.array(stack.support_y), distance.argmin(-1), 1)
    assert 0.5 < np.mean(guess == np.array(stack.query_y)) < 0.95  # nearest pixels are well above chance, 0.2


def test_the_second_load_comes_from_the_cache(omniglot, monkeypatch):
    first = omniglot.read().images
    monkeypatch.setattr("efficientai_toolkit.tasks.omniglot.decode", None)
    np.testing.assert_array_equal(omniglot.read().images, first)


def test_mnist(data_dir):
    if not (data_dir / "mnist").is_dir():
        pytest.skip(f"no mnist/ in {data_dir}")
    data = Mnist(data_dir).read()
    assert data.images.shape == (70000, 28, 28, 1)
    np.testing.assert_array_equal(np.diff(data.starts), [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958])
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 6, "val": 2, "test": 2}


def test_fc100s_superclasses_are_those_of_the_published_list(data_dir):
    path = data_dir / "fc100" / "splits.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    listed = json.loads(path.read_text())
    superclasses = sorted(name for split in listed.values() for name in split)
    assert len(superclasses) == 20
    assert sorted(listed["val"]) == [superclasses[i] for i in _VAL]
    assert sorted(listed["test"]) == [superclasses[i] for i in _TEST]


# Files in exactly the format of the data sets


def cifar_files(per_class: int = 6) -> dict[str, bytes]:
    """CIFAR-100 as Python 2 pickled it: byte strings, protocol 2."""
    rng = np.random.default_rng(0)
    fine = np.tile(np.arange(100), per_class)
    names = [f"class_{i:02d}".encode() for i in range(100)]

    def batch(part):
        n = len(part)
        images = np.repeat(part[:, None], 3072, 1).astype(np.uint8)
        images[:, 1:] = rng.integers(0, 255, (n, 3071))
        return python2_pickle(
            {
                b"data": images,
                b"fine_labels": part.tolist(),
                b"coarse_labels": (part // 5).tolist(),
                b"filenames": [b"x.png"] * n,
                b"batch_label": b"training batch 1 of 1",
            }
        )

    meta = {b"fine_label_names": names, b"coarse_label_names": [f"super_{i:02d}".encode() for i in range(20)]}
    return {"train": batch(fine[:500]), "test": batch(fine[500:]), "meta": python2_pickle(meta)}


def python2_pickle(value) -> bytes:
    """Byte strings as Python 2's `str` (SHORT_BINSTRING), which protocol 2 of Python 3 never writes."""

    class Python2(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

        def save_bytes(self, text):
            head = b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + len(text).to_bytes(4, "little")
            self.write(head + text)
            self.memoize(text)

        dispatch[bytes] = save_bytes

    buffer = io.BytesIO()
    Python2(buffer, 2).dump(value)
    return buffer.getvalue()


@pytest.fixture(params=["folder", "archive"])
def cifar(request, tmp_path) -> Path:
    files = cifar_files()
    if request.param == "folder":
        (tmp_path / "cifar-100-python").mkdir()
        for name, data in files.items():
            (tmp_path / "cifar-100-python" / name).write_bytes(data)
    else:
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(f"cifar-100-python/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (tmp_path / "cifar-fs").mkdir()
    for split, numbers in (("train", range(64)), ("val", range(64, 80)), ("test", range(80, 100))):
        (tmp_path / "cifar-fs" / f"{split}.txt").write_text("".join(f"class_{i:02d}\n" for i in numbers))
    return tmp_path


def test_cifar_fs_and_fc100(cifar):
    data = CifarFS(cifar).read()
    assert data.images.shape == (600, 32, 32, 3)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 64, "val": 16, "test": 20}
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.repeat(np.arange(100), 6))  # red, first of three planes
    by_superclass = FC100(cifar).read()
    assert {k: len(v) for k, v in by_superclass.splits.items()} == {"train": 60, "val": 20, "test": 20}
    assert by_superclass.splits["test"].tolist() == [*range(5), *range(35, 40), *range(60, 65), *range(70, 75)]
    configs = [TaskConfig("a", "cifar_fs", 5, task_params={"k_shot": 1, "query_per_class": 5, "split": "test"})]
    x = TaskDistribution(configs, families={"cifar_fs": CifarFS(cifar)}).sample_episode()[3]
    assert x.shape == (25, 32, 32, 3)
    with pytest.raises(TaskSamplingError, match=r"class 'class_00' has 6 images, and an episode needs 16"):
        TaskDistribution(
            [TaskConfig("a", "cifar_fs", 5, task_params={"k_shot": 1, "query_per_class": 15})],
            families={"cifar_fs": CifarFS(cifar)},
        )


def test_cifar_lists_that_do_not_fit(cifar):
    (cifar / "cifar-fs" / "val.txt").write_text("class_01\n")
    with pytest.raises(DataError, match="a class is in two of the three lists"):
        CifarFS(cifar).read()
    (cifar / "cifar-fs" / "val.txt").write_text("zebra\n")
    with pytest.raises(DataError, match="'zebra' is no class of CIFAR-100"):
        CifarFS(cifar).read()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("value", [Bomb(), {"data": [Bomb()]}, np.array([Bomb()], object), np.random.default_rng(0)])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_code_is_refused(value, protocol):
    with pytest.raises(DataError, match=r"train: it holds .*; refused, because loading it would run code"):
        plain_pickle(pickle.dumps(value, protocol), "train")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(protocol):
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [1, (2.5, None)], "c": np.eye(3, order="F")}
    found = plain_pickle(pickle.dumps(value, protocol), "x")
    np.testing.assert_array_equal(found["a"], value["a"])
    np.testing.assert_array_equal(found["c"], value["c"])
    assert found["b"] == value["b"]


@given(st.integers(0, 10**6), st.binary(max_size=20))
def test_damaged_pickles_are_one_sentence(place, junk):
    data = pickle.dumps({"a": np.arange(5), "b": [1, "x"]}, 2)
    place %= len(data)
    for damaged in (data[:place], data[:place] + junk + data[place + 1 :]):
        try:
            plain_pickle(damaged, "train")
        except DataError as error:
            message = str(error)
            assert message.startswith("train")
            assert "\n" not in message


def test_damaged_cifar(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    files = cifar_files()
    for name in ("train", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(files[name])
    with pytest.raises(DataNotFoundError, match="test is not there"):
        FC100(tmp_path).read()
    (tmp_path / "cifar-100-python" / "test").write_bytes(files["meta"])
    with pytest.raises(DataError, match="does not hold CIFAR-100's fields"):
        FC100(tmp_path).read()


def write_image(path: Path, value: int, size: tuple[int, int] = (100, 90), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


def imagenet_table(folder: Path, split: str, first: int, classes: int) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / f"{split}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "label"])
        for c in range(first, first + classes):
            for i in range(4):
                name = f"n{c:08d}{i:08d}.jpg"
                write_image(folder / "images" / name, 10 * c)
                rows.writerow([name, f"n{c:08d}"])


def test_mini_imagenet_in_its_three_formats(tmp_path):
    folder = tmp_path / "mini-imagenet"
    imagenet_table(folder, "train", 0, 5)
    images = np.repeat(np.arange(50, 62, dtype=np.uint8), 84 * 84 * 3).reshape(12, 84, 84, 3)
    np.savez(folder / "val.npz", images=images, labels=np.repeat(["b", "a", "c"], 4))
    cache = {"image_data": images, "class_dict": {"y": [0, 1, 2, 3], "x": [4, 5, 6, 7], "z": [8, 9, 10, 11]}}
    (folder / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(cache, 2))
    data = MiniImageNet(tmp_path).read()
    assert data.images.shape == (5 * 4 + 12 + 12, 84, 84, 3)
    assert data.names == [*(f"n{c:08d}" for c in range(5)), "a", "b", "c", "x", "y", "z"]
    assert {k: v.tolist() for k, v in data.splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "val": [5, 6, 7],
        "test": [8, 9, 10],
    }
    np.testing.assert_allclose(data.images[:20, 0, 0, 0], np.repeat(10 * np.arange(5), 4), atol=3)  # JPEG
    assert data.images[data.starts[5], 0, 0, 0] == 54  # class a
    assert data.images[data.starts[9], 0, 0, 0] == 50  # class y


def test_mini_imagenets_mistakes(tmp_path):
    with pytest.raises(DataNotFoundError, match="train images are not in"):
        MiniImageNet(tmp_path).read()
    folder = tmp_path / "mini-imagenet"
    imagenet_table(folder, "train", 0, 2)
    (folder / "images" / "n0000000100000002.jpg").unlink()
    with pytest.raises(DataNotFoundError, match=r"train\.csv, line 8: .*n0000000100000002\.jpg is not there"):
        MiniImageNet(tmp_path).read()
    imagenet_table(folder, "train", 0, 2)
    imagenet_table(folder, "val", 1, 2)
    imagenet_table(folder, "test", 3, 2)
    with pytest.raises(DataError, match="class 'n00000001' is in two splits"):
        MiniImageNet(tmp_path).read()
    np.savez(folder / "train.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.zeros(2))
    with pytest.raises(DataError, match=r"expected \(N, 84, 84, 3\) uint8"):
        MiniImageNet(tmp_path).read()
    np.savez(folder / "train.npz", images=np.array([Bomb()], object), labels=np.zeros(1))
    with pytest.raises(DataError, match="holds pickled objects"):
        MiniImageNet(tmp_path).read()
    (folder / "train.npz").unlink()
    (folder / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"image_data": Bomb(), "class_dict": {}}))
    with pytest.raises(DataError, match="refused, because loading it would run code"):
        MiniImageNet(tmp_path).read()


def test_image_folder(tmp_path):
    for c in range(10):
        for i in range(4):
            size, mode = ((40, 30), "L") if i % 2 else ((200, 100), "RGB")
            write_image(tmp_path / f"kind {c}" / f"{i}.png", 20 * c, size, mode)
    (tmp_path / "kind 3" / "notes.txt").write_text("not an image")
    data = ImageFolder(tmp_path).read()
    assert data.images.shape == (40, 84, 84, 3)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 6, "val": 2, "test": 2}
    assert (data.images[data.starts[7] : data.starts[8], ..., 0] == 140).all()
    params = {"image_size": 16, "grayscale": True, "k_shot": 1, "query_per_class": 2, "rotations": True}
    config = TaskConfig("a", "image_folder", 5, task_params=params)
    tasks = TaskDistribution([config], endless=True, families={"image_folder": ImageFolder(tmp_path)})
    assert tasks.input_shape == (16, 16, 1)
    assert tasks.batch_at(0, 3)[0].query_x.shape == (3, 10, 16, 16, 1)
    write_image(tmp_path / "kind 3" / "new.png", 77)  # the cache sees that the folder has changed
    assert len(ImageFolder(tmp_path).read().images) == 41
    (tmp_path / "kind 3" / "broken.png").write_bytes(b"\x89PNG, no longer")
    with pytest.raises(DataError, match=r"broken\.png is damaged, or no image$"):
        ImageFolder(tmp_path).read()


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.uint16, "tiff"), (np.int32, "tiff")])
def test_gray_of_16_bits_is_scaled_not_clipped(kind, suffix):
    deep = np.linspace(0, 65535, 400).round().astype(kind).reshape(20, 20)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, suffix)
    for mode, channels in (("L", 1), ("RGB", 3)):
        found = decode(file.getvalue(), "x.png", (20, 20), mode)
        assert found.shape == (20, 20, channels)
        np.testing.assert_allclose(found[..., 0], deep / 257, atol=0.5)


def test_a_cut_image_is_named():
    file = io.BytesIO()
    Image.new("RGB", (50, 50)).save(file, "png")
    with pytest.raises(DataError, match=r"^x\.png is damaged, or not an image that can be read \("):
        decode(file.getvalue()[:60], "x.png", (8, 8), "L")


def test_image_folder_with_splits_of_its_own(tmp_path):
    for split, classes in (("train", range(3)), ("val", range(3, 5)), ("test", range(5, 7))):
        for c in classes:
            write_image(tmp_path / "image_folder" / split / f"c{c}" / "0.png", 9)
    data = ImageFolder(tmp_path).read(8, "L")
    assert data.names == ["train/c0", "train/c1", "train/c2", "val/c3", "val/c4", "test/c5", "test/c6"]
    assert data.splits["val"].tolist() == [3, 4]
    write_image(tmp_path / "image_folder" / "test" / "c3" / "0.png", 9)  # examples are split here, not classes
    with pytest.raises(
        DataError, match=r"image_folder: class 'c3' is in val/ and in test/, .* into one of train/, val/"
    ):
        ImageFolder(tmp_path).read(8, "L")
    with pytest.raises(DataNotFoundError, match="expected a folder for each class"):
        ImageFolder(tmp_path / "image_folder" / "train" / "c0").read()


# Absent and damaged data


def test_absent_data_says_what_to_do(tmp_path):
    with pytest.raises(
        DataNotFoundError, match=r"downloading it failed \(the tests have no network\); put the file from"
    ):
        Omniglot(tmp_path).read()
    assert not [*(tmp_path / "omniglot").iterdir()]  # no half of a file is left
    with pytest.raises(DataNotFoundError, match=r"the data folder .*absent is not there"):
        Omniglot(tmp_path / "absent").read()


def test_a_download_is_kept_only_whole_and_unchanged(tmp_path, monkeypatch, capsys):
    class Response(io.BytesIO):
        headers = {"Content-Length": "4"}  # noqa: RUF012

    for content, words in ((b"abc", "closed after 3 of 4 bytes"), (b"abcd", "has changed")):
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, content=content, **__: Response(content))
        with pytest.raises(DataError, match=words):
            storage.fetch(tmp_path, "file", "https://example.org/file", sha256="0", what="It")
        assert not [*tmp_path.iterdir()]
    digest = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"
    path = storage.fetch(tmp_path, "set/file", "https://example.org/file", sha256=digest, what="It")
    assert path.read_bytes() == b"abcd"
    assert storage.fetch(tmp_path, "x", "https://example.org/x", md5=hashlib.md5(b"abcd").hexdigest(), what="It")
    with pytest.raises(DataError, match="came damaged: MD5 e2fc714c4727ee9395f324cd2e7f331f, expected 0; nothing"):
        storage.fetch(tmp_path, "y", "https://example.org/y", md5="0", what="It")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    path.parent.rename(tmp_path / "home" / "efficientai-toolkit")  # the cache is looked into, too
    found = storage.fetch(tmp_path, "file", "https://example.org/absent", what="It")
    assert found == tmp_path / "home" / "efficientai-toolkit" / "file"
    assert "downloading file: 0.0 of 0.0 MB" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "kind"), [(Omniglot, "MD5"), (CifarFS, "SHA-256")])
def test_a_data_set_that_came_damaged_is_not_kept(tmp_path, monkeypatch, family, kind):
    class Response(io.BytesIO):
        headers = {}  # noqa: RUF012

    if family is CifarFS:
        monkeypatch.setattr("efficientai_toolkit.tasks.cifar_fs.read_cifar100", lambda _: {"fine_names": np.array([])})
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"not it"))
    with pytest.raises(DataError, match=rf"has changed, or came damaged: {kind} \w+, expected \w+; nothing was kept"):
        family(tmp_path).read()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_published_lists_have_the_checksums(data_dir):
    for split, digest in _SPLIT_SHA256.items():
        path = data_dir / "cifar-fs" / f"{split}.txt"
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_damaged_omniglot(tmp_path):
    folder = tmp_path / "omniglot"
    folder.mkdir()
    for part in ("images_background", "images_evaluation"):
        (folder / f"{part}.zip").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match=r"images_background\.zip is not a whole zip archive"):
        Omniglot(tmp_path).read()
    with zipfile.ZipFile(folder / "images_background.zip", "w") as archive:
        archive.writestr("images_background/Greek/character01/0001_01.png", b"")
    with pytest.raises(DataError, match="holds 1 alphabets with 1 characters; Omniglot's has 30 with 964"):
        Omniglot(tmp_path).read()


def test_damaged_mnist(tmp_path):
    path = tmp_path / "labels.gz"
    good = b"\x00\x00\x08\x01\x00\x00\x00\x03\x01\x02\x03"
    path.write_bytes(gzip.compress(good))
    assert read_idx(path).tolist() == [1, 2, 3]
    for damaged in (good[:-1], good + b"x", b"", b"\x00\x00\x08", b"\x00\x00\x0d" + good[3:]):
        path.write_bytes(gzip.compress(damaged))
        with pytest.raises(DataError, match="is not an idx file"):
            read_idx(path)
    path.write_bytes(gzip.compress(good)[:-6])
    with pytest.raises(DataError, match="is not a whole gzip file"):
        read_idx(path)


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("1")
    calls = []

    def build():
        calls.append(1)
        return {"x": np.arange(3)}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(3):
        assert storage.cached("x", [source], build)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    [file] = (tmp_path / "cache" / "efficientai-toolkit" / "arrays").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    storage.cached("x", [source], build)
    assert len(calls) == 2
    source.write_text("changed")
    storage.cached("x", [source], build)
    assert len(calls) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file: no folder can be made in it
    assert storage.cached("x", [source], build)["x"].tolist() == [0, 1, 2]
