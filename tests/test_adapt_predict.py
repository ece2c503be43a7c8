"""adapt and predict: a user's own labels from a few examples, through the library and the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit.cli import app, main
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import CheckpointError, DataError, DataNotFoundError, ModelError, OutputError
from efficientai_toolkit.runs.adapted import (
    ABOUT,
    ARRAYS,
    AdaptedTask,
    adapt_checkpoint,
    calibrate,
    scores,
)
from efficientai_toolkit.runs.build import build, checkpoint_file
from efficientai_toolkit.runs.loaded import load_learner, widen_head
from efficientai_toolkit.runs.train import train
from text_models import THINGS, settings, write_encoder, write_intents

# A random encoder tells words apart and nothing else.
SUPPORT = [
    "rose rose",
    "my rose rose rose",
    "oven oven",
    "my oven oven oven",
    "cat cat",
    "cat cat cat",
    "my cat cat cat",
]
LABELS = ["green", "green", "hot", "hot", "furry", "furry", "furry"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a prototypical network and one of Reptile, over a tiny encoder."""
    folder = tmp_path_factory.mktemp("runs")
    encoder, dataset = write_encoder(folder / "encoder"), write_intents(folder / "mine.csv")
    found = {}
    for algorithm in ("protonet", "reptile"):
        config = MetaLearningConfig.from_dict(settings(encoder, dataset, folder / algorithm, algorithm))
        found[algorithm] = train(config)["run"]
    return found


@pytest.fixture
def cli(monkeypatch):
    runner = CliRunner()
    return lambda *arguments, **options: runner.invoke(app, [str(a) for a in arguments], **options)


@pytest.mark.parametrize("algorithm", ["protonet", "reptile"])
def test_a_folder_predicts_what_the_adapted_learner_does(runs, tmp_path, algorithm):
    adapted = adapt_checkpoint(runs[algorithm], SUPPORT, LABELS, num_steps=20 if algorithm == "reptile" else None)
    logits = adapted.outputs(SUPPORT)
    assert logits.shape == (7, 3)
    found = adapted.predict(SUPPORT)
    assert [label for label, _ in found] == LABELS
    assert all(1 / 3 < probability <= 1 for _, probability in found)
    adapted.save(tmp_path / "mine")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {ABOUT, ARRAYS}
    again = AdaptedTask.load(tmp_path / "mine")
    assert mx.array_equal(again.outputs(SUPPORT), logits)
    assert again.counts == {"green": 2, "hot": 2, "furry": 3}


def test_one_example_a_label_and_more_labels_than_in_training(runs):
    labels = list(THINGS)
    texts = [f"my {things[0]}" for things in THINGS.values()]
    adapted = adapt_checkpoint(runs["protonet"], texts, labels)
    assert [label for label, _ in adapted.predict(texts)] == labels


def test_prototypes_are_the_class_means_of_the_features(runs):
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    model, inputs = adapted.model, adapted._inputs
    z = np.array(model.features(inputs(SUPPORT)))  # type: ignore[operator]
    means = np.stack([z[:2].mean(0), z[2:4].mean(0), z[4:].mean(0)])
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (z, means)]
    np.testing.assert_allclose(np.array(adapted.outputs(SUPPORT)), 10 * unit[0] @ unit[1].T, atol=2e-4)


def test_a_head_for_another_number_of_classes_starts_alike_for_all(runs):
    learner = load_learner(checkpoint_file(runs["reptile"])).learner
    widen_head(learner, 3)
    weight = np.array(learner.meta["model"]["head.weight"])
    assert weight.shape == (3, 32)
    assert (weight == weight[0]).all()
    two = adapt_checkpoint(runs["reptile"], SUPPORT[:4], LABELS[:4], num_steps=0)
    assert not (np.array(two.fast["head.weight"])[0] == np.array(two.fast["head.weight"])[1]).all()


def test_the_frozen_prefix_changes_no_loss(runs):
    config = load_learner(checkpoint_file(runs["reptile"])).config
    cached = build(config)
    config.model.prefix_cache = False
    plain = build(config)
    assert mx.issubdtype(cached.splits.train.batch_at(0, 2)[0].query_x.dtype, mx.floating)
    assert mx.issubdtype(plain.splits.train.batch_at(0, 2)[0].query_x.dtype, mx.integer)
    for step in range(3):
        a, b = (each.learner.meta_train_step(each.splits.train.batch_at(step, 2)) for each in (cached, plain))
        for name in ("query_loss", "support_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-5)


# --- none of these -----------------------------------------------------------------------------------------------


def test_a_calibrated_threshold_tells_off_what_fits_nothing(runs):
    strange = [f"{word} {word} {word}" for word in ("capital", "peru", "of", "what")]
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS, background=strange)
    assert adapted.threshold is not None
    told = [label for label, _ in adapted.predict(strange)]
    assert told.count(None) >= 3
    assert [label for label, _ in adapted.predict(SUPPORT)].count(None) <= 1
    assert not any(label is None for label, _ in adapt_checkpoint(runs["protonet"], SUPPORT, LABELS).predict(strange))


