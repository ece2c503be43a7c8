"""`MetaLearner`: the thin stateful shell around a `Learner`. It owns the model, the optimiser and the step count."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters.fixed import check_fixed, fixed_arrays, split_fixed
from ..checkpoint import read_npz, write_npz
from ..errors import CheckpointError, ConfigurationError, ModelError, TaskSamplingError
from ..intervals import mean_ci95
from ..nn.functional import Parameters, trainable, update
from ..nn.layers import check_pure
from ..nn.losses import LossFn, is_classification
from ..nn.trees import check_fit, flatten, unflatten
from ..optimizers import at_own_rate, initial_state
from ..optimizers import outer_optimizer as make_optimizer
from ..precision import widened
from ..settings import check_positive, check_seed, check_whole
from ..tasks.episode import EpisodeStack, as_array, as_stacks, as_targets
from .adapted import Predictor, adapted_copy
from .algorithm import Algorithm
from .graphs import Graphs
from .inputs import naming_inputs
from .labels import check_range, check_slots, classes
from .learner import Learner, Meta, Metrics, Problem, apply_fast, bind

Episodes = Sequence[Sequence[mx.array]] | EpisodeStack
ADAPTATION_STEPS = (0, 1, 3, 5, 10)


class MetaLearner(Algorithm):
    """Meta-trains `model`'s trainable parameters; each subclass brings one algorithm by its `build`.

    Args:
        model: any `mlx.nn.Module`; what it has frozen stays as it is.
        inner_lr: rate of the inner steps.
        outer_lr: rate of the outer optimiser, or a schedule (step → rate) of `mlx.optimizers`.
        num_inner_steps: inner steps of meta-training, and of `adapt` where nothing else is said.
        outer_optimizer: an `mlx.optimizers.Optimizer`, or the name of one ("adam", "sgd", "adamw", …).
        seed: of everything random (dropout, minibatches, what the learner initialises); of 32 bits.
        gradient_clip: largest global norm of the meta-gradient; None leaves it alone. One that is not finite stays so.
        head: path of the model's head, for learners that need it and models that do not name it.
        chunk: tasks whose meta-gradient is one stacked graph; None chooses by size and device. The result is
            the same to rounding; 1 loops over the tasks with one compiled graph, which a large model on a CPU likes.
        compile: trace each step once with `mx.compile`.
        options: of the algorithm; see the subclass.
    """

    def __init_subclass__(cls, **named: Any):
        super().__init_subclass__(**named)
        cls.__signature__ = _signature(cls)  # what `help` and editors show

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.01,
        outer_lr: float | Callable[[mx.array], mx.array] = 0.001,
        num_inner_steps: int = 5,
        *,
        outer_optimizer: Any = None,
        seed: int = 0,
        gradient_clip: float | None = None,
        head: str | None = None,
        chunk: int | None = None,
        compile: bool = True,
        **options: Any,
    ):
        if not isinstance(model, nn.Module):
            raise ModelError(f"model must be an mlx.nn.Module, got {type(model).__name__}")
        check_positive(
            inner_lr=inner_lr, outer_lr=None if callable(outer_lr) else outer_lr, gradient_clip=gradient_clip
        )
        check_whole(0, num_inner_steps=num_inner_steps)
        check_whole(1, chunk=chunk)
        if not isinstance(compile, bool):
            raise ConfigurationError(f"compile must be true or false, got {compile!r}")
        check_seed(seed)
        options = self._checked(options)
        check_pure(model)
        params = trainable(model)
        if not params:
            raise ModelError(f"{type(model).__name__} has no trainable parameters: a learner adapts exactly those")
        self.inner_lr, self.num_inner_steps, self.seed = float(inner_lr), int(num_inner_steps), int(seed)
        self.gradient_clip, self.options = None if gradient_clip is None else float(gradient_clip), options
        self.chunk = None if chunk is None else int(chunk)
        self.iteration = 0
        self._model, self._head, self._compile = model, head, compile
        self.learner: Learner = self.build(**options)
        self._meta: Meta = self.learner.init(params, key=mx.random.key(self.seed))
        self._optimizer = make_optimizer(outer_optimizer, outer_lr)
        self._optimizer_state: Any = initial_state(self._optimizer, self._meta)
        self._task_bytes: dict[str, int] = {}
        self.rebuild()
        mx.eval(self._meta, self._optimizer_state)

    def __repr__(self) -> str:
        if "_optimizer_state" not in vars(self):  # shown by a debugger before it is made
            return super().__repr__()
        rate = self._optimizer_state.get("learning_rate")
        settings = {
            "inner_lr": self.inner_lr,
            **({} if rate is None else {"outer_lr": f"{rate.item():g}"}),
            "num_inner_steps": self.num_inner_steps,
            **{name: repr(value) for name, value in self.options.items()},
        }
        said = ", ".join(f"{name}={value}" for name, value in settings.items())
        return f"{type(self).__name__}({said}; iteration {self.iteration}, {self.num_trainable:,} trainable)"

    # --- what it holds -------------------------------------------------------------------------------------------

    @property
    def meta(self) -> Meta:
        """Everything that is meta-learned: {"model": θ, "rule": …}."""
        return self._meta

    @property
    def model(self) -> nn.Module:
        """The model, with the meta-learned weights in it."""
        update(self._model, self._meta["model"])
        return self._model

    @property
    def num_trainable(self) -> int:
        """Numbers that an adaptation may change."""
        return sum(value.size for value in self._meta["model"].values())

    @property
    def _counter(self) -> mx.array:
        """The key of this iteration: a pure function of seed and iteration, so nothing random needs saving."""
        return mx.array([self.seed & 0xFFFFFFFF, self.iteration], dtype=mx.uint32)

    def rebuild(self) -> None:
        """Forget every compiled graph. Call it after changing frozen weights: graphs keep the old ones."""
        mx.eval(self._model.parameters())  # on this thread, whose streams no other can use
        self._graphs = Graphs(
            self.learner,
            lambda loss_fn: bind(self._model, self.learner.loss_fn if loss_fn is None else loss_fn, self._head),
            self._optimizer,
            num_steps=self.num_inner_steps,
            by_steps=self.adapts_by_steps,
            gradient_clip=self.gradient_clip,
            chunk=self.chunk,
            task_bytes=self._task_bytes,
            compiled=self._compile,
        )

    def problem(self, loss_fn: LossFn | None = None) -> Problem:
        """The model and `loss_fn` as pure functions."""
        return self._graphs.problem(loss_fn)

    # --- meta-training -------------------------------------------------------------------------------------------

    def meta_train_step(self, episodes: Episodes, loss_fn: LossFn | None = None) -> dict[str, float]:
        """One outer step on a meta-batch: a list of episodes (4-tuples), stacks of them, or one stack.

        Returns:
            means over the tasks: `query_loss`, `support_loss` (both after adaptation), `query_accuracy` for
            classification; and `param_diff` (L2 norm of the change of all that is meta-learned), `grad_norm`.
        """
        stacks = as_stacks(episodes)
        self._check_labels(stacks, loss_fn, training=True)
        return {name: float(value) for name, value in self.meta_update(stacks, loss_fn, support_loss=True).items()}

    def meta_update(
        self, stacks: Sequence[EpisodeStack], loss_fn: LossFn | None = None, *, support_loss: bool = False
    ) -> Metrics:
        """`meta_train_step` on stacks, lazily: nothing is waited for, so steps can be queued with `mx.async_eval`.

        The support's loss after adaptation, a forward pass that nothing but the report needs, is computed where
        `support_loss` asks for it.
        """
        with naming_inputs(self._model, stacks):
            metrics, self._meta, self._optimizer_state = self._graphs.update(
                self._meta, self._optimizer_state, stacks, loss_fn, self._counter, self.iteration, support_loss
            )
        self.iteration += 1
        return metrics

    def meta_gradient(self, episodes: Episodes, loss_fn: LossFn | None = None) -> tuple[Metrics, Parameters]:
        """Metrics and the meta-gradient `{"model/…": …, "rule/…": …}` of a meta-batch; changes nothing."""
        metrics, grads = self._graphs.gradient(self._meta, as_stacks(episodes), loss_fn, self._counter, self.iteration)
        return metrics, flatten(grads)

    def meta_train(
        self,
        tasks: Any,
        loss_fn: LossFn | None = None,
        num_iterations: int | None = None,
        *,
        meta_batch_size: int = 4,
    ) -> dict[str, list[float]]:
        """The loop for those who want no loop.

        Args:
            tasks: a `TaskDistribution` (1000 meta-batches of it unless `num_iterations` says otherwise), or a list
                of episodes (each seen once, or cycled through for `num_iterations`).
            loss_fn: default by the targets.
            num_iterations: outer steps.
            meta_batch_size: tasks an outer step.

        Returns:
            every metric's history, one value an iteration.
        """
        check_whole(0, num_iterations=num_iterations)
        check_whole(1, meta_batch_size=meta_batch_size)
        num_iterations, meta_batch_size = None if num_iterations is None else int(num_iterations), int(meta_batch_size)
        if hasattr(tasks, "batch_at"):
            start, count = self.iteration, 1000 if num_iterations is None else num_iterations
            if hasattr(tasks, "skip_to"):
                tasks.skip_to(start + count)  # what is sampled afterwards has not been trained on
            batches = (tasks.batch_at(start + i, meta_batch_size) for i in range(count))
        else:
            episodes = list(tasks)
            if episodes:
                self._check_labels(as_stacks(episodes), loss_fn, training=True)
            batches = _cycle(episodes, meta_batch_size, num_iterations)
        history: list[Metrics] = []
        for stacks in batches:
            history.append(self.meta_update(stacks, loss_fn, support_loss=True))
            mx.async_eval(self._meta, self._optimizer_state, history[-1])
            if len(history) > 1:
                mx.eval(history[-2])  # at most two steps in flight
        return {name: [float(row[name]) for row in history] for name in (history[-1] if history else {})}

    # --- adaptation ----------------------------------------------------------------------------------------------

    def adapt(
        self,
        support_x: Any,
        support_y: Any = None,
        loss_fn: LossFn | None = None,
        num_steps: int | None = None,
    ) -> Predictor:
        """An adapted copy of the model; the learner and its model stay as they are.

        What normalises by its batch (`EpisodicBatchNorm`) normalises by the support's statistics in the copy, so that
        its answer to an input does not depend on what else is asked.

        Args:
            support_x: (S, *input); or the pair (x, y).
            support_y: (S,) classes or (S, *output) targets.
            loss_fn: default by the targets.
            num_steps: default: as in meta-training.
        """
        if support_y is None:
            if not isinstance(support_x, (tuple, list)) or len(support_x) != 2:
                raise TaskSamplingError("adapt needs support_x and support_y, or the pair (x, y) as its first argument")
            support_x, support_y = support_x
        check_whole(0, num_steps=num_steps)
        problem = self.problem(loss_fn)
        # What is computed in closed form, of embeddings, has no dropout: queries have none either.
        key = mx.random.key(self.seed) if self.adapts_by_steps else None
        steps = self.num_inner_steps if num_steps is None else int(num_steps)
        x, y = as_array(support_x), as_targets(support_y)
        stacks = as_stacks(EpisodeStack(x[None], y[None], x[None], y[None]))
        self._check_labels(stacks, loss_fn)
        with naming_inputs(self._model, stacks):
            fast = self.learner.adapt(problem, self._meta, x, y, key=key, num_steps=steps)
        mx.eval(fast)
        return adapted_copy(self.model, self.learner, fast, x, loss_fn, self._head)

    def evaluate(
        self,
        episodes: Episodes,
        loss_fn: LossFn | None = None,
        num_adaptation_steps: Sequence[int] = ADAPTATION_STEPS,
        *,
        transductive: bool = True,
    ) -> dict[str, float]:
        """Query loss and accuracy after each number of inner steps, means over the episodes.

        `transductive` lets what normalises by its batch (`EpisodicBatchNorm`) see an episode's queries together, as
        MAML's papers do; without it they are normalised by the support's statistics, each for itself.

        Returns:
            `step_{k}_loss`, `step_{k}_acc` (classification), each with its `_ci95` (half-width of the 95 % interval
            of the mean over tasks, by Student's t; 0 for one task), and `final_loss`, the loss after the most steps.
        """
        report: dict[str, float] = {}
        steps = _numbers_of_steps(num_adaptation_steps)
        found = self.evaluate_per_task(episodes, loss_fn, steps, transductive=transductive)
        for name, values in found.items():
            report[name], width = mean_ci95(values)
            report[f"{name}_ci95"] = width or 0.0
        report["final_loss"] = report[f"step_{steps[-1]}_loss"]
        return report

    def evaluate_per_task(
        self,
        episodes: Episodes,
        loss_fn: LossFn | None = None,
        num_adaptation_steps: Sequence[int] = ADAPTATION_STEPS,
        *,
        transductive: bool = True,
    ) -> dict[str, np.ndarray]:
        """`step_{k}_loss` and `step_{k}_acc` of every episode, each (tasks,), grouped by shape where shapes differ."""
        steps = _numbers_of_steps(num_adaptation_steps)
        stacks = as_stacks(episodes)
        self._check_labels(stacks, loss_fn)
        with naming_inputs(self._model, stacks):
            return self._graphs.evaluate(self._meta, stacks, loss_fn, steps, self.seed, transductive)

    def _check_labels(self, stacks: Sequence[EpisodeStack], loss_fn: LossFn | None, *, training: bool = False) -> None:
        """Refuse classes without an output or slot; what other losses and predictors make of them is theirs."""
        for stack in stacks:
            if not is_classification(stack.support_y):
                continue
            if self.has_slots:
                slots = classes(self.problem(loss_fn), self._meta["model"], stack.support_y[0])
                check_slots(stack, slots, query=loss_fn is None, remedy=self.other_labels)
            elif loss_fn is None and self.learner.predict is apply_fast:
                with naming_inputs(self._model, [stack]):
                    one = self.problem().apply(self._meta["model"], stack.support_x[0])  # not computed
                outputs = one.shape[-1]
                check_range(stack, outputs, f"{type(self._model).__name__} has {outputs} outputs", one.shape[1:-1])

    # --- persistence ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, mx.array]:
        """Every array to be saved, flat: `model/…`, `rule/…`, `optimizer/…`, `rng/counter` (seed, iteration)."""
        return flatten({**self._meta, "optimizer": self._optimizer_state, "rng": {"counter": self._counter}})

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `state` gave; names, shapes and dtypes must fit. The outer rate stays the learner's own.

        Arrays under `fixed/` are those that an adapter of the model has for itself (VeRA's A and B).
        """
        fixed, arrays = split_fixed(self._model, arrays)
        # Older checkpoints of half-precision models have moments of half precision too.
        arrays = {name: widened(a) if name.startswith("optimizer/") else a for name, a in arrays.items()}
        check_fit(arrays, self.state(), f"this {type(self).__name__} over {type(self._model).__name__}")
        update(self._model, fixed)
        tree = unflatten(arrays, {**self._meta, "optimizer": self._optimizer_state})
        self._meta = {"model": tree["model"], "rule": tree["rule"]}
        self._optimizer_state = at_own_rate(self._optimizer, tree["optimizer"], self._optimizer_state)
        self.seed, self.iteration = (int(n) for n in arrays["rng/counter"].tolist())  # type: ignore[union-attr]
        update(self._model, self._meta["model"])
        self.rebuild()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's header says of the learner; plain JSON."""
        shapes = {path: list(value.shape) for path, value in self._meta["model"].items()}
        return {
            "algorithm": self.algorithm,
            "inner_lr": self.inner_lr,
            "num_inner_steps": self.num_inner_steps,
            "options": self.options,
            "iteration": self.iteration,
            "task_bytes": self._task_bytes,
            "model": {"class": type(self._model).__name__, "parameters": shapes},
        }

    def save(self, path: str | Path) -> None:
        """Write a checkpoint (`.npz`, no pickle, replaced atomically)."""
        write_npz(Path(path), {**self.state(), **fixed_arrays(self._model)}, {"learner": self.describe()})

    def load(self, path: str | Path) -> None:
        """Take over a checkpoint of the same algorithm and options, model and optimiser.

        `inner_lr`, `outer_lr` (but for a schedule, the rate at the saved step) and `num_inner_steps` stay the learner's
        own: give it those of the one that was saved to go on as that would.

        Raises:
            CheckpointError: the file is damaged, or of another algorithm, of other options, of another model.
        """
        arrays, header = read_npz(path)
        self._check_options(path, header.get("learner", {}))
        self.take_over(path, arrays, header)

    def take_over(self, path: str | Path, arrays: Mapping[str, mx.array], header: Mapping[str, Any]) -> None:
        """`load` of a file at `path` that has been read already (`checkpoint.read_npz`), whatever its options."""
        about = header.get("learner", {})
        if about.get("algorithm") != self.algorithm:
            raise CheckpointError(f"{path} was made by {about.get('algorithm')!r}, not by {self.algorithm!r}")
        check_fixed(self._model, arrays, path)
        self.load_state(arrays)
        # So that a resumed run cuts its stacks as the first one did.
        self._task_bytes.update(about.get("task_bytes", {}))


def _signature(made: type[MetaLearner]) -> inspect.Signature:
    """The call of a learner's class, with the options of its `build` in place of `**options`."""
    _, *own = inspect.signature(made.__init__).parameters.values()
    named = {p.name: p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(named) < len(own):
        for function in (MetaLearner.__init__, made.build):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    named.setdefault(parameter.name, parameter)
    return inspect.Signature(list(named.values()))


def _numbers_of_steps(given: Sequence[int]) -> tuple[int, ...]:
    """As in `evaluate`: each once, ascending."""
    steps = sorted(set(given)) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not steps or not all(isinstance(k, Real) and k >= 0 and k % 1 == 0 for k in steps):
        raise ConfigurationError(
            f"num_adaptation_steps must be whole numbers of at least 0, such as (0, 1, 5), got {given!r}"
        )
    return tuple(map(int, steps))


def _cycle(episodes: list, size: int, num_iterations: int | None) -> Iterator[list[EpisodeStack]]:
    """Meta-batches of `size` episodes: one pass, or round and round for `num_iterations`."""
    if not episodes:
        raise TaskSamplingError("no episodes were given; meta-training needs at least one")
    count = -(-len(episodes) // size) if num_iterations is None else num_iterations
    source: Iterator = iter(episodes) if num_iterations is None else itertools.cycle(episodes)
    for _ in range(count):
        yield as_stacks(list(itertools.islice(source, size)))
