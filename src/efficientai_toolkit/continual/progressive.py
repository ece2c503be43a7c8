"""Progressive networks: one column a task, with lateral connections from every column before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ConfigurationError, ModelError, TaskSamplingError
from ..nn.activations import relu
from ..nn.functional import update
from ..nn.head import features_of, find_head
from ..settings import check_whole
from .learner import ContinualLearner, checked
from .loss import as_input

_ROWS = 1024


class Column(nn.Module):
    """Two hidden layers and a head; each layer but the first also sees that layer's inputs in former columns."""

    def __init__(self, input_dim: int, hidden_size: int, num_outputs: int, lateral: int, key: mx.array):
        super().__init__()
        keys = list(mx.random.split(key, 5))
        self.layers = [_linear(input_dim, hidden_size, keys[0]), _linear(hidden_size, hidden_size, keys[1])]
        self.head = _linear(hidden_size, num_outputs, keys[2])
        if lateral:
            self.laterals = [
                _linear(lateral, hidden_size, keys[3], bias=False),
                _linear(lateral, num_outputs, keys[4], bias=False),
            ]

    def __call__(self, x: mx.array, former: list[list[mx.array]]) -> tuple[mx.array, list[mx.array]]:
        """`x` (N, D), `former`: of each former column its hidden activations -> logits, own hidden activations."""
        first = relu(self.layers[0](x))
        second = self.layers[1](first) + self._from(former, 0)
        second = relu(second)
        return self.head(second) + self._from(former, 1), [first, second]

    def _from(self, former: list[list[mx.array]], layer: int) -> mx.array | float:
        if not former:
            return 0.0
        return self.laterals[layer](mx.concatenate([hidden[layer] for hidden in former], axis=-1))


