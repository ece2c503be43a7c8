"""An episode: a support set to adapt on and a query set to measure on; and stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..errors import TaskSamplingError


class Episode(NamedTuple):
    """One episode, or a stack of episodes with a leading task axis. A plain 4-tuple works wherever one does."""

    support_x: mx.array  # (S, *input)
    support_y: mx.array  # (S,) integer classes, or (S, *output) targets
    query_x: mx.array  # (Q, *input)
    query_y: mx.array  # (Q,) or (Q, *output)


def stack_episodes(episodes: Sequence[Sequence[mx.array]]) -> list[Episode]:
    """Episodes as stacks, one for each combination of shapes and dtypes, in order of first appearance."""
    groups: dict[tuple, list[Sequence[mx.array]]] = {}
    for number, episode in enumerate(episodes):
        if len(episode) != 4:
            raise TaskSamplingError(
                f"episode {number} has {len(episode)} parts; expected (support_x, support_y, query_x, query_y)"
            )
        sx, sy, qx, qy = episode
        for name, x, y in (("support", sx, sy), ("query", qx, qy)):
            if x.shape[0] == 0 or x.shape[0] != y.shape[0]:
                raise TaskSamplingError(
                    f"episode {number}: {name}_x has {x.shape[0]} rows and {name}_y {y.shape[0]}; "
                    "both need the same number, at least one"
                )
        groups.setdefault(tuple((a.shape, a.dtype) for a in episode), []).append(episode)
    return [Episode(*(mx.stack(parts) for parts in zip(*group, strict=True))) for group in groups.values()]
