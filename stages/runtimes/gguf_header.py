"""What a GGUF file says of itself, read and checked before llama.cpp sees the file.

llama.cpp ends the whole process on some damaged or mismatched files, so nothing is handed to it unread. Notable: every
length is checked against the file's size before it is used; token lists cost milliseconds, not seconds as with
`gguf.GGUFReader`; tensor data is located, never loaded. Format: ggml/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from artifacts.errors import SourceError, StageError

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]
ClsOrder = Literal["first", "last"]
"""Where CLS stands among the patches while llama.cpp's encoder runs; `llamacpp_cls` tells the story."""

# GGUF value type -> struct format; 8 is a string, 9 an array.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_LARGEST_DIMENSIONS: Final = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in ggml order: the row length comes first."""

    shape: tuple[int, ...]
    type: str  # "F32", "Q4_0", ...
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The metadata and the table of tensors of one file."""

    path: Path
    fields: dict[str, Value]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is no vector, in ggml's order: what types are chosen for."""
        return {name: tensor.shape for name, tensor in self.tensors.items() if len(tensor.shape) > 1}

    def integer(self, key: str) -> int | None:
        """A whole number of the metadata, None when the key is absent or something else."""
        value = self.fields.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise EOFError(f"the header goes on after byte {len(self.data)}, where the file ends")
        chunk = self.data[self.at : self.at + count]
        self.at += count
        return chunk

    def number(self, format: str) -> int:
        value: int = struct.unpack("<" + format, self.take(struct.calcsize("<" + format)))[0]
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                return [self.text() for _ in range(count)]
            if inner not in _SCALARS:
                raise ValueError(f"unknown array type {inner}")
            raw = self.take(count * struct.calcsize("<" + _SCALARS[inner]))
            return [item[0] for item in struct.iter_unpack("<" + _SCALARS[inner], raw)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        scalar: Scalar = struct.unpack("<" + _SCALARS[kind], self.take(struct.calcsize("<" + _SCALARS[kind])))[0]
        return scalar


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file and check that all tensor data lies within the file.

    Raises:
        SourceError: the file is missing, is not GGUF, or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            magic = handle.read(4)
            if magic != b"GGUF":
                raise SourceError(
                    f"{path.name} is not a GGUF file",
                    where=str(path),
                    why=f"it has {size} bytes and begins with {magic!r}, not b'GGUF'",
                    way_out="give a file that the stage 'gguf' or llama.cpp wrote",
                )
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except (OSError, IsADirectoryError) as error:
        raise SourceError(
            f"the model file {path.name} cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            way_out="check the path; an artifact of type 'gguf' holds model.gguf and, if it sees images, mmproj.gguf",
        ) from error
    except (EOFError, ValueError, OverflowError, MemoryError, struct.error) as error:
        raise SourceError(
            f"{path.name} is damaged",
            where=str(path),
            why=str(error),
            way_out="copy or download the file again, or run the recipe again to rebuild it",
        ) from error


def _parse(path: Path, data: mmap.mmap) -> Header:
    import gguf

    cursor = _Cursor(data)
    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; versions 2 and 3 are known (a big-endian file looks like this too)")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Value] = {}
    for _ in range(field_count):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    table: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.number("I")
        if dimensions > _LARGEST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        table.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, code, offset in table:
        kind = gguf.GGMLQuantizationType(code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape and shape[0] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]}, {kind.name} needs a multiple of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > len(data):
            raise ValueError(
                f"the data of tensor {name!r} ends at byte {start + offset + nbytes}, the file has {len(data)}"
            )
        tensors[name] = TensorInfo(shape=shape, type=str(kind.name), offset=start + offset, nbytes=nbytes)
    return Header(path=path, fields=fields, tensors=tensors)


