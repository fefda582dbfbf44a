"""What a quantizer makes of weights: rounded by libggml's own functions, to the bit, and back to floats.

The functions are those that `llama_model_quantize` calls (ggml.h: `ggml_quantize_chunk`, `ggml_get_type_traits`), taken
from the library that llama-cpp-python has installed; so what is rounded here is what llama.cpp will read.
"""

from __future__ import annotations

import ctypes
import difflib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import RecipeError, StageError

if TYPE_CHECKING:
    import gguf

# Types that need no importance matrix, and what llama.cpp takes for rows that their blocks do not divide
# (llama-quant.cpp, tensor_type_fallback).
TYPES: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
_FALLBACK: Final = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def check_type(name: str) -> None:
    """Raises:
    RecipeError: no tensor type that can be rounded to here.
    """
    if name not in TYPES:
        near = difflib.get_close_matches(name, TYPES, n=1, cutoff=0.0)
        raise RecipeError(
            f"weights cannot be rounded to {name!r}",
            why=f"one type for all matrices is needed here, one of {', '.join(TYPES)}; mixtures such as Q4_K_M give "
            "each tensor its own, and types below need an importance matrix",
            way_out=f"use {near[0]}, or leave the quantizer out",
        )


def row_type(name: str, width: int) -> str:
    """The type that rows of `width` numbers get from llama.cpp when `name` is asked for.

    Raises:
        StageError: neither the type nor its replacement divides them.
    """
    for candidate in (name, _FALLBACK.get(name)):
        if candidate is not None and width % _block(candidate) == 0:
            return candidate
    raise StageError(
        f"rows of {width} numbers cannot be quantized to {name}",
        why=f"its blocks hold {_block(name)}",
        way_out="llama.cpp leaves such tensors as they are: choose Q8_0 or no quantizer",
    )


def round_weights(weights: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The float32 values that llama.cpp computes with after these (rows, width) were quantized.

    Values are taken through float16 first, as they stand in the F16 file that the quantizer reads.
    """
    rows, width = weights.shape
    kind = _kind(row_type(name, width))
    library = _library()
    traits = _traits(int(kind))
    source = np.ascontiguousarray(weights.astype(np.float16).astype(np.float32))
    stored = np.empty(rows * width // traits.blck_size * traits.type_size, dtype=np.uint8)
    rounded = np.empty_like(source)
    library.ggml_quantize_chunk(int(kind), source.ctypes.data, stored.ctypes.data, 0, rows, width, None)
    cast("Callable[[int, int, int], None]", traits.to_float)(stored.ctypes.data, rounded.ctypes.data, rows * width)
    return rounded


def _block(name: str) -> int:
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[_kind(name)]
    return int(block)


def _kind(name: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[name]


@cache
def _traits(kind: int) -> _Traits:
    found = cast("_Traits", _library().ggml_get_type_traits(kind).contents)
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if (found.blck_size, found.type_size) != (block, size):  # the structure changed: do not call through it
        raise StageError(
            "the installed libggml describes its types in a way that is not known here",
            way_out="install the llama-cpp-python that requirements.lock names",
        )
    return found


@cache
def _library() -> ctypes.CDLL:
    from stages.runtimes.llamacpp_library import library

    loaded: ModuleType = library()
    folder = Path(str(loaded.__file__)).parent / "lib"
    found = next(iter(sorted(folder.glob("*ggml-base*"))), None)
    if found is None:
        raise StageError("libggml is not where llama-cpp-python keeps it", where=str(folder))
    ggml = ctypes.CDLL(str(found))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    return ggml
