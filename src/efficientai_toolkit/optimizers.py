"""Outer optimisers: MLX's, by name, as pure updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from .errors import ConfigurationError, did_you_mean
from .precision import widened

Rate = float | Callable[[mx.array], mx.array]

OPTIMIZERS: dict[str, Callable[[Rate], optim.Optimizer]] = {
    # MLX leaves the bias of Adam's moments uncorrected by default; Kingma & Ba, PyTorch and TensorFlow correct it.
    "adam": lambda rate: optim.Adam(rate, bias_correction=True),
    "adamw": lambda rate: optim.AdamW(rate, bias_correction=True),
    "sgd": lambda rate: optim.SGD(rate),
    "momentum": lambda rate: optim.SGD(rate, momentum=0.9),
    "rmsprop": lambda rate: optim.RMSprop(rate),
    "adagrad": lambda rate: optim.Adagrad(rate),
    "lion": lambda rate: optim.Lion(rate),
}
SCHEDULES = ("constant", "linear", "cosine")


def outer_optimizer(which: str | optim.Optimizer | None, rate: Rate) -> optim.Optimizer:
    """An optimiser from its name (default "adam") and rate; one that is an optimiser already is taken as it is.

    Raises:
        ConfigurationError: no optimiser has that name; or it is a `MultiOptimizer`.
    """
    if isinstance(which, optim.MultiOptimizer):
        raise ConfigurationError(
            "outer_optimizer must be one for all that is meta-learned, got a MultiOptimizer; give one of its optimizers"
        )
    if isinstance(which, optim.Optimizer):
        return which
    name = "adam" if which is None else which
    if name not in OPTIMIZERS:
        raise ConfigurationError(f"unknown optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](rate)


def schedule(name: str, rate: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> Rate:
    """A learning rate over `steps`: "constant", "linear" or "cosine" from `rate` to `end`, after a linear warm-up."""
    if name not in SCHEDULES:
        raise ConfigurationError(f"unknown schedule {name!r}{did_you_mean(name, SCHEDULES)}")
    main: Rate = rate
    if name == "linear":
        main = optim.linear_schedule(rate, end, max(1, steps - warmup))
    elif name == "cosine":
        main = optim.cosine_decay(rate, max(1, steps - warmup), end)
    if warmup == 0:
        return main
    held = main if callable(main) else lambda _: mx.array(rate)
    return optim.join_schedules([optim.linear_schedule(0.0, rate, warmup), held], [warmup])


def at_own_rate(optimizer: optim.Optimizer, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The `saved` state with the rate of `own`; a schedule's rate follows from the saved step and stays."""
    if "learning_rate" not in own or "learning_rate" in optimizer._schedulers:
        return saved
    return {**saved, "learning_rate": own["learning_rate"]}


def initial_state(optimizer: optim.Optimizer, parameters: Any) -> dict[str, Any]:
    """The optimiser's state before the first update, whatever else it has updated; its own stays as it was. Moments of
    half-precision parameters are of float32: those of small gradients are zero in float16."""
    held = optimizer.state
    # Of what it holds, rates are arrays of their own; moments are in mappings, one a parameter or module.
    rates = {name: value for name, value in held.items() if isinstance(value, mx.array)}
    start = mx.zeros_like(optimizer.step)
    try:
        optimizer.state = {
            **rates,
            **{name: rate(start) for name, rate in optimizer._schedulers.items()},
            "step": start,
        }
        optimizer.init(tree_map(widened, parameters))
        return _copied(optimizer.state)
    finally:
        optimizer.state = held


def pure_update(optimizer: optim.Optimizer, state: Any, gradients: Any, parameters: Any) -> tuple[Any, Any]:
    """(new parameters, new state), leaving the optimiser's own state as it was. Half precision is updated in float32
    and rounded back."""
    held = optimizer.state
    try:
        optimizer.state = _copied(state)
        new = optimizer.apply_gradients(tree_map(widened, gradients), tree_map(widened, parameters))
        new = tree_map(lambda after, before: after.astype(before.dtype), new, parameters)
        return new, _copied(optimizer.state)
    finally:
        optimizer.state = held


def _copied(state: Any) -> Any:
    """The same arrays in new containers: MLX's optimisers write into theirs."""
    return {name: _copied(value) for name, value in state.items()} if isinstance(state, dict) else state