def test_without_a_second_example_the_threshold_is_the_background_s(runs):
    strange = ["capital of peru", "what of peru", "of of of"]
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT[::2][:3], ["a", "b", "c"], background=strange)
    assert adapted.threshold == pytest.approx(float(np.quantile(scores(adapted.outputs(strange)), 0.95)), abs=1e-5)


def test_calibration_separates_what_can_be_separated(runs):
    """Known examples that score far above the background: the threshold lies between."""
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    y = np.array([0, 0, 1, 1, 2, 2, 2])
    threshold = calibrate(adapted, adapted._inputs(SUPPORT), y, ["capital capital capital"])
    off = scores(adapted.outputs(["capital capital capital"]))
    assert off[0] < threshold


# --- what does not fit -------------------------------------------------------------------------------------------


def test_folders_that_do_not_fit_are_refused(runs, tmp_path):
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    adapted.save(tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    other = write_encoder(tmp_path / "wider", size=48)
    with pytest.raises(CheckpointError, match=r"with hidden_size 32, and '.*wider' has 48"):
        AdaptedTask.load(tmp_path, source=str(other))
    same = write_encoder(tmp_path / "same")
    weights = dict(mx.load(str(same / "model.safetensors")))
    name = next(name for name in weights if "word_embeddings" in name)
    mx.save_safetensors(str(same / "model.safetensors"), {**weights, name: weights[name] * 2})
    with pytest.raises(CheckpointError, match=r"the weights of .* are others"):
        AdaptedTask.load(tmp_path, source=str(same))
    for change, said in (
        ({"labels": ["a"]}, "do not belong together"),
        ({"format": "x"}, "of another format"),
        ({"format_version": 9}, "has version 9"),
    ):
        (tmp_path / ABOUT).write_text(json.dumps({**about, **change}))
        with pytest.raises(CheckpointError, match=said):
            AdaptedTask.load(tmp_path)
    with pytest.raises(DataNotFoundError, match="not a folder that `adapt` wrote"):
        AdaptedTask.load(tmp_path / "wider")


def test_a_frozen_head_of_another_size_is_said(runs, tmp_path):
    folder = tmp_path
    encoder, dataset = write_encoder(folder / "encoder"), write_intents(folder / "mine.csv")
    data = settings(encoder, dataset, folder, "reptile")
    data["adapter"]["train_head"] = False
    run = train(MetaLearningConfig.from_dict(data))["run"]
    with pytest.raises(ModelError, match="frozen at 2 classes, and the examples have 3"):
        adapt_checkpoint(run, SUPPORT, LABELS)
    assert adapt_checkpoint(run, SUPPORT[:4], LABELS[:4]).labels == ["green", "hot"]


def test_numbers_for_classifiers_and_regressions(tmp_path):
    def run_of(family):
        config = {
            "meta_learning": {"num_meta_iterations": 2, "meta_batch_size": 2},
            "task_distribution": {
                "task_families": [family],
                "num_train_tasks": 4,
                "num_val_tasks": 2,
                "num_test_tasks": 2,
            },
            "model": {"backbone": "linear" if "class" in family else "mlp", "hidden_dim": 8},
            "logging": {"tensorboard_enabled": False},
            "paths": {"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints")},
        }
        return train(MetaLearningConfig.from_dict(config))["run"]

    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(3, 1, (8, 2)), rng.normal(-3, 1, (8, 2))]).astype(np.float32)
    labels = ["up"] * 8 + ["down"] * 8
    run = run_of("linear_classification")
    adapted = adapt_checkpoint(run, x, labels, num_steps=50)
    adapted.save(tmp_path / "mine")
    found = [label for label, _ in AdaptedTask.load(tmp_path / "mine").predict(x)]
    assert sum(a == b for a, b in zip(found, labels, strict=True)) >= 15
    with pytest.raises(DataError, match=r"cannot take inputs of shape \(3,\); it was trained on \(2,\)$"):
        adapt_checkpoint(run, np.ones((4, 3), np.float32), ["a", "a", "b", "b"])
    run = run_of("sinusoid")
    adapted = adapt_checkpoint(run, x[:, :1], [str(v) for v in x[:, 1]])
    assert adapted.outputs(x[:, :1]).shape == (16, 1)
    with pytest.raises(ModelError, match="predicts numbers, not labels"):
        adapted.predict(x[:, :1])
    for label in ("a", "nan", "-inf", "1e39"):
        with pytest.raises(DataError, match=f"the label of example 2 is '{label}'; expected a finite number"):
            adapt_checkpoint(run, x[:2, :1], ["1", label])
    points = tmp_path / "points.csv"
    points.write_text("x,y\n" + "".join(f"{a},{b}\n" for a, b in x.tolist()))

    def said(*arguments, **options):
        done = CliRunner().invoke(app, [str(a) for a in arguments], **options)
        assert done.exit_code == 0, done.output
        return done

    folder = tmp_path / "my wave"
    end = said("adapt", "--checkpoint", run, "--support", points, "--output", folder).stdout.splitlines()[-1]
    assert end.endswith(f"--adapter '{folder}' --input points.csv")
    done = said("predict", "--adapter", folder, "--input", points)
    error = float(np.square(np.array(adapted.outputs(x[:, :1]))[:, 0] - x[:, 1]).mean())
    assert done.stderr == f"mean squared error {error:.4g} over 16 rows\n"
    piped = said("predict", "--adapter", folder, "--input", "-", input=points.read_text())
    assert (piped.stdout, piped.stderr) == (done.stdout, done.stderr)
    alone = said("predict", "--adapter", folder, "--input", "-", input="".join(f"{a}\n" for a in x[:, 0].tolist()))
    assert (alone.stdout, alone.stderr) == (done.stdout, "")
    blank = said("predict", "--adapter", folder, "--input", "-", input="x,y\n" + "".join(f"{a},\n" for a in x[:, 0]))
    assert (blank.stdout, blank.stderr) == (done.stdout, "")


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(SUPPORT, LABELS, strict=True)))
    return file


