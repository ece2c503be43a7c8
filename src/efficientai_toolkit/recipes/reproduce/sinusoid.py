"""Few-shot regression of sinusoids, the protocol of Finn et al. (2017)."""

from __future__ import annotations

from typing import Any

from .table import Row, Table

PARK = "Park & Oliva 2019, Table 1"

# Published errors, 5-shot and 10-shot.
ANCHORS = {
    "maml": (0.686, 0.435),
    "meta_sgd": (0.482, 0.258),
    "lslr": (0.528, 0.269),
    "mc1": (0.426, 0.239),
    "mc2": (0.405, 0.201),
}

LONGER: dict[str, Any] = {"num_meta_iterations": 30_000}
LEO: dict[str, Any] = {
    "learner": {"decodes": "all", "finetune_steps": 1, "kl_weight": 0.0001},
    "inner_lr": 0.001,
    "outer_lr": 0.002,
    "gradient_clip": 1.0,
    "num_meta_iterations": 10_000,
}


def _pair(
    name: str,
    line: str,
    algorithm: str,
    *,
    learner: dict[str, Any] | None = None,
    paper: tuple[float | None, float | None] = (None, None),
    source: str = "",
    note: str = "",
    shots: tuple[int, ...] = (5, 10),
    tasks: dict[str, Any] | None = None,
    where: str = "",
    optimizer: dict[str, Any] | None = None,
    **meta_learning: Any,
) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{name}-{shot}",
            line,
            f"{shot}-shot{where}",
            {
                "meta_learning": {"algorithm": algorithm, **meta_learning},
                "learner": learner or {},
                "optimizer": optimizer or {},
                "task_distribution": {"k_shot": shot, "query_size": shot, **(tasks or {})},
            },
            paper[i] if i < len(paper) else None,
            source,
            note,
        )
        for i, shot in enumerate(shots)
    )


def _mixed(name: str, line: str, algorithm: str, **settings: Any) -> tuple[Row, ...]:
    tasks = {"task_families": ["mixed_regression"], "task_params": {"kinds": ["sine", "line"], "noise": 0.3}}
    return _pair(name, line, algorithm, shots=(5,), tasks=tasks, where=" sine/line", **settings)


TABLE = Table(
    name="sinusoid",
    title="Sinusoids",
    about=(
        "Mean squared error after the trained number of inner steps, in 2,000 episodes of 1,525 unseen tasks with 100 "
        "query points each, ± 95 % interval; the paper's number in brackets. Amplitude in [0.1, 5], phase in [0, π], "
        "x in [−5, 5]; MLP 1-40-40-1, He initialisation, 25 tasks a meta-batch, as many query as support points in "
        "training. Adam, its rate falling to zero along a cosine, where the papers hold 0.001 for 60,000 to 70,000 "
        "iterations."
    ),
    base={
        "meta_learning": {
            "meta_batch_size": 25,
            "num_meta_iterations": 20_000,
            "inner_lr": 0.01,
            "outer_lr": 0.008,
            "num_inner_steps": 1,
            "eval_interval": 10_000,
            "save_interval": 10_000,
        },
        "optimizer": {"schedule": "cosine"},
        "task_distribution": {
            "task_families": ["sinusoid"],
            "num_train_tasks": None,
            "num_val_tasks": 200,
            "num_test_tasks": 100,
        },
        "model": {"backbone": "mlp", "hidden_dim": 40, "num_layers": 2},
        "evaluation": {"steps": [0, 1, 2, 5, 10]},
        "logging": {"log_interval": 500, "tensorboard_enabled": False},
    },
    evaluation={"query_size": 100, "num_test_tasks": 2000},
    rows=(
        *_pair("reptile", "Reptile", "reptile", num_inner_steps=10, inner_lr=0.003, outer_lr=0.004, gradient_clip=1.0),
        *_pair("maml", "MAML", "maml", paper=ANCHORS["maml"], source=PARK, shots=(5, 10, 20)),
        *_pair(
            "meta_sgd",
            "Meta-SGD",
            "meta_sgd",
            paper=ANCHORS["meta_sgd"],
            source=PARK,
            note="rates learned for one step diverge over five, as the records show",
        ),
        *_pair("lslr", "Per-layer rates (LSLR)", "lslr", paper=ANCHORS["lslr"], source=PARK),
        *_pair(
            "mc1",
            "Meta-Curvature, MC1",
            "meta_curvature",
            learner={"kind": "mc1"},
            paper=ANCHORS["mc1"],
            source=PARK,
            note="the output's matrix M_o of every layer stays the identity",
            num_meta_iterations=60_000,
            outer_lr=0.004,
        ),
        *_pair(
            "mc2",
            "Meta-Curvature, MC2",
            "meta_curvature",
            learner={"kind": "mc2"},
            paper=ANCHORS["mc2"],
            source=PARK,
            **LONGER,
        ),
        *_pair("maml_enhanced", "MAML Enhanced (MC2 + LSLR)", "maml_enhanced", **LONGER),
        *_pair("cavia", "CAVIA", "cavia", inner_lr=1.0, outer_lr=0.004),
        *_pair(
            "imaml",
            "iMAML",
            "imaml",
            learner={"strength": 1.0, "cg_steps": 5, "inner_clip": 20.0},
            num_inner_steps=10,
            inner_lr=0.001,
            outer_lr=0.002,
            gradient_clip=1.0,
            num_meta_iterations=4000,
        ),
        *_pair("leo", "LEO", "leo", num_inner_steps=3, **LEO),
        *_pair(
            "r2d2",
            "R2-D2 (ridge head)",
            "r2d2",
            learner={"strength": 10.0},
            optimizer={"warmup_iterations": 500},
            gradient_clip=1.0,
            num_meta_iterations=8000,
        ),
        *_pair(
            "alpaca",
            "ALPaCA (Bayesian head)",
            "alpaca",
            paper=(0.02, None),
            source="GP-VIB (arXiv:2009.03228), a Gaussian-process head, for ALPaCA's row: the lowest known to us",
            outer_lr=0.002,
        ),
        *_mixed("maml-mixed", "MAML", "maml"),
        *_mixed("leo-mixed", "LEO", "leo", num_inner_steps=3, **LEO),
        *_mixed("leo-mixed-ablated", "LEO without latent adaptation", "leo", num_inner_steps=0, **LEO),
    ),
)
