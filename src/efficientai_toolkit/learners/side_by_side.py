"""Graphs of several tasks side by side on the cores of a CPU.

MLX computes a stream of the CPU on one thread and leaves only matrix products to the BLAS's threads; between the
products of a small transformer all cores but one wait for half of the time. So tasks that are looped over get a thread
and a stream a core, each with one thread of BLAS. Every thread traces for itself, one at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..devices import blas_threads, one_blas_thread, total_memory

Kept = Callable[[dict[Any, Callable]], Callable[..., Any]]  # what a thread keeps for an owner → the function to call

# Tracing swaps a model's weights for the traced ones, which two threads must not do at once.
_tracing = threading.Lock()
_own = threading.local()


def workers(count: int, each: int) -> int:
    """How many of `count` graphs of `each` bytes go side by side.

    As many as a matrix product takes threads, where that is ours to set (OpenBLAS; not on macOS, nor on a GPU), and as
    half of the memory holds; 1 where `each` is 0, which is unknown.
    """
    if mx.default_device() != mx.cpu or each <= 0:
        return 1
    return max(1, min(count, blas_threads(), total_memory() // 2 // each))


def side_by_side(owner: Any, function: Kept, calls: Sequence[tuple[Any, ...]], count: int) -> Generator[Any]:
    """What each call returns, evaluated, in the order of the calls.

    Args:
        owner: whose functions these are: once it is gone, so are they. No function may hold it.
        function: given the functions that a thread keeps for the owner, the one to call. A compiled function belongs
            to a thread as its stream does, and must not outlive it.
        calls: arguments, of evaluated arrays. What else the function reads must be evaluated too: an array that is not
            belongs to the stream of the thread that made it (`RuntimeError`, "There is no Stream").
        count: results at once, being computed or waiting.
    """
    pool, pending = _pool(max(count, blas_threads())), deque[Future]()
    with one_blas_thread():
        try:
            for call in calls:
                if len(pending) == count:
                    yield _first_of(pending)
                pending.append(pool.submit(_run, owner, function, call))
            while pending:
                yield _first_of(pending)
        finally:
            for future in pending:
                if not future.cancel():
                    future.exception()  # waits; what went wrong first is on its way already


def _first_of(pending: deque[Future]) -> Any:
    result = pending[0].result()  # which an interrupt may leave, and `finally` then waits for
    pending.popleft()
    return result


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="tasks", initializer=_start)


def _start() -> None:
    _own.stream, _own.functions = mx.new_stream(mx.cpu), WeakKeyDictionary()


def _run(owner: Any, function: Kept, call: tuple[Any, ...]) -> Any:
    with _tracing, mx.stream(_own.stream):
        result = function(_own.functions.setdefault(owner, {}))(*call)
    mx.eval(result)
    return result
