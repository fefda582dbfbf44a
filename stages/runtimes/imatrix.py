"""llama.cpp's importance matrix: how strongly each column of a weight matrix is used.

Format (llama.cpp, tools/imatrix): a GGUF file with `general.type = imatrix`, the keys `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size`, and for each weight two F32 tensors: `<name>.in_sum2`, the sum of
squared inputs of each column, and `<name>.counts`, the tokens that were summed; one row of both for each expert. The
quantizer weighs columns by sum / count, and by 1 where nothing was counted (tools/quantize).
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
from numpy.typing import NDArray

from artifacts.disk import appearing
from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import sha256_file
from stages.runtimes.gguf_header import read_header
from stages.stage import Context, Located, Planned

if TYPE_CHECKING:
    from stages.models.spec import ModelSpec

Importance = Mapping[str, NDArray[np.float32]]
"""Mean squared input of each column, (columns,) or for experts (experts * columns,), by the weight's name in GGUF."""

ImatrixName = Annotated[str, Located()]
"""How a recipe names one: the stage that makes it, or a file (a path, or a name that ends in .gguf)."""

IMATRIX_NAME: Final = "imatrix.gguf"  # in an artifact of type "imatrix"
_TYPE: Final = "imatrix"
_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_BLOCK: Final = re.compile(r"blk\.(\d+)\.")
_KEYS: Final = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


