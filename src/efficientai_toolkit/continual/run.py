"""A continual-learning experiment: strategies × seeds over one scenario, resumable at every context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backbones.mlp import MLP
from ..checkpoint import read_npz, write_npz
from ..errors import ConfigurationError, did_you_mean
from ..files import read_json, write_json
from ..intervals import mean_ci95
from ..settings import check_positive, check_seed, check_whole
from . import build_learner, strategy_class
from .metrics import adaptation_speed, by_seed, summary, values_by_seed
from .scenarios import Scenario
from .streams import STREAMS, build_scenario

# Steps of a context after which its own test accuracy is taken.
PROBES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_PROBE_ROWS = 1000

Build = Callable[[Scenario, int], nn.Module]
Watch = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers.

    Args:
        stream: a name of `STREAMS`; or paths of a user's files.
        kind: "task", "domain" or "class".
        strategies: name → options; names joined by "+" compose.
        seeds: of the order of classes, the weights and the batches.
        contexts: how many; None is the stream's own number.
        active: see `Scenario`.
        iterations, batch_size, learning_rate: steps a context, rows a step, of Adam.
        hidden_dim, num_layers: of the MLP.
        quick: a run to try the machinery, not for results.
    """

    stream: str | tuple[str, ...] = "split-mnist"
    kind: str = "task"
    strategies: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"naive": {}, "joint": {}})
    seeds: tuple[int, ...] = (0,)
    contexts: int | None = None
    active: str = "all"
    iterations: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    hidden_dim: int = 400
    num_layers: int = 2
    quick: bool = False

    def __post_init__(self):
        if not self.strategies or not self.seeds:
            raise ConfigurationError("a continual-learning experiment needs a strategy and a seed")
        for seed in self.seeds:
            check_seed(seed)
        for name in ("contexts", "iterations", "batch_size", "hidden_dim", "num_layers"):
            check_whole(1, **{name: getattr(self, name)})
        check_positive(learning_rate=self.learning_rate)
        if isinstance(self.stream, str) and self.stream not in STREAMS:
            raise ConfigurationError(f"unknown stream {self.stream!r}{did_you_mean(self.stream, STREAMS)}")
        for name, options in self.strategies.items():
            for part in name.split("+"):
                strategy_class(part)
            if name == "progressive" and self.kind != "task":
                raise ConfigurationError(
                    f"progressive networks must be told the task: use kind 'task', not {self.kind!r}"
                )
            if name == "progressive" and (strange := [option for option in options if option != "hidden_size"]):
                raise ConfigurationError(f"strategy 'progressive' has no option {strange[0]!r}. Known: hidden_size")
        for name in self.strategies:  # of options, the last strategy's fault is told before the first one's steps
            _learner(self, name, MLP(1, 2, 1, 1), seed=0)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        plain = asdict(self)
        stream = plain["stream"]
        return {
            **plain,
            "stream": stream if isinstance(stream, str) else [str(path) for path in stream],
            "seeds": list(self.seeds),
            "strategies": {n: dict(o) for n, o in self.strategies.items()},
        }


def build_mlp(scenario: Scenario, seed: int, hidden_dim: int = 400, num_layers: int = 2) -> MLP:
    """An MLP whose weights and biases are uniform in ±1/√inputs, as in PyTorch and van de Ven & Tolias' runs."""
    inputs = int(np.prod(scenario.input_shape))
    model = MLP(inputs, scenario.num_outputs, hidden_dim, num_layers)
    layers = [*model.layers, model.head]
    for layer, key in zip(layers, mx.random.split(mx.random.key(seed), len(layers)), strict=True):
        weight, bias = mx.random.split(key)
        bound = layer.weight.shape[1] ** -0.5
        layer.weight = mx.random.uniform(-bound, bound, layer.weight.shape, key=weight)
        layer.bias = mx.random.uniform(-bound, bound, layer.bias.shape, key=bias)
    return model


