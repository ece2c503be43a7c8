"""Graphs of several tasks side by side on the cores of a CPU.

MLX computes a stream of the CPU on one thread and leaves only matrix products to the BLAS's threads; between the
products of a small transformer all cores but one wait for half of the time. So tasks that are looped over get a thread
and a stream a core, each with one thread of BLAS.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..devices import blas_threads, one_blas_thread

Kept = Callable[[dict[Any, Callable]], Callable[..., Any]]  # what a thread keeps for an owner → the function to call

# Tracing swaps a model's weights for the traced ones, which two threads must not do at once.
_tracing = threading.Lock()
_own = threading.local()


def workers(count: int) -> int:
    """How many of `count` tasks go side by side: as many as a matrix product would take threads; 1 on a GPU."""
    return min(count, blas_threads()) if mx.default_device() == mx.cpu else 1


def side_by_side(owner: Any, function: Kept, calls: Sequence[tuple[Any, ...]], count: int) -> Iterator[Any]:
    """What each call returns, evaluated, in the order of the calls.

    Args:
        owner: whose functions these are: once it is gone, so are they. No function may hold it.
        function: given the functions that a thread keeps for the owner, the one to call. A compiled function belongs
            to a thread as its stream does, and must not outlive it.
        calls: arguments, of evaluated arrays.
        count: threads; at most one result more is held than there are threads.
    """
    pending: deque[Future] = deque()
    with one_blas_thread():
        try:
            for call in calls:
                pending.append(_pool(count).submit(_run, owner, function, call))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                if not future.cancel():
                    future.exception()  # waits; what went wrong first is on its way already


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="tasks", initializer=_start)


def _start() -> None:
    _own.stream, _own.functions = mx.new_stream(mx.cpu), WeakKeyDictionary()


def _run(owner: Any, function: Kept, call: tuple[Any, ...]) -> Any:
    with _tracing, mx.stream(_own.stream):
        result = function(_own.functions.setdefault(owner, {}))(*call)
    mx.eval(result)
    return result
