"""The one name here of an encoder's array, which has several in the checkpoints of Transformers."""

from __future__ import annotations

import re

_FAMILY = re.compile(r"^(bert|roberta|distilbert)\.")  # before an encoder's names where it is a part of a larger model


def plain_name(name: str) -> str:
    """`bert.embeddings.LayerNorm.gamma` → `embeddings.LayerNorm.weight`."""
    name = _FAMILY.sub("", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
