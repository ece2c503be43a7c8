"""Put adapters on a model and take them off: `attach`, `activate`, `detach`, `merge`.

`attach` swaps each matched module for a slot (`Adapted`) that holds it and its adapters, and freezes everything
else: `model.trainable_parameters()` is then exactly the active adapters' arrays, which is what every learner adapts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import AdapterError, did_you_mean
from ..nn.functional import Parameters
from ..nn.functional import update as update_parameters
from .attached import Attached, adapters_of, arrays_of, head_path, head_state, hold, module_at, require, write_head
from .base import Adapted, AdapterConfig, Owner, Site, copy_of, linear_from, thaw
from .quantized import dequantized, make_stackable
from .select import SHARED, Node, select, walk

M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    config: AdapterConfig,
    target_modules: str | Sequence[str] | None = None,
    *,
    key: mx.array | None = None,
    name: str = "default",
    train_head: bool | str = False,
) -> M:
    """Put an adapter on `model`, freeze the rest, and make the adapter the active one.

    Args:
        model: any module; changed in place.
        config: `LoRAConfig(rank=8)`, …
        target_modules: paths, endings of paths, globs or kinds (see `select`); `None` takes the method's own choice.
        key: for the adapter's initial arrays. Default: `mx.random.key(0)`.
        name: several adapters may be on one model; see `activate`.
        train_head: also train `model.head` (`True`) or the module at this path. A trained head gets no adapter. It
            starts as the model's own and is this adapter's: it comes and goes with it.

    Returns:
        `model`, or its slot where `model` itself is the adapted layer.

    Raises:
        AdapterError: nothing matched, the name is taken, there is no such head, or it lies in or around one that
            another adapter trains; or a part of the model has adapters of its own.

    >>> model = attach(MLP(2, 5), LoRAConfig(rank=4), "linear")
    """
    attached = adapters_of(model)
    if not (isinstance(name, str) and name.isidentifier()):
        raise AdapterError(f"adapter name {name!r} must be an identifier: it becomes part of parameter paths")
    if attached and name in attached.configs:
        raise AdapterError(f"this model already has an adapter named {name!r}; detach it or choose another name")
    _refuse_inner(model, attached)
    head = head_path(model, train_head)
    nodes = select(model, config, target_modules, exclude=head)
    bases = [node.module for node in nodes]
    shared_key, *keys = mx.random.split(mx.random.key(0) if key is None else key, len(nodes) + 1)
    shared = config.adapter.share(bases, config, shared_key)
    owner = None if shared is None else Owner(shared)
    made = [  # all of them before the first is placed: a failure leaves the model as it was
        config.adapter.from_base(node.module, config, k, Site(node.path, index, owner))
        for index, (node, k) in enumerate(zip(nodes, keys, strict=True))
    ]
    if attached is None:
        attached = Attached({node.path: set(node.module._no_grad) for node in walk(model)})
        make_stackable(model)
    for node, adapter in zip(nodes, made, strict=True):
        slot, model = _slot(model, node)
        slot.adapters[name] = adapter
    if shared is not None:
        model[SHARED] = {**model.get(SHARED, {}), name: shared}
    attached.configs[name] = config
    attached.paths[name] = [node.path for node in nodes]
    if head:
        attached.heads[name] = head
        if head not in attached.kept:
            attached.kept[head], attached.held[head] = {"": arrays_of(module_at(model, head))}, ""
        attached.kept[head][name] = attached.kept[head][""]
    model.attached = attached
    mx.eval(model.parameters())  # a compiled graph would make frozen weights that are still lazy anew at every call
    return activate(model, name)


def activate(model: M, names: str | Mapping[str, float] | None) -> M:
    """Choose the adapters that act and are trained: one by name, several by weight, or none (`None`).

    Each adapted layer gives base + Σ wᵢ (adapterᵢ − base); a layer that an adapter does not cover is unchanged by it.
    A trained head is mixed alike, W₀ + Σ wᵢ (Wᵢ − W₀); a mixture of heads is no adapter's own, so it is not trained.

    Raises:
        AdapterError: no adapter has that name, a weight is not finite, or one that lengthens the sequence has another
            weight than 1 or shares a layer.

    >>> activate(model, {"english": 0.7, "legal": 0.3})
    """
    attached = require(model)
    weights = _weights(names)
    for name in weights:
        if name not in attached.configs:
            raise AdapterError(f"no adapter named {name!r}{did_you_mean(name, attached.configs)}")
    for name in weights:
        if not attached.configs[name].adapter.combines and not _acts_whole(model, name, weights):
            raise AdapterError(
                f"adapter {name!r} lengthens the sequence, so its output can be neither weighted nor added to "
                "another's; activate it with weight 1, and besides it only what adapts other layers"
            )
    model.freeze()
    for path in attached.kept:
        acting = {name: weight for name, weight in weights.items() if attached.heads.get(name) == path}
        hold(model, attached, path, acting)
        if list(acting.values()) == [1.0]:
            module_at(model, path).unfreeze()
    for slot in slots(model).values():
        slot.active = tuple((n, w) for n, w in weights.items() if n in slot.adapters)
        for name, adapter in slot.adapters.items():
            adapter.freeze()  # a trained head around it thawed it
            if name in weights:
                adapter.thaw()
    for name, shared in model.get(SHARED, {}).items():
        if name in weights:
            thaw(shared)
    return model


def _acts_whole(model: nn.Module, name: str, weights: Mapping[str, float]) -> bool:
    """Whether adapter `name` has weight 1 and its slots to itself, among `weights`, and no other lengthens."""
    configs = require(model).configs
    others = weights.keys() - {name}
    return (
        weights[name] == 1
        and all(configs[other].adapter.combines for other in others)
        and not any(others & slot.adapters.keys() for slot in slots(model).values() if name in slot.adapters)
    )


def _weights(names: object) -> dict[str, float]:
    """Name → weight of what `activate` was given."""
    if names is None or isinstance(names, str):
        return {} if names is None else {names: 1.0}
    weights = {name: _finite(weight) for name, weight in names.items()} if isinstance(names, Mapping) else {"": None}
    known = {name: weight for name, weight in weights.items() if weight is not None}
    if len(known) < len(weights):
        raise AdapterError(
            f"activate takes a name, a mapping of names to finite weights such as {{'a': 0.5, 'b': 0.5}}, or None; "
            f"got {names!r}"
        )
    return known


def _finite(weight: Any) -> float | None:
    """A number, also of NumPy or MLX, as a float; None of anything else."""
    try:
        value = math.nan if isinstance(weight, (str, bytes)) else float(weight)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def detach(model: M, name: str | None = None) -> M:
    """Take one adapter off, with its head, or (`None`) all of them; without any, the model is what it was before."""
    attached = require(model)
    names = list(attached.configs) if name is None else [name]
    for n in names:
        if n not in attached.configs:
            raise AdapterError(f"no adapter named {n!r}{did_you_mean(n, attached.configs)}")
        for slot in slots(model).values():
            slot.adapters.pop(n, None)
            slot.active = tuple((m, w) for m, w in slot.active if m != n)
        for record in (attached.configs, attached.paths, attached.heads, *attached.kept.values()):
            record.pop(n, None)
        if SHARED in model:
            model[SHARED].pop(n, None)
    if not attached.configs:
        activate(model, None)  # the heads as they were
    return _tidy(model, attached)


def merge(model: M, *, dequantize: bool = False) -> M:
    """Fold what acts now into the base weights and take every adapter off.

    A quantised base is quantised again, which loses part of a small delta (`quantization_loss` measures it);
    `dequantize=True` leaves the merged layers dense, and exact.

    Raises:
        AdapterError: an active adapter has no merge. The model is then unchanged.
    """
    attached = require(model)
    fused = {path: slot.fuse() for path, slot in slots(model).items()}
    for path, slot in slots(model).items():
        slot.base = fused[path] if dequantize else requantized(fused[path], slot.base)
        slot.adapters.clear()
        slot.active = ()
    attached.configs.clear()
    return _tidy(model, attached)


def requantized(fused: nn.Module, base: Any) -> nn.Module:
    """`fused` quantised as `base` is, where `base` is quantised; a weight that is the base's keeps its codes."""
    if not isinstance(base, nn.QuantizedLinear) or fused is base:
        return fused
    weight: Any = fused.weight
    if not mx.array_equal(weight, dequantized(base)):
        return nn.QuantizedLinear.from_linear(fused, base.group_size, base.bits, base.mode)
    out = copy_of(base)
    if "bias" in fused:
        out.bias = fused.bias
    return out


