"""The continual-learning experiment in a run folder, and the published settings of what it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..continual import report
from ..continual.run import Plan, run
from ..continual.scenarios import KINDS
from ..errors import ConfigurationError, did_you_mean
from ..runs.experiment import ExperimentManager

# The settings of van de Ven, Tuytelaars & Tolias (2022): sizes and steps by stream, strengths also by kind of scenario.
PROTOCOL: dict[str, dict[str, Any]] = {
    "split-mnist": {"iterations": 2000, "batch_size": 128, "learning_rate": 1e-3, "hidden_dim": 400},
    "permuted-mnist": {"iterations": 5000, "batch_size": 128, "learning_rate": 1e-4, "hidden_dim": 1000},
    "split-cifar100": {"iterations": 5000, "batch_size": 256, "learning_rate": 1e-4, "hidden_dim": 2000},
}
_LAMBDA = {
    "split-mnist": {"task": 1e5, "domain": 1e10, "class": 1e9},
    "permuted-mnist": {"task": 100.0, "domain": 100.0, "class": 100.0},
    "split-cifar100": {"task": 1000.0, "domain": 1000.0, "class": 100.0},
}
_C = {
    "split-mnist": {"task": 10.0, "domain": 5e4, "class": 5e3},
    "permuted-mnist": {"task": 10.0, "domain": 10.0, "class": 5.0},
    "split-cifar100": {"task": 100.0, "domain": 500.0, "class": 5.0},
}
_BUDGET = {"permuted-mnist": 10}  # examples a class; 100 elsewhere
_QUICK = {"iterations": 20, "hidden_dim": 32, "contexts": 3, "batch_size": 32}


def settings_of(strategy: str, stream: str | tuple, kind: str, classes: int = 10, contexts: int = 5) -> dict[str, Any]:
    """The published options of a strategy, where there are any.

    `classes` and `contexts` are those of the stream: the memory has places for the budget of each class.
    """
    name = stream if isinstance(stream, str) else ""
    if strategy in ("ewc", "online-ewc"):
        return {"ewc_lambda": _LAMBDA.get(name, _LAMBDA["permuted-mnist"])[kind]}
    if strategy == "si":
        return {"si_c": _C.get(name, _C["permuted-mnist"])[kind]}
    if strategy in ("replay", "agem"):
        budget = _BUDGET.get(name, 100)
        groups = classes * contexts if name == "permuted-mnist" else 100 if name == "split-cifar100" else classes
        return {"capacity": budget * groups, "per_group": budget} if name in PROTOCOL else {"capacity": 1000}
    return {}


def plan_of(given: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]] | None = None) -> Plan:
    """A plan from plain values: published settings of the stream, `given` over them, `options` of strategies over all.

    Raises:
        ConfigurationError: an option of a strategy that is not run, or an impossible value.
    """
    given = dict(given)
    stream = given.get("stream", Plan.stream)
    given["stream"] = stream = stream if isinstance(stream, str) else tuple(stream)
    kind, strategies = given.get("kind", Plan.kind), given.get("strategies") or {}
    for name in options or {}:
        if not any(name in joined.split("+") for joined in strategies):
            raise ConfigurationError(f"options for strategy {name!r}, which is not run{did_you_mean(name, strategies)}")
    contexts = given.get("contexts") or (10 if stream == "permuted-mnist" else 5)
    if kind not in KINDS:
        raise ConfigurationError(f"unknown kind of scenario {kind!r}{did_you_mean(kind, KINDS)}")
    filled = {}
    for joined, own in strategies.items():
        parts = joined.split("+")
        each = {
            part: {
                **settings_of(part, stream, kind, contexts=contexts),
                **(own if len(parts) == 1 else own.get(part, {})),
                **(options or {}).get(part, {}),
            }
            for part in parts
        }
        filled[joined] = each[joined] if len(parts) == 1 else {part: o for part, o in each.items() if o}
    base = PROTOCOL.get(stream, {}) if isinstance(stream, str) else {}
    quick = dict(_QUICK) if given.get("quick") else {}
    if quick and not isinstance(stream, str):
        quick["contexts"] = min(quick["contexts"], len(stream))
    return Plan(**{**base, **quick, **given, "strategies": filled, "seeds": tuple(given.get("seeds", (0,)))})


def experiment(
    plan: Plan,
    manager: ExperimentManager,
    *,
    data_dir: Path | None = None,
    watch: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Path]:
    """Run what of the plan is missing in the run folder, then draw the figures and write the report.

    Returns:
        the results, and the path of `results.md`.
    """
    with manager.alone():
        results = run(plan, manager.path, data_dir=data_dir, watch=watch)
        written, _ = report.write(manager.path)
        manager.finish({"summary": results["summary"]})
    return results, written