def test_adapt_then_predict_from_files_and_standard_input(runs, examples, tmp_path, cli):
    folder = tmp_path / "adapter"
    done = cli("adapt", "--checkpoint", runs["protonet"], "--support", examples, "--output", folder)
    assert done.exit_code == 0, done.output
    assert "Learned 3 labels from 7 examples" in done.stdout
    assert done.stdout.endswith("--input texts.csv\n")
    said = cli("predict", "--adapter", folder, "--input", examples)
    assert [line.split("\t")[0] for line in said.stdout.splitlines()] == LABELS
    assert "7 of 7 as labelled" in said.stderr
    said = cli("predict", "--adapter", folder, "--input", "-", "--json", input="rose rose\ncat cat\n\n")
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["green", "furry"]
    said = cli("predict", "--adapter", folder, "--input", examples, "--threshold", "1e6")
    assert {line.split("\t")[0] for line in said.stdout.splitlines()} == {"(none of these)"}


def test_labels_are_said_in_any_encoding(runs, tmp_path, monkeypatch):
    labels = ["día", "día", "熱い", "熱い"]
    adapt_checkpoint(runs["protonet"], SUPPORT[:4], labels).save(tmp_path / "mine")
    (tmp_path / "asked.txt").write_text("\n".join(SUPPORT[:4]))
    out = (tmp_path / "answers.txt").open("w", encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "__stdout__", out)  # the process's own
    arguments = ["predict", "--adapter", tmp_path / "mine", "--input", tmp_path / "asked.txt"]
    monkeypatch.setattr(sys, "argv", ["efficientai-toolkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert ended.value.code == 0
    said = (tmp_path / "answers.txt").read_text("latin-1").splitlines()
    out.close()
    assert [line.split("\t")[0] for line in said] == ["día", "día", r"\u71b1\u3044", r"\u71b1\u3044"]


def test_adapt_sets_a_threshold_from_a_file(runs, examples, tmp_path, cli):
    off = tmp_path / "off.txt"
    off.write_text("capital capital\nperu peru\nof of of\n")
    arguments = ["--checkpoint", runs["protonet"], "--support", examples, "--output", tmp_path / "a"]
    done = cli("adapt", *arguments, "--background", off, "--json")
    assert json.loads(done.stdout)["threshold"] is not None
    missing = cli("adapt", *arguments, "--none-of-these", "--data-dir", tmp_path)
    assert missing.exit_code == 2
    assert "give them with --background" in missing.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\n,a\nb,b\n", "line 2: the text is empty"),
        ("text,label\na,x\nb,\n", "line 3: the label is missing"),
        ("text,label\na,x\nb,x\n", "every example is 'x'"),
        ("text,intent\na,x\n", "unknown column 'intent'"),
    ],
)
def test_bad_examples_end_as_one_sentence(runs, tmp_path, cli, text, said):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    done = cli("adapt", "--checkpoint", runs["protonet"], "--support", file, "--output", tmp_path / "a")
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("inputs", "labels", "background", "said"),
    [
        ("rose", ["green"], None, "inputs is 'rose', one alone; expected a list"),
        ([], [], None, "got 0 inputs and 0 labels; expected as many of each, one at least"),
        (SUPPORT, ["green"], None, "got 7 inputs and 1 labels"),
        (SUPPORT, LABELS, [], "the background is empty"),
        (SUPPORT, LABELS, "rose", "background is 'rose', one alone"),
    ],
)
def test_what_cannot_be_examples_is_said_in_python_too(runs, inputs, labels, background, said):
    with pytest.raises(DataError, match=said):
        adapt_checkpoint(runs["protonet"], inputs, labels, background=background)