def quantization_loss(model: nn.Module) -> dict[str, float]:
    """path → share of each active delta that `merge` would lose to quantising again, |Q(W+Δ) − (W+Δ)| / |Δ|.

    Layers whose weight stays as it is are left out.
    """
    losses = {}
    for path, slot in slots(model).items():
        if isinstance(slot.base, nn.QuantizedLinear) and slot.active:
            wide = copy_of(slot)  # in float32: half precision rounds a small delta away
            wide.base = linear_from(dequantized(slot.base).astype(mx.float32), slot.base.get("bias"))
            exact = wide.fuse().weight
            if delta := mx.linalg.norm(exact - wide.base.weight).item():
                merged = dequantized(requantized(slot.fuse(), slot.base)).astype(mx.float32)
                losses[path] = mx.linalg.norm(merged - exact).item() / delta
    return losses


def slots(model: nn.Module) -> dict[str, Adapted]:
    """path → slot, in the model's order; a path names the module as if no adapter were attached."""
    found: dict[str, Adapted] = {"": model} if isinstance(model, Adapted) else {}
    for node in walk(model):
        value = node.container[node.name] if node.container is not None else None
        if isinstance(value, Adapted):
            found[node.path] = value
    return found


def count_parameters(
    model: nn.Module,
    config: AdapterConfig,
    target_modules: str | Sequence[str] | None = None,
    *,
    train_head: bool | str = False,
) -> int:
    """Trainable parameters of the adapter that `attach` would add, by the method's formula, without attaching.

    Those of a head that is trained besides are not counted, and it gets no adapter.
    """
    nodes = select(model, config, target_modules, exclude=head_path(model, train_head))
    adapter, bases = config.adapter, [node.module for node in nodes]
    own = sum(adapter.num_parameters(node.module, config, node.path) for node in nodes)
    return own + adapter.num_shared(bases, config)


