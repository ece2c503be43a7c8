"""Whatever a user gets wrong ends as one sentence that says what and where, exit code 2, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from efficientai_toolkit.backbones import BACKBONES
from efficientai_toolkit.checkpoint import read_npz, write_npz
from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ConfigurationError, ToolkitError
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.runs.build import build, restore
from efficientai_toolkit.runs.train import train

QUICK = ["--config", str(Path(__file__).parents[1] / "configs" / "quick.yaml"), "-n", "6", "--no-report"]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The sentence with which a command refuses its arguments."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code: int = 2) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert isinstance(result.exception, SystemExit), (result.output, result.exception)
        assert result.exit_code == code
        assert "Traceback" not in result.output
        (sentence,) = result.stderr.strip().splitlines()
        assert sentence.startswith("Error: ")
        return sentence

    return run


def sets(**values) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--algorithm", "mamll"], ["'mamll'", "'maml'"]),
        (sets(task_distribution__task_families="[sinusiod]"), ["'sinusiod'", "'sinusoid'"]),
        (sets(model__backbone="conv"), ["'conv'", "'conv4'"]),
        (sets(model__backbone="conv4"), ["conv4", "images", "(2,)"]),
        (sets(optimizer__name="adm"), ["'adm'", "'adam'"]),
        (sets(optimizer__schedule="cosin"), ["'cosin'", "'cosine'"]),
        (sets(learner__inner_batchsize=3), ["learner.inner_batchsize", "'inner_batch_size'"]),
        (sets(learner__inner_lr=3), ["learner.inner_lr", "meta_learning"]),
        (sets(learner__chunk=0), ["chunk"]),
        (sets(learner__inner_batch_size="abc"), ["inner_batch_size", "'abc'"]),
        (sets(learner__head="layers.9"), ["layers.9"]),
        (sets(task_distribution__task_params="{kind: moon}"), ["kind"]),
        (sets(task_distribution__task_params="{amplitud: 3}"), ["amplitud"]),
        (sets(task_distribution__task_families="[sinusoid, linear_classification]"), ["regression"]),
        (sets(adapter__method="lroa"), ["'lroa'", "'lora'"]),
        (sets(adapter__method="lora", adapter__rnk=3), ["'rnk'", "'rank'"]),
        (sets(adapter__rank=3), ["adapter.rank", "adapter.method"]),
        (sets(adapter__method="lora", adapter__rank="abc"), ["rank", "'abc'"]),
        (sets(adapter__method="lora", adapter__target_modules="[nosuch]"), ["'nosuch'", "It could go to"]),
        (sets(adapter__method="lora", adapter__train_head=3), ["train_head", "3"]),
        (sets(meta_learning__inner_lr=".nan"), ["--set meta_learning.inner_lr=.nan", "finite"]),
        (sets(meta_learning__num_inner_steps=-2), ["num_inner_steps", "-2"]),
        (sets(task_distribution__k_shot=0), ["k_shot"]),
        (["--iterations", "-1"], ["--iterations -1"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--device", "tpu"], ["'tpu'", "'gpu'"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--resume", "nowhere"], ["nowhere", "not a run folder"]),
        (["--resume", "nowhere", "--seed", "3"], ["--seed", "--resume"]),
        (["--data-dir", "nowhere", *sets(task_distribution__task_families="[omniglot]")], ["nowhere"]),
        (
            sets(task_distribution__task_families="[sinusoid]", meta_learning__target_accuracy=0.9),
            ["target_accuracy", "regression"],
        ),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_train_refuses(refused, arguments, parts, tmp_path):
    given = arguments if {"--config", "--resume"} & set(arguments) else [*QUICK, *arguments]
    sentence = refused("train", *given)
    assert all(part in sentence for part in parts), sentence
    assert not (tmp_path / "checkpoints" / "best.npz").exists()


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_what_an_adapter_cannot_be_made_of(refused, monkeypatch, kind):
    def fail(*_):
        raise kind("uniform(): incompatible arguments")

    monkeypatch.setattr("efficientai_toolkit.adapters.lora.LoRA.from_base", fail)
    sentence = refused("train", *QUICK, *sets(adapter__method="lora", adapter__rank=3))
    assert "adapter: 'lora' cannot be built from {'rank': 3}: uniform(): incompatible arguments" in sentence


def test_a_device_that_is_not_there(refused):
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "Metal not available" in refused("train", *QUICK, "--device", "gpu")


def test_unwritable_output(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in refused("train", *QUICK, "--output", "file")
    assert "paths.checkpoint_dir" in refused("train", *QUICK, *sets(paths__checkpoint_dir="file/x"))
    assert (tmp_path / "file").read_text() == "in the way"
    assert not (tmp_path / "experiments").exists()


def test_a_damaged_data_set(refused, tmp_path):
    (tmp_path / "data" / "omniglot").mkdir(parents=True)
    for name in ("images_background", "images_evaluation"):
        (tmp_path / "data" / "omniglot" / f"{name}.zip").write_bytes(b"PK\x03\x04 cut short")
    families = sets(task_distribution__task_families="[omniglot]", model__backbone="conv4")
    sentence = refused("train", *QUICK, "--data-dir", tmp_path / "data", *families)
    assert "images_background.zip" in sentence


def test_divergence(refused, tmp_path):
    sentence = refused("train", *QUICK, *sets(meta_learning__inner_lr=1e12), code=3)
    assert "at iteration 1;" in sentence
    assert "inner_lr" in sentence
    (run,) = (tmp_path / "experiments").iterdir()
    arrays, _ = read_npz(run / "checkpoints" / "last.npz")
    assert all(np.isfinite(np.array(a)).all() for a in arrays.values())


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """The folder of a short run."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *QUICK, "--json"])
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.stdout)["run"])


