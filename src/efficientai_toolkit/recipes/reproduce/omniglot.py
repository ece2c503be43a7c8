"""Few-shot classification of characters on Omniglot's standard split, rotations as classes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .table import Row, Table

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))  # way, shot

# Published accuracies in per cent, in the order of `TASKS`.
PROTONET = (98.8, 99.7, 96.0, 98.9)
MAML = (98.7, 99.9, 95.8, 98.9)
META_SGD = (99.53, 99.93, 95.93, 98.97)
MAML_PP = (99.47, 99.93, 97.65, 99.33)
# Of prototypical networks, by shot: with five, validation no longer rises after a thousand.
ITERATIONS = {1: 3000, 5: 1500}


def _prototypes() -> Iterator[Row]:
    """One training a shot, in 20-way episodes; 5 and 20 ways are two measurements of it."""
    for (way, shot), published in zip(TASKS, PROTONET, strict=True):
        yield Row(
            f"protonet-{way}way-{shot}shot",
            "Prototypical network",
            f"{way}-way {shot}-shot",
            {
                "meta_learning": {
                    "algorithm": "protonet",
                    "meta_batch_size": 1,
                    "num_meta_iterations": ITERATIONS[shot],
                },
                "learner": {},
                "task_distribution": {"n_way": 5, "k_shot": shot, "task_params": {"train_n_way": 20}},
                "model": {"backbone": "conv4", "hidden_dim": 64},
            },
            published,
            "Snell et al. 2017",
            "64 filters; 20-way episodes in training (60 in the paper), one a step",
            evaluation={"n_way": way},
            trained_as=f"protonet-5way-{shot}shot",
        )


def _gradient(
    name: str,
    line: str,
    paper: tuple[float, ...],
    source: str,
    *,
    iterations: tuple[int, int, int, int],
    learner: dict[str, Any] | None = None,
    **meta_learning: Any,
) -> Iterator[Row]:
    """The strided network of MAML's own Omniglot experiments; `iterations` in the order of `TASKS`."""
    for (way, shot), published, count in zip(TASKS, paper, iterations, strict=True):
        # Twenty ways are four times the images.
        tasks = meta_learning["meta_batch_size"] // (4 if way == 20 else 1)
        yield Row(
            f"{name}-{way}way-{shot}shot",
            line,
            f"{way}-way {shot}-shot",
            {
                "meta_learning": {
                    "algorithm": name,
                    **meta_learning,
                    "num_meta_iterations": count,
                    "meta_batch_size": tasks,
                },
                "learner": learner or {},
                "task_distribution": {"n_way": way, "k_shot": shot},
                "model": {"backbone": "conv4_strided", "hidden_dim": 32},
            },
            published,
            source,
            "32 filters, strided convolutions",
        )


TABLE = Table(
    name="omniglot",
    title="Omniglot",
    about=(
        "Accuracy in per cent on 600 episodes of characters that training never saw, 15 query images a class, after "
        "the trained number of inner steps, ± 95 % interval; the paper's number in brackets. 28 × 28 images, standard "
        "split, Conv-4. The schedules are short ones that fit two CPU cores (the papers: 16 or 32 tasks a step for "
        "60,000 iterations, 64 filters); batch norm uses the statistics of its batch, as in the papers but ProtoNet's."
    ),
    base={
        "meta_learning": {"eval_interval": 500, "save_interval": 500, "outer_lr": 0.002},
        "optimizer": {"schedule": "cosine"},
        "task_distribution": {
            "task_families": ["omniglot"],
            "query_per_class": 5,
            "num_train_tasks": None,
            "num_val_tasks": 50,
            "num_test_tasks": 50,
        },
        "model": {"num_layers": 4},
        "evaluation": {"steps": [0, 1, 3]},
        "logging": {"log_interval": 50, "tensorboard_enabled": False},
    },
    evaluation={"query_per_class": 15, "num_test_tasks": 600},
    rows=(
        *_prototypes(),
        *_gradient(
            "maml",
            "MAML",
            MAML,
            "Finn et al. 2017",
            iterations=(4500, 2500, 4500, 2500),
            meta_batch_size=8,
            inner_lr=0.4,
            num_inner_steps=1,
        ),
        *_gradient(
            "meta_sgd",
            "Meta-SGD",
            META_SGD,
            "Li et al. 2017",
            iterations=(4500, 2500, 4500, 2500),
            learner={"rate_range": [0.05, 0.4]},
            meta_batch_size=8,
            num_inner_steps=1,
        ),
        *_gradient(
            "maml++",
            "MAML++",
            MAML_PP,
            "Antoniou et al. 2019",
            iterations=(9000, 5000, 4500, 2500),
            learner={"multi_step_iterations": 1000},
            meta_batch_size=4,
            inner_lr=0.1,
            num_inner_steps=5,
        ),
    ),
    percent=True,
)
