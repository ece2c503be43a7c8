"""Random numbers that belong to a task: pure functions of its seed, for many tasks at once.

`numpy.random` seeds one generator at a time; here a vector of seeds gives a matrix of numbers, by SplitMix64
(Steele, Lea & Flood 2014). Every quantity has a name and with it a stream of its own, so fixing one of a task's
quantities leaves its others as they were.
"""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stable_seed(*parts: object) -> int:
    """A 64-bit seed from strings and numbers: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def generator(stream: int, number: int) -> np.random.Generator:
    """The counter-based generator of item `number` of a stream."""
    return np.random.Generator(np.random.Philox(key=np.array([stream & _MASK, number & _MASK], np.uint64)))


def uniform(seeds: np.ndarray, name: str, n: int = 1) -> np.ndarray:
    """(T,) seeds → (T, `n`) float64, uniform in [0, 1)"""
    keys = _mix(np.asarray(seeds, np.uint64) ^ np.uint64(_stream(name)))
    counters = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return (_mix(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def normal(seeds: np.ndarray, name: str, n: int = 1) -> np.ndarray:
    """(T,) seeds → (T, `n`) float64, standard normal (Box-Muller)"""
    u = uniform(seeds, name, 2 * n)
    return np.sqrt(-2 * np.log1p(-u[:, :n])) * np.cos(2 * np.pi * u[:, n:])


@functools.cache
def _stream(name: str) -> int:
    return stable_seed("quantity", name)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
