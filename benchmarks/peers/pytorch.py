"""PyTorch: the autograd loop that learn2learn runs, `torch.func`, and the latter under `torch.compile`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad, grad_and_value, vmap


def mlp(p, x):
    for i in range(len(p) // 2 - 1):
        x = torch.relu(F.linear(x, p[f"layers.{i}.weight"], p[f"layers.{i}.bias"]))
    return F.linear(x, p["head.weight"], p["head.bias"])


def conv4(p, x, by_hand):
    for i in range(4):
        x = F.conv2d(x, p[f"blocks.{i}.conv.weight"], padding=1)
        scale, shift = p[f"blocks.{i}.norm.weight"], p[f"blocks.{i}.norm.bias"]
        if by_hand:  # F.batch_norm is wrong by 1e-3 in second order under vmap
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
            x = (x - mean) * torch.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
        else:
            x = F.batch_norm(x, None, None, scale, shift, training=True)
        x = F.max_pool2d(torch.relu(x), 2)
    return F.linear(x.flatten(1), p["head.weight"], p["head.bias"])


def make(work, arrays, contestant):
    params = {path[6:]: torch.tensor(value) for path, value in arrays.items() if path.startswith("param/")}
    episode = [torch.tensor(arrays[f"episode/{part}"]) for part in ("sx", "sy", "qx", "qy")]
    if work.model == "conv4":  # PyTorch's layout
        params = {p: v.permute(0, 3, 1, 2).contiguous() if v.ndim == 4 else v for p, v in params.items()}
        episode = [e.permute(0, 1, 4, 2, 3).contiguous() if e.ndim == 5 else e for e in episode]
    episode = [e if e.is_floating_point() else e.long() for e in episode]
    by_hand = contestant != "autograd loop"
    criterion = F.mse_loss if work.loss == "mse" else F.cross_entropy

    def loss(p, x, y):
        return criterion(mlp(p, x) if work.model == "mlp" else conv4(p, x, by_hand), y)

    maker = _loop if contestant == "autograd loop" else _functional
    return maker(work, params, episode, loss, compiled=contestant == "torch.compile")


def _loop(work, params, episode, loss, compiled):
    params = {path: torch.nn.Parameter(value) for path, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=work.outer_lr, eps=work.eps)
    second = work.algorithm == "maml"

    def step():
        optimizer.zero_grad()
        total = 0.0
        for sx, sy, qx, qy in zip(*episode, strict=True):
            fast = params if second else {p: v.detach().clone().requires_grad_() for p, v in params.items()}
            for _ in range(work.steps):
                grads = torch.autograd.grad(loss(fast, sx, sy), list(fast.values()), create_graph=second)
                fast = {p: v - work.inner_lr * g for (p, v), g in zip(fast.items(), grads, strict=True)}
                if not second:
                    fast = {p: v.detach().requires_grad_() for p, v in fast.items()}
            if second:
                query = loss(fast, qx, qy)
                (query / work.tasks).backward()
            else:
                with torch.no_grad():
                    query = loss(fast, qx, qy)
                    for path, p in params.items():
                        displacement = (p - fast[path]) / work.tasks
                        p.grad = displacement if p.grad is None else p.grad + displacement
            total += float(query.detach())
        optimizer.step()
        return total / work.tasks

    return lambda count: [step() for _ in range(count)][-1]


def _functional(work, params, episode, loss, compiled):
    def adapted(p, sx, sy):
        for _ in range(work.steps):
            g = grad(loss)(p, sx, sy)
            p = {path: p[path] - work.inner_lr * g[path] for path in p}
        return p

    def gradient(p, *episode):
        if work.algorithm == "maml":

            def outer(p):
                return vmap(lambda sx, sy, qx, qy: loss(adapted(p, sx, sy), qx, qy))(*episode).mean()

            return grad_and_value(outer)(p)

        def task(sx, sy, qx, qy):
            fast = adapted(p, sx, sy)
            return fast, loss(fast, qx, qy)

        fast, query = vmap(task)(*episode)
        return {path: p[path] - fast[path].mean(0) for path in p}, query.mean()

    def step(p, m, v, correction, *episode):
        g, query = gradient(p, *episode)
        m = {path: 0.9 * m[path] + 0.1 * g[path] for path in p}
        v = {path: 0.999 * v[path] + 0.001 * g[path].square() for path in p}
        one, two = correction[0], correction[1]
        new = {path: p[path] - work.outer_lr * (m[path] / one) / ((v[path] / two).sqrt() + work.eps) for path in p}
        return query, new, m, v

    run = torch.compile(step) if compiled else step
    # Two sets of zeros: of one, torch.compile would notice at the second step that they are no longer the same.
    state = [params, *({path: torch.zeros_like(value) for path, value in params.items()} for _ in range(2))]
    done = 0

    def steps(count):
        nonlocal done
        for _ in range(count):
            done += 1
            correction = torch.tensor([1 - 0.9**done, 1 - 0.999**done])
            query, *state[:] = run(*state, correction, *episode)
        return float(query)

    return steps
