"""JAX: jit + vmap + grad; for the convolutional workload also its fastest form, nine shifted slices, task by task."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mlp(p, x):
    for i in range(len(p) // 2 - 1):
        x = jax.nn.relu(x @ p[f"layers.{i}.weight"].T + p[f"layers.{i}.bias"])
    return x @ p["head.weight"].T + p["head.bias"]


def conv_native(x, w):
    return jax.lax.conv_general_dilated(
        x, w.transpose(1, 2, 3, 0), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_slices(x, w):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)
    return columns @ w.reshape(w.shape[0], -1).T


def conv4(p, x, conv):
    for i in range(4):
        x = conv(x, p[f"blocks.{i}.conv.weight"])
        mean = x.mean((0, 1, 2))
        variance = jnp.square(x - mean).mean((0, 1, 2))
        scale = jax.lax.rsqrt(variance + 1e-5) * p[f"blocks.{i}.norm.weight"]
        x = jax.nn.relu((x - mean) * scale + p[f"blocks.{i}.norm.bias"])
        n, height, width, channels = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
        # By comparison: the gradient of `max` asks which values equal the largest, and where XLA computes them twice,
        # with different rounding, none does.
        x = jnp.where(x[:, :, 0] >= x[:, :, 1], x[:, :, 0], x[:, :, 1])
        x = jnp.where(x[:, :, :, 0] >= x[:, :, :, 1], x[:, :, :, 0], x[:, :, :, 1])
    return x.reshape(x.shape[0], -1) @ p["head.weight"].T + p["head.bias"]


def make(work, arrays, contestant):
    params = {path[6:]: jnp.array(value) for path, value in arrays.items() if path.startswith("param/")}
    episode = [jnp.array(arrays[f"episode/{part}"]) for part in ("sx", "sy", "qx", "qy")]
    conv = conv_slices if "slices" in contestant else conv_native

    def loss(p, x, y):
        predictions = mlp(p, x) if work.model == "mlp" else conv4(p, x, conv)
        if work.loss == "mse":
            return jnp.mean(jnp.square(predictions - y))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(predictions), y[:, None], axis=1))

    def adapted(p, sx, sy):
        for _ in range(work.steps):
            g = jax.grad(loss)(p, sx, sy)
            p = {path: p[path] - work.inner_lr * g[path] for path in p}
        return p

    def task(p, sx, sy, qx, qy):
        if work.algorithm == "maml":
            return jax.value_and_grad(lambda p: loss(adapted(p, sx, sy), qx, qy))(p)
        fast = adapted(p, sx, sy)
        return loss(fast, qx, qy), {path: p[path] - fast[path] for path in p}

    def outer(p, m, v, done, g):
        m = {path: 0.9 * m[path] + 0.1 * g[path] for path in p}
        v = {path: 0.999 * v[path] + 0.001 * jnp.square(g[path]) for path in p}
        one, two = 1 - 0.9**done, 1 - 0.999**done
        new = {path: p[path] - work.outer_lr * (m[path] / one) / (jnp.sqrt(v[path] / two) + work.eps) for path in p}
        return new, m, v

    def whole(p, m, v, done, *episode):
        losses, grads = jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(p, *episode)
        return losses.mean(), *outer(p, m, v, done, jax.tree.map(lambda g: g.mean(0), grads))

    one_task, outer_, whole_ = jax.jit(task), jax.jit(outer), jax.jit(whole)
    add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y / work.tasks, a, b))

    def looped(p, m, v, done, *episode):
        query, grads = 0.0, jax.tree.map(jnp.zeros_like, p)
        for parts in zip(*episode, strict=True):
            value, more = one_task(p, *parts)
            query, grads = add((query, grads), (value, more))
        return query, *outer_(p, m, v, done, grads)

    run = looped if "task by task" in contestant else whole_
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = [params, zeros, zeros]
    done = 0

    def steps(count):
        nonlocal done
        for _ in range(count):
            done += 1
            query, *state[:] = run(*state, float(done), *episode)
        jax.block_until_ready(state)
        return float(query)

    return steps
