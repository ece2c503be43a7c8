"""Models underneath. To add one: its file, and its line in `BACKBONES`.

A backbone is an `mlx.nn.Module` whose constructor takes whichever it needs of `input_shape` (an image's), `input_dim`
(numbers in one input), `num_classes` or `output_dim`, `hidden_dim`, `num_layers`, `source`, `pooling` and `key`. What
else it takes are its options (`model.options`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    import mlx.nn as nn

BACKBONES = {
    "conv4": "conv4:Conv4",
    "conv4_strided": "conv4:StridedConv4",
    "encoder": "bert:load_encoder",
    "language_model": "language_model:load_language_model",
    "linear": "mlp:SimpleClassifier",
    "mlp": "mlp:MLP",
    "resnet12": "resnet12:ResNet12",
}


def backbone_class(name: str) -> Callable[..., nn.Module]:
    """The class (or loader) of a backbone by its name in configuration."""
    if name not in BACKBONES:
        raise ConfigurationError(f"unknown backbone {name!r}{did_you_mean(name, BACKBONES)}")
    module, _, attribute = BACKBONES[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)


def build_backbone(config: Any, input_shape: Sequence[int], output_dim: int, *, seed: int = 0) -> nn.Module:
    """The model that `config` (`backbone` and its settings) names, for inputs and outputs of these sizes.

    Args:
        config: section `model` of the configuration.
        input_shape: of one input: (D,), (H, W) or (H, W, C); (L,) tokens for an encoder.
        output_dim: classes, or the size of a target.
        seed: of the weights.
    """
    import inspect

    import mlx.core as mx

    made = backbone_class(config.backbone)
    takes = inspect.signature(made).parameters
    shape = tuple(input_shape)
    if "input_shape" in takes:
        if len(shape) not in (2, 3):
            raise ConfigurationError(
                f"model.backbone {config.backbone!r} works on images, and these tasks have inputs of shape {shape}; "
                "use linear or mlp"
            )
        if "num_layers" in takes:
            layers = takes["num_layers"].default if config.num_layers is None else config.num_layers
            if 2**layers > min(shape[:2]):
                raise ConfigurationError(
                    f"model.num_layers = {layers} halves images of {shape[0]} × {shape[1]} away; "
                    f"at most {int(math.log2(min(shape[:2])))} layers fit"
                )
    offered = {
        "input_shape": shape if len(shape) == 3 else (*shape, 1),
        "input_dim": math.prod(shape),
        "num_classes": output_dim,
        "output_dim": output_dim,
        "source": config.source,
        "pooling": config.pooling,
        "key": mx.random.key(seed),
    }
    sizes = {"hidden_dim": config.hidden_dim, "num_layers": config.num_layers}
    offered |= {name: size for name, size in sizes.items() if size is not None}
    options = _options(config, made, {*takes} - {*offered, *sizes})
    return made(**{name: value for name, value in offered.items() if name in takes}, **options)


def _options(config: Any, made: Callable[..., nn.Module], known: set[str]) -> dict[str, Any]:
    """`model.options`, checked against the annotations of what is made."""
    import inspect

    from ..settings import as_annotated

    hints = get_type_hints(made.__init__ if inspect.isclass(made) else made, include_extras=True)
    checked = {}
    for name, value in config.options.items():
        if name not in known:
            hint = did_you_mean(name, known) if known else "; it has none"
            raise ConfigurationError(f"model.options: {config.backbone!r} has no option {name!r}{hint}")
        try:
            checked[name] = as_annotated(value, hints[name], strict=True)
        except ValueError as error:
            raise ConfigurationError(f"model.options.{name} {error}, got {value!r}") from None
    return checked
