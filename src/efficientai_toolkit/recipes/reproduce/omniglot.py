"""Few-shot classification of characters on Omniglot's standard split, rotations as classes of their own."""

from __future__ import annotations

from typing import Any

from .table import Row, Table

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))  # way, shot

# Published accuracies in per cent, in the order of `TASKS`.
PROTONET = (98.8, 99.7, 96.0, 98.9)
MAML = (98.7, 99.9, 95.8, 98.9)
META_SGD = (99.53, 99.93, 95.93, 98.97)
MAML_PP = (99.47, 99.93, 97.65, 99.33)


def _rows(
    name: str,
    line: str,
    algorithm: str,
    paper: tuple[float, ...],
    source: str,
    *,
    learner: dict[str, Any] | None = None,
    task_params: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    note: str = "",
    ways: tuple[int, ...] = (5, 20),
    **meta_learning: Any,
) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{name}-{way}way-{shot}shot",
            line,
            f"{way}-way {shot}-shot",
            {
                "meta_learning": {"algorithm": algorithm, **meta_learning},
                "learner": learner or {},
                "task_distribution": {"n_way": way, "k_shot": shot, "task_params": task_params or {}},
                "model": model or {},
            },
            published,
            source,
            note,
        )
        for (way, shot), published in zip(TASKS, paper, strict=True)
        if way in ways
    )


# The gradient learners run on the strided network of MAML's own Omniglot experiments, prototypes on the pooled one.
STRIDED = {"backbone": "conv4_strided"}

TABLE = Table(
    name="omniglot",
    title="Omniglot",
    about=(
        "Accuracy in per cent on 600 episodes of characters that training never saw, 15 query images a class, after "
        "the trained number of inner steps, ± 95 % interval; the paper's number in brackets. 28 × 28 images, standard "
        "split, Conv-4 with 64 filters. The schedules are short ones that fit two CPU cores (the papers: 60,000 "
        "iterations); batch norm uses the statistics of its batch, as in all four papers but ProtoNet's."
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
        "model": {"backbone": "conv4", "hidden_dim": 64, "num_layers": 4},
        "evaluation": {"steps": [0, 1, 3]},
        "logging": {"log_interval": 50, "tensorboard_enabled": False},
    },
    evaluation={"query_per_class": 15, "num_test_tasks": 600},
    rows=(
        *_rows(
            "protonet",
            "Prototypical network",
            "protonet",
            PROTONET,
            "Snell et al. 2017",
            task_params={"train_n_way": 20},
            note="20-way episodes in training (60 in the paper), one a step",
            meta_batch_size=1,
            num_meta_iterations=3000,
        ),
        *_rows(
            "maml",
            "MAML",
            "maml",
            MAML,
            "Finn et al. 2017",
            model=STRIDED,
            meta_batch_size=16,
            num_meta_iterations=5000,
            inner_lr=0.4,
            num_inner_steps=1,
        ),
        *_rows(
            "meta_sgd",
            "Meta-SGD",
            "meta_sgd",
            META_SGD,
            "Li et al. 2017",
            model=STRIDED,
            learner={"rate_range": [0.05, 0.4]},
            meta_batch_size=16,
            num_meta_iterations=5000,
            num_inner_steps=1,
        ),
        *_rows(
            "maml++",
            "MAML++",
            "maml++",
            MAML_PP,
            "Antoniou et al. 2019",
            model=STRIDED,
            learner={"multi_step_iterations": 1000},
            meta_batch_size=8,
            num_meta_iterations=4000,
            inner_lr=0.1,
            num_inner_steps=5,
        ),
    ),
    percent=True,
)