def flat_parameters(model: nn.Module) -> Parameters:
    """Every array of `model`, frozen or not, by path."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def adapter_state(model: nn.Module, name: str = "default") -> Parameters:
    """Every array of one adapter (fixed ones and a trained head too), flat, under its path in the model."""
    attached = require(model)
    if name not in attached.configs:
        raise AdapterError(f"no adapter named {name!r}{did_you_mean(name, attached.configs)}")
    own = {
        path: array
        for path, array in flat_parameters(model).items()
        if f".adapters.{name}." in f".{path}" or path.startswith(f"{SHARED}.{name}.")
    }
    return own | head_state(model, name)


def load_adapter_state(model: M, arrays: Mapping[str, mx.array], name: str = "default") -> M:
    """Write arrays as `adapter_state` gave them; names and shapes must agree.

    Raises:
        AdapterError: with every name that is missing or not known, and every shape that differs.
    """
    own = adapter_state(model, name)
    faults = [f"{path} is missing" for path in own if path not in arrays]
    faults += [f"{path} is not in this model" for path in arrays if path not in own]
    faults += [
        f"{path} is {tuple(arrays[path].shape)}, this model's is {tuple(own[path].shape)}"
        for path in own
        if path in arrays and arrays[path].shape != own[path].shape
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise AdapterError(f"the adapter's arrays do not fit: {'; '.join(faults[:5])}{more}")
    cast = {path: arrays[path].astype(own[path].dtype) for path in own}
    head = head_state(model, name)
    update_parameters(model, {path: array for path, array in cast.items() if path not in head})
    start = len(require(model).heads.get(name, "")) + 1
    write_head(model, name, {path[start:]: cast[path] for path in head})
    return model


def _refuse_inner(model: nn.Module, attached: Attached | None) -> None:
    """Refuse a model of which a part has adapters that its record does not know."""
    known = attached.configs if attached else {}
    inner = {node.path for node in walk(model) if node.container is not None and adapters_of(node.module)}
    inner |= {path for path, slot in slots(model).items() if not slot.adapters.keys() <= known.keys()}
    if inner:
        raise AdapterError(
            f"{min(inner)!r} has adapters that were attached to a part of this model, or to a model it is a part of; "
            "detach them there first"
        )


def _slot(model: nn.Module, node: Node) -> tuple[Adapted, Any]:
    """The slot around `node`'s module, made where there is none; and the model, which may be that slot."""
    if node.container is None:
        if isinstance(model, Adapted):
            return model, model
        slot = Adapted(model)
        model.__dict__.pop("attached", None)
        if SHARED in model:
            slot[SHARED] = model.pop(SHARED)
        return slot, slot
    current = node.container[node.name]
    if not isinstance(current, Adapted):
        current = node.container[node.name] = Adapted(current)
    return current, model


def _tidy(model: M, attached: Attached) -> M:
    if attached.configs:
        act = {n: w for slot in slots(model).values() for n, w in slot.active}
        model = activate(model, act or None)
        for path in [path for path in attached.kept if path not in attached.heads.values()]:
            del attached.kept[path], attached.held[path]
        return model
    for node in list(walk(model)):
        if node.container is not None and isinstance(node.container[node.name], Adapted):
            node.container[node.name] = node.module
        node.module._no_grad = set(attached.before.get(node.path, ()))
    model.__dict__.pop("attached", None)
    model.pop(SHARED, None)
    root: Any = model["base"] if isinstance(model, Adapted) else model
    make_stackable(root, False)
    return root


__all__ = [
    "activate",
    "adapter_state",
    "attach",
    "count_parameters",
    "detach",
    "load_adapter_state",
    "merge",
    "quantization_loss",
]
