"""This project against what one would use instead, on one machine, in one run.

    python benchmarks/run.py [--workload a b c d e f g] [--peers-python PYTHON] [--preload LIBRARY] [--json FILE]

Every contestant runs in a process of its own, from the same weights on the same episodes, and must report the same
query losses for the first meta-steps before it is timed. The peers (`requirements-peers.txt`) may live in another
environment, named by `--peers-python`. Contestants take turns, so that what else the machine does falls on all;
`--preload libjemalloc.so.2` gives all of them another allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np

from workloads import WORKLOADS, arrays

HERE = Path(__file__).parent
# Relative, of the query losses of three meta-steps in float32: of the first, and of those after an update, where Adam
# magnifies the rounding of small gradients. (The tests hold the meta-gradients themselves to 1e-5 of torch.func's.)
TOLERANCES = (1e-3, 1e-2, 1e-2)
ROSTER = {  # module -> contestant -> workloads
    "ours": {"ours": "abc", "ours, with drawing": "ac"},
    "pytorch": {"autograd loop": "abc", "torch.func": "abc", "torch.compile": "ac"},
    "jax_": {"JAX": "abc", "JAX, slices, task by task": "b"},
    "encoder_ours": {"ours": "defg", "ours, prefix cache": "fg"},
    "encoder_pytorch": {"PEFT, autograd loop": "defg", "torch.func": "d", "torch.func, task by task": "e"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list("abc"))
    parser.add_argument("--contestant", nargs="+", help="only these")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--preload", help="a library (an allocator, say) for every contestant: LD_PRELOAD of Linux")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contestant")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, a process")
    parser.add_argument("--json", type=Path, help="write the record here, and its table beside it (.md)")
    options = parser.parse_args()
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cpu": _chip(), "cores": os.cpu_count(), "system": platform.system(), "arch": platform.machine()},
        "command": _command({options.peers_python: "PYTHON", str(options.json): "FILE"}),
        "preload": options.preload,
        "versions": _versions(options.peers_python),
        "workloads": {},
    }
    for name in options.workload:
        record["workloads"][name] = _compete(name, options)
    text = table(record)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        options.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def _command(names: dict[str, str]) -> str:
    """This command, with what is of this machine alone by another name."""
    return "python benchmarks/run.py " + shlex.join(names.get(word, word) for word in sys.argv[1:])


def _compete(name: str, options: argparse.Namespace) -> dict:
    entries = [
        (module, contestant)
        for module, contestants in ROSTER.items()
        for contestant, where in contestants.items()
        if name in where and (not options.contestant or contestant in options.contestant)
    ]
    environment = {**os.environ, **({"LD_PRELOAD": options.preload} if options.preload else {})}
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"{name}.npz"
        np.savez(data, **arrays(name))
        for number in range(options.rounds):
            for module, contestant in entries:
                print(f"{name}: {contestant}, round {number + 1}", file=sys.stderr, flush=True)
                python = sys.executable if module.endswith("ours") else options.peers_python
                command = [python, HERE / "worker.py", module, contestant, name, data]
                command = [*map(str, command), "--seconds", str(options.seconds)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if options.preload and "cannot be preloaded" in done.stderr:
                    raise SystemExit(f"--preload {options.preload}: there is no such library here")
                if done.returncode:
                    last = (done.stderr.strip() or "no message").splitlines()[-1]
                    print(f"{name}: {contestant} failed: {last}", file=sys.stderr, flush=True)
                    continue
                runs.setdefault(contestant, []).append(json.loads(done.stdout.splitlines()[-1]))
    results = {contestant: _merged(each) for contestant, each in runs.items()}
    _verify(name, results)
    return {"title": WORKLOADS[name].title, "results": results}


def _merged(runs: list[dict]) -> dict:
    return {
        "losses": runs[0]["losses"],
        "first_step_s": min(run["first_step_s"] for run in runs),
        "ms": {
            "median": median(run["ms"]["median"] for run in runs),
            "min": min(run["ms"]["min"] for run in runs),
            "max": max(run["ms"]["max"] for run in runs),
        },
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _verify(name: str, results: dict[str, dict]) -> None:
    """Stop unless all who were given the same episodes report the same losses."""
    same = {contestant: r["losses"] for contestant, r in results.items() if not contestant.endswith("drawing")}
    if not same:
        return
    reference = next(iter(same.values()))
    for contestant, losses in same.items():
        off = np.abs(np.subtract(losses, reference))
        if not np.all(off <= np.multiply(TOLERANCES, np.abs(reference)) + 1e-5):
            raise SystemExit(f"workload {name}: {contestant} computes something else: {losses}, expected {reference}")


def table(record: dict) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    system = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    preload = f" {record['preload']} under every contestant." if record["preload"] else ""
    lines = [f"{record['date']}, {system}; {versions}.{preload}", ""]
    for name, work in record["workloads"].items():
        results = work["results"]
        ours = results.get("ours", {}).get("ms", {}).get("median")
        lines += [f"**({name})** {work['title']}", ""]
        lines += ["| | median ms | min – max | ours ÷ this | peak RSS MB | first step s |", "|---|---|---|---|---|---|"]
        for contestant, r in results.items():
            ms, ratio = r["ms"], f"{ours / r['ms']['median']:.2f}" if ours else ""
            lines.append(
                f"| {contestant} | {ms['median']:.3g} | {ms['min']:.3g} – {ms['max']:.3g} | {ratio} "
                f"| {r['peak_rss_bytes'] / 2**20:.0f} | {r['first_step_s']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _versions(peers_python: str) -> dict[str, str]:
    code = "import sys; from importlib import metadata as m; print(*(n + '=' + m.version(n) for n in sys.argv[1:]))"
    found = {}
    for python, packages in ((sys.executable, ("mlx",)), (peers_python, ("torch", "transformers", "peft", "jax"))):
        for package in packages:
            done = subprocess.run([python, "-c", code, package], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found[package] = done.stdout.strip().partition("=")[2].split("+")[0]
    return found


def _chip() -> str:
    from efficientai_toolkit.devices import chip

    return chip()


if __name__ == "__main__":
    main()
