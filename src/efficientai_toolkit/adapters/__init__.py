"""Parameter-efficient fine-tuning: small trained modules beside a frozen model, on any `mlx.nn.Module`.

A new method is one file and one line in `ADAPTERS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from ..errors import AdapterError, did_you_mean
from .attach import (
    activate,
    adapter_state,
    attach,
    count_parameters,
    detach,
    load_adapter_state,
    merge,
    quantization_loss,
)
from .base import Adapter, AdapterConfig

ADAPTERS: dict[str, str] = {
    "lora": "lora:LoRAConfig",
    "rslora": "lora:RsLoRAConfig",
    "dora": "dora:DoRAConfig",
    "adalora": "adalora:AdaLoRAConfig",
    "vera": "vera:VeRAConfig",
    "linear": "linear:LinearAdapterConfig",
    "houlsby": "bottleneck:HoulsbyConfig",
    "pfeiffer": "bottleneck:PfeifferConfig",
    "parallel": "bottleneck:ParallelConfig",
    "bitfit": "bitfit:BitFitConfig",
    "ia3": "ia3:IA3Config",
    "compacter": "compacter:CompacterConfig",
    "prefix": "prefix:PrefixConfig",
    "prefix_mlp": "prefix:PrefixMLPConfig",
    "prompt": "prompt_tuning:PromptConfig",
    "p_tuning": "p_tuning:PTuningConfig",
}


def adapter_class(method: str) -> type[AdapterConfig]:
    """The configuration class of a method: `adapter_class("lora")` is `LoRAConfig`."""
    if method not in ADAPTERS:
        raise AdapterError(f"no adapter method {method!r}{did_you_mean(method, ADAPTERS)}")
    module, name = ADAPTERS[method].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), name)


def adapter_config(method: str, **options: Any) -> AdapterConfig:
    """`adapter_config("lora", rank=4)`: the method's configuration; an unknown option is named with its nearest."""
    config = adapter_class(method)
    known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise AdapterError(f"adapter {method!r} has no option {option!r}{did_you_mean(option, known)}")
    return config(**options)


__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "activate",
    "adapter_class",
    "adapter_config",
    "adapter_state",
    "attach",
    "count_parameters",
    "detach",
    "load_adapter_state",
    "merge",
    "quantization_loss",
]
