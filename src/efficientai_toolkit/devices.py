"""Hardware: the BLAS and the allocator underneath, the devices that are there, memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .errors import DeviceError

# The Linux CPU wheel of MLX carries the reference BLAS (about 6 GFLOP/s). OpenBLAS in the global symbol table
# before `mlx.core` is imported takes its place (about 170 on the same two cores).
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")
_loaded_blas: str | None = None
_openblas: ctypes.CDLL | None = None
_OLDEST_CORE = "Prescott"
_CORES = {  # the best first
    "SkylakeX": frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}),
    "Haswell": frozenset({"avx2", "fma"}),
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_JEMALLOC_ALL_ARENAS = 4096  # MALLCTL_ARENAS_ALL

# A stack of tasks that keeps the working set of one core's share of the cache is faster than a loop on a CPU;
# a larger one is not.
_CPU_BUDGET = 64 << 20


def preload_blas() -> str | None:
    """Load OpenBLAS globally where it is found and `mlx.core` is not imported yet; returns the library's name."""
    global _loaded_blas, _openblas
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get("EFFICIENTAI_BLAS") == "mlx":
        return _loaded_blas
    # Idle BLAS threads spin, by default for tens of milliseconds, on the core that MLX dispatches from.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    for name in _OPENBLAS:
        try:
            _openblas = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded_blas = name
        _use_vector_kernels(_openblas)
        break
    return _loaded_blas


def _use_vector_kernels(library: Any) -> None:
    """Give an OpenBLAS that takes this processor for one of 2004 the kernels of the instructions that it has.

    Up to 0.3.24 (Debian 12, Ubuntu 22.04) that is any processor of Intel's that is newer than the library: a quarter of
    the speed or less (OpenBLAS, pull request 4268). A user's own OPENBLAS_CORETYPE is left alone.
    """
    functions = ("openblas_get_corename", "gotoblas_dynamic_quit", "gotoblas_dynamic_init")
    if "OPENBLAS_CORETYPE" in os.environ or not all(hasattr(library, name) for name in functions):
        return
    better = _kernels(_processor_flags())
    if _core_name(library) != _OLDEST_CORE or better is None:
        return
    os.environ["OPENBLAS_CORETYPE"] = better  # read by the next line but one
    library.gotoblas_dynamic_quit()
    library.gotoblas_dynamic_init()
    del os.environ["OPENBLAS_CORETYPE"]  # NumPy's own OpenBLAS may know better


def _kernels(flags: frozenset[str]) -> str | None:
    """OpenBLAS's name for a processor with the instructions `flags`, where they are more than the oldest one's."""
    return next((core for core, needed in _CORES.items() if needed <= flags), None)


