"""Adapter folders on disk, and whole models with the adapter folded in.

`export_peft`, `import_peft` (Hugging Face PEFT), `export_mlx_lm`, `import_mlx_lm` (mlx-lm), `fuse_folder`. A head that
was trained with the adapter is no part of either format and lies beside it in `head.safetensors`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backbones.bert_names import plain_name
from ..errors import AdapterError, DataNotFoundError, OutputError, did_you_mean
from ..nn.functional import clone
from ..settings import as_annotated
from .attach import flat_parameters, merge, quantization_loss
from .attached import adapters_of, arrays_of, head_state
from .base import AdapterConfig

CONFIG, HEAD = "adapter_config.json", "head.safetensors"
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/*", "2_Normalize/*")


# What paths begin with in mlx-lm and in Transformers, where a model type of theirs has other names there.
_THERE = {
    "gpt2": {"model.": "transformer."},
    "gpt_neox": {"model.h.": "gpt_neox.layers.", "model.embed_out": "embed_out", "model.": "gpt_neox."},
}


def hf_name(model: nn.Module, path: str) -> str:
    """The path in Transformers of the module at `path`; encoders say their own, most of mlx-lm's have the same."""
    named: Callable[[str], str] | None = getattr(model, "hf_name", None)
    if named:
        return named(path)
    path = path.removeprefix(getattr(model, "inner", ""))
    starts = _THERE.get(model_type(model), {})
    return next((there + path.removeprefix(start) for start, there in starts.items() if path.startswith(start)), path)


def model_type(model: nn.Module) -> str:
    """What mlx-lm and Transformers call the architecture of a language model; empty where it is none."""
    inner = getattr(model, "inner", "").rstrip(".")
    return getattr(getattr(model, inner) if inner else model, "model_type", "")


def named_config(model: nn.Module, name: str) -> AdapterConfig:
    attached = adapters_of(model)
    if attached is None or name not in attached.configs:
        known = attached.configs if attached else ()
        raise AdapterError(f"no adapter named {name!r} on this model{did_you_mean(name, known)}")
    return attached.configs[name]


def write_folder(
    model: nn.Module,
    name: str,
    folder: Path,
    file: str,
    arrays: Mapping[str, mx.array],
    about: Mapping[str, Any],
    metadata: dict[str, str],
) -> Path:
    """Write one adapter folder, and the head beside it where one was trained."""
    spare_own(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder / file, {k: mx.contiguous(a) for k, a in arrays.items()}, metadata)
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if head := head_state(model, name):
            save_arrays(folder / HEAD, head, metadata)
        else:
            (folder / HEAD).unlink(missing_ok=True)  # of an adapter that was here before
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error
    return folder


def spare_own(folder: Path, *names: str) -> None:
    """Raise an `OutputError` where `folder` has a head (or one of `names`) and is no adapter folder: it is the user's.

    An adapter folder's is of an adapter that was there before, and is replaced or removed.
    """
    own = next((folder / name for name in (HEAD, *names) if os.path.exists(folder / name)), None)
    if own is not None and not (folder / CONFIG).is_file():
        raise OutputError(f"{own} is a file of your own, which would be overwritten; name another folder")


