"""Causal language models of mlx-lm as classifiers by label words, and their next-token loss.

What `mlx_lm.load` loads is a model here where one of its modules holds the input embedding and the list of blocks and
maps ids to hidden states: Llama, Qwen, Gemma, Mistral, Phi, OLMo 2 and 3, GPT-2, GPT-NeoX and most others; OLMo 1 is an
exception. Adapters and learners work on it as on every other module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError
from ..nn.attention import LayerNorm, RMSNorm
from ..nn.functional import locate
from ..nn.losses import target_logits
from ..pretrained import TextTokenizer, is_language_model, load_tokenizer, resolve


class LanguageModelConfig(NamedTuple):
    """What tells one language model from another."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    pad_id: int


class LanguageModel(nn.Module):
    """A causal language model that tells labels apart by the word that would come next.

    The features of a text are the hidden state at its last token, from which the model predicts what follows. With
    label words, row c of `head` starts as the output embedding of word c, so that `head(features)` are the next-token
    logits of the words; trained, the head moves from there. Without, its rows are small and random.

    MLX's norms in `lm` become those of `nn.attention`, which have gradients in half precision on a GPU. A norm of the
    architecture's own (Gemma's) stays as it is: load such a model in bfloat16 or float32, not in float16.

    Args:
        lm: of mlx-lm. Its body is the module that holds the input embedding (of all embeddings the one with the most
            rows) and, under any name, the list of blocks; without an output layer, the body maps ids (N, L) to hidden
            states (N, L, d).
        pad_id: what short texts are filled up with on the right. Attention is causal, so no mask is needed.
        num_classes: rows of the head.
        key: of the rows without a label word.

    Raises:
        ModelError: the model's hidden states or output embedding cannot be found.
    """

    inner = "lm."  # where the model of other libraries' files stands in this one: their names go without it

    def __init__(self, lm: Any, pad_id: int, num_classes: int = 2, *, key: mx.array | None = None):
        super().__init__()
        self.lm, self.pad_id, self.resumes_at = lm, pad_id, 0
        embeddings = [(path, m) for path, m in _leaves(lm) if _is_embedding(m)]
        self.embedding_path, embedding = max(embeddings, key=lambda pair: len(pair[1].weight), default=("", None))
        self.body_path = self.embedding_path.rpartition(".")[0]
        stacks = [name for name, value in self._body.items() if _is_stack(value)]
        if embedding is None or not stacks:
            raise ModelError(f"{type(lm).__module__} has no module with {_LAYOUT}; not supported")
        self.stack = max(stacks, key=lambda name: len(self._body[name]))
        vocabulary, size = len(embedding.weight), embedding(mx.array([0])).shape[-1]
        own = [path for path, m in _leaves(lm) if _is_linear(m) and len(m.weight) == vocabulary]
        self.output_path = next((p for p in own if p.rpartition(".")[0] in ("", self.body_path)), self.embedding_path)
        self.config = LanguageModelConfig(size, len(self.layers), vocabulary, pad_id)
        try:
            found = self._hidden(mx.array([[0]]))
        except Exception as error:  # the model is foreign code
            raise ModelError(f"{type(lm).__module__} has no module with {_LAYOUT} ({error}); not supported") from error
        if not isinstance(found, mx.array) or found.shape != (1, 1, size):
            raise ModelError(f"{type(lm).__module__}: {self.body_path or 'the model'} is no module with {_LAYOUT}")
        for _, norm in _leaves(lm):
            norm.__class__ = _NORMS.get(type(norm), type(norm))
        self.head = nn.Linear(self.config.hidden_size, num_classes)
        bound = self.config.hidden_size**-0.5
        shape = (num_classes, self.config.hidden_size)
        self.head.weight = mx.random.uniform(-bound, bound, shape, key=mx.random.key(0) if key is None else key)
        self.head.bias = mx.zeros((num_classes,))

    @property
    def layers(self) -> list[Any]:
        """The blocks, from the embedding up."""
        return self._body[self.stack]

    @property
    def embedding(self) -> Any:
        """The input embedding, or the slot of an adapter around it."""
        return _at(self.lm, self.embedding_path)

    @property
    def _body(self) -> Any:
        return _at(self.lm, self.body_path)

    def __call__(self, x: mx.array) -> mx.array:
        """ids (N, L), or what `prefix` gave → logits of the classes (N, C)."""
        return self.head(self.features(x))

    def features(self, x: mx.array) -> mx.array:
        """ids (N, L), right-padded, or what `prefix` gave → float32 hidden states (N, d) at each text's last token."""
        if mx.issubdtype(x.dtype, mx.floating):
            hidden, tokens = self._resumed(x, self.resumes_at), x[..., -1] > 0
        else:
            hidden, tokens = self._hidden(x), x != self.pad_id
        hidden = hidden[:, hidden.shape[1] - x.shape[1] :]  # behind a soft prompt
        places = mx.arange(tokens.shape[-1])
        last = mx.max(mx.where(tokens, places, 0), axis=-1)
        here = (places == last[:, None]).astype(mx.float32)
        # A sum over one-hot rows, unlike a gather, behaves under every transform.
        return mx.sum(here[..., None] * hidden.astype(mx.float32), axis=1)

    def prefix(self, ids: mx.array, layers: int) -> mx.array:
        """The embedding and first `layers` blocks on ids (N, L) → float32 (N, L, d + 1), which takes the ids' place.

        The last channel is 1 at tokens and 0 at pads. See `Encoder.prefix`.
        """

        def stop(h: mx.array) -> mx.array:
            raise _Reached(h)

        try:
            with _swapped([(self.layers, layers, _StandIn(self.layers[layers], stop))]):
                self._body(ids, cache=None)
            raise ModelError(f"the model has no block {layers}")
        except _Reached as reached:
            (h,) = reached.args
        return mx.concatenate([h.astype(mx.float32), (ids != self.pad_id)[..., None].astype(mx.float32)], axis=-1)

    def can_resume(self, layers: int) -> bool:
        """Whether going on from `prefix` is exact. Not where blocks read more than what the block below them gave."""
        ids = mx.arange(8)[None] % self.config.vocab_size
        try:
            whole, resumed = self._hidden(ids), self._resumed(self.prefix(ids, layers), layers)
            return bool(mx.allclose(resumed, whole, rtol=1e-4, atol=1e-5).item())
        except Exception:  # the model is foreign code
            return False

    def below(self, layers: int) -> list[tuple[str, mx.array]]:
        """The arrays of the body below block `layers`, and those that belong to no block."""
        flat: Any = tree_flatten(self._body.parameters())
        above = tuple(f"{self.stack}.{i}." for i in range(layers, len(self.layers)))
        return [(path, array) for path, array in flat if not path.startswith((*above, *self._own_output()))]

    def is_output(self, path: str) -> bool:
        """Whether `path` lies in an output layer, on which no feature depends."""
        return self.output_path != self.embedding_path and f"{path}.".startswith(f"lm.{self.output_path}.")

    def _own_output(self) -> list[str]:
        """The name of the body's output layer, where the body has one (GPT-NeoX)."""
        parent, _, name = self.output_path.rpartition(".")
        return [name] if parent == self.body_path and self.output_path != self.embedding_path else []

    def _hidden(self, ids: mx.array) -> Any:
        """(N, L) → (N, P + L, d), P the length of a soft prompt"""
        self._check_prompt(ids)
        body = self._body
        with _swapped([(body, name, nn.Identity()) for name in self._own_output()]):
            return body(ids, cache=None)  # which some models want to be told

    def _check_prompt(self, ids: mx.array) -> None:
        """Refuse a soft prompt where the body looks up more than words: as many positions as there are ids, say."""
        words = self.embedding_path.rpartition(".")[2]
        others = [name for name, module in self._body.items() if _is_embedding(module) and name != words]
        if others and self.embedding(ids).shape[1] > ids.shape[1]:
            raise ModelError(
                f"a soft prompt makes the input longer, and {type(self.lm).__module__} looks up its "
                f"{' and '.join(others)} by the length of the text; choose an adapter of its layers, such as 'lora'"
            )

    def _resumed(self, x: mx.array, layers: int) -> mx.array:
        """The blocks from `layers` on: (N, L, d + 1) → (N, L, d). The body itself runs them, so masks are as ever."""

        def given(h: mx.array) -> mx.array:
            return x[..., :-1].astype(h.dtype)

        stack = self.layers
        with _swapped([(stack, i, _StandIn(stack[i], given)) for i in range(layers)]):
            return self._hidden(mx.zeros(x.shape[:-1], mx.int32))

    def next_token_logits(self, ids: mx.array) -> mx.array:
        """ids (N, L) → logits of the token after each (N, L, V)."""
        self._check_prompt(ids)
        logits = self.lm(ids)
        return logits[:, logits.shape[1] - ids.shape[1] :]

    def label_rows(self, words: Sequence[Sequence[int]]) -> mx.array:
        """(C, d) rows of the output embedding, of words of several tokens the mean.

        `features @ rows.T` are then the next-token logits of the words (a word's mean over its tokens), without the
        scale or cap that some models put on them.
        """
        output = _at(self.lm, self.output_path)
        output = output.base if "base" in output else output
        chosen = mx.array([token for tokens in words for token in tokens])
        if isinstance(output, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            parts: Any = (output[name][chosen] if name in output else None for name in ("weight", "scales", "biases"))
            rows = mx.dequantize(*parts, group_size=output.group_size, bits=output.bits, mode=output.mode)
        else:
            rows = output.weight[chosen]
        owner = [number for number, tokens in enumerate(words) for _ in tokens]
        members = (mx.array(owner) == mx.arange(len(words))[:, None]).astype(mx.float32)
        return members @ rows.astype(mx.float32) / mx.sum(members, axis=1, keepdims=True)


_NORMS: dict[type, type] = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}
_LAYOUT = "an input embedding and a list of blocks that maps ids (N, L) to hidden states (N, L, d)"


