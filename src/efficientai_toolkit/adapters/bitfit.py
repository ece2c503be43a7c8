"""BitFit: train the biases and nothing else (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..settings import Positive
from .base import Adapter, AdapterConfig, Site, copy_of

# Their bias is inside a recurrence, where a sum behind the layer does not reach.
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)


class BitFit(Adapter):
    """y = base(x) + b, b the change of the bias, zero at the start.

    The same gradients as training the bias itself, while the base keeps its own: it can be detached, named and
    combined like any other adapter. Parameters: the bias's.
    """

    wants: ClassVar[str] = "a dense layer, a convolution or a norm with a bias"

    def __init__(self, bias: mx.array):
        super().__init__()
        self.bias = bias

    @classmethod
    def fits(cls, base: Any) -> bool:
        bias = base.get("bias")
        if not isinstance(bias, mx.array) or bias.ndim != 1 or isinstance(base, _RECURRENT):
            return False
        if any("." in path for path, _ in tree_flatten(base.parameters())):  # layers of its own may follow the bias
            return False
        parameters = inspect.signature(base).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return len(needed) == 1  # of several inputs one may choose or multiply the bias

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        return cls(mx.zeros(base.bias.shape))

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return base.bias.size

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        y = base(x)
        return y + self.bias.astype(y.dtype)

    def fuse(self, base: Any) -> nn.Module:
        out = copy_of(base)
        out.bias = base.bias + self.bias.astype(base.bias.dtype)
        return out


@dataclass(frozen=True)
class BitFitConfig(AdapterConfig):
    """Every bias of the model, the norms' included. Default rate: 1e-3, the upper end of the paper's search
    (it notes that biases want larger rates than full fine-tuning)."""

    learning_rate: Positive = 1e-3

    adapter: ClassVar[type[Adapter]] = BitFit
    targets: ClassVar = (("bias",),)
