"""Hugging Face PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backbones.bert_names import plain_name
from ..errors import AdapterError, did_you_mean
from .adalora import AdaLoRAConfig
from .attach import attach, detach, slots
from .attached import write_head
from .formats import cast, faults_sentence, hf_name, model_type, named_config, read_arrays, read_config, write_folder
from .ia3 import IA3Config
from .peft_methods import (
    BY_PEFT_TYPE,
    LEARNS_A_PROMPT,
    METHODS,
    TYPES,
    WRITTEN_AS,
    Method,
    check_options,
    prompt_options,
)
from .prompt_tuning import Prompt
from .quantized import is_linear
from .select import walk

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = {"base_model.vera_A", "base_model.vera_B"}
_CLASSIFIERS = ("classifier", "score")  # what PEFT saves beside an adapter of the task SEQ_CLS


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    base_model: str = "",
    task_type: str | None = None,
) -> Path:
    """Write adapter `name` as Hugging Face PEFT reads it: `PeftModel.from_pretrained(base, folder)` computes the same.

    A P-tuning or reparameterised prefix adapter is written as the prompt or prefix that its network makes.

    Args:
        base_model: name or path of the base, for PEFT's record.
        task_type: PEFT's; needed by its prompt methods. `None` guesses: CAUSAL_LM for a language model, else
            FEATURE_EXTRACTION.

    Raises:
        AdapterError: PEFT has no such method (bottlenecks, Compacter, BitFit, linear adapters), or not in some layers
            only (prefixes).
    """
    config = named_config(model, name)
    kind = WRITTEN_AS.get(type(config), type(config))
    if kind not in METHODS:
        raise AdapterError(
            f"Hugging Face PEFT has no counterpart of {type(config).__name__}; it has those of "
            f"{', '.join(sorted(c.__name__ for c in (*METHODS, *WRITTEN_AS)))}"
        )
    method = METHODS[kind]
    if task_type is None:
        task_type = "CAUSAL_LM" if _is_causal(model) else "FEATURE_EXTRACTION"
    placed = {path: slot for path, slot in slots(model).items() if name in slot.adapters}
    about: dict[str, Any] = {
        "peft_type": method.peft_type,
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
        **method.options(config),
    }
    if method.peft_type in LEARNS_A_PROMPT:
        about |= prompt_options(model, config)
        if method.peft_type == "PREFIX_TUNING" and about["num_layers"] != len(placed):
            raise AdapterError(
                f"PEFT has prefixes in all layers, and {name!r} has them in {len(placed)} of {about['num_layers']}"
            )
    else:
        about["target_modules"] = [hf_name(model, path) for path in placed]
        if method.peft_type == "IA3":
            about["feedforward_modules"] = [
                hf_name(model, path) for path, slot in placed.items() if slot.adapters[name].scales_input
            ]
        if model_type(model) == "gpt2":  # whose layers there are Conv1D
            about["fan_in_fan_out"] = True
    return write_folder(model, name, Path(folder), FILE, _arrays(model, name, method), about, {"format": "pt"})


def _is_causal(model: nn.Module) -> bool:
    """Whether `model` is a causal language model: ours, or mlx-lm's, whose embedding may be its output layer too."""
    own = any(node.path.endswith("lm_head") for node in walk(model))
    return own or (not hasattr(model, "hf_name") and ("lm" in model or "model" in model))


