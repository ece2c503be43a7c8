"""A bounded memory of examples: which to keep, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import ConfigurationError, did_you_mean
from ..settings import check_whole

POLICIES = ("reservoir", "ring", "balanced")


class Memory:
    """At most `capacity` rows, as they came (bytes stay bytes).

    | policy | keeps | reference |
    |---|---|---|
    | "reservoir" | a uniform sample of everything seen | Vitter 1985; Riemer et al. 2019 |
    | "ring" | of each group the latest rows | Lopez-Paz & Ranzato 2017 |
    | "balanced" | of each group a uniform sample | Rebuffi et al. 2017; Chrysakis & Moens 2020 |

    A group is a class of a context. With `per_group`, each has that many places; without, the groups seen so far
    share the capacity equally, and give up rows when a new one comes. Of more groups than places, a uniform sample
    keeps one row each.

    Args:
        capacity: rows.
        policy: see above.
        per_group: places of one group, for "ring" and "balanced".
    """

    def __init__(self, capacity: int, policy: str = "reservoir", per_group: int | None = None):
        if policy not in POLICIES:
            raise ConfigurationError(f"unknown memory policy {policy!r}{did_you_mean(policy, POLICIES)}")
        try:
            check_whole(1, capacity=capacity, per_group=per_group)
        except ConfigurationError as error:
            raise ConfigurationError(f"a memory needs places: {error}") from None
        if per_group is not None and policy == "reservoir":
            raise ConfigurationError("a reservoir has no groups; per_group is for 'ring' and 'balanced'")
        self.capacity, self.policy = int(capacity), policy
        self.per_group = None if per_group is None else int(per_group)
        self._rows: dict[str, np.ndarray] = {}
        self._filled = 0
        self._seen: dict[tuple[int, int], int] = {}  # of each group; a reservoir has the one group (-1, -1)
        self._places: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return self._filled

    @property
    def nbytes(self) -> int:
        """Bytes of all places, used or not."""
        return sum(rows.nbytes for rows in self._rows.values())

    def add(self, rows: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """Offer rows (`x`, `y`, `context`, more columns alike) in their order."""
        count = len(rows["y"])
        for name, values in rows.items():
            if name not in self._rows:
                self._rows[name] = np.zeros((self.capacity, *values.shape[1:]), values.dtype)
        if self.policy == "reservoir":
            places = self._reservoir(count, rng)
        else:
            groups = zip(rows["context"].tolist(), rows["y"].tolist(), strict=True)
            places = np.array([self._place(group, rng) for group in groups], dtype=np.int64)
        # A place given twice keeps the later row.
        last = {place: index for index, place in enumerate(places.tolist()) if place >= 0}
        to, which = list(last), list(last.values())
        for name, values in rows.items():
            self._rows[name][to] = values[which]

    def draw(self, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`count` different rows, or all where there are no more."""
        used = self._used()
        chosen = used[rng.choice(len(used), min(count, len(used)), replace=False, shuffle=False)]
        return {name: values[chosen] for name, values in self._rows.items()}

    def rows(self) -> dict[str, np.ndarray]:
        """Everything in it."""
        return {name: values[self._used()] for name, values in self._rows.items()}

    def _used(self) -> np.ndarray:
        if self.policy == "reservoir":
            return np.arange(self._filled)
        return np.array([place for places in self._places.values() for place in places], dtype=np.int64)

    def _reservoir(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Algorithm R: row n (from 0) takes a place drawn from 0 … n, if there is one."""
        seen = self._seen.get((-1, -1), 0)
        order = np.arange(seen, seen + count)
        places = np.where(order < self.capacity, order, rng.integers(0, order + 1))
        self._seen[-1, -1] = seen + count
        self._filled = min(self.capacity, seen + count)
        return np.where(places < self.capacity, places, -1)

    def _place(self, group: tuple[int, int], rng: np.random.Generator) -> int:
        if group not in self._places:
            self._places[group], self._seen[group] = [], 0
            self._shrink(rng)
            if self.per_group is None and len(self._places) > self.capacity:
                self._replace_a_group(rng)
        mine, seen = self._places[group], self._seen[group]
        self._seen[group] = seen + 1
        quota = self._quota()
        if len(mine) < quota:
            if self._filled == self.capacity:
                return -1  # per_group × groups is more than there is
            free = set(range(self.capacity)).difference(*self._places.values()) if self._filled else {0}
            place = min(free)
            mine.append(place)
            self._filled += 1
            return place
        if self.policy == "ring":
            mine.append(mine.pop(0))
            return mine[-1]
        at = int(rng.integers(0, seen + 1))
        return mine[at] if at < len(mine) else -1

    def _quota(self) -> int:
        return self.per_group or max(self.capacity // len(self._places), 1)

    def _replace_a_group(self, rng: np.random.Generator) -> None:
        """Algorithm R over groups: the newest takes the place of a random one, or none."""
        at = int(rng.integers(0, len(self._places)))
        if at < self.capacity:
            held = [places for places in self._places.values() if places]
            held[at].pop()
            self._filled -= 1

    def _shrink(self, rng: np.random.Generator) -> None:
        quota = self._quota()
        for places in self._places.values():
            while len(places) > quota:
                places.pop(0 if self.policy == "ring" else int(rng.integers(0, len(places))))
                self._filled -= 1

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to checkpoint."""
        groups = list(self._seen)
        held: Iterable[Any] = [(g, p) for g, places in self._places.items() for p in places]
        return {
            **{f"rows/{name}": values for name, values in self._rows.items()},
            "groups": np.array([[*g, self._seen[g]] for g in groups], np.int64).reshape(-1, 3),
            "places": np.array([[*g, p] for g, p in held], np.int64).reshape(-1, 3),
            "filled": np.array(self._filled, np.int64),
        }

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """What `state` gave."""
        self._rows = {n.removeprefix("rows/"): np.array(a) for n, a in arrays.items() if n.startswith("rows/")}
        self._seen = {(int(a), int(b)): int(n) for a, b, n in np.array(arrays["groups"])}
        self._places = {group: [] for group in self._seen if group != (-1, -1)}
        for a, b, place in np.array(arrays["places"]):
            self._places[int(a), int(b)].append(int(place))
        self._filled = int(np.array(arrays["filled"]))