def run(
    plan: Plan,
    folder: Path | str,
    *,
    data_dir: Path | None = None,
    build: Build | None = None,
    watch: Watch = lambda line: None,
) -> dict[str, Any]:
    """Run what of `plan` is not in `folder` yet, and write `results.json` there.

    A run (one strategy, one seed) is kept after every context: interrupted, at most the current context is lost.

    Args:
        plan: what to run.
        folder: of `results.json` and of `checkpoints/`.
        data_dir: parent of the data sets.
        build: (scenario, seed) -> model; default `build_mlp` of the plan's sizes.
        watch: told one line a context.

    Raises:
        ConfigurationError: the folder holds another plan's results.
    """
    folder = Path(folder)
    path = folder / "results.json"
    ours = plan.describe()
    results = {"experiment": "continual", "plan": ours, "runs": {}}
    if path.is_file():
        found = read_json(path)
        theirs = {"strategies": {}, "seeds": [], **found.get("plan", {})}
        results |= {name: found[name] for name in ("runs", "contexts") if name in found}
        run_already = by_seed(results["runs"])
        again = [name for name in plan.strategies if name in run_already and name in theirs["strategies"]]
        refuse_another(path, _identity(ours, again), _identity(theirs, again))
        # What was run before, by another plan, is in the results, too.
        kept = {name: options for name, options in theirs["strategies"].items() if name in run_already}
        seeds = sorted({*ours["seeds"], *(seed for seeds in run_already.values() for seed in seeds)})
        results["plan"] = {**ours, "strategies": {**kept, **ours["strategies"]}, "seeds": seeds}
    build = build or (lambda scenario, seed: build_mlp(scenario, seed, plan.hidden_dim, plan.num_layers))
    for seed in plan.seeds:
        scenario = None
        for name in plan.strategies:
            key = f"{name}/seed{seed}"
            if key in results["runs"]:
                continue
            if scenario is None:
                scenario = build_scenario(
                    plan.stream, plan.kind, data_dir=data_dir, seed=seed, contexts=plan.contexts, active=plan.active
                )
                if seed == min(results["plan"]["seeds"]) or "contexts" not in results:
                    results["contexts"] = scenario.names
            checkpoint = folder / "checkpoints" / f"{name.replace('+', '-')}-seed{seed}.npz"
            joint = name == "joint"
            iterations = plan.iterations * (len(scenario) if joint else 1)  # as many steps as the others take in all
            learner = _learner(plan, name, build(scenario, seed), iterations=iterations, seed=seed)
            results["runs"][key] = run_one(
                learner, scenario, f"{name}, seed {seed}", iterations, checkpoint, watch,
                joint=joint, made_by=_identity(ours, [name]),
            )  # fmt: skip
            results["summary"] = summarise(results["runs"])
            write_json(path, results)
            checkpoint.unlink(missing_ok=True)
    results["summary"] = summarise(results["runs"])
    write_json(path, results)
    return read_json(path)


