"""Adapters in and out of other libraries' folders, and whole models with the adapter folded in.

What `adapt` and `finetune` learned beyond the adapter has no place in those formats. It lies in the same folder, where
the other libraries leave it alone:

* `labels.json`: `labels`, in the order of the classes; the `algorithm` and its `options`; the `pooling` of token states
  to one vector a text, and whether it is scaled to length 1 (`normalize`); the `threshold` of "none of these".
* `head.safetensors`: of a learner that adapts weights, `head.weight` (C, d) and `head.bias` (C,) for the logits.
* `learned.safetensors`: of a learner that adapts no weights, what it made of the examples in place of a head. Of a
  prototypical network it is `prototypes` (C, d), the labels' mean vectors; logits are −‖z − c‖², or
  `scale` · cos(z, c). Of the others it has a place for every class that there could have been, of which the first C
  are the labels: `having`, where there is one, is true of those with examples, and the others' logits take no part.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from ..adapters import ADAPTERS, AdapterConfig
from ..adapters.attach import flat_parameters
from ..adapters.attached import adapters_of
from ..adapters.fixed import fixed_arrays
from ..adapters.formats import CONFIG, HEAD, fuse_folder, read_config, save_arrays, spare_own
from ..adapters.formats_mlx import export_mlx_lm, import_mlx_lm
from ..adapters.formats_peft import export_peft, import_peft
from ..backbones import backbone_class
from ..checkpoint import write_npz
from ..config import MetaLearningConfig
from ..errors import AdapterError, ConfigurationError, DataError, OutputError, did_you_mean
from ..files import read_json, write_json
from ..pretrained import backbone_of, hub_name, resolve
from .adapted import ABOUT, AdaptedTask
from .base_model import describe_base
from .build import build_learner, checkpoint_file
from .loaded import load_learner

EXPORTS = {"peft": export_peft, "mlx-lm": export_mlx_lm}
# Of PEFT without its classifier: the prototypes of one's own labels take its place.
IMPORTS = {"peft": functools.partial(import_peft, head=False), "mlx-lm": import_mlx_lm}
_OWN = {"peft": "peft_type", "mlx-lm": "fine_tune_type"}  # what the configuration of each has, and of no other
LABELS, LEARNED = "labels.json", "learned.safetensors"


class Opened(NamedTuple):
    model: nn.Module  # with the adapted weights in it
    config: MetaLearningConfig
    adapted: AdaptedTask | None = None  # what it is of, where `adapt` or `finetune` wrote it

    @property
    def source(self) -> str:
        """The base model."""
        return self.config.model.source


def open_adapted(path: str | Path, *, source: str | None = None) -> Opened:
    """The model of a folder that `adapt` wrote, of a checkpoint, or of a run folder.

    Args:
        path: it.
        source: where the base model is on this machine, where it differs from where it was.
    """
    refuse_foreign(path)
    if (Path(path) / ABOUT).is_file():
        adapted = AdaptedTask.load(path, source=source)
        opened = Opened(adapted.model, adapted.config, adapted)
    else:
        loaded = load_learner(checkpoint_file(path), source=source)
        opened = Opened(loaded.learner.model, loaded.config)
    if adapters_of(opened.model) is None:
        raise AdapterError(f"{path} has no adapter: all of its model was trained")
    return opened


def refuse_foreign(path: str | Path) -> None:
    """Raise an `AdapterError` where `path` is an adapter folder of another library, and say what to do with it."""
    if (format := None if (Path(path) / ABOUT).is_file() else _format_of(Path(path))) is not None:
        name, own = "a PEFT", ""
        if format == "mlx-lm":
            name, own = "an mlx-lm", "use it with mlx_lm.generate or mlx_lm.fuse, or "
        raise AdapterError(f"{path} is {name} adapter: {own}read it with `import --format {format}` first")


def export_adapter(path: str | Path, format: str, folder: str | Path, *, source: str | None = None) -> Path:
    """Write the adapter of `path` (see `open_adapted`) as `format` ("peft" or "mlx-lm") has it, and the rest beside it.

    Raises:
        AdapterError: the method or the model has no counterpart there.
        OutputError: the folder cannot be written, or has a `labels.json` or `head.safetensors` of the user's own.
    """
    write = EXPORTS[_format(format)]
    opened = open_adapted(path, source=source)
    backbone = opened.config.model.backbone
    if format == "mlx-lm" and backbone != "language_model":
        raise AdapterError(
            f"mlx-lm has language models only, and the base of {path} is of backbone {backbone!r}; use --format peft"
        )
    _spare_own(Path(folder))
    base = hub_name(opened.source) if opened.config.model.reads_texts else ""  # others have no base to load
    written = write(opened.model, folder, base_model=base)
    _write_learned(opened, written)
    return written


def loading(folder: Path, format: str) -> str:
    """The lines of Python that load an adapter folder over its base model; empty where there is none to load."""
    about = read_config(folder, {})
    if format == "mlx-lm":
        return f"from mlx_lm import load\nmodel, tokenizer = load({about['model']!r}, adapter_path={str(folder)!r})"
    loader = "AutoModelForCausalLM" if about["task_type"] == "CAUSAL_LM" else "AutoModel"
    if not about["base_model_name_or_path"]:
        return ""
    base = f"{loader}.from_pretrained({about['base_model_name_or_path']!r})"
    return (
        f"from peft import PeftModel; from transformers import {loader}\n"
        f"model = PeftModel.from_pretrained({base}, {str(folder)!r})"
    )


def import_adapter(folder: str | Path, format: str, source: str, checkpoint: str | Path) -> dict[str, Any]:
    """Write the adapter of another library over the model `source` as a checkpoint that `adapt` can start from.

    The checkpoint is a prototypical network over the adapted model (an encoder or a language model): it learns labels
    from a few examples as it is.

    Returns:
        what was read: the method and its number of parameters.
    """
    read, found = IMPORTS[_format(format)], _format_of(Path(folder))
    if found not in (None, format):
        raise AdapterError(f"{folder} is an adapter of the other format: give --format {found}")
    backbone = backbone_of(source)
    model = read(backbone_class(backbone)(source, num_classes=2), folder)
    attached = adapters_of(model)
    assert attached is not None
    config = _configuration(attached.configs["default"], attached.paths["default"], backbone, source)
    learner = build_learner(config, model)
    header = {
        "learner": learner.describe(),
        "base": describe_base(config, learner.model),
        "config": config.to_dict(),
    }
    write_npz(checkpoint, {**learner.state(), **fixed_arrays(learner.model)}, header)
    return {"method": config.adapter.method, "parameters": learner.num_trainable}


def fuse(
    path: str | Path, folder: str | Path, *, source: str | None = None, dequantize: bool = False
) -> dict[str, float]:
    """Write the base model of `path` with its adapter folded in; see `fuse_folder` for what is returned.

    Raises:
        AdapterError: the model has no pre-trained base.
        OutputError: the folder cannot be written, or has a `labels.json` or `head.safetensors` of the user's own.
    """
    opened = open_adapted(path, source=source)
    if not opened.config.model.reads_texts:
        raise AdapterError(
            f"{path} is over backbone {opened.config.model.backbone!r}, which has no base model's folder to fuse into; "
            "in Python, `merge` folds it in"
        )
    _spare_own(Path(folder))
    lost = fuse_folder(opened.model, resolve(opened.source), folder, dequantize=dequantize)
    _write_learned(opened, Path(folder))
    return lost


def _spare_own(folder: Path) -> None:
    """Raise an `OutputError` where `labels.json` in `folder`, or an array file, is not one that was written for it."""
    if not os.path.exists(folder / LABELS):  # False, too, where it cannot be looked for: writing will say so
        spare_own(folder, LEARNED)
        return
    try:
        about = read_json(folder / LABELS)
    except DataError:
        about = None
    if not isinstance(about, dict) or not {"labels", "algorithm", "options"} <= about.keys():
        raise OutputError(f"{folder / LABELS} is a file of your own, which would be overwritten; name another folder")


def _write_learned(opened: Opened, folder: Path) -> None:
    """Write what was learned beyond the adapter (see above), and remove that of an adapter that was here before."""
    model, adapted = opened.model, opened.adapted
    labels = None if adapted is None else adapted.labels
    try:
        if (folder / LABELS).exists():
            (folder / LABELS).unlink()
            (folder / LEARNED).unlink(missing_ok=True)
        if adapted is None or labels is None:
            return
        own = flat_parameters(model)
        if adapted.learned:
            save_arrays(folder / LEARNED, adapted.learned, {"format": "pt"})
            (folder / HEAD).unlink(missing_ok=True)  # it takes no part in the answers
        elif head := {path: own[path] for path in ("head.weight", "head.bias") if path in own}:
            save_arrays(folder / HEAD, head, {"format": "pt"})
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error
    options = inspect.signature(adapted.learner.build).parameters
    about = {
        "labels": labels,
        "algorithm": adapted.config.algorithm,
        "options": {name: option.default for name, option in options.items()} | adapted.learner.options,
        "threshold": adapted.threshold,
    }
    if adapted.reads_texts:
        about["pooling"] = getattr(model, "pooling", "last token")
        about["normalize"] = getattr(model, "normalize", False)
    write_json(folder / LABELS, about)


def _format_of(folder: Path) -> str | None:
    """The library whose adapter folder this is, as `--format` names it; None where it is none."""
    if not (folder / CONFIG).is_file():
        return None
    data = read_config(folder, {})
    return next((format for format, key in _OWN.items() if key in data), None)


def _format(name: str) -> str:
    if name not in EXPORTS:
        raise ConfigurationError(f"unknown format {name!r}{did_you_mean(name, EXPORTS)}")
    return name


def _configuration(config: AdapterConfig, paths: list[str], backbone: str, source: str) -> MetaLearningConfig:
    kind = type(config).__name__
    method = next(name for name, place in ADAPTERS.items() if place.endswith(f":{kind}"))
    options = {
        field.name: list(value) if isinstance(value := getattr(config, field.name), tuple) else value
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
    }
    return MetaLearningConfig.from_dict(
        {
            "meta_learning": {"algorithm": "protonet", "num_inner_steps": 0},
            "learner": {"distance_metric": "cosine"},
            "task_distribution": {"task_families": ["intents"]},
            "model": {"backbone": backbone, "source": source},
            "adapter": {"method": method, "target_modules": paths, **options},
        }
    )
