"""Which llama.cpp is installed, said without loading a model or the package that brings it."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from artifacts.manifest import sha256_file

REBUILD: Final = (
    "CMAKE_ARGS='-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__' "
    "pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python=="
)
"""Compiles llama.cpp for this processor, without AMX; the version goes behind it."""


def uses_amx() -> bool:
    """Whether it was compiled with AMX, where this version may die of an illegal instruction.

    gcc optimises away the tile configuration that it loads (llama.cpp pull request 26954, not merged). Met with gcc 12
    on a Xeon of the fourth generation.
    """
    folder = _libraries()
    library = folder and next(iter(sorted(folder.glob("libggml-cpu.*"))), None)
    if not library:
        return False
    ctypes.CDLL(str(next(iter(sorted(library.parent.glob("libggml-base.*"))))), mode=ctypes.RTLD_GLOBAL)
    return bool(ctypes.CDLL(str(library)).ggml_cpu_has_amx_int8())


def llama_cpp_build() -> str | None:
    """The tensor library's version and commit as the build knew them, and the digest of what computes; None: not here.

    The commit is that of the sources which llama-cpp-python ships; "unknown" where they were built without it.
    """
    folder = _libraries()
    if folder is None:
        return None
    base, llama = (next(iter(sorted(folder.glob(f"lib{name}.*"))), None) for name in ("ggml-base", "llama"))
    if base is None or llama is None:
        return None
    library = ctypes.CDLL(str(base))
    said = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        said.append(function().decode())
    return f"ggml {said[0]}, commit {said[1]}, {llama.name} sha256:{sha256_file(llama)}"


def _libraries() -> Path | None:
    """The folder of the installed llama.cpp; None: not here."""
    spec = find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"
