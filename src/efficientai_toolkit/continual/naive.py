"""Fine-tuning on one context after the other, and training on all of them at once: the two bounds."""

from __future__ import annotations

from .strategy import Strategy


class Naive(Strategy):
    """Plain fine-tuning: the lower bound."""

    name = "naive"


class Joint(Strategy):
    """Training once, on the examples of all contexts together, for as many steps as those have in all: the upper bound.

    Van de Ven & Tolias (2019) take as many steps, on the examples of the contexts so far. Here only the last row of the
    accuracy matrix exists.
    """

    name = "joint"