class Columns(nn.Module):
    """The module: a frozen base or none, and columns of which the latest is trained."""

    def __init__(self, base: nn.Module | None = None):
        super().__init__()
        self.columns: list[Column] = []
        if base is not None:
            self.base = base
            self._base_features = features_of(base, find_head(base))
        self.freeze()

    def inputs(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """(what columns see, the base's features): the features also where the input is no vector of numbers."""
        features = self._base_features({}, x) if "base" in self else None
        if mx.issubdtype(x.dtype, mx.integer):
            if features is None:
                raise ModelError("inputs that are indices (tokens) need a base_model with features")
            return features, features
        return x.reshape(x.shape[0], -1), features

    def grow(self, x: mx.array, hidden_size: int, num_outputs: int, key: mx.array) -> None:
        """One more column for inputs like `x`; only it is trainable."""
        rows, features = self.inputs(x)
        lateral = hidden_size * len(self.columns) + (0 if features is None else features.shape[-1])
        self.freeze()
        self.columns.append(Column(rows.shape[-1], hidden_size, num_outputs, lateral, key))

    def __call__(self, x: mx.array, column: int | None = None) -> mx.array:
        """Logits of a column (default the latest) for `x` (N, …)."""
        number = len(self.columns) - 1 if column is None else column
        if not 0 <= number < len(self.columns):
            raise TaskSamplingError(f"there is no column {number}; there are {len(self.columns)}, from 0 on")
        logits, features = self.inputs(x)
        rows, former = logits, [] if features is None else [[features, features]]
        for each in self.columns[: number + 1]:
            logits, hidden = each(rows, former)
            former.append(hidden)
        return logits


class ProgressiveNetwork:
    """h_i^(k) = relu(W_i^(k) h_{i−1}^(k) + Σ_{j<k} U_i^(k:j) h_{i−1}^(j)): former columns help, and never change.

    Args:
        base_model: a trained model with features (its head is not used), which is frozen and counts as a former
            column at every layer; or None.
        hidden_size: width of a column's two hidden layers.
        settings: of the `ContinualLearner` that trains each column.

    Reference: Rusu et al. (2016), Progressive neural networks.
    Differs from the paper in: linear laterals (its equation 1), without the scaled adapters of its equation 2.

    >>> network = ProgressiveNetwork(base_model, hidden_size=64)
    >>> network.add_new_task(x, y)["accuracy"]
    """

    name = "progressive"

    def __init__(self, base_model: nn.Module | None = None, hidden_size: int = 64, **settings: Any):
        check_whole(1, hidden_size=hidden_size)
        self.network = Columns(base_model)
        self.hidden_size, self.settings, self._seed = hidden_size, settings, settings.get("seed", 0)

    @property
    def learned(self) -> int:
        return len(self.network.columns)

    @property
    def num_parameters(self) -> int:
        """Of all columns."""
        return sum(a.size for column in self.network.columns for a in _arrays(column).values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of all columns but one."""
        return sum(a.nbytes for column in self.network.columns[1:] for a in _arrays(column).values())

    def add_new_task(self, x: Any, y: Any, num_classes: int | None = None) -> dict[str, float]:
        """Grow a column for a task and train it.

        Args:
            x, y: (N, …) inputs and (N,) classes.
            num_classes: outputs of the column; default the largest class of `y` and one.
        """
        return self.learn(x, y, num_classes=num_classes)

    def learn(
        self,
        x: Any,
        y: Any,
        *,
        active: np.ndarray | None = None,
        each: Callable[[int], None] | None = None,
        num_classes: int | None = None,
    ) -> dict[str, float]:
        """See `ContinualLearner.learn`."""
        x, y = checked(x, y)
        units = None if active is None else np.asarray(active, bool)[min(self.learned, len(active) - 1)]
        outputs = num_classes or (int(y.max()) + 1 if units is None else len(units))
        key = mx.random.key(self._seed * 7919 + self.learned)
        self.network.grow(as_input(mx.array(x[:1])), self.hidden_size, outputs, key)
        learner = ContinualLearner(self.network, **{**self.settings, "seed": self._seed + self.learned})
        return learner.learn(x, y, active=None if units is None else units[None], each=each)

    def predict(self, x: Any, task: int) -> mx.array:
        """Logits (N, C) of the column of a task."""
        return self.network(as_input(mx.array(x)), task)

    def evaluate(self, x: Any, y: Any, active: Any = None, context: int | None = None) -> float:
        """Accuracy of the column of `context` on (`x`, `y`); of one to come, that of the latest column."""
        x, y = checked(x, y)
        if context is None:
            raise ConfigurationError("a progressive network must be told the task of its inputs: use kind='task'")
        if not self.learned:
            return float("nan")
        correct = 0
        for first in range(0, len(y), _ROWS):
            logits = self.predict(x[first : first + _ROWS], min(context, self.learned - 1))
            if active is not None:
                logits = mx.where(mx.array(active), logits, -mx.inf)
            picked = mx.argmax(logits, axis=-1)
            correct += int(np.array(picked == mx.array(y[first : first + _ROWS])).sum())
        return correct / len(y)

    def state(self) -> dict[str, mx.array]:
        """Every array that a checkpoint between two tasks needs."""
        return {f"columns.{n}.{p}": a for n, c in enumerate(self.network.columns) for p, a in _arrays(c).items()}

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """What `state` gave."""
        count = len({name.split(".")[1] for name in arrays if name.startswith("columns.")})
        self.network.columns = []
        for number in range(count):
            own = {
                n.removeprefix(f"columns.{number}."): a for n, a in arrays.items() if n.startswith(f"columns.{number}.")
            }
            hidden, inputs = own["layers.0.weight"].shape
            lateral = own["laterals.0.weight"].shape[1] if "laterals.0.weight" in own else 0
            column = Column(inputs, hidden, own["head.weight"].shape[0], lateral, mx.random.key(0))
            update(column, own)
            self.network.columns.append(column)
        self.network.freeze()


def _arrays(column: Column) -> dict[str, mx.array]:
    return dict(tree_flatten(column.parameters()))  # pyright: ignore[reportArgumentType]


def _linear(n: int, m: int, key: mx.array, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(n, m, bias=bias)
    bound = n**-0.5
    weight, offset = mx.random.split(key)
    layer.weight = mx.random.uniform(-bound, bound, (m, n), key=weight)
    if bias:
        layer.bias = mx.random.uniform(-bound, bound, (m,), key=offset)
    return layer
