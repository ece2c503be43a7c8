"""Linear layers, dense or quantised, as adapters see them; and quantised layers that stack over tasks.

`mx.quantized_matmul` has no `vmap` rule. A frozen quantised layer computed as dequantise → matmul has one: the dense
weight depends on no task, so under `vmap` the tasks fold into the rows of one matmul. It is rebuilt for the backward
pass instead of kept, so that no more than a layer's dense weight need be alive at a time.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear))


def in_features(base: Any) -> int:
    if isinstance(base, nn.QuantizedLinear):
        return base.weight.shape[-1] * 32 // base.bits
    return base.weight.shape[-1]


def out_features(base: Any) -> int:
    return base.weight.shape[0]


def dequantized(module: Any) -> mx.array:
    """The dense weight (out, in) of a quantised layer."""
    return mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def dense_weight(base: Any) -> mx.array:
    """(out, in)"""
    return dequantized(base) if isinstance(base, nn.QuantizedLinear) else base.weight


def dense_linear(base: Any) -> nn.Linear:
    """`base` as an `nn.Linear` (itself, where it is one)."""
    if isinstance(base, nn.Linear):
        return base
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = dequantized(base)
    if "bias" in base:
        layer.bias = base.bias
    return layer


def frozen_matmul(base: Any, x: mx.array) -> mx.array:
    """x @ Wᵀ for the constant W of a quantised layer, under every transformation and to every order in x."""

    @mx.custom_function
    def matmul(x) -> Any:
        return x @ dequantized(base).T.astype(x.dtype)

    @mx.custom_function
    def transposed(g):
        return g @ dequantized(base).astype(g.dtype)

    @matmul.vjp
    def _(x, cotangent, _output):
        return transposed(cotangent)

    @transposed.vjp
    def _(g, cotangent, _output):
        return matmul(cotangent)

    out: Any = matmul(x)
    return out


class StackableQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` with a `vmap` rule; the same arrays under the same names."""

    def __call__(self, x: mx.array) -> mx.array:
        y = frozen_matmul(self, x)
        return y + self["bias"] if "bias" in self else y


class StackableQuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` whose `as_linear` (tied output layer) has a `vmap` rule."""

    def as_linear(self, x: mx.array) -> mx.array:
        return frozen_matmul(self, x)


_STACKABLE = {
    nn.QuantizedLinear: StackableQuantizedLinear,
    nn.QuantizedEmbedding: StackableQuantizedEmbedding,
}
_PLAIN = {stackable: plain for plain, stackable in _STACKABLE.items()}


def make_stackable(model: nn.Module, stackable: bool = True) -> None:
    """Give every quantised layer of `model` the class that stacks, or (`False`) MLX's own, fastest for generation."""
    classes = _STACKABLE if stackable else _PLAIN
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
