"""Reading the pickles in which some data sets are distributed, without running what is in them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from ..errors import DataError


def plain_pickle(data: bytes, name: str) -> Any:
    """The plain containers, numbers, strings and NumPy arrays of a pickle; anything else in it is refused.

    Strings of Python 2 come back as bytes.
    """
    try:
        return _Plain(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:
        raise DataError(f"{name} is not a whole pickle ({type(error).__name__})") from None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module.replace("numpy._core.", "numpy.core."), name))
        if admitted is not None:
            return admitted
        raise DataError(
            f"it holds {module}.{name}, where only plain containers and NumPy arrays are admitted; refused, because "
            "loading it would run code"
        )


def _reconstruct(kind: type, shape: tuple, typecode: Any) -> np.ndarray:
    if kind is not np.ndarray:
        raise DataError("it holds an array of a class of its own; refused")
    return np.ndarray.__new__(np.ndarray, shape, typecode)


def _from_buffer(buffer: Any, dtype: Any, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin-1" if encoding == "latin1" else "utf-8")


_ADMITTED = {  # what the pickles of arrays call, by our own hands where it is a function
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
