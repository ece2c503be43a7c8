"""Fine-tuning a causal language model with an adapter on prompts and completions, by the next-token loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..adapters import adapter_config, attach
from ..backbones.language_model import LanguageModel, load_chat_tokenizer, load_language_model, next_token_loss
from ..errors import ConfigurationError, DataError, DivergenceError, ModelError
from ..nn.functional import functional, trainable, update
from ..pretrained import TextTokenizer, load_tokenizer
from ..tasks.completions import Completion
from ..tasks.labelled import fail
from .finetune import adamw, batches, check_settings

_log = logging.getLogger(__name__)


class Tuned(NamedTuple):
    model: LanguageModel  # with the trained adapter in it
    curve: list[dict[str, Any]]  # epoch, step, train_loss, seconds
    chat_template: bool  # whether prompts went through the model's
    stopped: bool  # before the last step


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
    chat_template: bool = True,
    seed: int = 0,
    watch: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Train an adapter to say each completion after its prompt; the loss of prompts and padding is masked.

    Args:
        rows: prompts and completions, chats, or whole texts.
        method: of `ADAPTERS`.
        source: a folder or hub name that mlx-lm loads.
        target_modules, options: of the adapter.
        learning_rate: default: the method's own.
        epochs, batch_size: passes, and rows a step.
        max_length: tokens of a row, see `tokenised`.
        chat_template: whether prompts and completions go through the model's chat template, where it has one.
        seed: of the adapter, the order and dropout.
        watch: is given every row of the curve.
        stop: asked before the first step and after every one but the last; where it says so, training ends there.

    Raises:
        DataError: a row has no token to learn; or the chat template cannot write it.
        DivergenceError: the loss became NaN or infinite.
        KeyboardInterrupt: `stop` said so before the first step.
    """
    check_settings(learning_rate, epochs, batch_size, max_length, seed)
    if method is None:
        raise ConfigurationError("completions are learned by an adapter, so that mlx-lm can load it; choose a method")
    settings = adapter_config(method, **(options or {}))
    model = load_language_model(source)
    attach(model, settings, target_modules, key=mx.random.key(seed))
    tokenizer = load_tokenizer(source, max_length=max_length)
    chat = load_chat_tokenizer(source) if chat_template else None
    ids, counted = tokenised(rows, tokenizer, chat)
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
    curve, started, step, stopped = [], time.perf_counter(), 0, False
    if stop():  # nothing is learned yet, and what is in the user's folder stays
        raise KeyboardInterrupt
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
            if stopped := step < total and stop():
                break
        row = {"epoch": epoch, "step": step, "train_loss": float(np.mean(losses))}
        if not np.isfinite(row["train_loss"]):
            raise DivergenceError(f"the loss became {row['train_loss']} in epoch {epoch}; lower the rate")
        curve.append({**row, "seconds": time.perf_counter() - started})
        if watch:
            watch(curve[-1])
        if stopped:
            break
    update(model, params)
    return Tuned(model, curve, chat is not None, stopped)


def tokenised(
    rows: Sequence[Completion], tokenizer: TextTokenizer, chat: Any | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids (N, L), counted (N, L)): prompt and completion, closed by the end of text, and which tokens to predict.

    With `chat` a prompt is the user's message and its completion the assistant's, in the words of the chat template,
    and what follows the template's request for an answer is counted, as in mlx-lm's own data sets. Where the request
    is no beginning of the whole (some templates drop the thoughts that they ask for), all after what they share is.
    The end of text is counted, so that the model learns to stop; no second one is put after a template's own.

    Of a row longer than the tokenizer's `max_length` the prompt loses its beginning (its start token stays), so that
    the completion is whole. A completion that is too long even alone loses its end, and the prompt before it keeps half
    of the length at most. A warning says how many rows that were.

    Args:
        rows: prompts and completions; chats, which need `chat`; whole texts, which are taken as they are.
        tokenizer: of the model.
        chat: mlx-lm's tokenizer of a model with a chat template.

    Raises:
        DataError: a row has no token to learn, or the template refuses it; or there are chats without a template.
        ModelError: the model names no end of text.
    """
    backend, limit = tokenizer.backend, tokenizer.max_length
    if tokenizer.end_id is None:
        raise ModelError("the model names no end of text, so it cannot learn to stop; add eos_token_id to config.json")
    chats = [number for number, row in enumerate(rows, 1) if isinstance(row.prompt, list)]
    if chats and chat is None:
        raise DataError(
            f"row {chats[0]} holds messages, which only a chat template can write, and the model has none or it is "
            "left out; give prompt and completion"
        )
    backend.no_truncation()
    texts, starts, long, faults = [], [], [], []
    for number, row in enumerate(rows, 1):
        if chat is None or row.prompt is None:
            before, lead, after = _plain(row, backend, tokenizer.end_id)
        else:
            try:
                before, lead, after = _templated(row, chat, tokenizer.end_id)
            except Exception as error:  # the template is foreign code
                faults.append(f"row {number}: the model's chat template refuses it ({error})")
                continue
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


def _plain(row: Completion, backend: Any, end_id: int) -> tuple[list[int], int, list[int]]:
    """The prompt's ids, how many special tokens they begin with, and the completion's ids up to the end of text."""
    after = backend.encode(row.completion, add_special_tokens=not row.prompt).ids
    if after[-1:] != [end_id]:
        after.append(end_id)
    if not row.prompt:
        return [], 0, after
    before = backend.encode(row.prompt)
    return before.ids, [*before.special_tokens_mask, 0].index(0), after


def _templated(row: Completion, chat: Any, end_id: int) -> tuple[list[int], int, list[int]]:
    """As `_plain`, by the chat template; closed where no token of its own would stop mlx-lm."""
    asked = row.prompt if isinstance(row.prompt, list) else [{"role": "user", "content": row.prompt}]
    answered = [*asked, {"role": "assistant", "content": row.completion}]
    whole = list(chat.apply_chat_template(answered))
    request = chat.apply_chat_template(asked, add_generation_prompt=True)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, request, strict=False)))
    after = whole[start:]
    if after and not {end_id, *chat.eos_token_ids}.intersection(after):
        after.append(end_id)
    return whole[:start], int(whole[:1] == [chat.bos_token_id]), after
