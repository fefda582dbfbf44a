"""Change which tensors a checkpoint holds, and what they are called, without ever loading it.

Bytes are copied from file to file, a few MiB at a time: a model of any size passes through a small process, any dtype
comes out as it went in, and the same input gives the same bytes. The format is that of safetensors: eight bytes of
length, a JSON header, the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypedDict

from stages.models import checkpoint

Rename = Callable[[str], str | None]
"""A tensor's name in the source -> its name in the copy; None: it is left out."""

_PIECE: Final = 8 << 20  # bytes copied at once


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class LeftOut:
    """What a copy lacks."""

    tensors: int
    parameters: int


def tensor_names(folder: Path) -> list[str]:
    """The names of all tensors of a checkpoint, from the headers alone.

    Raises:
        SourceError: as `checkpoint.weight_files`.
    """
    return [name for path in checkpoint.weight_files(folder) for name in tensor_names_of(path)]


def tensor_names_of(path: Path) -> list[str]:
    """The names in one safetensors file that is known to be whole."""
    with path.open("rb") as handle:
        return [name for name in _read_header(handle)[0] if name != "__metadata__"]


def copy_weights(source: Path, target: Path, rename: Rename) -> LeftOut:
    """Copy the weight files of a checkpoint, file by file, with other names or without some tensors.

    A file that would be empty is left out; the index is written anew.

    Raises:
        SourceError: as `checkpoint.weight_files`. ValueError: two tensors would have one name.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors = parameters = total_size = total_parameters = 0
    weight_map: dict[str, str] = {}
    for path in checkpoint.weight_files(source):
        with path.open("rb") as handle:
            header, data = _read_header(handle)
            kept: list[tuple[str, _Entry]] = []
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                new, count = rename(name), math.prod(entry["shape"])
                if new is None:
                    tensors, parameters = tensors + 1, parameters + count
                    continue
                if new in weight_map:
                    raise ValueError(f"two tensors would be called {new}")
                weight_map[new] = path.name
                kept.append((new, entry))
                total_parameters += count
            if kept:
                kept.sort(key=lambda item: item[1]["data_offsets"][0])
                total_size += _write(handle, data, kept, target / path.name)
    if list(weight_map.values()).count(checkpoint.WEIGHTS) != len(weight_map):
        index = {
            "metadata": {"total_parameters": total_parameters, "total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / checkpoint.INDEX).write_text(text, encoding="utf-8")
    return LeftOut(tensors, parameters)


def _read_header(handle: BinaryIO) -> tuple[dict[str, _Entry], int]:
    """The header of a file that `checkpoint.weight_files` has found whole, and where its data begin."""
    size = int.from_bytes(handle.read(8), "little")
    header: dict[str, _Entry] = json.loads(handle.read(size))
    return header, 8 + size


def _write(source: BinaryIO, data: int, tensors: list[tuple[str, _Entry]], target: Path) -> int:
    """Write these tensors, in this order; returns the bytes of their data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, entry in tensors:
        begin, end = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [place, place + end - begin]}
        place += end - begin
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for _, entry in tensors:
            begin, end = entry["data_offsets"]
            source.seek(data + begin)
            left = end - begin
            while left:
                piece = source.read(min(_PIECE, left))
                if not piece:
                    raise OSError(f"{target.name} ended early")
                out.write(piece)
                left -= len(piece)
    return place
