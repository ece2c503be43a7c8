"""Fine-tuning a causal language model with an adapter on prompts and completions, by the next-token loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..adapters import adapter_config, attach
from ..backbones.language_model import LanguageModel, load_language_model, next_token_loss
from ..errors import ConfigurationError, DivergenceError
from ..nn.functional import functional, trainable, update
from ..pretrained import TextTokenizer, load_tokenizer
from ..tasks.completions import Completion
from ..tasks.labelled import fail
from .finetune import adamw, batches, check_settings

_log = logging.getLogger(__name__)


class Tuned(NamedTuple):
    model: LanguageModel  # with the trained adapter in it
    curve: list[dict[str, Any]]  # epoch, step, train_loss, seconds


def finetune_completions(
    rows: Sequence[Completion],
    method: str | None = "lora",
    *,
    source: str,
    target_modules: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    epochs: int = 3,
    batch_size: int = 4,
    max_length: int = 256,
    seed: int = 0,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> Tuned:
    """Train an adapter to say each completion after its prompt; the loss of prompts and padding is masked.

    Args:
        rows: prompts and completions.
        method: of `ADAPTERS`.
        source: a folder or hub name that mlx-lm loads.
        target_modules, options: of the adapter.
        learning_rate: default: the method's own.
        epochs, batch_size: passes, and rows a step.
        max_length: tokens of a row, see `tokenised`.
        seed: of the adapter, the order and dropout.
        watch: is given every row of the curve.

    Raises:
        DataError: a row has no token to learn.
        DivergenceError: the loss became NaN or infinite.
    """
    check_settings(learning_rate, epochs, batch_size, max_length)
    if method is None:
        raise ConfigurationError("completions are learned by an adapter, so that mlx-lm can load it; choose a method")
    settings = adapter_config(method, **(options or {}))
    model = load_language_model(source)
    attach(model, settings, target_modules, key=mx.random.key(seed))
    tokenizer = load_tokenizer(source, max_length=max_length)
    ids, counted = tokenised(rows, tokenizer)
    apply, params = functional(model, "next_token_logits"), trainable(model)

    total = epochs * -(-len(rows) // batch_size)
    extra = settings.training(total)
    state = extra.init(params) if extra else None

    def loss(params, x, counted, key):
        value = next_token_loss(apply(params, x, key=key), x, counted)
        return (value + extra.penalty(params) if extra else value), value

    gradient = mx.compile(mx.value_and_grad(loss))
    optimizer = adamw(settings.learning_rate if learning_rate is None else learning_rate, total)
    rng, keys = np.random.default_rng(seed), iter(mx.random.split(mx.random.key(seed), total))
    curve, started, step = [], time.perf_counter(), 0
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in batches(len(rows), batch_size, rng):
            (_, value), grads = gradient(params, mx.array(ids[batch]), mx.array(counted[batch]), next(keys))
            params = optimizer.apply_gradients(grads, params)
            step += 1
            if extra:
                params, state = extra.update(params, grads, state, step)
            mx.eval(params, optimizer.state, state, value)
            losses.append(value.item())
        row = {"epoch": epoch, "step": step, "train_loss": float(np.mean(losses))}
        if not np.isfinite(row["train_loss"]):
            raise DivergenceError(f"the loss became {row['train_loss']} in epoch {epoch}; lower the rate")
        curve.append({**row, "seconds": time.perf_counter() - started})
        if watch:
            watch(curve[-1])
    update(model, params)
    return Tuned(model, curve)


def tokenised(rows: Sequence[Completion], tokenizer: TextTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids (N, L), counted (N, L)): prompt and completion, closed by the padding token, and which tokens to predict.

    The first padding token is counted: where a model pads with its end of text, it learns to stop.

    Of a row longer than the tokenizer's `max_length` the prompt loses its beginning (its start token stays), so that
    the completion is whole. A completion that is too long even alone loses its end, and the prompt before it keeps half
    of the length at most. A warning says how many rows that were.

    Raises:
        DataError: a row has no token to learn.
    """
    backend, limit = tokenizer.backend, tokenizer.max_length
    backend.no_truncation()
    texts, starts, long, faults = [], [], [], []
    for number, (prompt, completion) in enumerate(rows, 1):
        before, lead = _prompt(backend.encode(prompt)) if prompt else ([], 0)
        after = [*backend.encode(completion, add_special_tokens=not prompt).ids, tokenizer.pad_id]
        if len(before) + len(after) > limit:
            long.append(number)
            room = limit - len(after) if len(after) < limit else limit // 2
            before = before[:lead] + before[lead + max(len(before) - room, 0) :]
        texts.append([*before, *after][:limit])
        starts.append(len(before))
        if len(texts[-1]) <= max(len(before), 1):  # a row's first token is never predicted
            faults.append(f"row {number}: no token to learn, expected one at least")
    backend.enable_truncation(limit)
    fail(faults, "completions")
    if long:
        _log.warning(
            "%d of %d rows are longer than %d tokens (row %d is the first): their prompts are cut at the beginning, "
            "and completions that are too long even alone at the end",
            len(long),
            len(rows),
            limit,
            long[0],
        )
    width = min(-(-max(map(len, texts)) // tokenizer.bucket) * tokenizer.bucket, limit)
    ids = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    counted = np.zeros((len(rows), width), bool)
    for i, (text, start) in enumerate(zip(texts, starts, strict=True)):
        ids[i, : len(text)] = text
        counted[i, start : len(text)] = True
    return ids, counted


def _prompt(encoding: Any) -> tuple[list[int], int]:
    """Its ids, and how many special tokens they begin with."""
    return encoding.ids, [*encoding.special_tokens_mask, 0].index(0)