def run_one(
    learner: Any,
    scenario: Scenario,
    name: str,
    iterations: int,
    checkpoint: Path,
    watch: Watch,
    *,
    joint: bool = False,
    made_by: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One learner over all contexts: its accuracy matrix and what follows from it.

    Args:
        learner: what `build_learner` gives, or anything with its methods `learn`, `evaluate`, `state`, `load_state`.
        scenario: the contexts.
        name: for `watch`.
        iterations: steps that the learner takes in a context.
        checkpoint: kept after every context, and gone on from.
        watch: told one line a context.
        joint: learn once, from the examples of all contexts, for `iterations` steps.
        made_by: the settings, as JSON; a checkpoint that was made by others is refused.
    """
    record: dict[str, Any] = {"seconds": 0.0, "matrix": [], "curves": [], "untrained": None}
    if checkpoint.is_file():
        arrays, header = read_npz(checkpoint)
        if made_by is not None and header.get("made_by") is not None:
            refuse_another(checkpoint, made_by, header["made_by"])
        learner.load_state(arrays)
        record = header["record"]
    else:
        record["untrained"] = [_finite(value) for value in _row(learner, scenario)]
    for number in range(len(record["matrix"]), len(scenario)):
        started = time.perf_counter()
        if joint and number < len(scenario) - 1:
            record["matrix"].append([None] * len(scenario))
            continue
        curve, probe = _probe(learner, scenario, number, iterations)
        x, y, more = _training_rows(scenario, number, joint)
        learner.learn(x, y, active=scenario.masks(number), each=probe, **more)
        record["seconds"] += time.perf_counter() - started
        record["curves"].append(curve)
        record["matrix"].append(_row(learner, scenario))
        write_npz(checkpoint, learner.state(), {"record": record, "made_by": made_by})
        seen = record["matrix"][-1] if joint else record["matrix"][-1][: number + 1]
        watch(
            f"{name}: context {number + 1} of {len(scenario)} ({scenario.names[number]}): "
            f"{100 * float(np.mean(seen)):.2f} % over the contexts so far, {record['seconds']:.0f} s"
        )
    matrix = np.array(record["matrix"], float)
    untrained = np.array(record["untrained"], float)
    return {
        **record,
        **summary(matrix, untrained),
        "steps_to_90_percent": None if joint else adaptation_speed(record["curves"]),
        "parameters": learner.num_parameters,
        "memory_bytes": learner.memory_bytes,
    }


def summarise(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """strategy → metric → {"mean", "ci95", "values"} over the seeds; `values` as `values_by_seed` gives them."""
    table: dict[str, dict[str, Any]] = {name: {"seeds": len(mine)} for name, mine in by_seed(runs).items()}
    for metric in METRICS:
        for name, values in values_by_seed(runs, metric).items():
            if known := [value for value in values if value is not None]:
                mean, half = mean_ci95(known)
                table[name][metric] = {"mean": mean, "ci95": half, "values": values}
    return table


METRICS = (
    "average_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "learning_accuracy",
    "steps_to_90_percent",
    "parameters",
    "memory_bytes",
    "seconds",
)


def _learner(plan: Plan, name: str, model: nn.Module, **settings: Any) -> Any:
    """The strategy `name` of `plan` over `model`."""
    options = dict(plan.strategies[name])
    if name == "progressive":
        options.setdefault("hidden_size", plan.hidden_dim)
    settings = {
        "iterations": plan.iterations,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "kind": plan.kind,
        **settings,
    }
    try:
        return build_learner(name, model, options, **settings)
    except TypeError as error:
        raise ConfigurationError(f"strategy {name!r} cannot be built from {options}: {error}") from error


def _identity(plan: Mapping[str, Any], strategies: Iterable[str]) -> dict[str, Any]:
    """What must agree for results of `strategies` to belong together; more strategies and seeds may be added."""
    shared = {name: value for name, value in plan.items() if name not in ("strategies", "seeds")}
    return shared | {f"options of {name}": plan["strategies"][name] for name in strategies}


def refuse_another(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise a ConfigurationError where `path`, which was made by the settings `theirs`, is not of `ours`."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ConfigurationError(
                f"{path} is of another experiment ({name} was {theirs.get(name)!r}, now {value!r}); give another folder"
            )


def _training_rows(scenario: Scenario, number: int, joint: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    if not joint:
        return *scenario.train(number), {}
    parts = [scenario.train(k) for k in range(len(scenario))]
    contexts = np.repeat(np.arange(len(parts)), [len(y) for _, y in parts])
    x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return x, y, {"contexts": contexts}


def _row(learner: Any, scenario: Scenario) -> list[float]:
    """Test accuracy of every context."""
    known = scenario.kind == "task"
    return [
        learner.evaluate(*scenario.test(j), scenario.test_mask(j), context=j if known else None)
        for j in range(len(scenario))
    ]


def _probe(learner: Any, scenario: Scenario, number: int, iterations: int) -> tuple[dict[str, list], Callable]:
    """A curve to be filled, and what fills it: accuracy on the context that is being learned."""
    x, y = scenario.test(number)
    rows = np.random.default_rng(0).permutation(len(y))[:_PROBE_ROWS]
    x, y, mask = x[rows], y[rows], scenario.test_mask(number)
    at = {*(step for step in PROBES if step < iterations), iterations}
    curve: dict[str, list] = {"steps": [], "accuracy": []}

    def each(step: int) -> None:
        if step in at:
            curve["steps"].append(step)
            curve["accuracy"].append(
                _finite(learner.evaluate(x, y, mask, context=number if scenario.kind == "task" else None))
            )

    return curve, each


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
