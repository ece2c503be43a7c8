"""Small tasks and comparisons that the tests of the learners share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from efficientai_toolkit import Episode, EpisodeStack


def sines(count: int, support: int = 6, query: int = 7, seed: int = 0) -> EpisodeStack:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, (count, support + query, 1)).astype(np.float32)
    y = (rng.uniform(0.5, 2, (count, 1, 1)) * np.sin(x - rng.uniform(0, 3, (count, 1, 1)))).astype(np.float32)
    return EpisodeStack(*(mx.array(a) for a in (x[:, :support], y[:, :support], x[:, support:], y[:, support:])))


def blobs(count: int, way: int = 3, shot: int = 2, query: int = 4, dim: int = 2, seed: int = 0) -> EpisodeStack:
    """Classes that are Gaussian clouds about centres of their own."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((count, way, 1, dim))
    x = (centres + 0.5 * rng.standard_normal((count, way, shot + query, dim))).astype(np.float32)
    y = np.broadcast_to(np.arange(way, dtype=np.int32)[:, None], (count, way, shot + query))
    parts = (x[:, :, :shot], y[:, :, :shot], x[:, :, shot:], y[:, :, shot:])
    return EpisodeStack(*(mx.array(np.ascontiguousarray(a).reshape(count, -1, *a.shape[3:])) for a in parts))


def singles(stack: EpisodeStack) -> list[Episode]:
    return [Episode(*(part[i] for part in stack)) for i in range(stack.num_tasks)]


def assert_close(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    """Same names, and each array equal in norm up to `tolerance`."""
    assert a.keys() == b.keys()
    for name in a:
        scale = max(mx.linalg.norm(b[name]).item(), 1e-6)
        assert mx.linalg.norm(a[name] - b[name]).item() <= tolerance * scale, name


def model_part(grads: dict) -> dict:
    return {name: g for name, g in grads.items() if name.startswith("model/")}
