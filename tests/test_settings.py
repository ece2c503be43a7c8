"""What a setting may be, in one place: learners, adapters and backbones refuse alike."""

from __future__ import annotations

import pytest

from efficientai_toolkit import LoRAConfig, SimpleClassifier, learner_class
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import AdapterError, ConfigurationError
from efficientai_toolkit.runs.build import build_learner
from efficientai_toolkit.settings import Count, as_annotated


@pytest.mark.parametrize(
    ("value", "annotation", "strict", "found"),
    [([1, 2.5], tuple[float, float], False, (1.0, 2.5)), (3, Count, True, 3), (None, Count | None, False, None)],
)
def test_a_value_becomes_what_its_annotation_says(value, annotation, strict, found):
    assert as_annotated(value, annotation, strict=strict) == found


@pytest.mark.parametrize(
    ("value", "annotation", "strict", "said"),
    [
        ([1], tuple[float, float], False, "should have more items"),
        ([1, 2, 3], tuple[float, float], False, "should have at most 2 items after validation, not 3"),
        ([1, 2], tuple[float, float], True, "should be a valid tuple"),
        (True, Count, False, "should be a number"),
        (1, bool, False, "should be true or false"),
        ("no", bool, False, "should be true or false"),
        (float("inf"), float, True, "should be a finite number"),
    ],
)
def test_what_it_should_be_is_said(value, annotation, strict, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        as_annotated(value, annotation, strict=strict)


def test_an_adapter_takes_no_boolean_for_a_number():
    with pytest.raises(AdapterError, match="LoRAConfig: rank should be a number, got True"):
        LoRAConfig(rank=True)


@pytest.mark.parametrize("pair", [[-0.1, 0.4], [0.4, 0.1], [-0.2, -0.1]])
def test_rates_that_meta_sgd_cannot_start_from(pair):
    config = MetaLearningConfig(algorithm="meta_sgd", learner={"rate_range": pair})
    with pytest.raises(ConfigurationError, match=r"rate_range must be a pair 0 ≤ low ≤ high, got \("):
        build_learner(config, SimpleClassifier())


@pytest.mark.parametrize("value", ["no", "false", 1, None])
def test_compile_is_true_or_false(value):
    with pytest.raises(ConfigurationError, match=f"compile must be true or false, got {value!r}"):
        build_learner(MetaLearningConfig(learner={"compile": value}), SimpleClassifier())
    assert learner_class("maml")(SimpleClassifier(), compile=False).iteration == 0