def import_peft(model: nn.Module, folder: str | Path, *, name: str = "default", head: bool = True) -> nn.Module:
    """Attach the adapter in a Hugging Face PEFT folder to `model`, its own base.

    Args:
        name: of the adapter here.
        head: take the classifier that PEFT saved with the adapter (task SEQ_CLS), where there is one, as its trained
            `model.head`. That is one dense layer over a language model; an encoder's reads what encoders here do not
            have. False, or a model without a head, takes the adapter alone.

    Raises:
        AdapterError: a method or option without counterpart, or arrays that do not fit this model. The model is then
            as it was.
    """
    folder = Path(folder)
    data = read_config(folder, TYPES)
    kind = data.get("peft_type")
    if kind not in BY_PEFT_TYPE:
        raise AdapterError(f"{folder}: PEFT method {kind!r} has no counterpart{did_you_mean(kind, BY_PEFT_TYPE)}")
    check_options(data, folder)
    method = BY_PEFT_TYPE[kind]
    arrays = {_plain(model, key): array for key, array in read_arrays(folder / FILE).items()}
    _take_out_the_base_s(model, arrays, folder)
    if kind == "VERA" and not arrays.keys() >= _PAIR:
        raise AdapterError(
            f"{folder} lacks VeRA's shared A and B, which PEFT can draw again and others cannot: save it there with "
            "save_projection=True"
        )
    classifier = _classifier(arrays, data.get("modules_to_save", ()), folder)
    classifier = _as_head(model, classifier, folder) if head else {}
    try:
        config = method.config(data)
    except KeyError as error:
        raise AdapterError(f"{folder}: adapter_config.json has no {error.args[0]!r}") from error
    except AdapterError as error:
        raise AdapterError(f"{folder}: adapter_config.json cannot be used: {error}") from error
    targets = None if kind in (*LEARNS_A_PROMPT, "P_TUNING") else _targets(model, arrays, method, folder)
    if targets and kind == "IA3":  # a row scales the input, a column the output
        rows = [a.shape[0] == 1 for key, a in arrays.items() if key.endswith(".ia3_l")]
        config = IA3Config(feedforward=tuple(f".{path}" for path, row in zip(targets, rows, strict=True) if row))
    if isinstance(config, AdaLoRAConfig):
        arrays = _filled_up(arrays, config.rank)
    model = attach(model, config, targets, name=name, train_head=bool(classifier))
    expected = _arrays(model, name, method)
    sentence = faults_sentence(expected, arrays)
    if sentence:
        detach(model, name)
        raise AdapterError(f"{folder} does not fit this model: {sentence}")
    _load(model, name, method, cast(expected, arrays))
    write_head(model, name, classifier)
    return model


def _plain(model: nn.Module, key: str) -> str:
    """A key of the file without the name that a larger model gives its encoder ("bert.encoder.…")."""
    if not hasattr(model, "hf_name") or not key.startswith(_PREFIX):
        return key
    return _PREFIX + plain_name(key.removeprefix(_PREFIX))


def _take_out_the_base_s(model: nn.Module, arrays: dict[str, mx.array], folder: Path) -> None:
    """Leave out of `arrays` the base's own, which PEFT saves with an adapted output layer.

    Raises:
        AdapterError: they are not those of this base; one that is quantised may have come from them.
    """
    ours = {hf_name(model, node.path): node.module for node in walk(model)}
    for key in [key for key in arrays if ".base_layer." in key]:
        path, _, leaf = key.removeprefix(_PREFIX).partition(".base_layer.")
        base: Any = ours.get(path)
        if not is_linear(base) or leaf not in base:
            continue  # it has no place here, which is said of it
        own, given = base[leaf], arrays.pop(key)
        if isinstance(base, nn.QuantizedLinear):
            continue
        if own.shape != given.shape or not mx.array_equal(own, given.astype(own.dtype)):
            raise AdapterError(f"{folder}: {key} is not this base's: the layer was changed beside the adapter")


def _classifier(arrays: dict[str, mx.array], saved: Sequence[str], folder: Path) -> dict[str, mx.array]:
    """The classifier's arrays by their names in it, taken out of `arrays`; empty where there is none."""
    if strange := [module for module in saved if module not in _CLASSIFIERS]:
        raise AdapterError(f"{folder}: modules_to_save = {strange!r} has no counterpart here")
    names = {key: re.match(rf"base_model\.(?:model\.)?(?:{'|'.join(_CLASSIFIERS)})\.(.+)$", key) for key in arrays}
    return {match[1]: arrays.pop(key) for key, match in names.items() if match}


def _as_head(model: nn.Module, classifier: dict[str, mx.array], folder: Path) -> dict[str, mx.array]:
    """The classifier as the arrays of `model.head`; empty where either is missing."""
    own: Any = next((node.module for node in walk(model) if node.path == "head"), None)
    if not classifier or not isinstance(own, nn.Linear):
        return {}
    if hasattr(model, "hf_name") or not {"weight"} <= classifier.keys() <= {"weight", "bias"}:
        raise AdapterError(
            f"{folder} holds a classifier that is more than one dense layer over this model's features (BERT's reads "
            "its pooler); import_peft(…, head=False) takes the adapter alone, and the labels are learned anew"
        )
    weight = classifier["weight"]
    if weight.shape != own.weight.shape:
        raise AdapterError(
            f"{folder} holds a classifier of shape {tuple(weight.shape)}, and this model's head has "
            f"{tuple(own.weight.shape)}; load the model with num_classes={weight.shape[0]}, or import with head=False"
        )
    missing = {"bias": mx.zeros((weight.shape[0],))} if "bias" in own else {}
    return {part: array.astype(own.weight.dtype) for part, array in (missing | classifier).items()}