@dataclass(frozen=True)
class Collected:
    """What was summed for one weight."""

    sums: NDArray[np.float32]  # (experts, columns) of squared inputs; one row where there are no experts
    counts: NDArray[np.float32]  # (experts,) tokens


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """The importance of the columns of every weight that the file knows.

    Raises:
        SourceError: no importance matrix, or a damaged one.
    """
    header = read_header(path)
    if header.fields.get("general.type") != "imatrix" or any(key not in header.fields for key in _KEYS):
        raise SourceError(
            f"{path.name} is not an importance matrix",
            where=str(path),
            why=f"its general.type is {header.fields.get('general.type')!r}",
            way_out="give a file that llama.cpp's imatrix program wrote, in its GGUF format",
        )
    found = {}
    for name in sorted({tensor.removesuffix(_SUMS) for tensor in header.tensors if tensor.endswith(_SUMS)}):
        sums, counts = (header.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS))
        if sums is None or counts is None or {sums.type, counts.type} != {"F32"}:
            raise _damaged(path, name, "sums or counts are missing, or are not F32")
        total, tokens = (
            np.fromfile(path, np.float32, tensor.nbytes // 4, offset=tensor.offset) for tensor in (sums, counts)
        )
        if not tokens.size or total.size % tokens.size or not np.isfinite(total).all() or not np.isfinite(tokens).all():
            raise _damaged(path, name, f"{total.size} sums and {tokens.size} counts, or numbers that are not finite")
        found[name] = _importance(total.reshape(tokens.size, -1), np.rint(tokens))
    if not found:
        raise _damaged(path, "every weight", "the file holds none")
    return found


def check_fits(importance: Importance, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuse the importance matrix of another model.

    Args:
        shapes: of the model's matrices, by GGUF name, in ggml's order. name: of the importance matrix, for messages.

    Raises:
        SourceError: it has other blocks, or rows of other lengths.
    """
    _check_blocks(name, _blocks(importance), _blocks(shapes))
    for tensor, values in importance.items():
        row, _, *experts = shapes.get(tensor, (values.size, 1))
        columns = row * math.prod(experts)
        if values.size != columns:
            raise _of_another_model(f"{name} has {values.size} columns for {tensor}, this model has {columns}")


def quantize_keys(path: Path) -> dict[str, str | int]:
    """What llama-quantize writes into a model's metadata about the importance matrix that it used, but for the path."""
    header = read_header(path)
    datasets, chunks = header.fields[_KEYS[0]], header.fields[_KEYS[1]]
    return {
        "quantize.imatrix.file": path.name,
        "quantize.imatrix.dataset": ", ".join(map(str, datasets)) if isinstance(datasets, list) else str(datasets),
        "quantize.imatrix.entries_count": sum(name.endswith(_SUMS) for name in header.tensors),
        "quantize.imatrix.chunks_count": chunks if isinstance(chunks, int) else 0,
    }


def write_imatrix(
    path: Path, collected: Mapping[str, Collected], *, datasets: Sequence[str], chunks: int, chunk_size: int
) -> None:
    """Write what was summed, by the names of the weights in GGUF; the file appears whole or not at all.

    Args:
        datasets: what the inputs were made of, one at least. chunks: how many texts. chunk_size: tokens in one.

    Raises:
        StoreError: the disk is full.
    """
    import gguf

    with appearing(path) as part:
        writer = gguf.GGUFWriter(part, "")
        writer.kv_data[0].clear()  # no architecture: the file holds no model
        writer.add_type("imatrix")
        writer.add_array(_KEYS[0], list(datasets))
        writer.add_uint32(_KEYS[1], chunks)
        writer.add_uint32(_KEYS[2], chunk_size)
        for name, entry in sorted(collected.items()):
            rows = len(entry.counts)
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums.reshape(rows, -1), dtype=np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts.reshape(rows, 1), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def native_importance(lib: ModuleType, importance: Importance) -> ctypes.Array[ctypes.Structure]:
    """What `llama_model_quantize_params.imatrix` points to; it must outlive the call."""
    structure: type[ctypes.Structure] = lib.llama_model_imatrix_data
    entries = (structure * (len(importance) + 1))()  # the last one is empty and ends the list
    kept: list[NDArray[np.float32]] = []
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        flat = np.ascontiguousarray(values.reshape(-1), dtype=np.float32)
        kept.append(flat)
        entry.name = name.encode()
        entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = flat.size
    entries.kept = kept  # type: ignore[attr-defined]  # C holds only pointers
    return entries


def referred(name: str | None) -> Mapping[str, str]:
    """What `Stage.references` says of the parameter `imatrix`."""
    return {} if name is None or _is_file(name) else {_TYPE: name}


def check_named(name: str | None, inputs: Mapping[str, Planned], spec: ModelSpec | None) -> None:
    """Refuse what is no importance matrix, or another model's.

    Args:
        spec: of the model that is rounded with it, if that is known.

    Raises:
        RecipeError.
    """
    if name is None:
        return
    try:
        if _is_file(name):
            importance = read_imatrix(_file(name))
            if spec is not None:
                from stages.runtimes.mixture import outline_of_text  # which imports this module

                check_fits(importance, outline_of_text(spec.text).shapes, Path(name).name)
        elif name in inputs:
            made = inputs[name]
            if made.type != _TYPE:
                raise RecipeError(
                    f"imatrix: the stage '{name}' makes an artifact of type {made.type!r}",
                    why="what is wanted is an importance matrix",
                    way_out="name a stage that uses imatrix, or a file: ./NAME.gguf",
                )
            if made.spec is not None and spec is not None:
                _check_blocks(f"'{name}'", made.spec.text.layers, spec.text.layers)
    except SourceError as error:
        raise RecipeError(f"imatrix: {error.what}", where=error.where, why=error.why, way_out=error.way_out) from error


def named_digest(name: str | None) -> str:
    """Of a file that a recipe names, for `Stage.fingerprint`; "" for what a stage makes.

    Raises:
        RecipeError: there is no such file.
    """
    if name is None or not _is_file(name):
        return ""
    return sha256_file(_file(name))


def locate(name: str | None, context: Context) -> Path | None:
    """The file that a recipe names."""
    if name is None:
        return None
    return Path(name) if _is_file(name) else context.inputs[name].file(IMATRIX_NAME)


def _is_file(name: str) -> bool:
    return name.startswith("/") or name.endswith(".gguf")


def _file(name: str) -> Path:
    """Raises: RecipeError: there is no such file."""
    if not Path(name).is_file():
        raise RecipeError(
            f"imatrix: there is no file {name}",
            way_out="make one with a stage `uses: imatrix`, or with llama.cpp's llama-imatrix",
        )
    return Path(name)


def _blocks(tensors: Iterable[str]) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := _BLOCK.match(name))), default=-1)


def _check_blocks(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise _of_another_model(f"{name} is of {found} blocks, this model has {wanted}")


def _of_another_model(what: str) -> SourceError:
    return SourceError(
        what,
        why="entries go by a tensor's name, and that by its block's number, which prune changes",
        way_out="make it of the model that is quantized, behind prune",
    )


def _importance(sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    counted = counts[:, None] > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(counted, sums / counts[:, None], np.float32(1))
    return means.astype(np.float32).reshape(-1)


def _damaged(path: Path, name: str, why: str) -> SourceError:
    return SourceError(
        f"the importance matrix is damaged at {name}", where=str(path), why=why, way_out="make the file again"
    )
