"""The files of a model: one GGUF, or parts as llama.cpp's gguf-split makes them, and the image encoder beside it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from artifacts.errors import SourceError
from stages.runtimes.gguf_header import Header, TensorInfo, read_header

MODEL_NAME: Final = "model.gguf"
MMPROJ_NAME: Final = "mmproj.gguf"
_FIRST: Final = re.compile(r"^(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf$")


def model_file(folder: Path) -> Path:
    """The file to give to llama.cpp: model.gguf, or the first part; it need not exist."""
    whole = folder / MODEL_NAME
    if whole.exists():
        return whole
    return next(iter(sorted(folder.glob(f"{whole.stem}-00001-of-*.gguf"))), whole)


def mmproj_file(folder: Path) -> Path | None:
    """The image encoder beside it, if there is one."""
    found = folder / MMPROJ_NAME
    return found if found.exists() else None


def parts_of(model: Path) -> list[Path]:
    """All files of a model, by its first."""
    found = _FIRST.match(model.name)
    if found is None:
        return [model]
    stem, count = found["stem"], int(found["count"])
    return [model.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]


def read_model(model: Path) -> Header:
    """The header of a model with the tensors of all its parts; the offset of each is in its own part.

    Raises:
        SourceError: a part is missing or damaged, or belongs to another model.
    """
    parts = parts_of(model)
    headers = [read_header(part) for part in parts]
    tensors: dict[str, TensorInfo] = {name: info for header in headers for name, info in header.tensors.items()}
    expected = headers[0].integer("split.tensors.count")
    if len(parts) > 1 and (
        expected != len(tensors)
        or [header.integer("split.no") for header in headers] != list(range(len(parts)))
        or any(header.integer("split.count") != len(parts) for header in headers)
    ):
        raise SourceError(
            f"the parts of {model.name} do not belong together",
            where=str(model.parent),
            why=f"together they hold {len(tensors)} tensors, the first one announces {expected}",
            way_out="copy all parts again from one place",
        )
    return replace(headers[0], tensors=tensors)


def split_model(model: Path, limit: int) -> list[Path]:
    """Cut a model into parts with tensors of at most `limit` bytes each, unless all of them are no more.

    The parts stand beside it under llama.cpp's names, each appears whole or not at all, and the file itself is gone
    afterwards. A tensor larger than `limit` gets a part for itself.

    Returns:
        The files that the model now is.
    """
    import gguf

    reader = gguf.GGUFReader(model)
    if sum(int(tensor.n_bytes) for tensor in reader.tensors) <= limit:
        return [model]
    place = model.parent / ".parts"
    place.mkdir(exist_ok=True)
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer = gguf.GGUFWriter(place / model.name, architecture, split_max_size=limit)
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = sorted(place.iterdir())
    if len(made) == 1:  # it is that file again
        shutil.rmtree(place)
        return [model]
    # The first one last: without it nobody takes the others for a model.
    for part in reversed(made):
        part.replace(model.with_name(part.name))
    place.rmdir()
    model.unlink()
    return [model.with_name(part.name) for part in made]
