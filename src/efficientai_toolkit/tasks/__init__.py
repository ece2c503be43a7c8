"""Task distributions: what a learner is meta-trained on.

A family is one kind of task (sinusoids, handwriting, …). A new one is one file that subclasses `Family`, and one
line in this table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import TaskSamplingError, did_you_mean

if TYPE_CHECKING:
    from .base import Family

FAMILIES = {
    "linear_classification": "linear:LinearClassification",
    "nonlinear_classification": "nonlinear:NonlinearClassification",
    "sinusoid": "sinusoid:SinusoidalTaskGenerator",
    "harmonic": "harmonic:Harmonic",
    "mixed_regression": "mixed_regression:MixedRegression",
    "omniglot": "omniglot:Omniglot",
    "mnist": "mnist:Mnist",
    "cifar_fs": "cifar_fs:CifarFS",
    "fc100": "fc100:FC100",
    "mini_imagenet": "mini_imagenet:MiniImageNet",
    "image_folder": "image_folder:ImageFolder",
    "intents": "intents:Intents",
    "glue": "glue:Glue",
    "superglue": "superglue:SuperGlue",
    "text_folder": "text_folder:TextFolder",
}


def family(name: str) -> type[Family]:
    """The class of the family `name`, imported now."""
    if name not in FAMILIES:
        raise TaskSamplingError(f"unknown task family {name!r}{did_you_mean(name, FAMILIES)}")
    module, attribute = FAMILIES[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
