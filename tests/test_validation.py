"""Validation while training measures as `evaluate` does afterwards."""

from __future__ import annotations

import pytest

from efficientai_toolkit import MetaLearner
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.runs.train import train


@pytest.mark.parametrize("transductive", [True, False])
def test_validation_is_transductive_where_evaluation_is(transductive, tmp_path, monkeypatch):
    measure, seen = MetaLearner.evaluate_per_task, []

    def noted(*args, **named):
        seen.append(named.get("transductive"))
        return measure(*args, **named)

    monkeypatch.setattr(MetaLearner, "evaluate_per_task", noted)
    config = MetaLearningConfig(
        meta_learning={"num_meta_iterations": 4, "eval_interval": 2, "meta_batch_size": 2, "num_inner_steps": 1},
        task_distribution={"num_train_tasks": 4, "num_val_tasks": 2, "num_test_tasks": 2, "query_size": 4},
        model={"hidden_dim": 4},
        evaluation={"transductive": transductive},
        logging={"tensorboard_enabled": False},
        paths={"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "latest")},
    )
    report = train(config)
    assert seen
    assert set(seen) == {transductive}
    assert report["best"]["val_loss"] > 0
