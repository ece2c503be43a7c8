"""Fixtures for every test: the real data sets, a cache folder of the tests' own, and no network."""

from __future__ import annotations

import gc
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports mlx: the same BLAS as in the processes that tests start, hence the same bits.
import efficientai_toolkit  # noqa: F401

# isort: split
import mlx.core as mx

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at MLX's first matrix product; references are float32
if mx.default_device() != mx.cpu:
    mx.set_cache_limit(512 << 20)  # pytest-xdist's workers share one memory, and each would keep most of it

settings.register_profile("toolkit", deadline=None, derandomize=True, database=None)
settings.load_profile("toolkit")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test or its fixtures draw without a key does not depend on which tests this process has run before."""
    mx.random.seed(0)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def peak_bytes(on_cpu: None) -> Callable[[Callable[[], object]], int]:
    """Measures the memory that a function needs at its peak, beyond what is there before; on the CPU.

    A GPU holds every temporary array until its command buffer has ended, which hides what small arrays would show.
    """

    def measure(run: Callable[[], object]) -> int:
        mx.synchronize()
        gc.collect()  # what other tests left is not to be freed meanwhile
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        return mx.get_peak_memory() - before

    return measure


@pytest.fixture(scope="session")
def data_dir_or_none() -> Path | None:
    """The folder of real data sets: `$EFFICIENTAI_DATA_DIR`, else `shared/data` beside the repository."""
    given = os.environ.get("EFFICIENTAI_DATA_DIR")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_dir(data_dir_or_none: Path | None) -> Path:
    """The same; a test that wants it is skipped where there is none."""
    if data_dir_or_none is None:
        pytest.skip("no data sets: set EFFICIENTAI_DATA_DIR to the folder that holds omniglot/, mnist/, …")
    return data_dir_or_none


@pytest.fixture(scope="session", autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Decoded arrays go to a folder of this test session, which pytest-xdist's workers share; not to the user's."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url, *_, **__):
        raise urllib.error.URLError("the tests have no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
