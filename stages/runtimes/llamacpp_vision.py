"""Images in llama.cpp: pixels as the checkpoint's image processor makes them, one encoder per exit, embeddings kept.

So that fidelity compares encoders and not resizers, an image that becomes one square is resized here by Pillow, with
the filter that the mmproj file records, and llama.cpp gets a bitmap that already has its size. Where it cuts images
into tiles (LLaVA-NeXT, Idefics3, SmolVLM) it gets the whole picture, and does what it does for every user: its resizers
follow Pillow's (to a rounding where a picture is resized in both directions), the texts between tiles are its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import StageError
from stages.machine import cores
from stages.runtimes.exits import derive_exit
from stages.runtimes.gguf_header import VisionHeader
from stages.runtimes.llamacpp_library import TextModel, log_tail, vision_library

if TYPE_CHECKING:
    from PIL.Image import Image

_CACHE_BYTES: Final = 256 * 2**20  # of image embeddings
_LAYOUTS: Final = 1024  # images whose pieces are remembered

AS_SHIPPED: Final = 0
"""The exit at which the mmproj file itself leaves the encoder: that file is read, whatever it says."""

Piece = NDArray[np.float32] | tuple[int, ...]
"""Image embeddings (image tokens, text width), or tokens of a text that llama.cpp puts between the tiles."""


class VisionEncoder:
    """Image embeddings of every exit; one exit's encoder is loaded at a time."""

    def __init__(self, model: TextModel, vision: VisionHeader) -> None:
        self._model = model
        self.vision = vision
        self._folder = tempfile.TemporaryDirectory(prefix="icet-exits-")
        self._exit: int | None = None  # whose encoder is loaded
        self._context: int | None = None
        self._kept: OrderedDict[tuple[int, str], list[Piece]] = OrderedDict()
        self._size = 0  # bytes in _kept
        self._lengths: OrderedDict[str, int] = OrderedDict()  # of images that llama.cpp cuts into tiles

    def embeddings(self, exit: int, image: Path) -> NDArray[np.float32]:
        """(image tokens, text width) of one image at one exit.

        Raises:
            StageError: no such exit, or the image cannot be read or encoded.
        """
        return _vectors(self.pieces(exit, image))

    def pieces(self, exit: int, image: Path) -> list[Piece]:
        """What the language model reads for one image at one exit, in order.

        Raises:
            StageError: no such exit, or the image cannot be read or encoded.
        """
        raw = read_image(image)
        key = (exit, hashlib.sha256(raw).hexdigest())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._run(exit, prepare_image(raw, self.vision, where=image), image)
        self._kept[key] = found
        self._size += _nbytes(found)
        while self._size > _CACHE_BYTES and len(self._kept) > 1:
            self._size -= _nbytes(self._kept.popitem(last=False)[1])
        return found

    def length(self, exit: int, image: Path) -> int:
        """Tokens of the context that one image takes, texts between its tiles included.

        Raises:
            StageError: as `pieces`; but nothing is encoded.
        """
        if not self.vision.tiles:
            return self.vision.pass_tokens
        raw = read_image(image)
        key = hashlib.sha256(raw).hexdigest()
        if key not in self._lengths:
            pixels = prepare_image(raw, self.vision, where=image)
            self._lengths[key] = sum(len(piece) for piece in self._run(exit, pixels, image, encode=False))
            if len(self._lengths) > _LAYOUTS:
                self._lengths.popitem(last=False)
        return self._lengths[key]

    def encode(self, exit: int, pixels: NDArray[np.uint8], *, where: Path) -> NDArray[np.float32]:
        """(image tokens, text width) of pixels (height, width, 3) at one exit; nothing is kept.

        Raises:
            StageError: no such exit, or llama.cpp refuses.
        """
        return _vectors(self._run(exit, pixels, where))

    def _run(self, exit: int, pixels: NDArray[np.uint8], where: Path, *, encode: bool = True) -> list[Piece]:
        """Every chunk that llama.cpp makes of a bitmap; without `encode`, image chunks hold zeros of no width."""
        self.load(exit)
        lib = vision_library()
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels)
        bitmap = lib.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = lib.mtmd_input_chunks_init()
        found: list[Piece] = []
        try:
            marker = lib.mtmd_default_marker()
            text = lib.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
            bitmaps = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
            status = lib.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1)
            for index in range(lib.mtmd_input_chunks_size(chunks) if status == 0 else 0):
                chunk = lib.mtmd_input_chunks_get(chunks, index)
                if lib.mtmd_input_chunk_get_type(chunk) != lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    found.append(_text_of(lib, chunk))
                    continue
                tokens = int(lib.mtmd_input_chunk_get_n_tokens(chunk))
                if not encode:
                    found.append(np.empty((tokens, 0), np.float32))
                    continue
                if lib.mtmd_encode_chunk(self._context, chunk):
                    found.clear()
                    break
                output = lib.mtmd_get_output_embd(self._context)
                vectors = np.ctypeslib.as_array(output, shape=(tokens, self._model.width))
                found.append(vectors.astype(np.float32, copy=True))
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)
        if any(isinstance(piece, np.ndarray) for piece in found):
            return found
        raise StageError(f"llama.cpp could not encode the image {where.name}", where=str(where), why=log_tail())

    def load(self, exit: int) -> None:
        """The encoder of one exit, if it is not loaded yet.

        Raises:
            StageError: llama.cpp does not load it.
        """
        if self._exit == exit:
            return
        self._unload()
        path = self.vision.header.path
        layers = self.vision.header.fields.get("clip.vision.feature_layer")
        whole = exit == self.vision.blocks and layers == ([exit] if self.vision.projector == "mlp" else None)
        if exit != AS_SHIPPED and not whole:
            path = Path(self._folder.name) / f"exit-{exit}.gguf"
            if not path.exists():
                derive_exit(self.vision.header.path, exit, path)
        lib = vision_library()
        params = lib.mtmd_context_params_default()
        params.use_gpu = False
        params.print_timings = False
        params.warmup = False
        params.n_threads = cores()
        self._context = lib.mtmd_init_from_file(os.fsencode(path), self._model.pointer, params)
        if not self._context:
            self._context = None
            at = "" if exit == AS_SHIPPED else f" at exit {exit}"
            raise StageError(
                f"llama.cpp does not load the image encoder {self.vision.header.path.name}{at}",
                where=str(self.vision.header.path),
                why=log_tail(),
                way_out="rebuild it with the stage 'gguf'",
            )
        self._exit = exit

    def close(self) -> None:
        self._unload()
        self._folder.cleanup()

    def _unload(self) -> None:
        if self._context is not None:
            vision_library().mtmd_free(self._context)
            self._context = None
            self._exit = None


