"""BitFit: train the biases and nothing else (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..nn.layers import Conv2d, EpisodicBatchNorm
from ..settings import Positive
from .base import Adapter, AdapterConfig, Site, copy_of

# They add their bias last. A recurrent layer's is inside its recurrence, where a sum behind the layer does not reach.
_ADD_IT_LAST = (
    *(nn.Linear, nn.QuantizedLinear, Conv2d, EpisodicBatchNorm),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.BatchNorm),
)


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
        return isinstance(base, _ADD_IT_LAST) and isinstance(base.get("bias"), mx.array)

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