def _filled_up(arrays: Mapping[str, mx.array], rank: int) -> dict[str, mx.array]:
    """AdaLoRA's arrays with the triplets that its schedule took out as zeros, last: they have no order."""
    out = dict(arrays)
    for stem in [key.removesuffix("lora_E") for key in arrays if key.endswith(".lora_E")]:
        triplet = [(f"{stem}{leaf}", axis) for leaf, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1))]
        left = {arrays[key].shape[axis] for key, axis in triplet if key in arrays}
        if len(left) != 1 or min(left) >= rank:
            continue  # nothing is missing; or the arrays do not fit, which is said of them as they are
        for key, axis in triplet:
            if key in arrays:
                shape = [rank - min(left) if i == axis else size for i, size in enumerate(arrays[key].shape)]
                out[key] = mx.concatenate([arrays[key], mx.zeros(shape, arrays[key].dtype)], axis=axis)
    return out


def _targets(model: nn.Module, arrays: Mapping[str, mx.array], method: Method, folder: Path) -> list[str]:
    """Our paths of the modules that the arrays belong to."""
    ours = {hf_name(model, node.path): node.path for node in walk(model)}
    found, unknown = [], []
    for key in arrays:
        for leaf in method.leaves.values():
            if key.endswith(f".{leaf}"):
                module = key.removeprefix(_PREFIX)[: -len(leaf) - 1]
                (found if module in ours else unknown).append(module)
    if unknown or not found:
        what = f"no module {unknown[0]!r} in this model{did_you_mean(unknown[0], ours)}" if unknown else "no arrays"
        raise AdapterError(f"{folder} does not fit this model: {what[:400]}")
    return [ours[module] for module in dict.fromkeys(found)]


def _arrays(model: nn.Module, name: str, method: Method) -> dict[str, mx.array]:
    """The adapter's arrays under PEFT's names, in its shapes."""
    placed = {path: slot.adapters[name] for path, slot in slots(model).items() if name in slot.adapters}
    adapters = list(placed.values())
    if method.peft_type == "PREFIX_TUNING":
        pairs = [half for adapter in adapters for half in adapter.prefix()]  # type: ignore[attr-defined]
        return {"prompt_embeddings": mx.concatenate(pairs, axis=1)}
    if method.peft_type == "PROMPT_TUNING":
        assert isinstance(adapters[0], Prompt)
        return {"prompt_embeddings": adapters[0].tokens()}
    out = {
        f"{_PREFIX}{hf_name(model, path)}.{leaf}": _there(adapter, ours)
        for path, adapter in placed.items()
        for ours, leaf in method.leaves.items()
        if ours in adapter
    }
    if method.peft_type == "VERA":
        pair = adapters[0].owner.module  # type: ignore[union-attr]
        out |= {"base_model.vera_A": pair.a.T, "base_model.vera_B": pair.b.T}
    return out


def _there(adapter: Any, ours: str) -> mx.array:
    array = adapter[ours]
    if ours in ("lora_a", "lora_b"):
        return array.T
    if ours == "lora_e":
        return array[:, None]
    if ours == "ia3":
        return array[None] if adapter.scales_input else array[:, None]
    return array


def _load(model: nn.Module, name: str, method: Method, arrays: Mapping[str, mx.array]) -> None:
    placed = {path: slot.adapters[name] for path, slot in slots(model).items() if name in slot.adapters}
    if method.peft_type == "PREFIX_TUNING":
        halves = mx.split(arrays["prompt_embeddings"], 2 * len(placed), axis=1)
        for index, adapter in enumerate(placed.values()):
            adapter.prefix_keys, adapter.prefix_values = halves[2 * index : 2 * index + 2]
        return
    if method.peft_type == "PROMPT_TUNING":
        next(iter(placed.values())).prompt = arrays["prompt_embeddings"]
        return
    for path, adapter in placed.items():
        for ours, leaf in method.leaves.items():
            if ours in adapter:
                array = arrays[f"{_PREFIX}{hf_name(model, path)}.{leaf}"]
                adapter[ours] = array.T if ours in ("lora_a", "lora_b") else array.reshape(adapter[ours].shape)
    if method.peft_type == "VERA":
        pair: Any = next(iter(placed.values())).owner.module  # type: ignore[union-attr]
        pair.a, pair.b = arrays["base_model.vera_A"].T, arrays["base_model.vera_B"].T
