"""Meta-train on 20 small linear tasks for about a second, then learn unseen ones from five examples each."""

from __future__ import annotations

from efficientai_toolkit import ReptileLearner, SimpleClassifier, TaskConfig, TaskDistribution, cross_entropy_loss


def linear_tasks(names: range, seed: int) -> TaskDistribution:
    settings = {"num_classes": 2, "input_dim": 2, "support_size": 5, "query_size": 50}
    return TaskDistribution([TaskConfig(f"linear_{i}", "linear_classification", **settings) for i in names], seed)


train_tasks, unseen_tasks = linear_tasks(range(20), seed=0), linear_tasks(range(20, 320), seed=1)
unseen = [unseen_tasks.sample_episode()[1:] for _ in range(300)]

learner = ReptileLearner(SimpleClassifier(input_dim=2, num_classes=2), inner_lr=0.01, outer_lr=0.001, num_inner_steps=5)
before = learner.evaluate(unseen, cross_entropy_loss)
for iteration in range(1, 1001):
    metrics = learner.meta_train_step(train_tasks.sample_batch(4), cross_entropy_loss)
    if iteration % 200 == 0:
        print(f"iteration {iteration:4d}: query loss {metrics['query_loss']:.3f}")
after = learner.evaluate(unseen, cross_entropy_loss)

print("accuracy on unseen tasks, from 5 examples each:")
print(f"  meta-trained, after 5 steps: {after['step_5_acc']:.2f} ± {after['step_5_acc_ci95']:.2f}")
print(f"  untrained:                   {before['step_0_acc']:.2f} ± {before['step_0_acc_ci95']:.2f}")
print(f"  untrained, after 5 steps:    {before['step_5_acc']:.2f} ± {before['step_5_acc_ci95']:.2f}")

support_x, support_y, query_x, query_y = unseen[0]
adapted = learner.adapt(support_x, support_y)
correct = (adapted(query_x).argmax(axis=1) == query_y).sum().item()
print(f"one of them: {correct} of {len(query_y)} right")
