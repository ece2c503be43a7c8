"""The BLAS underneath: whichever kernels OpenBLAS takes by itself, they use the instructions that the processor has."""

import os
import subprocess
import sys

import pytest

from efficientai_toolkit import devices

AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
# OpenBLAS is loaded for a processor that it does not know, before the package is.
MISTAKEN = """
import ctypes, os
ctypes.CDLL(os.environ.pop("LIBRARY"), mode=ctypes.RTLD_GLOBAL)
if not os.environ.pop("KEEP"):
    del os.environ["OPENBLAS_CORETYPE"]
import efficientai_toolkit, mlx.core as mx, numpy as np
from efficientai_toolkit.devices import blas
a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((70, 130), (130, 90)))
assert abs(np.array(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu)) - a @ b).max() < 1e-4
print(blas()[0], os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.parametrize(
    ("flags", "core"),
    [
        ({"sse2", "avx"}, None),
        ({"avx2"}, None),
        ({"avx2", "fma"}, "Haswell"),
        ({"avx2", "fma", "avx512f"}, "Haswell"),
        ({"avx2", "fma", *AVX512}, "SkylakeX"),
    ],
)
def test_kernels_follow_the_instructions(flags, core):
    assert devices._kernels(frozenset(flags)) == core


@pytest.fixture
def mistaken():
    library = devices._openblas
    if library is None or not hasattr(library, "gotoblas_dynamic_init"):
        pytest.skip("needs an OpenBLAS that can change its kernels")
    if devices._kernels(devices._processor_flags()) is None:
        pytest.skip("needs a processor with AVX2")

    def ask(keep):
        settings = {"OPENBLAS_CORETYPE": "Prescott", "LIBRARY": devices._loaded_blas, "KEEP": keep}
        done = subprocess.run(
            [sys.executable, "-c", MISTAKEN], env={**os.environ, **settings}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    return ask


def test_a_processor_that_openblas_does_not_know_gets_its_kernels(mistaken):
    told = mistaken("")
    assert "Prescott" not in told  # which others there are is the library's
    assert told.endswith(") None")


def test_the_kernels_that_a_user_asked_for_are_kept(mistaken):
    assert mistaken("yes") == f"OpenBLAS ({devices._loaded_blas}, Prescott) Prescott"
