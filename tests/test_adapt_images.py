"""adapt and predict from image files and arrays of images, as training reads them; and numbers by their columns."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import DataError
from efficientai_toolkit.runs.adapted import ABOUT, AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.build import checkpoint_file
from efficientai_toolkit.runs.loaded import Inputs, load_learner
from efficientai_toolkit.runs.train import train
from efficientai_toolkit.tasks import FAMILIES, family, image_examples
from efficientai_toolkit.tasks.base import TaskConfig
from efficientai_toolkit.tasks.cifar_fs import CifarFS
from efficientai_toolkit.tasks.image_examples import image_arrays, read_images
from efficientai_toolkit.tasks.image_folder import ImageFolder, decode_files
from efficientai_toolkit.tasks.images import ImageSet
from efficientai_toolkit.tasks.mini_imagenet import MiniImageNet
from efficientai_toolkit.tasks.mnist import Mnist
from efficientai_toolkit.tasks.omniglot import Omniglot


def configuration(folder, family: str, **parts) -> MetaLearningConfig:
    tasks = {"task_families": [family], "n_way": 2, "k_shot": 2, "query_per_class": 2}
    return MetaLearningConfig.from_dict(
        {
            "meta_learning": {"algorithm": "protonet", "num_meta_iterations": 2, "meta_batch_size": 2},
            "task_distribution": {**tasks, "num_val_tasks": 2, **parts.get("tasks", {})},
            "model": {"backbone": "conv4", "hidden_dim": 4, "num_layers": 2, **parts.get("model", {})},
            "paths": {
                "data_dir": str(folder / "data"),
                "output_dir": str(folder / "runs"),
                "checkpoint_dir": str(folder / "checkpoints"),
            },
            "logging": {"tensorboard_enabled": False},
        }
    )


def write_classes(folder, classes: int, each: int, size: int = 20) -> None:
    rng = np.random.default_rng(0)
    for label in range(classes):
        pattern = rng.random((size, size, 3))
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(pattern + 0.1 * rng.standard_normal(pattern.shape), 0, 1)
            suffix = ("png", "bmp")[number % 2]
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.{suffix}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prototypical network over images in folders, 16 × 16."""
    folder = tmp_path_factory.mktemp("images")
    write_classes(folder / "data" / "image_folder", 12, 6)
    return folder, train(configuration(folder, "image_folder", tasks={"task_params": {"image_size": 16}}))["run"]


