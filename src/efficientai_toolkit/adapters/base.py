"""What every adapter shares: its configuration, its tiny shape, and the slot that holds it beside a frozen module."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, get_type_hints

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..nn.functional import Parameters
from ..settings import as_annotated
from .quantized import dense_linear, is_linear


class Training(NamedTuple):
    """What a method adds to a training loop besides its arrays."""

    penalty: Callable[[Parameters], mx.array]  # a term of the loss
    init: Callable[[Parameters], Any]  # the state before the first step
    # (params after the optimiser's step, its gradients, state, number of the step from 1) -> (params, state)
    update: Callable[[Parameters, Mapping[str, mx.array], Any, int], tuple[Parameters, Any]]


class AdapterConfig:
    """Base of the configurations, each a frozen dataclass with its method's own defaults.

    The annotations of the fields are checked: a value of another type, out of range or not finite is an error.
    `adapter` is the module that one adapted layer gets; `targets` lists alternatives, in order, for
    `target_modules=None`: the first that matches anything in the model is taken.
    """

    adapter: ClassVar[type[Adapter]]
    targets: ClassVar[tuple[tuple[str, ...], ...]]
    learning_rate: float

    def __post_init__(self):
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            try:
                checked = as_annotated(value, hints[field.name])
            except ValueError as error:
                raise AdapterError(f"{type(self).__name__}: {field.name} {error}, got {value!r}") from None
            object.__setattr__(self, field.name, checked)  # the class is frozen; a YAML list becomes a tuple

    def training(self, total_steps: int) -> Training | None:
        """What the method adds to a plain training of so many steps; most add nothing."""
        return None

    def require(self, holds: bool, rule: str) -> None:
        """Raise `AdapterError` unless `holds`."""
        if not holds:
            raise AdapterError(f"{type(self).__name__}: {rule}, got {self}")


class Owner:
    """A reference to a module that lives elsewhere in the tree, so that its arrays have one place only.

    (MLX walks modules, dicts and lists; an array reachable on two paths comes apart at its first update.)
    """

    def __init__(self, module: Any):
        self.module = module


class Site(NamedTuple):
    """Where an adapter is placed: the module's path, its rank among the matched modules, and the shared part."""

    path: str
    index: int
    owner: Owner | None = None


class Adapter(nn.Module):
    """One adapter beside one frozen module: `adapter(base, x)` takes the place of `base(x)`.

    It holds its own arrays only (never the base), so its parameters are exactly what is trained and saved; those
    named in `frozen` are not trained. Where the method has a merge, `fuse(base)` gives the one dense module that
    computes the same.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[str] = "a linear layer"
    combines: ClassVar[bool] = True  # False where it lengthens the sequence or its keys, which no weight can halve

    @classmethod
    def fits(cls, base: Any) -> bool:
        """Whether this adapter can sit on `base`."""
        return is_linear(base)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        raise NotImplementedError

    @classmethod
    def share(cls, bases: Sequence[Any], config: Any, key: mx.array) -> nn.Module | None:
        """The part that all adapted layers of one `attach` have in common, or `None`."""
        return None

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        """Trainable parameters beside `base`, by the method's formula."""
        raise NotImplementedError

    @classmethod
    def num_shared(cls, bases: Sequence[Any], config: Any) -> int:
        """Trainable parameters of the shared part, by formula."""
        return 0

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        raise NotImplementedError

    def fuse(self, base: Any) -> nn.Module:
        raise AdapterError(f"{type(self).__name__} has no merge: it is not an affine map of the layer's own kind")

    def thaw(self) -> None:
        """Make the adapter's arrays trainable, but for those that its method keeps fixed."""
        thaw(self)


def thaw(module: nn.Module) -> None:
    """Unfreeze an adapter (or a shared part), but for the arrays it names in `frozen`."""
    module.unfreeze()
    module.freeze(recurse=False, keys=[key for key in getattr(module, "frozen", ()) if key in module])


class Adapted(nn.Module):
    """The slot: a frozen `base`, its named `adapters`, and which of them act, by what weight.

    One adapter at weight 1 replaces the base's output; otherwise the output is base + Σ wᵢ (adapterᵢ − base), which
    for LoRA is the weighted sum of the deltas. Attributes that the slot does not have are the base's.
    """

    def __init__(self, base: Any):
        super().__init__()
        self.base = base
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[tuple[str, float], ...] = ()

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            if key.startswith("__") or "base" not in self:
                raise
            return getattr(self["base"], key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        acting = [(self.adapters[name], weight) for name, weight in self.active if name in self.adapters]
        if len(acting) == 1 and acting[0][1] == 1:
            return acting[0][0](self.base, *args, **kwargs)
        out = plain = self.base(*args, **kwargs)
        # What takes more than x may write to a cache, and does so once.
        base = _Called(self.base, plain) if len(args) + len(kwargs) > 1 else self.base
        for adapter, weight in acting:
            out = out + weight * (adapter(base, *args, **kwargs) - plain)
        return out

    @property
    def prefix_length(self) -> int:
        """How many keys the active adapters put before the base's: encoders count positions on from there."""
        return max((getattr(self.adapters[n], "length", 0) for n, _ in self.active if n in self.adapters), default=0)

    def fuse(self) -> nn.Module:
        """The dense module that computes what the slot computes now."""
        acting = [(self.adapters[name], weight) for name, weight in self.active if name in self.adapters]
        if not acting:
            return self.base
        base = dense_linear(self.base) if is_linear(self.base) else self.base
        if len(acting) == 1 and acting[0][1] == 1:
            return acting[0][0].fuse(base)
        fused = [(adapter.fuse(base), weight) for adapter, weight in acting]
        out = copy_of(base)
        for name in {name for module, _ in fused for name in module if isinstance(module[name], mx.array)}:
            plain: Any = base.get(name, 0)
            out[name] = plain + sum(weight * (module.get(name, plain) - plain) for module, weight in fused)
        return out


class _Called:
    """A module in which only the output of one call is left to ask for."""

    def __init__(self, module: Any, output: Any):
        self._module, self._output = module, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._output


def copy_of(module: nn.Module) -> Any:
    """A shallow copy: the same arrays in a module of its own."""
    out = copy.copy(module)
    out._no_grad = set(module._no_grad)
    return out


def linear_from(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    """An `nn.Linear` with these arrays; `weight` (out, in)."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def kaiming_uniform(key: mx.array, fan_in: int, shape: Sequence[int]) -> mx.array:
    """U(±1/√fan_in): PyTorch's and MLX's default for a linear layer, and LoRA's for A."""
    bound = 1 / math.sqrt(fan_in)
    return mx.random.uniform(-bound, bound, shape, key=key)
