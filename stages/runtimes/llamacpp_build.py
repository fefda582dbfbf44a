"""Which llama.cpp is installed, said without loading a model or the package that brings it."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from artifacts.manifest import sha256_file


def llama_cpp_build() -> str | None:
    """The tensor library's version and commit as the build knew them, and the digest of what computes; None: not here.

    The commit is that of the sources which llama-cpp-python ships; "unknown" where they were built without it.
    """
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
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