@pytest.fixture
def support(made, tmp_path):
    """Three labels with four images each."""
    for label, of in (("cats", 0), ("big dogs", 1), ("día", 2)):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for file in sorted((made[0] / "data" / "image_folder" / f"class{of}").iterdir())[:4]:
            (tmp_path / "mine" / label / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mine" / "cats" / "._0.png").write_text("hidden")
    return tmp_path / "mine"


@pytest.fixture
def cli():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_folders_of_images_are_learned_and_named(made, support, tmp_path, cli):
    folder = tmp_path / "adapter"
    done = cli("adapt", "--checkpoint", made[1], "--support", support, "--output", folder)
    assert done.exit_code == 0, done.output
    assert "Learned 3 labels from 12 examples" in done.stdout
    assert done.stdout.endswith(f"predict --adapter {folder} --input FOLDER\n")
    said = cli("predict", "--adapter", folder, "--input", support)
    rows = [line.split("\t") for line in said.stdout.splitlines()]
    files = [
        f"{label}/{name}" for label in ("big dogs", "cats", "día") for name in ("0.png", "1.bmp", "2.png", "3.bmp")
    ]
    assert [row[0] for row in rows] == files
    assert [row[1] for row in rows] == [file.split("/")[0] for file in files]
    assert "12 of 12 as labelled" in said.stderr
    said = cli("predict", "--adapter", folder, "--input", support / "cats", "--json")
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [(row["file"], row["label"]) for row in rows] == [
        (name, "cats") for name in ("0.png", "1.bmp", "2.png", "3.bmp")
    ]
    assert set(rows[0]) == {"file", "label", "probability"}
    said = cli("predict", "--adapter", folder, "--input", support / "día" / "1.bmp")
    assert said.stdout.split("\t")[:2] == ["1.bmp", "día"]


def test_files_become_the_pixels_of_training(made, support):
    base = load_learner(checkpoint_file(made[1]))
    assert base.input_shape == (16, 16, 3)
    files, labels = read_images(support)
    assert labels is not None
    assert len(files) == len(labels) == 12
    x = Inputs(base.config, base.input_shape)(files)
    data = ImageFolder(made[0] / "data")
    stored = data.read(16)
    starts = [stored.starts[stored.names.index(name)] for name in ("class1", "class0", "class2")]
    rows = [start + i for start in starts for i in range(4)]
    assert mx.array_equal(x, mx.array(data.finish(stored.images[rows])))


def test_no_data_set_is_needed_to_adapt_what_was_trained_on_folders(made, support, monkeypatch):
    monkeypatch.setattr(ImageFolder, "read", lambda *_: pytest.fail("the data set was read"))
    files, labels = read_images(support)
    assert adapt_checkpoint(made[1], files, labels or []).predict(files)[0][0] == "big dogs"
    config = TaskConfig("a", "image_folder", task_params={"image_size": 9, "grayscale": True})
    assert ImageFolder().input_shape(config) == (9, 9, 1)


def test_images_are_decoded_a_batch_at_a_time(made, support, monkeypatch):
    files, labels = read_images(support)
    adapted = adapt_checkpoint(made[1], files, labels or [])
    seen = []

    def counted(paths, *rest):
        seen.append(len(paths))
        return decode_files(paths, *rest)

    monkeypatch.setattr(image_examples, "decode_files", counted)
    assert len(adapted.predict(list(files) * 10)) == sum(seen) == 120
    assert max(seen) <= 32


# --- ranges ------------------------------------------------------------------------------------------------------


def test_levels_and_floats_are_the_same_images(made, support, tmp_path, cli):
    files, labels = read_images(support)
    x = (255 * image_arrays(files, "image_folder", (16, 16, 3))).round().astype(np.uint8)
    np.savez(tmp_path / "levels.npz", x=x, y=labels)
    np.savez(tmp_path / "whole.npz", x=x.astype(np.int64), y=labels)
    np.savez(tmp_path / "unit.npz", x=x / 255, y=labels)
    probabilities = []
    for name in ("levels", "whole", "unit"):
        cli("adapt", "--checkpoint", made[1], "--support", tmp_path / f"{name}.npz", "--output", tmp_path / name)
        said = cli("predict", "--adapter", tmp_path / "levels", "--input", tmp_path / f"{name}.npz", "--json")
        assert "12 of 12 as labelled" in said.stderr
        probabilities.append([json.loads(line)["probability"] for line in said.stdout.splitlines()])
        logits = AdaptedTask.load(tmp_path / name).outputs(files)
        np.testing.assert_allclose(logits, AdaptedTask.load(tmp_path / "levels").outputs(files), atol=1e-4)
    np.testing.assert_allclose(probabilities[1:], [probabilities[0]] * 2, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.full((4, 16, 16, 3), 200.0), r"x\.npz: numbers from 200 to 200, and the model was trained on .* \[0, 1\]"),
        (np.full((4, 16, 16, 3), -2.0), r"numbers from -2 to -2"),
        (np.full((4, 16, 16, 3), 300), r"whole numbers from 300 to 300; expected levels of 0 to 255"),
        (np.ones((4, 16, 16, 3), np.uint8), r"levels of 0 to 255, and none is above 1; save 0 to 1 as float"),
        (np.ones((4, 3, 16, 16)), r"inputs of shape \(3, 16, 16\); it was trained on \(16, 16, 3\)$"),
    ],
)
def test_arrays_in_another_range_are_refused(made, tmp_path, cli, x, said):
    np.savez(tmp_path / "x.npz", x=x, y=["a", "a", "b", "b"])
    done = cli("adapt", "--checkpoint", made[1], "--support", tmp_path / "x.npz", "--output", tmp_path / "a")
    assert done.exit_code == 2
    assert " ".join(done.stderr.split()) == done.stderr.strip()
    with pytest.raises(DataError, match=said):
        adapt_checkpoint(made[1], read_images(tmp_path / "x.npz")[0], ["a", "a", "b", "b"])


