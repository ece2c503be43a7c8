"""AdaLoRA in plain fine-tuning: the budget is spent, the loss falls, and the factors stay near orthonormal."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.adapters import adapter_config
from efficientai_toolkit.adapters.adalora import AdaLoRAConfig, allot, budget, init_importance, orthogonality
from efficientai_toolkit.recipes.finetune import finetune, read_task
from text_models import write_encoder, write_intents

OPTIONS = {"rank": 3, "target_rank": 1, "alpha": 3.0}
TARGETS = ["query", "value"]
LAYERS = 6  # query and value of three


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    encoder, dataset = write_encoder(folder / "encoder"), write_intents(folder / "mine.csv")
    return read_task(str(dataset), None, folder), {
        "source": str(encoder),
        "target_modules": TARGETS,
        "learning_rate": 0.01,
        "epochs": 6,
        "max_length": 16,
    }


def kept(done) -> int:
    return sum(int(mx.sum(a != 0).item()) for path, a in done.adapted.fast.items() if path.endswith("lora_e"))


def test_fine_tuning_spends_the_budget_and_learns(settings):
    task, options = settings
    done = finetune(task, "adalora", options=OPTIONS, **options)
    assert kept(done) == LAYERS
    losses = [row["train_loss"] for row in done.curve]
    assert losses[-1] < 0.6 * losses[0]
    fixed = finetune(task, "adalora", options={**OPTIONS, "target_rank": 3}, **options)
    assert kept(fixed) == 3 * LAYERS


def test_the_regulariser_is_in_the_loss(settings):
    task, options = settings
    far, near = (
        finetune(task, "adalora", options={**OPTIONS, "orthogonality": weight}, **{**options, "epochs": 2})
        for weight in (0.0, 10.0)
    )
    assert orthogonality(near.adapted.fast).item() < 0.5 * orthogonality(far.adapted.fast).item()
    # What is reported is the loss of the task alone, of which the penalty is no part.
    assert near.curve[0]["train_loss"] < 3


def test_the_schedule_is_scaled_to_the_run():
    config = AdaLoRAConfig(**OPTIONS)
    assert (config.warmup, config.cooldown, config.total_steps) == (100, 300, 1000)
    params = {"x.lora_a": mx.ones((4, 3)), "x.lora_b": mx.ones((3, 4)), "x.lora_e": mx.array([3.0, 2.0, 1.0])}
    counts = []
    for total in (1, 2, 10, 60, 3000):
        training = config.training(total)
        assert training is not None
        state = training.init(params)
        now = params
        for step in sorted({1, total // 2, total} - {0}):
            now, state = training.update(now, params, state, step)
        counts.append(int(mx.sum(now["x.lora_e"] != 0).item()))
    assert counts == [1] * 5
    assert adapter_config("lora").training(10) is None


def test_equal_scores_keep_the_budget_and_the_cooldown_keeps_its_choice():
    config = AdaLoRAConfig(rank=3, target_rank=1, warmup=0, cooldown=4, total_steps=8, interval=1)
    params = {"x.lora_a": mx.ones((4, 3)), "x.lora_b": mx.ones((3, 4)), "x.lora_e": mx.ones(3)}
    state = init_importance(params)
    same, _ = allot(config, params, params, state, step=4)
    assert mx.sum(same["x.lora_e"] != 0).item() == budget(config, 4, 1) == 1
    grads = {**params, "x.lora_e": mx.array([1.0, 9.0, 2.0])}
    chosen, state = allot(config, params, grads, state, step=4)
    assert np.array(chosen["x.lora_e"]).tolist() == [0, 1, 0]
    other = {**params, "x.lora_e": mx.array([99.0, 0.0, 0.0])}
    later, after = allot(config, params, other, state, step=5)
    assert np.array(later["x.lora_e"]).tolist() == [0, 1, 0]
    assert all(after.mean[path] is state.mean[path] for path in state.mean)
