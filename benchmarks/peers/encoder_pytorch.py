"""PyTorch: Transformers' BERT and Hugging Face PEFT's LoRA, by an autograd loop over the tasks or by `torch.func`.

Attention is "eager": the fused kernel has no second derivative.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
import transformers
from torch.func import functional_call, grad, grad_and_value, vmap


class Classifier(torch.nn.Module):
    """Token ids without pads (N, L) → the mean of the last hidden states → a linear head (N, `classes`)."""

    def __init__(self, encoder, width, classes):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(width, classes)

    def forward(self, ids):
        return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))


def make(work, arrays, contestant):
    model, params = _model(work, arrays)
    episode = [torch.tensor(arrays[f"episode/{part}"]).long() for part in ("sx", "sy", "qx", "qy")]

    def loss(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x,)), y)

    params = {path: value.detach().clone().requires_grad_() for path, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=work.outer_lr, eps=work.eps)
    gradient = {"torch.func": _stacked, "torch.func, task by task": _functional}.get(contestant, _loop)(work, loss)

    def step():
        optimizer.zero_grad()
        query = gradient(params, episode)
        optimizer.step()
        return query

    return lambda count: [step() for _ in range(count)][-1]


def _model(work, arrays):
    config = transformers.BertConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        intermediate_size=work.hidden,
        attn_implementation="eager",
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    weights = {path[7:]: torch.tensor(value) for path, value in arrays.items() if path.startswith("frozen/")}
    bert.load_state_dict(weights, strict=True)
    layers = list(work.adapted)
    lora = peft.LoraConfig(
        r=work.rank, lora_alpha=work.rank, target_modules=["query", "value"], layers_to_transform=layers
    )
    model = Classifier(peft.get_peft_model(bert, lora), work.width, work.classes).eval()  # eval: no dropout
    given = {}
    for path, value in arrays.items():
        if path.startswith("param/"):
            given[_peft_name(path[6:])] = torch.tensor(value)
    trained = {path: value for path, value in model.named_parameters() if value.requires_grad}
    if given.keys() != trained.keys():
        raise SystemExit(f"trained by PEFT and not by the workload, or the reverse: {given.keys() ^ trained.keys()}")
    return model, given


def _peft_name(path):
    if path.startswith("head."):
        return path
    layer, module, factor = path.split(".")
    return f"encoder.base_model.model.encoder.layer.{layer}.attention.self.{module}.lora_{factor}.default.weight"


def _loop(work, loss):
    """The loop of learn2learn and `higher`: `torch.autograd.grad`, with `create_graph` for second order."""
    second = work.algorithm == "maml"

    def gradient(params, episode):
        total = 0.0
        for sx, sy, qx, qy in zip(*episode, strict=True):
            fast = params
            for _ in range(work.steps):
                grads = torch.autograd.grad(loss(fast, sx, sy), list(fast.values()), create_graph=second)
                fast = {path: v - work.inner_lr * g for (path, v), g in zip(fast.items(), grads, strict=True)}
            query = loss(fast, qx, qy)
            (query / work.tasks).backward()
            total += float(query.detach())
        return total / work.tasks

    return gradient


def _adapted(work, loss, p, sx, sy):
    for _ in range(work.steps):
        g = grad(loss)(p, sx, sy)
        p = {path: p[path] - work.inner_lr * g[path] for path in p}
    return p


def _stacked(work, loss):
    """`vmap` over the tasks, first order (in second, a stack would keep the inner graphs of every task at once)."""

    def task(p, sx, sy, qx, qy):
        return grad_and_value(loss)(_adapted(work, loss, p, sx, sy), qx, qy)

    def gradient(params, episode):
        start = {path: value.detach() for path, value in params.items()}
        grads, query = vmap(task, in_dims=(None, 0, 0, 0, 0))(start, *episode)
        for path, value in params.items():
            value.grad = grads[path].mean(0)
        return float(query.mean())

    return gradient


def _functional(work, loss):
    """`grad` through the inner steps, task by task."""

    def task(p, sx, sy, qx, qy):
        return loss(_adapted(work, loss, p, sx, sy), qx, qy)

    def gradient(params, episode):
        start = {path: value.detach() for path, value in params.items()}
        total, mean = 0.0, {path: torch.zeros_like(value) for path, value in start.items()}
        for parts in zip(*episode, strict=True):
            grads, query = grad_and_value(task)(start, *parts)
            mean = {path: mean[path] + g / work.tasks for path, g in grads.items()}
            total += float(query)
        for path, value in params.items():
            value.grad = mean[path]
        return total / work.tasks

    return gradient
