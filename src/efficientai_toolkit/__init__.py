"""efficientai-toolkit: meta-learning and parameter-efficient fine-tuning on MLX.

Every public name can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .devices import preload_blas

__version__ = "0.1.0"

# Before anything imports mlx: afterwards it is too late.
preload_blas()

_NAMES = {
    ".backbones": ("build_backbone",),
    ".backbones.conv4": ("Conv4", "StridedConv4"),
    ".backbones.mlp": ("MLP", "SimpleClassifier"),
    ".checkpoint": ("read_npz", "write_npz"),
    ".config": ("MetaLearningConfig",),
    ".devices": ("device_info", "select_device"),
    ".errors": (
        "AdapterError",
        "CheckpointError",
        "ConfigurationError",
        "DataError",
        "DeviceError",
        "DivergenceError",
        "ModelError",
        "OutputError",
        "TaskSamplingError",
        "ToolkitError",
    ),
    ".learners": ("learner_class",),
    ".learners.alpaca": ("ALPaCALearner",),
    ".learners.anil": ("ANILLearner",),
    ".learners.base": ("MetaLearner",),
    ".learners.cavia": ("CAVIALearner",),
    ".learners.fomaml": ("FOMAMLLearner",),
    ".learners.imaml": ("IMAMLLearner",),
    ".learners.inner_loop": ("inner_loop",),
    ".learners.learner": ("Learner", "Problem"),
    ".learners.leo": ("LEOLearner",),
    ".learners.maml": ("MAML", "MAMLLearner"),
    ".learners.maml_pp": ("LSLRLearner", "MAMLPlusPlusLearner"),
    ".learners.meta_curvature": ("MAMLEnhancedLearner", "MetaCurvatureLearner"),
    ".learners.meta_sgd": ("MetaSGDLearner",),
    ".learners.r2d2": ("R2D2Learner",),
    ".learners.reptile": ("ReptileLearner",),
    ".learners.update_rules": ("UpdateRule",),
    ".logging": ("setup_logger",),
    ".nn.functional": ("functional", "trainable"),
    ".nn.layers": ("Conv2d", "Dropout", "EpisodicBatchNorm", "Linear", "conv2d", "max_pool2d"),
    ".nn.losses": ("cross_entropy_loss", "mse_loss"),
    ".recipes.compare": ("BaselineComparison",),
    ".runs.experiment": ("ExperimentManager",),
    ".tasks": ("family",),
    ".tasks.base": ("Family",),
    ".tasks.build": ("Splits", "build_splits"),
    ".tasks.distribution": ("TaskConfig", "TaskDistribution"),
    ".tasks.episode": ("Episode", "EpisodeStack", "stack_episodes"),
    ".tasks.images": ("ImageFamily",),
    ".tasks.regression": ("RegressionFamily",),
    ".tasks.sinusoid": ("SinusoidalTaskGenerator",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