def save_arrays(file: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    mx.eval(list(arrays.values()))  # they may come from the file that is replaced
    part = file.with_name(f".{file.stem}.part.safetensors")
    mx.save_safetensors(str(part), dict(arrays), metadata)
    os.replace(part, file)


def read_config(folder: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """`adapter_config.json` of a folder, as `checked` has it."""
    if not (folder / CONFIG).is_file():
        raise DataNotFoundError(f"{folder} has no {CONFIG}: no adapter folder of PEFT or mlx-lm")
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder / CONFIG} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{folder / CONFIG} must hold a JSON object")
    return checked(data, types, str(folder / CONFIG))


def checked(data: Mapping[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`data` without its nulls.

    Raises:
        AdapterError: an entry that `types` annotates is something else; `where` begins the sentence.
    """
    given = {name: value for name, value in data.items() if value is not None}
    for name in [name for name in types if name in given]:
        try:
            as_annotated(given[name], types[name], strict=True)
        except ValueError as error:
            raise AdapterError(f"{where}: {name} {error}, given {given[name]!r:.99}") from None
    return given


def read_arrays(file: Path) -> dict[str, mx.array]:
    if not file.is_file():
        raise DataNotFoundError(f"{file} is not there")
    try:
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.eval(arrays)  # read now: the file may be written anew before the arrays are used
        return arrays
    except RuntimeError as error:
        raise AdapterError(f"{file} is not a readable safetensors file: {error}") from error


def faults_sentence(expected: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> str:
    """Every missing, unknown and misshapen array, or one of whole numbers, in one sentence; empty where all fit."""
    faults = [f"{key} is missing" for key in expected if key not in given]
    faults += [f"{key} has no place" for key in given if key not in expected]
    faults += [
        f"{key} is {tuple(given[key].shape)}, not {tuple(array.shape)}"
        for key, array in expected.items()
        if key in given and given[key].shape != array.shape
    ]
    faults += [
        f"{key} is of {str(array.dtype).removeprefix('mlx.core.')}, not floating-point numbers"
        for key, array in given.items()
        if not mx.issubdtype(array.dtype, mx.floating)
    ]
    return "; ".join(faults[:5]) + (f" (and {len(faults) - 5} more)" if len(faults) > 5 else "")


def cast(expected: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a file in the adapter's own dtypes, in which it is trained further and saved."""
    return {key: given[key].astype(array.dtype) for key, array in expected.items()}


def fuse_folder(
    model: nn.Module, source: str | Path, folder: str | Path, *, dequantize: bool = False
) -> dict[str, float]:
    """Write the model that acts now, its adapters folded in, as a whole model folder.

    Args:
        model: adapted; it stays as it is.
        source: the base's folder: its configuration and tokenizer are copied, and what of its weights is no part of
            the encoder (other heads).
        folder: to write; `mlx_lm.load` (language models) or Transformers (encoders) loads it.
        dequantize: leave the merged layers of a quantised base dense.

    Returns:
        path → share of the adapter's change that is lost to quantising again; empty where nothing is.

    Raises:
        AdapterError: an adapter has no merge, or one that needs arrays that this architecture has no place for.
    """
    source, folder = Path(source), Path(folder)
    if not (source / "config.json").is_file():
        raise DataNotFoundError(f"{source} has no config.json; the base model's folder is needed")
    if folder.resolve() == source.resolve():
        raise OutputError(f"{folder} is the base model's own folder; fuse into another")
    lost = {} if dequantize else quantization_loss(model)
    fused = merge(clone(model), dequantize=dequantize)
    encoder, inner = hasattr(fused, "hf_name"), getattr(model, "inner", "")
    arrays = {  # but for a head of ours
        path: array
        for path, array in flat_parameters(fused).items()
        if path.startswith(inner) and not (encoder and path.startswith("head."))
    }
    if strange := sorted(arrays.keys() - arrays_of(model).keys()):
        raise AdapterError(
            f"this architecture has no place for what folding the adapter in adds: {', '.join(strange[:3])}"
            f"{', …' if len(strange) > 3 else ''}; keep the adapter beside the model, or adapt layers that have it"
        )
    if encoder:
        weights = _over(source, {hf_name(fused, path): array for path, array in arrays.items()})
    else:
        weights = {path.removeprefix(inner): array for path, array in arrays.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".index.json"):
                    (folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, folder / file.relative_to(source))
        metadata = {"format": "pt" if encoder else "mlx"}
        save_arrays(folder / "model.safetensors", weights, metadata)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error
    return lost


def _over(source: Path, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The source's checkpoint with `weights` in place of its own arrays, under its own names."""
    from ..pretrained import read_weights

    return {key: weights.get(plain_name(key), array) for key, array in read_weights(source).items()}
