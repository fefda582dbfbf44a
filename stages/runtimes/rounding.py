"""What a quantizer makes of weights: rounded by libggml's own functions, to the bit, and back to floats.

The functions are those that `llama_model_quantize` calls (ggml.h: `ggml_quantize_chunk`, `ggml_get_type_traits`), taken
from the library that llama-cpp-python has installed; so what is rounded here is what llama.cpp will read. Which type
each tensor of a file gets, when a mixture such as Q4_K_M is asked for, is told by `mixture`.
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

TYPES: Final = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S"),
    *("MXFP4", "TQ2_0", "TQ1_0"),
    # Without an importance matrix llama.cpp writes none of these (llama-quant.cpp, tensor_requires_imatrix), and for
    # some of them libggml ends the process.
    *("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
NEED_IMATRIX: Final = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})

# What llama.cpp takes for rows that the blocks of a type do not divide (llama-quant.cpp, tensor_type_fallback); it is
# compared with the installed library by a test. Rows that these do not divide either stay F16.
_FALLBACK: Final = {
    **dict.fromkeys(("Q2_K", "Q2_0", "TQ2_0", "TQ1_0"), "Q4_0"),
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "IQ4_NL"),
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


def check_type(name: str, *, imatrix: bool = False) -> None:
    """Refuse what all matrices of a model cannot be rounded to.

    Args:
        imatrix: whether there is an importance matrix.

    Raises:
        RecipeError: no tensor type that can be rounded to here, or one that needs an importance matrix.
    """
    possible = [type for type in TYPES if imatrix or type not in NEED_IMATRIX]
    if name in possible:
        return
    near = difflib.get_close_matches(name, possible, n=1, cutoff=0.0)
    if name in NEED_IMATRIX:
        raise RecipeError(
            f"weights cannot be rounded to {name!r} without an importance matrix",
            why="llama.cpp writes no file of types this small without one",
            way_out=f"give one, or use {near[0]}",
        )
    raise RecipeError(
        f"weights cannot be rounded to {name!r}",
        why=f"one type for all matrices is needed here, one of {', '.join(TYPES)}; mixtures such as Q4_K_M give each "
        "tensor its own",
        way_out=f"use {near[0]}, or leave the quantizer out",
    )


def row_type(name: str, width: int) -> str:
    """The type that rows of `width` numbers get from llama.cpp when `name` is asked for; F16 if no block fits."""
    return next((type for type in (name, _FALLBACK.get(name)) if type and width % _block(type) == 0), "F16")


def round_weights(
    weights: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The float32 values that llama.cpp computes with after these (rows, width) were quantized.

    Values are taken through float16 first, as they stand in the F16 file that the quantizer reads.

    Args:
        name: the type asked for; rows that its blocks do not divide get another (`row_type`).
        importance: (width,) weights of the columns, as an importance matrix has them.

    Raises:
        StageError: the type needs `importance`, or it has another width.
    """
    rows, width = weights.shape
    type = row_type(name, width)
    half = weights.astype(np.float16)
    source: NDArray[np.float32] = half.astype(np.float32)
    if type == "F16":
        return source
    if importance is None and type in NEED_IMATRIX:
        raise StageError(
            f"weights cannot be rounded to {type} without an importance matrix", way_out="give one, or a larger type"
        )
    if importance is not None and importance.shape != (width,):
        raise StageError(
            f"the importance matrix has {importance.size} columns for rows of {width} numbers",
            way_out="give the importance matrix of this very model",
        )
    kind = int(_kind(type))
    library, traits = _library(), _traits(kind)
    stored = np.empty(rows * width // traits.blck_size * traits.type_size, dtype=np.uint8)
    rounded = np.empty_like(source)
    columns = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    library.ggml_quantize_chunk(
        kind, source.ctypes.data, stored.ctypes.data, 0, rows, width, None if columns is None else columns.ctypes.data
    )
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