def _processor_flags() -> frozenset[str]:
    """The instruction sets of this Linux machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((frozenset(line.split()) for line in file if line.startswith("flags")), frozenset())
    except OSError:
        return frozenset()


def _core_name(library: Any) -> str:
    """Whose kernels OpenBLAS uses, such as "Haswell"."""
    if not hasattr(library, "openblas_get_corename"):
        return "unknown kernels"
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename().decode()


def keep_freed_memory() -> None:
    """Have glibc's or jemalloc's `malloc` keep what is freed, for the next array, instead of returning it to Linux.

    MLX's CPU backend allocates each array anew. What `malloc` returned comes back page by page, each zeroed by the
    kernel: half of the time of a step over images. A process then holds its peak until it ends; glibc's threads share
    two arenas, since each holds what another could use (LoRA on an encoder: 590 MB in place of 780). Settings of the
    user's own (`GLIBC_TUNABLES`, `MALLOC_CONF`, `MALLOC_TRIM_THRESHOLD_`, …) are left alone.
    """
    if sys.platform != "linux" or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return
    process = ctypes.CDLL(None)
    if hasattr(process, "mallctl"):
        never = ctypes.c_ssize_t(-1)
        for kind in ("dirty", "muzzy"):
            for arenas in ("arenas", f"arena.{_JEMALLOC_ALL_ARENAS}"):  # those to come, those there are
                name = f"{arenas}.{kind}_decay_ms".encode()
                process.mallctl(name, None, None, ctypes.byref(never), ctypes.c_size_t(ctypes.sizeof(never)))
    elif hasattr(process, "mallopt"):
        process.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        process.mallopt(_M_MMAP_MAX, 0)
        process.mallopt(_M_ARENA_MAX, 2)


def blas() -> tuple[str, str | None]:
    """(the BLAS in use on the CPU, how to get a faster one or None)."""
    if sys.platform == "darwin":
        return "Accelerate", None
    if _loaded_blas:
        return f"OpenBLAS ({_loaded_blas}, {_core_name(_openblas)})", None
    return (
        "reference BLAS of the MLX wheel (slow)",
        "install OpenBLAS (Debian, Ubuntu: `apt-get install libopenblas0`), and import efficientai_toolkit before mlx",
    )


def blas_threads() -> int:
    """Threads that a matrix product takes; 1 where that cannot be set for all (Accelerate, OpenMP's, the reference)."""
    if _openblas is None or not hasattr(_openblas, "openblas_set_num_threads"):
        return 1
    if _openblas.openblas_get_parallel() != 1:  # OpenMP's number of threads is each thread's own
        return 1
    return _openblas.openblas_get_num_threads()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it a matrix product takes one thread, where that can be set."""
    threads = blas_threads()
    if threads == 1:
        yield
        return
    assert _openblas is not None
    _openblas.openblas_set_num_threads(1)
    try:
        yield
    finally:
        _openblas.openblas_set_num_threads(threads)


def allocator() -> tuple[str, str | None]:
    """(what `malloc` is in this process, how to get a faster one or None)."""
    if sys.platform != "linux":
        return "of the system", None
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            maps = file.read()
    except OSError:
        return "unknown", None
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if f"lib{name}" in maps:
            return name, None
    # MLX's CPU stream frees on one thread what Python's thread allocated: glibc takes a lock for each, others do not.
    return (
        f"{platform.libc_ver()[0] or 'the C library'}'s malloc",
        "small models train up to 1.5 times faster on a CPU with jemalloc (Debian, Ubuntu: `apt-get install "
        "libjemalloc2`, then LD_PRELOAD=libjemalloc.so.2)",
    )


def compiles() -> tuple[bool, str]:
    """(whether `mx.compile` really compiles on the default device, why)."""
    import mlx.core as mx

    if os.environ.get("MLX_DISABLE_COMPILE") is not None:
        return False, "MLX_DISABLE_COMPILE is set; unset it"
    if mx.default_device() == mx.cpu:
        if _has_compiler():
            return True, "with the C++ compiler of this machine"
        remedy = "`xcode-select --install`" if sys.platform == "darwin" else "Debian, Ubuntu: `apt-get install g++`"
        return False, f"the CPU backend needs g++, a C++ compiler, at run time ({remedy})"
    return True, "on the GPU"


@functools.cache
def _has_compiler() -> bool:
    """Whether `g++ --version` succeeds: MLX's CPU backend asks that, and does without compiling where it fails."""
    place = shutil.which("g++")
    if sys.platform == "darwin" and place == "/usr/bin/g++" and not _succeeds("xcode-select", "-p"):
        return False  # Apple's stand-in, which would ask the user to install the command line tools
    return place is not None and _succeeds("g++", "--version")


def _succeeds(*command: str) -> bool:
    import subprocess

    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def gpu_kind() -> str | None:
    """ "metal", "cuda" or None."""
    import mlx.core as mx

    if mx.metal.is_available():
        return "metal"
    if hasattr(mx, "cuda") and mx.cuda.is_available():
        return "cuda"
    return None


def select_device(name: str | None) -> None:
    """Make "gpu" or "cpu" the default device; None leaves MLX's choice.

    Raises:
        DeviceError: it is not there.
    """
    import mlx.core as mx

    if name is None:
        return
    if name not in ("gpu", "cpu"):
        raise DeviceError(f"unknown device {name!r}; there are 'gpu' and 'cpu'")
    if name == "gpu" and gpu_kind() is None:
        raise DeviceError(f"Metal not available, nor CUDA: this machine has only {chip()} (--device cpu)")
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)


def chip() -> str:
    """The processor's name."""
    if sys.platform == "darwin":
        import subprocess

        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_info() -> dict[str, Any]:
    """The default device, its name, memory in bytes, BLAS and whether compiling works; plain JSON."""
    import mlx.core as mx

    kind = gpu_kind()
    on_gpu = mx.default_device() == mx.gpu and kind is not None
    details = mx.device_info() if on_gpu else {}
    works, why = compiles()
    return {
        "device": kind if on_gpu else "cpu",
        "name": str(details.get("device_name") or details.get("name") or chip()),
        "memory_bytes": int(details.get("memory_size") or details.get("total_memory") or total_memory()),
        "cores": os.cpu_count(),
        "blas": blas()[0],
        "allocator": allocator()[0],
        "compiles": works,
        "compiles_why": why,
        "gpu": kind,
    }


def total_memory() -> int:
    """Bytes of memory of this machine; 0 where that cannot be known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def memory_budget() -> int:
    """Bytes that one stacked graph may take: a cache-sized share on a CPU, half of a GPU's memory."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return _CPU_BUDGET
    return _gpu_memory() // 2 or (4 << 30)


@functools.cache
def _gpu_memory() -> int:
    return int(device_info()["memory_bytes"])  # asked for at every choice of a stack: once is enough