def test_a_little_beyond_the_range_is_resampling(made):
    x = np.random.default_rng(0).uniform(-0.1, 1.1, (4, 16, 16, 3))
    adapted = adapt_checkpoint(made[1], x, ["a", "a", "b", "b"])
    with pytest.raises(DataError, match="the images: numbers from"):
        adapted.predict(200 * x)
    with pytest.raises(DataError, match=r"adapted model cannot take inputs of shape \(32, 32, 3\); it was trained on"):
        adapted.predict(x.repeat(2, axis=1).repeat(2, axis=2))


# --- what does not fit -------------------------------------------------------------------------------------------


def test_folders_that_are_no_examples_are_refused(made, support, tmp_path, cli):
    (support / "empty").mkdir()
    (support / "empty" / "a.txt").write_text("no image")
    flat = support / "cats"
    for path, said in (
        (support, "the folder 'empty' holds no images (.bmp, .gif, .jpeg"),
        (flat, f"no images in {flat}; expected a folder for each class"),
        (flat / "0.png", "images come as a folder with a folder of them for each label"),
        (tmp_path / "none", "there is no file or folder at"),
    ):
        done = cli("adapt", "--checkpoint", made[1], "--support", path, "--output", tmp_path / "a")
        assert done.exit_code == 2
        assert said in done.stderr
        assert not (tmp_path / "a").exists()
    (tmp_path / "one" / "cats").mkdir(parents=True)
    (flat / "0.png").rename(tmp_path / "one" / "cats" / "0.png")
    with pytest.raises(DataError, match="every example is 'cats'; at least two labels are needed"):
        read_images(tmp_path / "one")
    (tmp_path / "one" / "loose.png").write_bytes((tmp_path / "one" / "cats" / "0.png").read_bytes())
    for labelled in (True, False):
        with pytest.raises(DataError, match=r"holds images \(loose\.png\) beside folders of images \(cats\)"):
            read_images(tmp_path / "one", labelled=labelled)
    (flat / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png is damaged, or no image"):
        image_arrays(read_images(flat, labelled=False)[0], "image_folder", (16, 16, 3))


def test_a_name_of_a_file_stays_one_field(made, support, tmp_path, cli):
    files, labels = read_images(support)
    adapt_checkpoint(made[1], files, labels or []).save(tmp_path / "adapter")
    (support / "cats" / "0.png").rename(support / "cats" / "a\tb\nc.png")
    said = cli("predict", "--adapter", tmp_path / "adapter", "--input", support / "cats")
    assert [line.count("\t") for line in said.stdout.splitlines()] == [2] * 4
    assert said.stdout.splitlines()[3].startswith(r"a\tb\nc.png" + "\tcats\t")


# --- families with sizes of their own ----------------------------------------------------------------------------


def test_a_character_is_read_as_omniglot_is(tmp_path):
    """Black strokes on white at any size become 1 on 0 at 28 × 28."""
    drawn = np.full((105, 105), 255, np.uint8)
    drawn[40:60, 10:90] = 0
    Image.fromarray(drawn).save(tmp_path / "a.png")
    (x,) = image_arrays([tmp_path / "a.png"], "omniglot", (28, 28, 1))
    assert x.shape == (28, 28, 1)
    assert x[0, 0, 0] == 0
    assert x[13, 14, 0] > 0.99
    np.testing.assert_array_equal(image_arrays(x[None], "omniglot", (28, 28, 1))[0], x)  # arrays are as training's
    for name, shape in (("mnist", (28, 28, 1)), ("cifar_fs", (32, 32, 3)), ("mini_imagenet", (84, 84, 3))):
        (x,) = image_arrays([str(tmp_path / "a.png")], name, shape)
        assert x.shape == shape
        assert x[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Omniglot, (28, 28, 1)), (Mnist, (28, 28, 1)), (CifarFS, (32, 32, 3)), (MiniImageNet, (84, 84, 3))],
)
def test_images_of_any_size_for_families_of_one_size(tmp_path, cli, monkeypatch, kind, shape):
    classes = np.arange(9).reshape(3, 3)
    images = np.random.default_rng(0).integers(0, 256, (36, *shape), np.uint8)
    splits = dict(zip(("train", "val", "test"), classes, strict=True))
    data = ImageSet(images, np.arange(10) * 4, [str(c) for c in range(9)], splits)
    monkeypatch.setattr(kind, "read", lambda *_: data)
    name = next(name for name in FAMILIES if family(name) is kind)
    (tmp_path / "data").mkdir()
    run = train(configuration(tmp_path, name, model={"num_layers": 4}))["run"]
    write_classes(tmp_path / "mine", 3, 2, size=50)
    done = cli("adapt", "--checkpoint", run, "--support", tmp_path / "mine", "--output", tmp_path / "a")
    assert done.exit_code == 0, done.output
    said = cli("predict", "--adapter", tmp_path / "a", "--input", tmp_path / "mine")
    assert "6 of 6 as labelled" in said.stderr


