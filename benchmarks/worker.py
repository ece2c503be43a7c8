"""One contestant on one workload, in a process of its own; prints one line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time

import numpy as np

from workloads import WORKLOADS

LONG = 1.0  # seconds; where a meta-step takes longer, the second and third of those verified are what is timed
VERIFIED = 3  # meta-steps whose losses are compared before anything is timed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("contestant")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    work = WORKLOADS[options.workload]
    if options.module.endswith("ours"):
        importlib.import_module("efficientai_toolkit")  # before mlx, for the fast BLAS
    peer = importlib.import_module(f"peers.{options.module}")
    with np.load(options.data, allow_pickle=False) as file:
        steps = peer.make(work, dict(file), options.contestant)
    begin = time.perf_counter()
    losses = [steps(1)]
    first = time.perf_counter() - begin
    times: list[float] = []
    for _ in range(VERIFIED - 1):
        begin = time.perf_counter()
        losses.append(steps(1))
        times.append((time.perf_counter() - begin) * 1e3)
    block = 1
    if min(times) < LONG * 1e3:  # one of them may have compiled anew
        times.clear()
        begin = time.perf_counter()
        steps(2)
        block = max(1, min(200, int(0.2 / (time.perf_counter() - begin))))
        steps(block)
        begin = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begin < options.seconds:
            start = time.perf_counter()
            steps(block)
            times.append((time.perf_counter() - start) / block * 1e3)
    scale = 1 if sys.platform == "darwin" else 1024
    print(
        json.dumps(
            {
                "losses": losses,
                "first_step_s": first,
                "ms": {
                    "median": float(np.median(times)),
                    "min": min(times),
                    "max": max(times),
                    "blocks": len(times),
                    "block": block,
                },
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
            }
        )
    )


if __name__ == "__main__":
    main()
