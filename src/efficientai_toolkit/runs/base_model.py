"""The base model under a checkpoint, which is not in it: its description, and the check that it is the same one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..adapters.attach import flat_parameters
from ..adapters.fixed import check_fixed, split_fixed
from ..adapters.select import SHARED
from ..checkpoint import read_npz
from ..errors import AdapterError, CheckpointError, ConfigurationError
from ..learners.base import MetaLearner
from ..nn.functional import trainable, update

if TYPE_CHECKING:
    from ..config import MetaLearningConfig

_SIZES = ("hidden_size", "num_layers", "vocab_size")
_SAMPLE = 1024  # numbers of one array that a digest is made of


def describe_base(config: MetaLearningConfig, model: Any) -> dict[str, Any]:
    """What the base model is, so that another is not taken for it; plain JSON, computed in milliseconds."""
    if not config.model.reads_texts:
        return {"source": config.model.backbone}
    sizes = {name: getattr(model.config, name) for name in _SIZES}
    return {"source": config.model.source, **sizes, "weights": _digest(model)}


def check_base(base: Any, config: MetaLearningConfig, model: Any, path: str | Path) -> None:
    """Refuse `model` where it does not stand on what `base` describes; a file from before has no description.

    Raises:
        CheckpointError: another size, or other weights; both models are named.
    """
    if not isinstance(base, dict) or not config.model.reads_texts:
        return
    theirs, here = base.get("source"), config.model.source
    own = {name: getattr(model.config, name) for name in _SIZES}
    other = [name for name in _SIZES if base.get(name) != own[name]]
    if other:
        sizes = ", ".join(f"{name} {base.get(name)}" for name in other)
        raise CheckpointError(
            f"{path} belongs to {theirs!r} with {sizes}, and {here!r} has {', '.join(str(own[n]) for n in other)}"
        )
    for name, digest in (("weights", _digest), ("fingerprint", _word_digest)):
        if name in base and digest(model) != base[name]:
            what = "its weights are others now" if theirs == here else f"the weights of {here!r} are others"
            raise CheckpointError(f"{path} belongs to {theirs!r}, and {what}; name the base it was made over")


@contextlib.contextmanager
def placing(base: Any, config: MetaLearningConfig, path: str | Path) -> Iterator[None]:
    """Within it an adapter that finds no place in the model says which base it belongs to."""
    try:
        yield
    except AdapterError as error:
        if not isinstance(base, dict) or not config.model.reads_texts:
            raise
        sizes = ", ".join(f"{name} {base.get(name)}" for name in _SIZES)
        raise CheckpointError(
            f"{path} belongs to {base.get('source')!r} ({sizes}), and its adapter does not fit "
            f"{config.model.source!r}: {error}"
        ) from error


def move_base(config: MetaLearningConfig, source: str | None) -> None:
    """Let `config` read its base model at `source`, where that is given.

    Raises:
        ConfigurationError: nothing of this model is read from anywhere.
    """
    if source is None:
        return
    if not config.model.reads_texts:
        raise ConfigurationError(
            f"--base names a pre-trained model, and model.backbone {config.model.backbone!r} is none"
        )
    config.model.source = source


def take_fixed(model: Any, arrays: Mapping[str, mx.array], path: str | Path) -> dict[str, mx.array]:
    """Put a file's fixed arrays into `model`; the others are returned."""
    check_fixed(model, arrays, path)
    fixed, others = split_fixed(model, arrays)
    update(model, fixed)
    return others


def load_checkpoint(learner: MetaLearner, config: MetaLearningConfig, path: str | Path) -> None:
    """`learner.load` of what `train` or `import` wrote, with its fixed arrays and over its own base model only.

    Raises:
        CheckpointError: the file is damaged, or of another algorithm, model or base model.
    """
    arrays, header = read_npz(path)
    check_base(header.get("base"), config, learner.model, path)
    learner.take_over(path, arrays, header)


def _digest(model: Any) -> str:
    """Of the base's frozen weights, evenly spaced numbers of each: a model trained further differs in them."""
    trained = trainable(model)
    parts = [
        array.reshape(-1)[:: max(1, array.size // _SAMPLE)].astype(mx.float32)
        for path, array in flat_parameters(model).items()
        if path not in trained and ".adapters." not in path and not path.startswith((SHARED, "head."))
    ]
    return _hash(mx.concatenate(parts)) if parts else ""


def _word_digest(model: Any) -> str:
    """Of the word embeddings alone, as folders of earlier releases have it."""
    embedding = model.lm.model.embed_tokens if "lm" in model else model.embeddings.word_embeddings
    weight = embedding.base.weight if "base" in embedding else embedding.weight
    return _hash(weight[:512].astype(mx.float32))


def _hash(array: mx.array) -> str:
    return hashlib.blake2b(np.array(array).tobytes(), digest_size=16).hexdigest()