class _Reached(Exception):
    """The hidden states at the block where `prefix` stops."""


class _StandIn:
    """In a block's place for one call. What the body reads off the block (its kind of attention) is still there."""

    def __init__(self, block: nn.Module, call: Callable[[mx.array], mx.array]):
        self._block, self._call = block, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, h: mx.array, *_: Any, **__: Any) -> mx.array:
        return self._call(h)


@contextlib.contextmanager
def _swapped(changes: Iterable[tuple[Any, Any, Any]]) -> Iterator[None]:
    """Within it, `container[name]` is `value` for each (container, name, value)."""
    own = []
    try:
        for container, name, value in changes:
            own.append((container, name, container[name]))
            container[name] = value
        yield
    finally:
        for container, name, value in own:
            container[name] = value


def _at(module: nn.Module, path: str) -> Any:
    """The module at `path`; "" is `module` itself."""
    if not path:
        return module
    container, name = locate(module, path)
    return container[name]


def _leaves(module: nn.Module) -> list[tuple[str, Any]]:
    """Modules without modules in them, in the order in which they were made."""
    flat: Any = tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    return flat


def _is_stack(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(block, nn.Module) for block in value)


def _is_embedding(module: Any) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear))


def load_language_model(
    source: str | Path,
    *,
    num_classes: int = 2,
    label_words: Sequence[str] | None = None,
    key: mx.array | None = None,
) -> LanguageModel:
    """The language model of a folder or hub name, as mlx-lm loads it.

    Args:
        source: a folder with `config.json` and safetensors; or a hub name.
        num_classes: rows of the head; with `label_words` as many as these.
        label_words: of each class: the head starts at their rows of the output embedding.
        key: of rows without a word.

    Raises:
        ModelError: mlx-lm is not installed or does not know this architecture, or its layout is not supported.
    """
    try:
        from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError("language models need mlx-lm: pip install 'efficientai-toolkit[lm]'") from error
    folder = resolve(source)
    if not is_language_model(folder):
        raise ModelError(f"{folder} holds no causal language model; encoders are loaded by backbone 'encoder'")
    try:
        lm, _ = load_model(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(f"mlx-lm does not load {folder}: {error}") from error
    except SystemExit as error:  # its OLMo 1 ends the process where a package is missing
        raise ModelError(f"mlx-lm does not load {folder} without a package of that model's own") from error
    tokenizer = load_tokenizer(folder)
    model = LanguageModel(lm, tokenizer.pad_id, len(label_words) if label_words else num_classes, key=key)
    if label_words:
        model.head.weight = model.label_rows(label_tokens(tokenizer, label_words))
    return model


def load_chat_tokenizer(source: str | Path) -> Any | None:
    """mlx-lm's own tokenizer of a folder or hub name, to write chats by the model's template; None where it has none.

    Raises:
        ModelError: mlx-lm is not installed or does not load this tokenizer.
    """
    try:
        from mlx_lm import utils  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError("language models need mlx-lm: pip install 'efficientai-toolkit[lm]'") from error
    folder = resolve(source)
    try:
        tokenizer = utils.load_tokenizer(folder, eos_token_ids=utils.load_config(folder).get("eos_token_id"))
    except Exception as error:  # the tokenizer may be foreign code
        raise ModelError(f"mlx-lm does not load the tokenizer of {folder}: {error}") from error
    return tokenizer if tokenizer.has_chat_template else None


def label_tokens(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each label word as it follows on a text (" lost card"), underscores read as spaces.

    Raises:
        ModelError: a word has none.
    """
    found = [
        tokenizer.backend.encode(" " + " ".join(word.split("_")).strip(), add_special_tokens=False).ids
        for word in words
    ]
    for word, tokens in zip(words, found, strict=True):
        if not tokens:
            raise ModelError(f"the label {word!r} has no token")
    return found


def next_token_loss(logits: mx.array, ids: mx.array, counted: mx.array) -> mx.array:
    """Mean cross entropy of each counted token given those before it.

    Args:
        logits: (N, L, V).
        ids: (N, L).
        counted: (N, L) which tokens are to be predicted; prompts and padding are not. The first never is.
    """
    logits, targets = logits[:, :-1].astype(mx.float32), ids[:, 1:]
    weight = counted[:, 1:].astype(mx.float32)
    losses = mx.logsumexp(logits, axis=-1) - target_logits(logits, targets)
    return mx.sum(weight * losses) / mx.maximum(mx.sum(weight), 1)
