"""What a type checker makes of a user's script; `pyright` reads this file, nothing runs it."""
# pyright: strict, reportMissingTypeStubs=false, reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import mlx.core as mx

from efficientai_toolkit import (
    MAML,
    LoRAAdapter,
    LoRAConfig,
    MAMLLearner,
    MetaLearningConfig,
    PrefixTuningAdapter,
    PromptTuningAdapter,
    SimpleClassifier,
    TaskConfig,
    TaskDistribution,
    activate,
    adapter_state,
    attach,
    build,
    detach,
    merge,
)
from efficientai_toolkit.learners.base import MetaLearner

tasks = TaskDistribution([TaskConfig("a", "linear_classification")])
model = SimpleClassifier()
learner = MAMLLearner(model, inner_lr=0.1, first_order=True)
assert_type(learner.meta_train(tasks, num_iterations=3), dict[str, list[float]])
_, support_x, support_y, query_x, query_y = tasks.sample_episode()
assert_type(learner.adapt(support_x, support_y)(query_x), mx.array)
assert_type(learner.evaluate(tasks.sample_batch(4)), dict[str, float])
assert_type(MAML(model, lr_inner=0.1), MAML)
MAMLLearner(modl=1)  # pyright: ignore[reportCallIssue]

assert_type(attach(model, LoRAConfig(rank=2)), SimpleClassifier)
assert_type(activate(model, {"default": 0.5}), SimpleClassifier)
assert_type(adapter_state(model), dict[str, mx.array])
assert_type(merge(detach(model)), SimpleClassifier)
assert_type(LoRAAdapter(model, r=8, lora_alpha=16).add_adapter(), SimpleClassifier)
assert_type(PrefixTuningAdapter(model).add_prefix(), SimpleClassifier)
assert_type(PromptTuningAdapter(model).add_prompt(), SimpleClassifier)

config = MetaLearningConfig(inner_lr=0.1, model={"hidden_dim": 64})
assert_type(config.inner_lr, float)
assert_type(config.patience, int | None)
config.seed = "1"  # pyright: ignore[reportAttributeAccessIssue]
print(config.inner_rl)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]
assert_type(build(config).learner, MetaLearner)
