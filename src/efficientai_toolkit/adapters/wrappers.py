"""Classes with the names and arguments that users of other libraries know; each wraps `attach` around one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import mlx.core as mx

from ..errors import AdapterError
from ..settings import unknown_setting
from . import adapter_config
from .attach import M, adapter_state, attach, count_parameters, detach, merge
from .base import AdapterConfig


class ModelAdapter(Generic[M]):
    """One adapter for one model: `add_adapter()`, `remove()`, `merge()`.

    Args:
        model: any module; changed in place by `add_adapter`.
        config: the method's configuration.
        target_modules, name, key, train_head: see `attach`.
    """

    def __init__(
        self,
        model: M,
        config: AdapterConfig,
        target_modules: str | Sequence[str] | None = None,
        *,
        name: str = "default",
        key: mx.array | None = None,
        train_head: bool | str = False,
        **unknown: Any,
    ):
        if unknown:
            raise AdapterError(unknown_setting(type(self), next(iter(unknown))))
        self.model, self.config, self.target_modules, self.name = model, config, target_modules, name
        self._options: dict[str, Any] = {"name": name, "key": key, "train_head": train_head}
        self.num_parameters = count_parameters(model, config, target_modules, train_head=train_head)

    def add_adapter(self) -> M:
        """Attach; the adapter's arrays are then all that is trainable."""
        self.model = attach(self.model, self.config, self.target_modules, **self._options)
        return self.model

    def parameters(self) -> dict[str, mx.array]:
        """The adapter's arrays by path."""
        return adapter_state(self.model, self.name)

    def remove(self) -> M:
        """Detach."""
        self.model = detach(self.model, self.name)
        return self.model

    def merge(self, *, dequantize: bool = False) -> M:
        """Fold the adapter into the base weights."""
        self.model = merge(self.model, dequantize=dequantize)
        return self.model


def _given(method: str, **settings: Any) -> AdapterConfig:
    """The method's configuration, with its own default where a setting is None."""
    return adapter_config(method, **{name: value for name, value in settings.items() if value is not None})


class LoRAAdapter(ModelAdapter[M]):
    """`LoRAAdapter(model, r=8, lora_alpha=16, lora_dropout=0.1).add_adapter()`; None takes the method's default."""

    method = "lora"

    def __init__(
        self,
        model: M,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        **options: Any,
    ):
        config = _given(self.method, rank=r, alpha=lora_alpha, dropout=lora_dropout)
        super().__init__(model, config, target_modules, **options)


class DoRAAdapter(LoRAAdapter[M]):
    """As `LoRAAdapter`, with magnitude and direction apart."""

    method = "dora"


class AdaLoRAAdapter(LoRAAdapter[M]):
    """As `LoRAAdapter`, in SVD form; a training loop gets the budget's schedule from `config.training(total_steps)`."""

    method = "adalora"


class BottleneckAdapter(ModelAdapter[M]):
    """`BottleneckAdapter(model, bottleneck_size=64).add_adapter()`; `placement` is houlsby, pfeiffer or parallel."""

    def __init__(self, model: M, bottleneck_size: int | None = None, placement: str = "houlsby", **options: Any):
        super().__init__(model, _given(placement, bottleneck=bottleneck_size), **options)


class PrefixTuningAdapter(ModelAdapter[M]):
    """`PrefixTuningAdapter(model, prefix_length=10, hidden_size=512).add_prefix()`

    `hidden_size` is the width of the network that makes the prefixes; `None` trains them directly.
    """

    def __init__(self, model: M, prefix_length: int = 10, hidden_size: int | None = None, **options: Any):
        method = "prefix" if hidden_size is None else "prefix_mlp"
        config = _given(method, length=prefix_length, hidden=hidden_size)
        super().__init__(model, config, **options)

    def add_prefix(self) -> M:
        """As `add_adapter`."""
        return self.add_adapter()


class PromptTuningAdapter(ModelAdapter[M]):
    """`PromptTuningAdapter(model, prompt_length=20).add_prompt()`; with `hidden_size`, P-tuning."""

    def __init__(self, model: M, prompt_length: int = 20, hidden_size: int | None = None, **options: Any):
        method = "prompt" if hidden_size is None else "p_tuning"
        config = _given(method, length=prompt_length, hidden=hidden_size)
        super().__init__(model, config, **options)

    def add_prompt(self) -> M:
        """As `add_adapter`."""
        return self.add_adapter()


class BitFitAdapter(ModelAdapter[M]):
    """`BitFitAdapter(model).add_adapter()`"""

    def __init__(self, model: M, **options: Any):
        super().__init__(model, adapter_config("bitfit"), **options)


class IA3Adapter(ModelAdapter[M]):
    """`IA3Adapter(model).add_adapter()`"""

    def __init__(self, model: M, **options: Any):
        super().__init__(model, adapter_config("ia3"), **options)


class CompacterAdapter(ModelAdapter[M]):
    """`CompacterAdapter(model, divisor=4, bottleneck_size=None).add_adapter()`"""

    def __init__(self, model: M, divisor: int = 4, bottleneck_size: int | None = None, **options: Any):
        config = _given("compacter", divisor=divisor, bottleneck=bottleneck_size)
        super().__init__(model, config, **options)


class VeRAAdapter(ModelAdapter[M]):
    """`VeRAAdapter(model, r=256).add_adapter()`"""

    def __init__(self, model: M, r: int = 256, **options: Any):
        super().__init__(model, adapter_config("vera", rank=r), **options)
