"""mlx-lm's adapter folder: `adapter_config.json` and `adapters.safetensors`, written and read."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError, did_you_mean
from ..settings import Count, Positive, Share
from .adalora import AdaLoRAConfig
from .attach import attach, detach, slots
from .base import AdapterConfig
from .dora import DoRAConfig
from .formats import CONFIG, cast, checked, faults_sentence, named_config, read_arrays, read_config, write_folder
from .lora import LoRAConfig
from .select import walk

FILE = "adapters.safetensors"
_LEAVES = ("lora_a", "lora_b", "m")
_TYPES = {"fine_tune_type": str, "lora_parameters": dict[str, Any]}
_PARAMETERS = {"rank": Count, "scale": Positive, "dropout": Share}


def export_mlx_lm(model: nn.Module, folder: str | Path, *, name: str = "default", base_model: str = "") -> Path:
    """Write adapter `name` as `mlx_lm.load(…, adapter_path=folder)` reads it; `scale` there is α / r (or α / √r).

    AdaLoRA is written as the LoRA it is, λ multiplied into A.

    Raises:
        AdapterError: mlx-lm knows low-rank adapters only.
    """
    config = named_config(model, name)
    check_method(type(config))
    assert isinstance(config, LoRAConfig)
    arrays = _arrays(model, name)
    paths = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in arrays))
    num_layers, keys = _layers_and_keys(model, paths)
    about = {
        "fine_tune_type": "dora" if isinstance(config, DoRAConfig) else "lora",
        "model": base_model,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": keys,
        },
    }
    return write_folder(model, name, Path(folder), FILE, arrays, about, {"format": "mlx"})


def check_method(config: type[AdapterConfig]) -> None:
    """Raise an `AdapterError` where mlx-lm has no counterpart of a method, given by the class of its configuration."""
    if not issubclass(config, LoRAConfig):
        raise AdapterError(f"mlx-lm has no counterpart of {config.__name__}; it has LoRA and DoRA")


def import_mlx_lm(model: nn.Module, folder: str | Path, *, name: str = "default") -> nn.Module:
    """Attach the adapter in an mlx-lm folder to `model`, its own base.

    Raises:
        AdapterError: a full fine-tune, an entry that cannot be, or arrays that do not fit this model. The model is
            then as it was.
    """
    folder = Path(folder)
    data = read_config(folder, _TYPES)
    kind = data.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{folder}: fine_tune_type {kind!r} is no adapter; 'lora' and 'dora' are")
    arrays = read_arrays(folder / FILE)
    config = _config(data, kind, arrays, folder)
    inner = _inner(model)
    known = {node.path.removeprefix(inner) for node in walk(model)}
    strange = [key for key in arrays if key.rpartition(".")[2] not in _LEAVES or key.rpartition(".")[0] not in known]
    if strange or not arrays:
        what = f"{strange[0]!r} is no adapter array of it{did_you_mean(strange[0], known)}" if strange else "no arrays"
        raise AdapterError(f"{folder} does not fit this model: {what[:400]}")
    paths = list(dict.fromkeys(inner + key.rpartition(".")[0] for key in arrays))
    model = attach(model, config, paths, name=name)
    expected = _arrays(model, name)
    sentence = faults_sentence(expected, arrays)
    if sentence:
        detach(model, name)
        raise AdapterError(f"{folder} does not fit this model: {sentence}")
    arrays = cast(expected, arrays)
    for path, slot in slots(model).items():
        if name in slot.adapters:
            for leaf in _LEAVES:
                if (key := f"{path.removeprefix(_inner(model))}.{leaf}") in arrays:
                    slot.adapters[name][leaf] = arrays[key]
    return model


def _inner(model: nn.Module) -> str:
    """What paths of `model` begin with and mlx-lm's own do not (see `LanguageModel`)."""
    return getattr(model, "inner", "")


def _config(data: dict[str, Any], kind: str, arrays: dict[str, mx.array], folder: Path) -> LoRAConfig:
    given = checked(data.get("lora_parameters", {}), _PARAMETERS, f"{folder / CONFIG}: lora_parameters")
    widths = (a.shape[1] for key, a in arrays.items() if key.endswith("lora_a") and a.ndim == 2)
    rank = given.get("rank") or next(widths, 0)
    if "scale" not in given or not rank:
        raise AdapterError(f"{folder}: adapter_config.json has no lora_parameters.scale or rank")
    made = DoRAConfig if kind == "dora" else LoRAConfig
    return made(rank=rank, alpha=given["scale"] * rank, dropout=given.get("dropout", 0.0))


def _arrays(model: nn.Module, name: str) -> dict[str, mx.array]:
    config = named_config(model, name)
    out = {}
    for path, slot in slots(model).items():
        if name in slot.adapters:
            adapter: Any = slot.adapters[name]
            for leaf in _LEAVES:
                if leaf in adapter:
                    out[f"{path.removeprefix(_inner(model))}.{leaf}"] = adapter[leaf]
            if isinstance(config, AdaLoRAConfig):
                out[f"{path.removeprefix(_inner(model))}.lora_a"] = adapter.lora_a * adapter.lora_e
    return out


def _layers_and_keys(model: nn.Module, paths: list[str]) -> tuple[int, list[str]]:
    """mlx-lm adapts the last N blocks at the same places; anything else is named by full paths, which it takes too."""
    places = defaultdict(set)
    for path in paths:
        if (match := re.match(r"(?:.*\.)?layers\.(\d+)\.(.+)$", path)) is None:
            return 0, paths
        places[int(match[1])].add(match[2])
    total = len(getattr(model, "layers", ())) or max(places) + 1
    last = list(range(min(places), total))
    same = all(places.get(layer) == places[min(places)] for layer in last)
    return (len(last), sorted(places[min(places)])) if same else (len(last), paths)
