"""A distribution over tasks, from which episodes are drawn, many at once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import DataError, TaskSamplingError, did_you_mean
from . import family
from .base import Arrays, Draw, Family, Shape, TaskConfig
from .episode import EpisodeStack
from .files import read_document, write_document
from .seeding import generator, stable_seed

__all__ = ["TaskConfig", "TaskDistribution"]

_BLOCK_BYTES = 1 << 20  # drawn ahead at most, one batch at least
_BLOCK_BATCHES = 64
_BLOCKS_KEPT = 4
_GOLDEN = 0.6180339887498949


class TaskDistribution:
    """Tasks, and the episodes drawn from them.

    A task is fixed by its seed (`task_params["seed"]`, else one derived from `task_id` and `seed`), so it is the
    same task whenever it is drawn; the points of an episode are fresh.

    Args:
        configs: the tasks.
        seed: for everything that is drawn.
        endless: the configurations are templates, and every episode is of a fresh task.
        families: families by name, in place of or beside those of the table `FAMILIES`.
        stream: tells apart distributions over the same tasks, so that their episodes differ.

    Raises:
        TaskSamplingError: no tasks, two with one id, an unknown family or setting, or classification mixed
            with regression.
    """

    def __init__(
        self,
        configs: Sequence[TaskConfig],
        seed: int = 0,
        *,
        endless: bool = False,
        families: Mapping[str, Family] | None = None,
        stream: str = "",
    ):
        self.configs = list(configs)
        self.seed, self.endless, self.stream = int(seed), bool(endless), stream
        self.families = dict(families or {})
        self._batches = self._episodes = 0
        self._inputs: Callable[[mx.array], mx.array] | None = None
        self._lock = threading.Lock()
        self._blocks: dict[tuple[int, int], list[_Drawn]] = {}
        if not self.configs:
            raise TaskSamplingError("a task distribution needs at least one TaskConfig; got none")
        self._index = {config.task_id: i for i, config in enumerate(self.configs)}
        if len(self._index) < len(self.configs):
            ids = [config.task_id for config in self.configs]
            twice = next(i for i in ids if ids.count(i) > 1)
            raise TaskSamplingError(f"two tasks are called {twice!r}; every task_id must be unique")
        for name in dict.fromkeys(config.task_family for config in self.configs):
            if name not in self.families:
                self.families[name] = family(name)()
        kinds = {f.classification: name for name, f in self._used_families().items()}
        if len(kinds) > 1:
            raise TaskSamplingError(
                f"{kinds[True]!r} is classification and {kinds[False]!r} regression; "
                "a distribution holds one or the other"
            )
        for config in self.configs:
            self.families[config.task_family].check_params(config)
        _ = self._stacks  # impossible settings are found now, not at the first draw

    # What a model needs to know

    @property
    def is_classification(self) -> bool:
        """Whether the targets are classes."""
        return self.families[self.configs[0].task_family].classification

    @property
    def reads_texts(self) -> bool:
        """Whether the inputs are token ids."""
        return any(np.issubdtype(kind.input_type, np.integer) for kind in self._used_families().values())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        shapes = list(dict.fromkeys(stack.shape.input for stack in self._stacks))
        if len(shapes) > 1:
            raise TaskSamplingError(f"the tasks have inputs of different shapes, {shapes}; no one model takes them")
        return shapes[0]

    @property
    def output_dim(self) -> int:
        """The largest number of classes, or the size of a target."""
        if self.is_classification:
            return max(config.num_classes for config in self.configs)
        return max(int(np.prod(stack.shape.target)) for stack in self._stacks)

    def __len__(self) -> int:
        return len(self.configs)

    def __repr__(self) -> str:
        kinds = ", ".join(self._used_families())
        return f"TaskDistribution({len(self)} {'templates' if self.endless else 'tasks'}: {kinds}; seed {self.seed})"

    # Drawing

    def batch_at(self, index: int, n: int) -> list[EpisodeStack]:
        """Batch number `index` of `n` episodes: a pure function of the distribution, `index` and `n`.

        Returns stacked episodes, one a shape; their task axes add up to `n`. No task comes again before every
        task of its shape has come once, as far as one block of batches goes; `n = len(self)` draws each once.
        """
        episodes = []
        for (cell, arrays, _, _), rows in self._drawn(index, n):
            packed = cell.family.pack(cell.config, tuple(a[rows] for a in arrays))
            episodes.append(EpisodeStack(*self._seen(packed)))
        return episodes

    def tasks_at(self, index: int, n: int) -> list[str] | None:
        """The `task_id` of every episode of `batch_at(index, n)`, stack by stack; None if endless: all are fresh."""
        if self.endless:
            return None
        return [self.configs[i].task_id for drawn, rows in self._drawn(index, n) for i in drawn.members[rows]]

    def _drawn(self, index: int, n: int) -> list[tuple[_Drawn, slice]]:
        """Of each shape what is drawn for some batches together, and the rows of batch `index` in it."""
        if index < 0 or n < 1:
            raise TaskSamplingError(f"batch {index} of {n} tasks cannot be drawn; expected index ≥ 0 and n ≥ 1")
        per_block = self._batches_per_block(n)
        number, offset = divmod(index, per_block)
        block = self._blocks.get((n, number))
        if block is None:
            block = self._draw_block(n, number, per_block)
            with self._lock:
                while len(self._blocks) >= _BLOCKS_KEPT:
                    self._blocks.pop(next(iter(self._blocks)))
                self._blocks[n, number] = block
        rows = [(drawn, slice(drawn.edges[offset], drawn.edges[offset + 1])) for drawn in block]
        return [(drawn, part) for drawn, part in rows if part.start < part.stop]

    def sample_batch(self, n: int) -> list[EpisodeStack]:
        """The next batch: `batch_at(0, n)`, `batch_at(1, n)`, …; after `meta_train`, of those it did not see."""
        with self._lock:
            index, self._batches = self._batches, self._batches + 1
        return self.batch_at(index, n)

    def skip_to(self, index: int) -> None:
        """Let `sample_batch` go on at batch `index`, where it is not there yet: those before were trained on."""
        with self._lock:
            self._batches = max(self._batches, index)

    def sample_episode(self, task_id: str | None = None) -> tuple[TaskConfig, mx.array, mx.array, mx.array, mx.array]:
        """A fresh episode of the task `task_id`, or of a random one: (config, support_x, support_y, query_x, query_y).

        When endless, `config` is that of the fresh task, with its seed.
        """
        if task_id is not None and task_id not in self._index:
            raise TaskSamplingError(f"unknown task_id {task_id!r}{did_you_mean(task_id, self._index)}")
        with self._lock:
            count, self._episodes = self._episodes, self._episodes + 1
        rng = generator(stable_seed(self.seed, self.stream, "episodes"), count)
        i = int(rng.integers(len(self))) if task_id is None else self._index[task_id]
        config = self.configs[i]
        if self.endless:
            task_seed = int(rng.integers(1 << 63))
            config = dataclasses.replace(
                config,
                task_id=f"{config.task_id}/{task_seed}",
                task_params={**config.task_params, "seed": task_seed},
            )
        kind = self.families[config.task_family]
        seeds = np.array([self.task_seed(config)], np.uint64)
        arrays = kind.pack(config, kind.draw(config, kind.tasks(config, kind.settings([config]), seeds), rng))
        sx, sy, qx, qy = self._seen(tuple(a[0] for a in arrays))
        return config, sx, sy, qx, qy

    def through(self, inputs: Callable[[mx.array], mx.array]) -> TaskDistribution:
        """The same tasks with inputs (…, *input) seen through `inputs`, such as a cache of what is frozen below."""
        seen = copy.copy(self)
        seen._inputs = inputs
        return seen

    def _seen(self, draw: Draw) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        sx, sy, qx, qy = map(mx.array, draw)
        return (sx, sy, qx, qy) if self._inputs is None else (self._inputs(sx), sy, self._inputs(qx), qy)

    def task_seed(self, config: TaskConfig) -> int:
        """The seed that fixes a task."""
        given = config.task_params.get("seed")
        return stable_seed(self.seed, "task", config.task_id) if given is None else int(given) % (1 << 64)

    # Splitting, saving

    def split_tasks(self, train_ratio: float = 0.8) -> tuple[TaskDistribution, TaskDistribution]:
        """Two distributions that share no task; families whose tasks share classes are split by class.

        An endless distribution gives two endless ones.
        """
        if not 0 < train_ratio < 1:
            raise TaskSamplingError(f"train_ratio is {train_ratio!r}; expected a number between 0 and 1")
        if self.endless:
            parts = (self.configs, self.configs)
        elif len(self) < 2:
            raise TaskSamplingError("one task cannot be split into two distributions; give at least two")
        else:
            order = generator(stable_seed(self.seed, "split"), 0).permutation(len(self))
            cut = min(max(round(train_ratio * len(self)), 1), len(self) - 1)
            parts = tuple([self.configs[i] for i in sorted(half)] for half in (order[:cut], order[cut:]))
        shares = ((0.0, train_ratio), (train_ratio, 1.0))
        train, held_out = (
            TaskDistribution(
                [self.families[c.task_family].restrict(c, *share) for c in part],
                self.seed,
                endless=self.endless,
                families=self.families,
                stream=f"{self.stream}/{name}",
            )
            for part, share, name in zip(parts, shares, ("train", "held out"), strict=True)
        )
        train._inputs = held_out._inputs = self._inputs
        return train, held_out

    def save(self, path: str | Path) -> None:
        """Write the distribution as JSON, or as `.npz` where the name ends so. Never a pickle, whatever the name."""
        document = {
            "seed": self.seed,
            "endless": self.endless,
            "stream": self.stream,
            "configs": [dataclasses.asdict(config) for config in self.configs],
        }
        write_document(Path(path), document)

    @classmethod
    def load(cls, path: str | Path, *, families: Mapping[str, Family] | None = None) -> TaskDistribution:
        """Read what `save` wrote. Families of your own, or with data of their own, are given as at construction.

        Raises:
            DataError: the file is damaged, foreign, or a pickle.
        """
        document = read_document(Path(path))
        return cls(
            [_config(path, i, entry) for i, entry in enumerate(document["configs"])],
            document["seed"],
            endless=document["endless"],
            families=families,
            stream=document["stream"],
        )

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_blocks", "_stacks", "_inputs")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock, self._blocks, self._inputs = threading.Lock(), {}, None

    # Blocks of batches

    def _used_families(self) -> dict[str, Family]:
        return {config.task_family: self.families[config.task_family] for config in self.configs}

    @functools.cached_property
    def _stacks(self) -> list[_Stack]:
        """The tasks by the shape of their episodes, and within it by the cells that are drawn as one vector."""
        shapes: dict[Shape, dict[tuple, list[int]]] = {}
        for i, config in enumerate(self.configs):
            kind = self.families[config.task_family]
            cell = (config.task_family, kind.cell(config))
            shapes.setdefault(kind.shape(config), {}).setdefault(cell, []).append(i)
        return [
            _Stack(shape, [self._cell(members) for members in cells.values()], np.concatenate(list(cells.values())))
            for shape, cells in shapes.items()
        ]

    def _cell(self, members: list[int]) -> _Cell:
        configs = [self.configs[i] for i in members]
        kind = self.families[configs[0].task_family]
        settings = kind.settings(configs)
        seeds = np.array([self.task_seed(config) for config in configs], np.uint64)
        return _Cell(kind, configs[0], len(members), settings, kind.tasks(configs[0], settings, seeds))

    @functools.cached_property
    def _largest_episode(self) -> int:
        """Numbers in an episode of the largest shape."""
        shapes = (stack.shape for stack in self._stacks)
        return max((s.support + s.query) * (math.prod(s.input) + math.prod(s.target)) for s in shapes)

    def _batches_per_block(self, n: int) -> int:
        return min(max(_BLOCK_BYTES // (4 * n * self._largest_episode), 1), _BLOCK_BATCHES)

    def _draw_block(self, n: int, number: int, per_block: int) -> list[_Drawn]:
        rng = generator(stable_seed(self.seed, self.stream, "batches", n), number)
        # Systematic sampling gives each shape its share of every batch to within one task, so that a compiled
        # meta-step sees few different stack sizes.
        turns = (np.arange(number * per_block, (number + 1) * per_block) * _GOLDEN) % 1.0
        sizes = np.array([stack.size for stack in self._stacks])
        below = np.concatenate([[0], np.cumsum(sizes)]) * n / sizes.sum()
        counts = np.diff(np.floor(below + turns[:, None]).astype(np.int64), axis=1)
        block = []
        for stack, column in zip(self._stacks, counts.T, strict=True):
            if total := int(column.sum()):
                rounds = -(-total // stack.size)
                # The one task of an endless distribution needs no order (and no random number).
                orders = [rng.permutation(stack.size) if stack.size > 1 else np.zeros(1, int) for _ in range(rounds)]
                slots = np.concatenate(orders)[:total]
                edges = np.concatenate([[0], np.cumsum(column)]).tolist()
                block.append(_Drawn(stack.cells[0], self._draw_stack(stack, slots, rng), edges, stack.members[slots]))
        return block

    def _draw_stack(self, stack: _Stack, slots: np.ndarray, rng: np.random.Generator) -> Draw:
        if len(stack.cells) == 1:
            return self._draw_cell(stack.cells[0], slots, rng)
        x_type = np.result_type(*(cell.family.input_type for cell in stack.cells))
        y_type = np.int32 if self.is_classification else np.float32
        x_shape, y_shape = stack.shape.input, stack.shape.target
        out = tuple(
            np.empty((len(slots), n, *shape), dtype)
            for n in (stack.shape.support, stack.shape.query)
            for shape, dtype in ((x_shape, x_type), (y_shape, y_type))
        )
        first = 0
        for cell in stack.cells:
            where = np.nonzero((slots >= first) & (slots < first + cell.size))[0]
            if len(where):
                for whole, part in zip(out, self._draw_cell(cell, slots[where] - first, rng), strict=True):
                    whole[where] = part
            first += cell.size
        return out

    def _draw_cell(self, cell: _Cell, rows: np.ndarray, rng: np.random.Generator) -> Draw:
        if self.endless:
            seeds = rng.integers(1 << 63, size=len(rows), dtype=np.uint64)
            tasks = cell.family.tasks(cell.config, {k: v[rows] for k, v in cell.settings.items()}, seeds)
        else:
            tasks = {k: v[rows] for k, v in cell.tasks.items()}
        return cell.family.draw(cell.config, tasks, rng)


def _config(path: str | Path, number: int, entry: object) -> TaskConfig:
    fields = {field.name for field in dataclasses.fields(TaskConfig)}
    if not isinstance(entry, dict):
        raise DataError(f"{path} is damaged: task {number} is not a mapping")
    for name in set(entry) - fields:
        raise DataError(f"{path}, task {number}: unknown key {name!r}{did_you_mean(name, fields)}")
    for name in {"task_id", "task_family"} - set(entry):
        raise DataError(f"{path}, task {number}: the key {name!r} is missing")
    return TaskConfig(**entry)


class _Cell(NamedTuple):
    family: Family
    config: TaskConfig
    size: int
    settings: Arrays
    tasks: Arrays


class _Stack(NamedTuple):
    shape: Shape
    cells: list[_Cell]
    members: np.ndarray  # of all cells, as numbers in `configs`

    @property
    def size(self) -> int:
        return sum(cell.size for cell in self.cells)


class _Drawn(NamedTuple):
    cell: _Cell  # the first of its stack
    arrays: Draw
    edges: list[int]  # batch b of the block holds rows edges[b] to edges[b + 1]
    members: np.ndarray  # of which task each row is