@dataclass(frozen=True)
class VisionHeader:
    """What an mmproj file says of the image encoder in it."""

    header: Header
    blocks: int
    default_exit: int
    width: int  # of the language model's embeddings that the projector makes
    image_size: int  # pixels, square
    patch_size: int  # pixels
    resample: str  # PIL's name of the filter that the checkpoint's image processor uses
    resize: str  # "stretch" to the square, or "crop": shortest edge, then the middle; not where llama.cpp tiles
    projector: str  # llama.cpp's name: "mlp", "idefics3"
    shuffle: int  # patches a side that the projector makes one token of
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of tiles that an image may be cut into beside the overview
    cls_order: ClsOrder | None  # the order that the position table was written for; None: the file does not say

    @property
    def has_cls(self) -> bool:
        return "v.class_embd" in self.header.tensors

    @property
    def tiles(self) -> bool:
        """Whether llama.cpp cuts images into tiles: then it is given the whole picture, and resizes it itself."""
        return bool(self.grids)

    @property
    def pass_tokens(self) -> int:
        """Image tokens of one pass of the encoder."""
        return (self.image_size // self.patch_size // self.shuffle) ** 2

    @property
    def image_tokens(self) -> int:
        """Image tokens of one image, at most."""
        return self.pass_tokens * (1 + max((rows * columns for rows, columns in self.grids), default=0))


RESAMPLE_KEY: Final = "icet.image.resample"  # ours: llama.cpp ignores these
RESIZE_KEY: Final = "icet.image.resize"
CLS_KEY: Final = "icet.image.cls"


_PROJECTORS: Final = ("mlp", "idefics3")  # of LLaVA; of Idefics3 and SmolVLM


def read_vision_header(path: Path) -> VisionHeader:
    """Read an mmproj file's header.

    Raises:
        SourceError: missing, damaged, or not an mmproj with an image encoder.
    """
    header = read_header(path)
    if header.architecture != "clip" or not header.fields.get("clip.has_vision_encoder"):
        raise SourceError(
            f"{path.name} holds no image encoder",
            where=str(path),
            why=f"its architecture is {header.architecture or 'not given'!r}, an mmproj file's is 'clip'",
            way_out="give the mmproj.gguf that was made together with the model",
        )
    numbers: dict[str, int] = {}
    for key in ("block_count", "projection_dim", "image_size", "patch_size"):
        found = header.integer(f"clip.vision.{key}")
        if found is None or found <= 0:
            raise SourceError(
                f"{path.name} does not say clip.vision.{key}",
                where=str(path),
                way_out="make it again with the stage 'gguf'",
            )
        numbers[key] = found
    blocks = numbers["block_count"]
    for block in range(blocks):
        if (
            f"v.blk.{block}.attn_q.weight" not in header.tensors
            and f"v.blk.{block}.attn_qkv.weight" not in header.tensors
        ):
            raise SourceError(
                f"{path.name} lacks block {block} of the {blocks} that it announces",
                where=str(path),
                way_out="make it again with the stage 'gguf'",
            )
    projector = str(header.fields.get("clip.projector_type", "mlp"))
    if projector not in _PROJECTORS:
        raise SourceError(
            f"{path.name} has a projector that is not known here: {projector}",
            where=str(path),
            why=f"how many tokens an image becomes is known of {' and '.join(_PROJECTORS)}",
            way_out="go on without images (--mmproj none), or use a model of another family: `pipeline families`",
        )
    layers = header.fields.get("clip.vision.feature_layer")
    if layers is None and projector != "mlp":
        layers = [blocks]  # the other graphs run all blocks there are
    # Without the key llama.cpp runs one block fewer than there are (its issue 25817).
    default = layers[-1] if isinstance(layers, list) and layers else max(blocks - 1, 1)
    if not isinstance(default, int) or not 1 <= default <= blocks:
        raise SourceError(f"{path.name} takes its features after block {default!r} of {blocks}", where=str(path))
    order = header.fields.get(CLS_KEY)
    return VisionHeader(
        header=header,
        blocks=blocks,
        default_exit=default,
        width=numbers["projection_dim"],
        image_size=numbers["image_size"],
        patch_size=numbers["patch_size"],
        resample=str(header.fields.get(RESAMPLE_KEY, "bicubic")),
        resize=str(header.fields.get(RESIZE_KEY, "stretch")),
        projector=projector,
        shuffle=(header.integer("clip.vision.projector.scale_factor") or 1) if projector == "idefics3" else 1,
        grids=_grids(header, projector, numbers["image_size"]),
        cls_order=cast("ClsOrder", order) if order in ("first", "last") else None,
    )


def _grids(header: Header, projector: str, size: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) that an image of any shape may be cut into."""
    if projector == "idefics3":
        most = -(-(header.integer("clip.vision.preproc_image_size") or size) // size)
        return tuple((rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1))
    pinpoints = header.fields.get("clip.vision.image_grid_pinpoints")
    if projector != "mlp" or not isinstance(pinpoints, list):
        return ()
    pixels = [int(value) for value in pinpoints]  # width, height, width, height, ...
    return tuple((height // size, width // size) for width, height in zip(pixels[::2], pixels[1::2], strict=False))


def check_pair(model: Header, vision: VisionHeader) -> None:
    """Refuse an mmproj file that belongs to another model, before llama.cpp aborts over it.

    Raises:
        StageError: the projector makes vectors of another width than the model takes.
    """
    expected = model.integer(f"{model.architecture}.embedding_length")
    last = vision.header.tensors.get("mm.2.weight")
    made = last.shape[-1] if last is not None else vision.width
    if expected is None or expected == vision.width == made:
        return
    raise StageError(
        f"{vision.header.path.name} does not belong to {model.path.name}",
        where=str(vision.header.path),
        why=f"its projector makes vectors of {made} numbers (it says {vision.width}), the model takes {expected}",
        way_out="use the mmproj.gguf from the same artifact as the model",
    )


def check_language_model(header: Header) -> None:
    """Refuse a file that is GGUF but not a language model.

    Raises:
        SourceError: it is an mmproj or a vocabulary only.
    """
    if header.architecture in ("", "clip") or not header.tensors:
        raise SourceError(
            f"{header.path.name} holds no language model",
            where=str(header.path),
            why=f"its architecture is {header.architecture or 'not given'!r} and it has {len(header.tensors)} tensors",
            way_out="give model.gguf here and mmproj.gguf as the image encoder",
        )
