"""An episode: a support set to adapt on and a query set to measure on; and stacks of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import TaskSamplingError


class Episode(NamedTuple):
    """One episode. A plain 4-tuple works wherever one does."""

    support_x: mx.array  # (S, *input)
    support_y: mx.array  # (S,) integer classes, or (S, *output) targets
    query_x: mx.array  # (Q, *input)
    query_y: mx.array  # (Q,) or (Q, *output)


class EpisodeStack(Episode):
    """Episodes of equal shape, stacked: every array has a leading task axis."""

    __slots__ = ()

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def chunks(self, size: int, multiple: int = 1) -> Iterator[EpisodeStack]:
        """The stack in pieces of at most `size` tasks, a multiple of `multiple`, as equal as can be."""
        count = -(-self.num_tasks // size)
        size = -(-self.num_tasks // (count * multiple)) * multiple
        for start in range(0, self.num_tasks, size):
            yield EpisodeStack(*(part[start : start + size] for part in self)) if count > 1 else self


def as_array(values: Any) -> mx.array:
    """`values`, which may be a NumPy array or nested lists, for the device."""
    try:
        return values if isinstance(values, mx.array) else mx.array(values)
    except (TypeError, ValueError) as error:
        raise TaskSamplingError(f"expected numbers, got {type(values).__name__} ({error})") from None


def as_targets(values: Any) -> mx.array:
    """`as_array` of targets, of which true and false are classes 1 and 0."""
    targets = as_array(values)
    return targets.astype(mx.int32) if targets.dtype == mx.bool_ else targets


def _check_rows(where: str, *rows: tuple[int, ...]) -> None:
    """Each example has its target, and there is one at least; `rows` of the four parts, () of a part without any."""
    for name, x, y in (("support", *rows[:2]), ("query", *rows[2:])):
        if x != y or 0 in (x or (0,)):
            raise TaskSamplingError(
                f"{where}{name}_x has {sum(x)} rows and {name}_y {sum(y)}; both need the same number, at least one"
            )


def _checked_stack(stack: EpisodeStack) -> EpisodeStack:
    """`stack` of arrays of MLX, of as many tasks and rows each as belong together: less would be broadcast."""
    sx, sy, qx, qy = stack
    parts = EpisodeStack(as_array(sx), as_targets(sy), as_array(qx), as_targets(qy))
    tasks = [part.shape[:1] for part in parts]
    if len(set(tasks)) > 1 or tasks[0] in ((), (0,)):
        raise TaskSamplingError(
            f"the parts of a stack are of {', '.join(str(sum(n)) for n in tasks)} tasks; "
            "all four need the same number, at least one"
        )
    _check_rows("", *(part.shape[1:2] for part in parts))
    return parts


def stack_episodes(episodes: Sequence[Sequence[mx.array]]) -> list[EpisodeStack]:
    """Episodes as stacks, one for each combination of shapes and dtypes, in order of first appearance."""
    groups: dict[tuple, list[Sequence[mx.array]]] = {}
    for number, episode in enumerate(episodes):
        if len(episode) != 4:
            raise TaskSamplingError(
                f"episode {number} has {len(episode)} parts; expected (support_x, support_y, query_x, query_y)"
            )
        sx, sy, qx, qy = episode
        episode = sx, sy, qx, qy = as_array(sx), as_targets(sy), as_array(qx), as_targets(qy)
        _check_rows(f"episode {number}: ", *(a.shape[:1] for a in episode))
        groups.setdefault(tuple((a.shape, a.dtype) for a in episode), []).append(episode)
    return [EpisodeStack(*(mx.stack(list(parts)) for parts in zip(*group, strict=True))) for group in groups.values()]


def as_stacks(episodes: Sequence[Sequence[mx.array]] | EpisodeStack) -> list[EpisodeStack]:
    """Stacks from one stack, or from a list of stacks, of single episodes (4-tuples), or of both."""
    if isinstance(episodes, EpisodeStack):
        episodes = [episodes]
    if not isinstance(episodes, Sequence):
        raise TaskSamplingError(f"expected a list of episodes, or a stack of them, got {episodes!r}")
    if len(episodes) == 4 and all(isinstance(part, mx.array) for part in episodes):
        if isinstance(episodes, Episode):
            return stack_episodes([episodes])  # pyright: ignore[reportArgumentType]
        raise TaskSamplingError(
            "expected a list of episodes, got one; write [episode], or EpisodeStack(*arrays) for a stack"
        )
    if not len(episodes):
        raise TaskSamplingError("no episodes were given; at least one is needed")
    each = [_checked_stack(e) if isinstance(e, EpisodeStack) else e for e in episodes]
    stacks = [e for e in each if isinstance(e, EpisodeStack)]
    if len(stacks) == len(each):
        return stacks
    singles = (zip(*e, strict=True) if isinstance(e, EpisodeStack) else [e] for e in each)
    return stack_episodes(list(itertools.chain.from_iterable(singles)))
