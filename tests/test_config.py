"""Configuration: one statement of the defaults, and one sentence for everything that cannot be used."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficientai_toolkit import trainable
from efficientai_toolkit.backbones import build_backbone
from efficientai_toolkit.config import MetaLearningConfig, Override
from efficientai_toolkit.errors import ConfigurationError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def said(tmp_path):
    """The sentence about a YAML file of the given text."""

    def read(text: str | bytes, *sets: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ConfigurationError) as caught:
            MetaLearningConfig.from_yaml(path, [Override.parse(text) for text in sets])
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence

    return read


def test_published_values():
    config = MetaLearningConfig()
    meta = config.meta_learning
    assert (meta.algorithm, meta.meta_batch_size, meta.num_meta_iterations) == ("reptile", 4, 1000)
    assert (meta.inner_lr, meta.outer_lr, meta.num_inner_steps) == (0.01, 0.001, 5)
    assert (meta.eval_interval, meta.save_interval) == (100, 500)
    tasks = config.task_distribution
    assert tasks.task_families == ["linear_classification", "nonlinear_classification"]
    assert (tasks.k_shot, tasks.query_size, tasks.num_train_tasks, tasks.num_val_tasks) == (5, 50, 100, 20)
    assert (config.model.backbone, config.model.hidden_dim, config.model.num_layers) == ("linear", 128, 2)


def test_default_yaml_states_every_key_with_its_default():
    written = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert written == MetaLearningConfig().to_dict()
    assert MetaLearningConfig.from_yaml(CONFIGS / "default.yaml") == MetaLearningConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_parse_and_round_trip(path):
    config = MetaLearningConfig.from_yaml(path)
    plain = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert MetaLearningConfig.from_dict(plain) == config


def test_meta_learning_fields_are_attributes():
    config = MetaLearningConfig(inner_lr=0.1, model={"hidden_dim": 64})
    assert (config.inner_lr, config.model.hidden_dim, config.num_inner_steps) == (0.1, 64, 5)
    config.inner_lr = 0.2
    assert config.meta_learning.inner_lr == config.to_dict()["meta_learning"]["inner_lr"] == 0.2
    with pytest.raises(AttributeError):
        _ = config.learning_rate
    with pytest.raises(ConfigurationError, match="did you mean 'inner_lr'"):
        config.inner_lrr = 0.1


@pytest.mark.parametrize(("name", "value"), [("inner_lr", -1), ("inner_lr", math.nan), ("algorithm", 3), ("lr", 1)])
def test_assignment_is_validated_and_leaves_the_old_value(name, value):
    config = MetaLearningConfig()
    with pytest.raises(ConfigurationError, match=name):
        setattr(config, name, value)
    with pytest.raises(ConfigurationError, match=name):
        setattr(config.meta_learning, name, value)
    assert config == MetaLearningConfig()


def sizes(model) -> tuple[int, ...]:
    return tuple(
        value.shape[0] for path, value in trainable(model).items() if path.endswith("weight") and value.ndim > 1
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"backbone": "conv4"}, (64, 64, 64, 64, 5)),
        ({"backbone": "conv4_strided"}, (64, 64, 64, 64, 5)),
        ({"backbone": "conv4", "hidden_dim": 8, "num_layers": None}, (8, 8, 8, 8, 5)),
        ({"backbone": "conv4", "hidden_dim": 128, "num_layers": 2}, (128, 128, 5)),  # of older checkpoints' headers
        ({}, (128, 128, 5)),
        ({"backbone": "mlp", "hidden_dim": None}, (128, 128, 5)),
        ({"backbone": "mlp", "num_layers": 1}, (128, 5)),
    ],
)
def test_sizes_that_are_not_given_are_the_backbones_own(settings, expected):
    config = MetaLearningConfig(model=settings)
    assert sizes(build_backbone(config.model, (16, 16), 5)) == expected
    again = MetaLearningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert sizes(build_backbone(again.model, (16, 16), 5)) == expected


def test_sizes_follow_a_backbone_that_is_assigned():
    model = MetaLearningConfig(model={"num_layers": 3}).model
    model.backbone = "conv4"
    assert (model.hidden_dim, model.num_layers) == (None, 3)
    model.backbone = "mlp"
    model.num_layers = None
    assert (model.hidden_dim, model.num_layers) == (128, 2)


def test_a_backbones_own_options():
    def build(backbone: str, shape: tuple[int, ...] = (8, 8), **options):
        settings = {"backbone": backbone, "options": options, "num_layers": 7}
        return build_backbone(MetaLearningConfig(model=settings).model, shape, 5)

    model = build("resnet12", widths=[4, 6], dropout=0.3, block_size=3)  # num_layers is not its own
    assert [block.norms[0].weight.size for block in model.blocks] == [4, 6]
    assert [block.drop.p for block in model.blocks] == [0.3, 0.3]
    assert build("resnet12", widths=[4, 4, 4], block_size=3).blocks[2].drop.block_size == 3
    for backbone, options, sentence in (
        ("resnet12", {"dropuot": 0.1}, "'resnet12' has no option 'dropuot'; did you mean 'dropout'?"),
        ("resnet12", {"key": 0}, "'resnet12' has no option 'key'"),
        ("resnet12", {"dropout": 1.0}, "model.options.dropout should be less than 1, got 1.0"),
        ("resnet12", {"block_size": 0}, "model.options.block_size should be greater than or equal to 1"),
        ("mlp", {"dropout": 0.1}, "'mlp' has no option 'dropout'; it has none"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(sentence)):
            build(backbone, **options)
    with pytest.raises(ConfigurationError, match="num_layers = 7 halves images of 8 × 8 away"):
        build("conv4")


def test_one_family_needs_no_list():
    from_mapping = MetaLearningConfig.from_dict({"task_distribution": {"task_families": "sinusoid"}})
    from_flag = MetaLearningConfig.from_dict({}, [Override.parse("task_distribution.task_families=sinusoid")])
    for config in (from_mapping, from_flag):
        assert config.task_distribution.task_families == ["sinusoid"]
        assert MetaLearningConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigurationError, match="task_families"):
        MetaLearningConfig.from_dict({"task_distribution": {"task_families": ""}})


def test_defaults_are_not_shared():
    first = MetaLearningConfig()
    first.task_distribution.task_families.append("sinusoid")
    first.learner["x"] = 1
    assert MetaLearningConfig().to_dict() == MetaLearningConfig.from_yaml(CONFIGS / "default.yaml").to_dict()


def test_flag_beats_file_beats_default(tmp_path):
    (tmp_path / "c.yaml").write_text("meta_learning:\n  inner_lr: 1e-3\n  outer_lr: 2\nmodel:\n")
    config = MetaLearningConfig.from_yaml(
        tmp_path / "c.yaml",
        [
            Override.parse("meta_learning.inner_lr=5e-2"),
            Override.parse("task_distribution.task_params.kind=[moons, xor]"),
            Override.parse("learner.batch_size=null"),
        ],
    )
    assert (config.inner_lr, config.outer_lr, config.num_inner_steps) == (0.05, 2.0, 5)
    assert config.task_distribution.task_params == {"kind": ["moons", "xor"]}
    assert config.learner == {"batch_size": None}


def test_adapter_options_are_free():
    config = MetaLearningConfig(adapter={"method": "lora", "rank": 8})
    assert config.adapter.options == {"rank": 8}
    assert MetaLearningConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("# nothing\n", ["nothing"]),
        (b"\x00\x01\xff\xfe", ["not a text file"]),
        (b"a\x00b", ["not valid YAML"]),
        ("- 1\n", ["a list"]),
        ("meta_learning: [1\n", ["line 2", "not valid YAML"]),
        ("model:\n  hidden_dim: 2\n  hidden_dim: 3\n", ["line 3", "stands twice"]),
        ("\nmeta_learning:\n  innerlr: 1\n", ["line 3", "'meta_learning.innerlr'", "'inner_lr'"]),
        ("modl:\n  hidden_dim: 2\n", ["line 1", "'modl'", "'model'"]),
        ("inner_lr: 2\n", ["'meta_learning.inner_lr'"]),
        ("meta_learning:\n  k_shot: 2\n", ["line 2", "'task_distribution.k_shot'"]),
        ("meta_learning:\n  num_inner_steps: -1\n", ["line 2", "num_inner_steps", "greater", "-1"]),
        ("meta_learning:\n  inner_lr: .nan\n", ["line 2", "inner_lr", "finite"]),
        ("learner:\n  rate: .inf\n", ["line 2", "learner.rate", "finite"]),
        ("meta_learning:\n  inner_lr: 0\n", ["inner_lr", "greater than 0"]),
        ("meta_learning:\n  inner_lr: fast\n", ["line 2", "inner_lr", "number", "'fast'"]),
        ("meta_learning:\n  seed: true\n", ["seed", "integer", "True"]),
        ("task_distribution:\n  k_shot: 0\n", ["line 2", "k_shot", "1"]),
        ("task_distribution:\n  task_families: []\n", ["task_families", "at least 1"]),
        ("task_distribution:\n  task_families:\n    - sinusoid\n    - 3\n", ["line 4", "task_families[1]"]),
        ("model: 3\n", ["line 1", "model", "section"]),
        ("1: 2\n", ["keys are texts"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["line 1", "not valid YAML"]),
        ("learner: &a\n  x: *a\n", ["nested"]),
        ("learner: " + "[" * 4000, ["not valid YAML"]),
        ("learner:\n  when: !!timestamp 2001-01-01\n", ["plain YAML"]),
    ],
)
def test_what_a_file_can_get_wrong(said, text, parts):
    sentence = said(text)
    assert all(part in sentence for part in parts), sentence


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigurationError, match="no configuration file"):
        MetaLearningConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match="cannot read"):
        MetaLearningConfig.from_yaml(tmp_path)


def test_a_flag_is_named_in_its_own_fault(said):
    sentence = said("model:\n  hidden_dim: 8\n", "model.num_layers=0")
    assert sentence.startswith("--set model.num_layers=0: ")
    assert "no keys below" in said("model: 3\n", "model.hidden_dim=3")


@pytest.mark.parametrize("text", ["inner_lr", "=3", "a..b=3", "a=[1", ""])
def test_malformed_overrides(text):
    with pytest.raises(ConfigurationError, match="--set"):
        Override.parse(text)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["maml", "linear", "INFO", 0, 1, -1, math.nan])
)
NAMES = st.sampled_from([*MetaLearningConfig.model_fields, "inner_lr", "k_shot", "backbone", "x"]) | st.text(max_size=4)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, TREES, max_size=5))
def test_any_mapping_is_a_configuration_or_a_sentence(data):
    try:
        config = MetaLearningConfig.from_dict(data, where="test")
    except ConfigurationError as error:
        said = str(error)
        assert said
        return
    assert MetaLearningConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_a_configuration_or_a_sentence(tmp_path, data):
    """The shipped default with bytes changed, cut or replaced by noise."""
    content = bytearray((CONFIGS / "default.yaml").read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "noise"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
                st.sampled_from(b"\n\t :-[]{}&*!|>'\"%@`0aZ\xff")
            )
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        content = bytearray(data.draw(st.binary(max_size=60) | st.text(max_size=60).map(str.encode)))
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    try:
        config = MetaLearningConfig.from_yaml(path)
    except ConfigurationError as error:
        said = str(error)
        assert str(path) in said
        return
    assert MetaLearningConfig.from_dict(config.to_dict()) == config
