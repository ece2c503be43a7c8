"""Meta-train on small linear tasks for about a second, then learn unseen ones from five examples each."""

from __future__ import annotations

from efficientai_toolkit import ReptileLearner, SimpleClassifier, TaskConfig, TaskDistribution, cross_entropy_loss

tasks = TaskDistribution(
    [TaskConfig(f"linear_{i}", "linear_classification", num_classes=2, input_dim=2, support_size=5) for i in range(20)],
    seed=0,
)
train_tasks, test_tasks = tasks.split_tasks(train_ratio=0.8)

learner = ReptileLearner(SimpleClassifier(input_dim=2, num_classes=2), inner_lr=0.01, outer_lr=0.001, num_inner_steps=5)
unseen = [test_tasks.sample_episode()[1:] for _ in range(200)]
before = learner.evaluate(unseen, cross_entropy_loss)

for iteration in range(1000):
    metrics = learner.meta_train_step(train_tasks.sample_batch(4), cross_entropy_loss)
    if (iteration + 1) % 200 == 0:
        print(f"iteration {iteration + 1:4d}  query loss {metrics['query_loss']:.3f}")

after = learner.evaluate(unseen, cross_entropy_loss)
print(
    f"accuracy on unseen tasks after 5 steps on 5 examples: {after['step_5_acc']:.2f} ± {after['step_5_acc_ci95']:.2f}"
)
print(f"an untrained model, before and after the same steps:  {before['step_0_acc']:.2f}, {before['step_5_acc']:.2f}")

support_x, support_y, query_x, query_y = unseen[0]
adapted = learner.adapt(support_x, support_y)
correct = (adapted(query_x).argmax(axis=1) == query_y).sum().item()
print(f"one new task: {correct} of {len(query_y)} right")