def test_no_input_has_no_answer_and_one_alone_is_no_list(runs):
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    assert adapted.predict([]) == []
    for ask in (adapted.predict, adapted.outputs):
        with pytest.raises(DataError, match="inputs is 'rose', one alone"):
            ask("rose")
    with pytest.raises(DataError, match="there are no inputs"):
        adapted.outputs([])


def test_a_user_s_own_adapted_json_is_kept(runs, examples, tmp_path, cli):
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "adapted.json"
    own.write_text('{"format": "mine"}')
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    with pytest.raises(OutputError, match=r"adapted\.json is a file of your own, which would be overwritten"):
        adapted.save(tmp_path / "own")
    done = cli("adapt", "--checkpoint", runs["protonet"], "--support", examples, "--output", tmp_path / "own")
    assert done.exit_code == 2
    assert own.read_text() == '{"format": "mine"}'
    assert list((tmp_path / "own").iterdir()) == [own]


def test_a_user_s_own_arrays_are_kept_and_ours_are_replaced(runs, examples, tmp_path, cli):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "adapted.npz").write_text("mine")
    done = cli("adapt", "--checkpoint", runs["protonet"], "--support", examples, "--output", folder)
    assert done.exit_code == 2
    assert "adapted.npz is a file of your own" in done.stderr
    (folder / "adapted.npz").unlink()
    adapted = adapt_checkpoint(runs["protonet"], SUPPORT, LABELS)
    adapted.save(folder)
    for text in ('{"format": "effici', None):  # as after a stop, or a fault of the disk
        (folder / "adapted.json").unlink() if text is None else (folder / "adapted.json").write_text(text)
        adapted.save(folder)
    assert (folder / "adapted.json").is_file()


def test_what_a_command_cannot_use_is_said(runs, examples, tmp_path, cli):
    def refused(*arguments):
        done = cli(*arguments)
        assert done.exit_code == 2
        return done.stderr

    adapt = ("adapt", "--checkpoint", runs["protonet"], "--support")
    assert "--steps: protonet adapts in closed form" in refused(*adapt, examples, "--steps", "3", "--output", tmp_path)
    assert "is a folder; the model reads texts" in refused(*adapt, tmp_path, "--output", tmp_path / "a")
    assert "x.csv: Not a directory" in refused(*adapt, examples, "--output", _file(tmp_path / "x.csv"))
    assert cli(*adapt, examples, "--output", tmp_path / "a").exit_code == 0
    predict = ("predict", "--adapter", tmp_path / "a", "--input")
    assert "is a folder; the model reads texts" in refused(*predict, tmp_path)
    assert "--threshold nan: expected a number" in refused(*predict, examples, "--threshold", "nan")


def _file(path):
    path.write_text("")
    return path


def test_a_text_with_several_labels_is_said_once(runs, tmp_path, cli):
    file = tmp_path / "twice.csv"
    file.write_text("text,label\nmy rose,green\nmy cat,furry\nmy rose,red\nmy rose,furry\nmy cat,furry\n")
    done = cli("adapt", "--checkpoint", runs["protonet"], "--support", file, "--output", tmp_path / "a")
    assert done.exit_code == 0
    assert done.stderr == f"Warning: {file} has 'my rose' as green and as red and as furry\n"


def test_adapting_does_not_import_what_it_does_not_need(runs, examples, tmp_path):
    code = (
        "import sys\n"
        "from efficientai_toolkit.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'matplotlib', 'tensorboardX', 'PIL', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = ["adapt", "--checkpoint", runs["protonet"], "--support", str(examples), "--output", str(tmp_path / "a")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    assert (tmp_path / "a" / ABOUT).is_file()
