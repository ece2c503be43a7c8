"""efficientai-toolkit: meta-learning and parameter-efficient fine-tuning on MLX.

Every public name can be imported from here; each is loaded when it is first asked for. Type checkers and editors read
`__init__.pyi`, which `docs/build_api.py` writes from `_NAMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .devices import keep_freed_memory, preload_blas

__version__ = "0.1.0"

# Before anything imports mlx: afterwards it is too late.
preload_blas()
keep_freed_memory()

_NAMES = {
    ".adapters.adalora": ("AdaLoRAConfig",),
    ".adapters.attach": (
        "activate",
        "adapter_state",
        "attach",
        "count_parameters",
        "detach",
        "load_adapter_state",
        "merge",
    ),
    ".adapters.base": ("Adapter", "AdapterConfig"),
    ".adapters.bitfit": ("BitFitConfig",),
    ".adapters.bottleneck": ("HoulsbyConfig", "ParallelConfig", "PfeifferConfig"),
    ".adapters.compacter": ("CompacterConfig",),
    ".adapters.dora": ("DoRAConfig",),
    ".adapters.formats": ("fuse_folder",),
    ".adapters.formats_mlx": ("export_mlx_lm", "import_mlx_lm"),
    ".adapters.formats_peft": ("export_peft", "import_peft"),
    ".adapters.ia3": ("IA3Config",),
    ".adapters.linear": ("LinearAdapterConfig",),
    ".adapters.lora": ("LoRAConfig", "RsLoRAConfig"),
    ".adapters.p_tuning": ("PTuningConfig",),
    ".adapters.prefix": ("PrefixConfig", "PrefixMLPConfig"),
    ".adapters.prompt_tuning": ("PromptConfig",),
    ".adapters.vera": ("VeRAConfig",),
    ".adapters.wrappers": (
        "AdaLoRAAdapter",
        "BitFitAdapter",
        "BottleneckAdapter",
        "CompacterAdapter",
        "DoRAAdapter",
        "IA3Adapter",
        "LoRAAdapter",
        "PrefixTuningAdapter",
        "PromptTuningAdapter",
        "VeRAAdapter",
    ),
    ".backbones": ("build_backbone",),
    ".backbones.conv4": ("Conv4", "StridedConv4"),
    ".backbones.language_model": ("LanguageModel", "load_language_model", "next_token_loss"),
    ".backbones.mlp": ("MLP", "SimpleClassifier"),
    ".backbones.resnet12": ("ResNet12",),
    ".checkpoint": ("read_header", "read_npz", "write_npz"),
    ".config": ("MetaLearningConfig",),
    ".continual.objects": ("EWC", "ExperienceReplay"),
    ".continual.progressive": ("ProgressiveNetwork",),
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
    ".learners.baseline_pp": ("BaselinePlusPlus",),
    ".learners.cavia": ("CAVIALearner",),
    ".learners.fomaml": ("FOMAMLLearner",),
    ".learners.imaml": ("IMAMLLearner",),
    ".learners.inner_loop": ("inner_loop",),
    ".learners.learner": ("Learner", "Problem"),
    ".learners.leo": ("LEOLearner",),
    ".learners.maml": ("MAML", "MAMLLearner"),
    ".learners.maml_pp": ("LSLRLearner", "MAMLPlusPlusLearner"),
    ".learners.matching": ("MatchingNetwork",),
    ".learners.meta_curvature": ("MAMLEnhancedLearner", "MetaCurvatureLearner"),
    ".learners.meta_sgd": ("MetaSGDLearner",),
    ".learners.proto_maml": ("ProtoMAMLLearner",),
    ".learners.protonet": ("PrototypicalNetwork",),
    ".learners.r2d2": ("R2D2Learner",),
    ".learners.relation": ("RelationNetwork",),
    ".learners.reptile": ("ReptileLearner",),
    ".learners.update_rules": ("UpdateRule",),
    ".logging": ("setup_logger",),
    ".nn.functional": ("functional", "trainable"),
    ".nn.layers": ("Conv2d", "Dropout", "EpisodicBatchNorm", "Linear", "conv2d", "max_pool2d"),
    ".nn.losses": ("cross_entropy_loss", "mse_loss"),
    ".recipes.baseline": ("joint_pretraining",),
    ".recipes.compare": ("BaselineComparison",),
    ".runs.build": ("build", "restore"),
    ".runs.evaluate": ("evaluate_checkpoint",),
    ".runs.experiment": ("ExperimentManager",),
    ".runs.report": ("write_report",),
    ".runs.train": ("resume", "train"),
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
        import difflib

        close = difflib.get_close_matches(name, _MODULE_OF, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
