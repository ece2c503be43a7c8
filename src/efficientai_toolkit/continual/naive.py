"""Fine-tuning on one context after the other, and training on all of them at once: the two bounds."""

from __future__ import annotations

from .strategy import Strategy


class Naive(Strategy):
    """Plain fine-tuning: the lower bound."""

    name = "naive"


class Joint(Strategy):
    """Training once, on the examples of all contexts together, for as many steps as one context has: the upper bound.

    Van de Ven & Tolias (2019) train their "joint" baseline so. Only the last row of its accuracy matrix exists.
    """

    name = "joint"
