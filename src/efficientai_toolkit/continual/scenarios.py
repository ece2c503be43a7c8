"""Task-, domain- and class-incremental learning over any sequence of contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, DataError, did_you_mean
from .loss import to_numpy

KINDS = ("task", "domain", "class")
ACTIVE = ("all", "seen")

Rows = tuple[np.ndarray, np.ndarray]


class Part(NamedTuple):
    """The data of one context; its labels are 0 … `num_classes` − 1, whatever the other contexts have."""

    name: str
    num_classes: int
    train: Callable[[], Rows]
    test: Callable[[], Rows]

    @classmethod
    def of(cls, name: str, train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike) -> Part:
        """From arrays: inputs (N, …) and integer labels (N,), of training and test."""
        train = _rows(name, "training", train_x, train_y)
        test = _rows(name, "test", test_x, test_y)
        if train[0].shape[1:] != test[0].shape[1:]:
            raise DataError(
                f"context {name!r}: training inputs are {train[0].shape[1:]}, test inputs {test[0].shape[1:]}"
            )
        return cls(name, int(max(train[1].max(), test[1].max())) + 1, lambda: train, lambda: test)


@dataclass(frozen=True)
class Scenario:
    """Contexts that come one after the other, and which outputs of the model belong to which.

    | kind | outputs | at test time |
    |---|---|---|
    | "task" | each context has its own | the context is known: only its outputs count |
    | "domain" | all contexts share them | the context is not known, nor needed |
    | "class" | each context has its own | the context is not known: all outputs count |

    Args:
        name: of the stream.
        kind: see above.
        parts: the contexts, in their order.
        active: in class-incremental learning, the outputs over which the softmax of training goes: "all" that the
            model has (van de Ven & Tolias' code) or those "seen" so far.

    Reference: van de Ven, Tuytelaars & Tolias (2022), Three types of incremental learning, Nature Machine Intelligence.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    active: str = "all"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigurationError(f"unknown kind of scenario {self.kind!r}{did_you_mean(self.kind, KINDS)}")
        if self.active not in ACTIVE:
            raise ConfigurationError(f"active={self.active!r}: use 'all' or 'seen'")
        if not self.parts:
            raise ConfigurationError(f"the scenario {self.name!r} has no contexts")

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def num_outputs(self) -> int:
        sizes = [part.num_classes for part in self.parts]
        return max(sizes) if self.kind == "domain" else sum(sizes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.parts[0].test()[0].shape[1:]

    def units(self, number: int) -> range:
        """The outputs of a context."""
        first = 0 if self.kind == "domain" else sum(part.num_classes for part in self.parts[:number])
        return range(first, first + self.parts[number].num_classes)

    def train(self, number: int) -> Rows:
        """Inputs (N, …) and outputs (N,) of a context's training set."""
        x, y = self.parts[number].train()
        return x, y + np.int32(self.units(number).start)

    def test(self, number: int) -> Rows:
        """The same of its test set."""
        x, y = self.parts[number].test()
        return x, y + np.int32(self.units(number).start)

    def masks(self, learned: int) -> np.ndarray:
        """(T, C): the outputs that rows of each context may have while context number `learned` is learned."""
        table = np.ones((len(self), self.num_outputs), bool)
        if self.kind == "task":
            for number, row in enumerate(table):
                row[:] = np.isin(np.arange(self.num_outputs), self.units(number))
        elif self.kind == "class" and self.active == "seen":
            table[:, self.units(learned).stop :] = False
        return table

    def test_mask(self, number: int) -> np.ndarray:
        """(C,): the outputs that may be predicted for the test set of a context."""
        return self.masks(len(self) - 1)[number]


def regroup(x: np.ndarray, y: np.ndarray, groups: Sequence[Sequence[int]]) -> list[Rows]:
    """The rows of each group of classes, with labels 0 … in the order of the group."""
    found = []
    for classes in groups:
        place = np.full(int(y.max()) + 1, -1, np.int32)
        place[list(classes)] = np.arange(len(classes))
        here = place[y] >= 0
        found.append((x[here], place[y[here]]))
    return found


def split_by_class(
    names: Sequence[str],
    train: Rows,
    test: Rows,
    groups: Sequence[Sequence[int]],
) -> tuple[Part, ...]:
    """One context a group of classes of a data set, `names` naming them."""
    trains, tests = regroup(*train, groups), regroup(*test, groups)
    return tuple(Part.of(name, *a, *b) for name, a, b in zip(names, trains, tests, strict=True))


def _rows(name: str, which: str, x: ArrayLike, y: ArrayLike) -> Rows:
    inputs, labels = to_numpy(np.asarray(x)), np.asarray(y)
    if labels.ndim != 1 or len(inputs) != len(labels) or len(labels) == 0:
        raise DataError(
            f"context {name!r}: the {which} set needs inputs (N, …) and labels (N,), "
            f"got {inputs.shape} and {labels.shape}"
        )
    if inputs.dtype.kind not in "biuf":
        raise DataError(f"context {name!r}: the {which} inputs must be numbers, got {inputs.dtype}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(f"context {name!r}: the {which} labels must be integers from 0 on")
    return inputs, labels.astype(np.int32)