def _vectors(pieces: Sequence[Piece]) -> NDArray[np.float32]:
    return np.concatenate([piece for piece in pieces if isinstance(piece, np.ndarray)])


def _nbytes(pieces: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces if isinstance(piece, np.ndarray))


def _text_of(lib: ModuleType, chunk: object) -> tuple[int, ...]:
    """Tokens of a text chunk, without those that the model's vocabulary lacks."""
    count = ctypes.c_size_t()
    tokens = lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
    return tuple(int(tokens[place]) for place in range(count.value) if tokens[place] >= 0)


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        StageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StageError(
            f"the image {path.name} cannot be read", where=str(path), why=error.strerror, way_out="check the path"
        ) from error


def prepare_image(raw: bytes, vision: VisionHeader, *, where: Path) -> NDArray[np.uint8]:
    """(height, width, 3): the pixels that the checkpoint's image processor would normalize; where llama.cpp tiles,
    the whole picture.

    Raises:
        StageError: not an image that Pillow can read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise StageError(
            f"{where.name} is not a readable image", where=str(where), why=str(error), way_out="use PNG or JPEG"
        ) from error
    return np.asarray(_fit(picture, vision), dtype=np.uint8)


def _fit(picture: Image, vision: VisionHeader) -> Image:
    from PIL import Image

    side = vision.image_size
    if vision.tiles or picture.size == (side, side):
        return picture
    filter = Image.Resampling[vision.resample.upper()]
    if vision.resize == "stretch":
        return picture.resize((side, side), resample=filter)
    # transformers' "shortest_edge" then center crop: the longer side is truncated, not rounded.
    width, height = picture.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return picture.resize(size, resample=filter).crop((left, top, left + side, top + side))