# --- scores, columns ---------------------------------------------------------------------------------------------


def test_a_score_is_said_where_there_is_a_threshold(made, support, tmp_path, cli):
    files, labels = read_images(support)
    adapt_checkpoint(made[1], files, labels or []).save(tmp_path / "a")
    answers = AdaptedTask.load(tmp_path / "a").answers(files)
    between = float(np.median([answer.score for answer in answers]))
    asked = ("predict", "--adapter", tmp_path / "a", "--input", support, "--threshold", between)
    rows = [json.loads(line) for line in cli(*asked, "--json").stdout.splitlines()]
    assert [row["label"] is None for row in rows] == [row["score"] < between for row in rows]
    assert [row["score"] for row in rows] == pytest.approx([answer.score for answer in answers])
    lines = [line.split("\t") for line in cli(*asked).stdout.splitlines()]
    assert 0 < sum(line[1] == "(none of these)" for line in lines) < 12
    for line, row in zip(lines, rows, strict=True):
        assert line[3:] == ([f"score {row['score']:.3f}"] if row["label"] is None else [])


def test_background_of_images_sets_a_threshold(made, support, tmp_path, cli):
    arguments = ("adapt", "--checkpoint", made[1], "--support", support, "--output", tmp_path / "a")
    strange = made[0] / "data" / "image_folder" / "class5"
    done = cli(*arguments, "--background", strange, "--json")
    assert isinstance(json.loads(done.stdout)["threshold"], float)
    assert "--none-of-these needs --background" in cli(*arguments, "--none-of-these").stderr


def test_numbers_are_asked_by_the_columns_they_were_learned_by(tmp_path, cli):
    tasks = {"num_train_tasks": 4, "num_test_tasks": 2, "n_way": 5, "query_per_class": None, "k_shot": 5}
    model = {"backbone": "linear", "num_layers": None}
    run = train(configuration(tmp_path, "linear_classification", tasks=tasks, model=model))["run"]
    (tmp_path / "points.csv").write_text("x1,x2,label\n2,-1,left\n2,-2,left\n-1,2,right\n-2,2,right\n")
    (tmp_path / "swapped.csv").write_text("x2,x1\n-1,2\n2,-1\n")
    (tmp_path / "same.csv").write_text("x1,x2\n2,-1\n-1,2\n")
    (tmp_path / "other.csv").write_text("x1,x3\n2,-1\n")
    folder = tmp_path / "mine"
    done = cli("adapt", "--checkpoint", run, "--support", tmp_path / "points.csv", "--output", folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("--input points.csv\n")

    def asked(name):
        return cli("predict", "--adapter", folder, "--input", tmp_path / name)

    assert asked("swapped.csv").stdout == asked("same.csv").stdout
    refused = asked("other.csv")
    assert refused.exit_code == 2
    assert "no column 'x2'; unknown column 'x3'" in refused.stderr
    about = json.loads((folder / ABOUT).read_text())
    assert about.pop("columns") == ["x1", "x2"]
    (folder / ABOUT).write_text(json.dumps(about))  # as older releases wrote it
    assert asked("other.csv").exit_code == 0
    assert asked("swapped.csv").stdout != asked("same.csv").stdout