def test_damaged_checkpoints(refused, trained, tmp_path):
    best = trained / "checkpoints" / "best.npz"
    whole = best.read_bytes()
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    for content, part in [
        (whole[: len(whole) // 2], "cut short or damaged"),
        (whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], "damaged"),
        (b"", "is empty"),
        (b"\x80\x04.", "a pickle"),
        ((tmp_path / "foreign.npz").read_bytes(), "no header"),
    ]:
        best.write_bytes(content)
        sentence = refused("evaluate", "--checkpoint", best)
        assert part in sentence
        assert str(best) in sentence
    assert "no checkpoint" in refused("evaluate", "--checkpoint", "none.npz")


def test_a_checkpoint_that_does_not_fit(trained, refused):
    best = trained / "checkpoints" / "best.npz"
    config = MetaLearningConfig.from_dict(read_npz(best)[1]["config"])
    config.model.hidden_dim = 16
    with pytest.raises(ToolkitError, match=r"layers.0.weight' is \(32, 2\) float32, expected \(16, 2\)"):
        restore(best, config=config)
    sentence = refused("evaluate", "--checkpoint", best, *sets(model__hidden_dim=16))
    assert "does not fit" in sentence
    sentence = refused("evaluate", "--checkpoint", best, *sets(meta_learning__algorithm="maml"))
    assert "'reptile'" in sentence


def test_a_checkpoint_of_save_needs_a_configuration(trained, tmp_path, refused):
    arrays, header = read_npz(trained / "checkpoints" / "best.npz")
    write_npz(tmp_path / "bare.npz", arrays, {"learner": header["learner"]})
    assert "--config" in refused("evaluate", "--checkpoint", tmp_path / "bare.npz")


def test_a_damaged_run_folder(trained, refused):
    config = trained / "config.json"
    text = config.read_text()
    config.write_text(text[:50])
    assert "config.json" in refused("train", "--resume", trained)
    config.write_text(text.replace('"num_inner_steps": 3', '"num_inner_steps": -3'))
    sentence = refused("train", "--resume", trained)
    assert "num_inner_steps" in sentence
    assert str(config) in sentence


SMALL = st.integers(1, 4)
# Each part is a value that the schema takes; whether they go together is for the rooms to say. `test_config.py`
# draws what the schema refuses.
CONFIGS = st.fixed_dictionaries(
    {
        "meta_learning": st.fixed_dictionaries(
            {
                "algorithm": st.sampled_from([*LEARNERS]),
                "meta_batch_size": SMALL,
                "num_inner_steps": st.integers(0, 3),
                "inner_lr": st.sampled_from([0.01, 1.0, 1e30]),
                "seed": st.sampled_from([0, 1, 2**32 - 1]),
                "gradient_clip": st.sampled_from([None, 1.0]),
            }
        ),
        "task_distribution": st.fixed_dictionaries(
            {
                "task_families": st.sampled_from(
                    [
                        ["linear_classification"],
                        ["nonlinear_classification", "linear_classification"],
                        ["sinusoid"],
                        ["harmonic"],
                        ["sinusoid", "linear_classification"],
                    ]
                ),
                "k_shot": SMALL,
                "query_size": SMALL,
                "num_train_tasks": st.none() | SMALL,
                "num_val_tasks": SMALL,
                "num_classes": st.integers(2, 4),
                "input_dim": st.integers(2, 3) | st.just(1),
                "task_params": st.just({})
                | st.just({"x_range": [-1, 1]})
                | st.just({"label_noise": 0.1})
                | st.dictionaries(
                    st.sampled_from(["kind", "label_noise", "amplitude", "rotation_angle", "x_range", "x"]),
                    st.sampled_from(["moons", 0.5, -1, [1, 2], [2, 1], None, "x", {}, []]),
                    max_size=2,
                ),
            }
        ),
        "model": st.fixed_dictionaries(
            {
                "backbone": st.sampled_from(["linear", "mlp"]) | st.sampled_from([*BACKBONES]),
                "hidden_dim": SMALL,
                "num_layers": SMALL,
            }
        ),
        "learner": st.just({})
        | st.dictionaries(st.sampled_from(["chunk", "head", "x"]), st.sampled_from([1, 0, "x", None]), max_size=1),
    }
)


@settings(max_examples=250)
@given(CONFIGS)
def test_any_configuration_runs_or_is_refused_in_a_sentence(data):
    """Built and stepped once, uncompiled; every refusal is a `ToolkitError`."""
    try:
        config = MetaLearningConfig.from_dict(data)
        config.learner["compile"] = False
        learner, splits = build(config)[1:]
        metrics = learner.meta_train_step(splits.train.batch_at(0, config.meta_batch_size))
    except ToolkitError as error:
        said = str(error)
        assert said
        assert "\n" not in said
        return
    assert {"query_loss", "support_loss", "param_diff", "grad_norm"} <= metrics.keys()
    assert splits.val.batch_at(0, len(splits.val))


@pytest.mark.parametrize(
    ("algorithm", "family", "said"),
    [
        ("protonet", "sinusoid", "'protonet' is for classification; sinusoid is regression"),
        ("alpaca", "linear_classification", "'alpaca' is for regression; linear_classification is classification"),
    ],
)
def test_a_learner_for_other_tasks_is_refused_before_there_is_a_run(tmp_path, algorithm, family, said):
    wanted = {
        "meta_learning": {"algorithm": algorithm},
        "task_distribution": {"task_families": [family]},
        "model": {"backbone": "mlp"},
        "paths": {"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints")},
    }
    with pytest.raises(ConfigurationError, match=said):
        train(MetaLearningConfig.from_dict(wanted))
    assert not list(tmp_path.iterdir())
