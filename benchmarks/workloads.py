"""The workloads: names, sizes, initial weights and episodes, as NumPy arrays that every contestant starts from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from encoder_workloads import ENCODER_WORKLOADS, EncoderWorkload, encoder_arrays


@dataclass(frozen=True)
class Workload:
    title: str
    algorithm: str  # maml (second order) or reptile
    model: str  # mlp or conv4
    loss: str  # mse or cross_entropy
    inner_lr: float
    steps: int
    tasks: int
    support: int
    query: int
    sizes: tuple[int, ...]  # of the MLP's layers; of Conv-4: (filters, classes)
    outer_lr: float = 0.001
    # Of Adam. Large enough that a gradient of nearly zero, whose sign is rounding, does not take a step of full size.
    eps: float = 1e-3


WORKLOADS: dict[str, Workload | EncoderWorkload] = {
    "a": Workload(
        "sinusoid MAML: 25 tasks × (10 + 10), MLP 1-40-40-1, 5 inner steps, second order",
        "maml", "mlp", "mse", 0.001, 5, 25, 10, 10, (1, 40, 40, 1),
    ),
    "b": Workload(
        "Conv-4 MAML: 64 filters, 32 tasks × (5 + 5) images of 28 × 28, 1 inner step, second order",
        "maml", "conv4", "cross_entropy", 0.01, 1, 32, 5, 5, (64, 5),
    ),
    "c": Workload(
        "Reptile: 4 tasks × (5 + 20), MLP 2-64-64-2, 5 inner steps",
        "reptile", "mlp", "cross_entropy", 0.01, 5, 4, 5, 20, (2, 64, 64, 2),
    ),
    **ENCODER_WORKLOADS,
}  # fmt: skip


def arrays(name: str) -> dict[str, np.ndarray]:
    """`param/PATH` (linear (out, in), convolution (out, kh, kw, in)) and `episode/{sx,sy,qx,qy}`, float32 and int32."""
    work, rng = WORKLOADS[name], np.random.default_rng(0)
    if isinstance(work, EncoderWorkload):
        return encoder_arrays(work)
    params = _mlp(rng, work.sizes) if work.model == "mlp" else _conv4(rng, *work.sizes)
    episode = {"a": _sinusoids, "b": _images, "c": _planes}[name](rng, work)
    made = {f"param/{path}": value for path, value in params.items()}
    made |= {f"episode/{part}": value for part, value in zip(("sx", "sy", "qx", "qy"), episode, strict=True)}
    return {path: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for path, value in made.items()}


def _mlp(rng, sizes):
    names = [*(f"layers.{i}" for i in range(len(sizes) - 2)), "head"]
    params = {}
    for path, n_in, n_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        params[f"{path}.weight"] = rng.standard_normal((n_out, n_in)) * (2 / n_in) ** 0.5
        params[f"{path}.bias"] = np.zeros(n_out)
    return params


def _conv4(rng, filters, classes):
    params, channels = {}, 1
    for i in range(4):
        bound = (6 / (9 * (channels + filters))) ** 0.5
        params[f"blocks.{i}.conv.weight"] = rng.uniform(-bound, bound, (filters, 3, 3, channels))
        params[f"blocks.{i}.norm.weight"] = np.ones(filters)
        params[f"blocks.{i}.norm.bias"] = np.zeros(filters)
        channels = filters
    params["head.weight"] = rng.standard_normal((classes, filters)) * filters**-0.5
    params["head.bias"] = np.zeros(classes)
    return params


def _sinusoids(rng, work):
    amplitude, phase = rng.uniform(0.1, 5, (work.tasks, 1, 1)), rng.uniform(0, np.pi, (work.tasks, 1, 1))
    x = rng.uniform(-5, 5, (work.tasks, work.support + work.query, 1))
    y = amplitude * np.sin(x - phase)
    return x[:, : work.support], y[:, : work.support], x[:, work.support :], y[:, work.support :]


def _planes(rng, work):
    x = rng.standard_normal((work.tasks, work.support + work.query, 2))
    y = (np.einsum("tni,ti->tn", x, rng.standard_normal((work.tasks, 2))) > 0).astype(int)
    return x[:, : work.support], y[:, : work.support], x[:, work.support :], y[:, work.support :]


def _images(rng, work):
    classes = work.sizes[1]
    strokes = rng.random((work.tasks, classes, 28, 28, 1)) < 0.2
    parts = []
    for shots in (work.support // classes, work.query // classes):
        images = np.repeat(strokes, shots, axis=1)
        # The noise keeps max pooling free of ties, whose gradient is not the same in every framework.
        parts += [np.where(rng.random(images.shape) < 0.1, 0.5, images) + rng.uniform(0, 0.1, images.shape)]
        parts += [np.tile(np.repeat(np.arange(classes), shots), (work.tasks, 1))]
    return parts
