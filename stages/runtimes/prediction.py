"""How much memory a GGUF will need: from shapes alone, before any work, or of the real files.

What is predicted is what `stages.runtimes.memory.measure_memory` measures: a process that reads the weights into its
own memory, fills the whole context 512 tokens at a time, encodes an image and generates, on a CPU.

- weights: exact, tensor by tensor, in the types that llama.cpp gives them (`mixture`); it rearranges some types for the
  processor while it reads them and keeps no other copy, but of a table that is embeddings and head at once;
- keys and values, graphs, logits: llama.cpp's own numbers for these shapes (`rehearsal`), not a formula of ours;
- image encoder: its file, its graph, and the embeddings on their way to the language model;
- overhead: a process without a model, measured once on this machine and remembered, and the vocabulary's tables.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

from artifacts.disk import write_atomically
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json
from stages.models.spec import ModelSpec, TextSpec, VisionSpec
from stages.runtimes import rounding
from stages.runtimes.exits import derive_exit
from stages.runtimes.gguf_header import Header, read_vision_header
from stages.runtimes.gguf_parts import read_model
from stages.runtimes.hollow import (
    Tensor,
    encoder_fallbacks,
    encoder_tensors,
    text_tensors,
    write_hollow_encoder,
    write_hollow_model,
)
from stages.runtimes.imatrix import Importance
from stages.runtimes.llamacpp_cls import write_probe_encoder, write_probe_model
from stages.runtimes.llamacpp_library import CacheType
from stages.runtimes.memory import STEP, measure_memory
from stages.runtimes.mixture import (
    NEED_IMATRIX,
    Fallback,
    Outline,
    differing,
    fallbacks,
    file_types,
    outline_of_text,
    tensor_types,
    uniform_importance,
)
from stages.runtimes.rehearsal import DEFAULT_UBATCH, Reserved, rehearse, rehearse_buffers, rehearse_encoder

_TABLE: Final = "token_embd.weight"
_HEAD: Final = "output.weight"  # without one the table is the head, too
_FORMAT: Final = 1  # raise it when what the probe measures changes
_PROBE_CONTEXT: Final = 256  # tokens
_DTYPES: Final[Mapping[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_F32: Final = 4  # bytes
# Measured, and counted in llama.cpp's structures: a token's text, score and entry in the table of texts; a merge's two
# texts and its entry in the table of ranks.
_TOKEN: Final = 180  # bytes
_MERGE: Final = 110  # bytes
_PRETOKENIZER: Final = 2_400_000  # bytes of Unicode tables, which only byte-pair encoders load
_LAYER: Final = 62 * 2**10  # bytes that describe a block's tensors in all graphs
# A matrix product first rounds its input to the type that goes with the weights'; bytes a number.
_INPUTS: Final[Mapping[str, float]] = {"F32": 0, "F16": 2, "BF16": 2}
_QUANTIZED_INPUT: Final = 292 / 256  # Q8_K; Q8_0 and Q8_1 take a little less
_EMBEDDINGS: Final = 4  # copies of an image's embeddings: llama.cpp's encoder, the caller, the batch, the micro-batch


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by what they are for."""

    weights: int  # of the language model
    kv_cache: int
    compute: int  # activations of one batch of the language model, logits
    vision: int  # image encoder: weights and activations; 0 without one
    overhead: int  # the process itself, and the vocabulary
    by_type: Mapping[str, int] = field(default_factory=dict)  # of the weights in the file: bytes in each tensor type

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute + self.vision + self.overhead


@cache
def predict_memory(spec: ModelSpec, context: int, *, cache_type: CacheType = "F16") -> MemoryPlan:
    """The memory of one conversation of `context` tokens with a GGUF, before there is a file.

    Args:
        spec: its `quantization` is a llama.cpp file type, e.g. "Q4_K_M"; None: the checkpoint's own dtype.
        cache_type: of keys and values.

    Raises:
        ValueError: an unknown type. StageError: llama.cpp is missing, or does not run a model of these shapes.
    """
    outline = outline_of_text(spec.text)
    return predict_outline(outline, planned_types(spec), context, vision=spec.vision, cache_type=cache_type)


def planned_types(spec: ModelSpec) -> str | dict[str, str]:
    """The type of each matrix in the GGUF of such a model, by tensor name; one word where all are floats.

    Raises:
        ValueError: an unknown type. StageError: as `mixture.tensor_types`.
    """
    kind = (spec.quantization or _DTYPES.get(spec.dtype, "F16")).upper()
    if kind in _INPUTS:
        return kind
    outline = outline_of_text(spec.text)
    single = {name: _allowed(type, outline.shapes[name][0]) for name, type in spec.tensor_types}
    return tensor_types(outline, kind, importance=_importance(outline, spec, kind)) | single


def planned_fallbacks(spec: ModelSpec) -> tuple[Fallback, ...]:
    """Where the shapes do not allow the types that were asked for, and which ones the files will hold instead: the
    language model's, then the image encoder's.

    Raises:
        ValueError: an unknown type. StageError: as `mixture.tensor_types`.
    """
    encoder = () if spec.vision is None else encoder_fallbacks(spec.vision, spec.text.hidden_size)
    kind = (spec.quantization or "F16").upper()
    if kind in _INPUTS:
        return encoder
    outline = outline_of_text(spec.text)
    chosen = dict(spec.tensor_types)
    named = {name: (type, _allowed(type, outline.shapes[name][0])) for name, type in chosen.items()}
    rest = fallbacks(outline, kind, importance=_importance(outline, spec, kind))
    others = (replace(one, tensors=tuple(name for name in one.tensors if name not in chosen)) for one in rest)
    return (*differing(named, outline.shapes), *(one for one in others if one.tensors), *encoder)


def least_memory(spec: ModelSpec, context: int, *, cache_type: CacheType = "F16") -> MemoryPlan:
    """The same with the smallest type that each matrix allows, those included that need an importance matrix if the
    model is made with one.

    Raises:
        StageError: as `predict_memory`.
    """
    outline = outline_of_text(spec.text)

    def smallest(name: str, shape: tuple[int, ...]) -> str:
        ends = "blk." not in name
        weighed = spec.imatrix and not ends  # an importance matrix holds nothing of embeddings and head
        fitting = [type for type in rounding.TYPES if weighed or type not in rounding.NEED_IMATRIX]

        def kept(type: str) -> int:
            tensor = Tensor(shape, type)
            return tensor.nbytes + (second_copy(tensor) if ends and _HEAD not in outline.shapes else 0)

        return min((_allowed(type, shape[0]) for type in fitting), key=kept)

    types = {name: smallest(name, shape) for name, shape in outline.shapes.items()}
    return predict_outline(outline, types, context, vision=spec.vision, cache_type=cache_type)


def most_memory(
    spec: ModelSpec, context: int, memory: int | None = None, *, cache_type: CacheType = "F16"
) -> MemoryPlan | None:
    """The same where types are yet to be chosen, to fill `spec.file_bytes` or the memory of a device: at most this.

    Args:
        memory: bytes of the device. None is None where no file size is given either.

    Raises:
        StageError: as `predict_memory`.
    """
    least = least_memory(spec, context, cache_type=cache_type)
    if spec.file_bytes is not None:
        limit = spec.file_bytes + largest_copy(spec.text)
    elif memory is not None:
        limit = room_in(memory) - (least.total - least.weights)
    else:
        return None
    floats = predict_memory(replace(spec, quantization="F16", tensor_types=()), context, cache_type=cache_type)
    return replace(least, weights=max(min(limit, floats.weights), least.weights), by_type={})


def room_in(memory: int) -> int:
    """Bytes that a prediction may come to where types are chosen to fill a device's memory.

    A hundredth is left free, since predictions run up to 0.7% under what is measured, and the step to which the gate
    rounds that up: the gate on the same budget shall hold after hours of work.
    """
    return memory - memory // 100 - STEP


def _allowed(type: str, row: int) -> str:
    return type if type in _INPUTS else rounding.row_type(type, row)


def _importance(outline: Outline, spec: ModelSpec, kind: str) -> Importance | None:
    if kind not in file_types():
        raise ValueError(f"unknown GGUF type {kind!r}")
    return uniform_importance(outline.shapes) if spec.imatrix or kind in NEED_IMATRIX else None


def predict_outline(
    outline: Outline,
    types: str | Mapping[str, str],
    context: int,
    *,
    vision: VisionSpec | None = None,
    cache_type: CacheType = "F16",
) -> MemoryPlan:
    """The same of a language model whose every matrix has a type of its own.

    Args:
        types: by tensor name; or "F32", "F16" or "BF16" for all.

    Raises:
        StageError: llama.cpp is missing, or does not run a model of these shapes.
    """
    tensors = text_tensors(outline, types)
    tokens = outline.shapes[_TABLE][-1]
    with tempfile.TemporaryDirectory(prefix="icet-hollow-") as name:
        model, mmproj = Path(name) / "model.gguf", Path(name) / "mmproj.gguf"
        write_hollow_model(model, outline, tensors)
        reserved = rehearse(model, context, cache_type=cache_type)
        seen = 0
        if vision is not None:
            width = outline.shapes[_TABLE][0]
            encoder = encoder_tensors(vision, width)
            first = {tensor: entry for tensor, entry in encoder.items() if _block(tensor) == 0}
            write_hollow_encoder(mmproj, vision, width, first)
            graph = rehearse_encoder(mmproj)
            seen = _encoding(encoder, graph, vision.patches + vision.has_cls, vision.image_tokens * width)
    # Byte pairs are counted: a vocabulary without them takes less.
    overhead = process_bytes(vision is not None) + _tables(tokens, tokens, _layers(outline.shapes))
    return _plan(tensors, reserved, context, seen, overhead)


def predict_files(model: Path, mmproj: Path | None, context: int, *, cache_type: CacheType = "F16") -> MemoryPlan:
    """The same of files that exist, for the image encoder's own exit.

    Raises:
        SourceError: a file is missing or damaged. StageError: llama.cpp does not load one.
    """
    header = read_model(model)
    tokens, merges = (header.fields.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "merges"))
    assert isinstance(tokens, list) and isinstance(merges, list)
    overhead = process_bytes(mmproj is not None) + _tables(len(tokens), len(merges), _layers(header.tensors))
    return _of_files(model, mmproj, context, overhead, cache_type=cache_type)


def _of_files(
    model: Path, mmproj: Path | None, context: int, overhead: int, *, cache_type: CacheType = "F16"
) -> MemoryPlan:
    header = read_model(model)
    seen = 0
    if mmproj is not None:
        vision = read_vision_header(mmproj)
        positions = vision.header.tensors["v.position_embd.weight"].shape[-1]
        with tempfile.TemporaryDirectory(prefix="icet-hollow-") as name:
            first = Path(name) / "mmproj.gguf"
            derive_exit(mmproj, 1, first)
            graph = rehearse_encoder(first)
        seen = _encoding(_tensors(vision.header), graph, positions, vision.image_tokens * vision.width)
    return _plan(_tensors(header), rehearse(model, context, cache_type=cache_type), context, seen, overhead)


def _plan(tensors: Mapping[str, Tensor], reserved: Reserved, context: int, seen: int, overhead: int) -> MemoryPlan:
    rows = min(-(-context // 256) * 256, DEFAULT_UBATCH)
    by_type: dict[str, int] = {}
    for tensor in tensors.values():
        by_type[tensor.type] = by_type.get(tensor.type, 0) + tensor.nbytes
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith("blk.")}
    return MemoryPlan(
        weights=reserved.weights + (0 if _HEAD in tensors else second_copy(tensors[_TABLE])),
        kv_cache=reserved.kv_cache,
        compute=reserved.compute + reserved.output + rows * _input_row(blocks),
        vision=seen,
        overhead=overhead,
        by_type=dict(sorted(by_type.items())),
    )


def largest_copy(text: TextSpec) -> int:
    """The most that `second_copy` comes to in any type that is chosen from; 0 where the head is a matrix of its own.

    Raises:
        StageError: as `second_copy`.
    """
    if not text.tied_embeddings:
        return 0
    shape = outline_of_text(text).shapes[_TABLE]
    types = {_allowed(type, shape[0]) for type in rounding.TYPES if type not in rounding.NEED_IMATRIX}
    return max(second_copy(Tensor(shape, type)) for type in types)


@cache
def second_copy(table: Tensor) -> int:
    """Bytes of what llama.cpp keeps beside a table that is embeddings and head at once: 0 where both read the same.

    The head's copy is rearranged for the processor. A model is asked about whose other weights are F32, which nothing
    rearranges: if it lies in a kind of memory that it does not with an F32 table, too, that is the copy.

    Raises:
        StageError: llama.cpp is missing, or does not say where weights lie.
    """
    if table.type == "F32":
        return 0
    width, tokens = table.shape
    outline = outline_of_text(TextSpec(1, width, width, 1, 1, width, tokens, tied_embeddings=True))
    with tempfile.TemporaryDirectory(prefix="icet-hollow-") as name:
        asked, floats = Path(name) / "asked.gguf", Path(name) / "floats.gguf"
        for model, type in ((asked, table.type), (floats, "F32")):
            types = {**dict.fromkeys(outline.shapes, "F32"), _TABLE: type}
            write_hollow_model(model, outline, text_tensors(outline, types))
        return table.nbytes if rehearse_buffers(asked) - rehearse_buffers(floats) else 0


def _encoding(tensors: Mapping[str, Tensor], graph: int, positions: int, numbers: int) -> int:
    """Bytes of an image encoder at work; `numbers`: in the embeddings of an image."""
    weights = sum(tensor.nbytes for tensor in tensors.values())
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith("v.blk.")}
    return weights + graph + positions * _input_row(blocks) + _EMBEDDINGS * numbers * _F32


def _input_row(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of one input of the matrix that takes the longest, rounded for it."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    return max(int(tensor.shape[0] * _INPUTS.get(tensor.type, _QUANTIZED_INPUT)) for tensor in matrices)


def _block(name: str) -> int:
    """0 for what is outside the blocks, too."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "blk" else 0


def _tensors(header: Header) -> dict[str, Tensor]:
    return {name: Tensor(tensor.shape, tensor.type) for name, tensor in header.tensors.items()}


def _tables(tokens: int, merges: int, layers: int) -> int:
    """Bytes of the vocabulary's tables and of the graphs' descriptions."""
    return tokens * _TOKEN + merges * _MERGE + (_PRETOKENIZER if merges else 0) + layers * _LAYER


def _layers(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blk.")})


@cache
def process_bytes(sees_images: bool) -> int:
    """Bytes of a process that has llama.cpp loaded and works, without what its model takes; a second, then remembered.

    Measured with a model of next to nothing; the interpreter, NumPy, program code, threads.

    Raises:
        StageError: llama.cpp is missing or does not run.
    """
    versions = [platform.python_version(), version("numpy"), version("llama-cpp-python"), str(os.cpu_count())]
    kept = cache_dir() / "probes" / f"process-{_FORMAT}-{'-'.join(versions)}-{'images' if sees_images else 'text'}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(kept.read_text(encoding="utf-8"))["bytes"])
    with tempfile.TemporaryDirectory(prefix="icet-probe-") as folder:
        model, mmproj = Path(folder) / "model.gguf", Path(folder) / "mmproj.gguf"
        write_probe_model(model)
        write_probe_encoder(mmproj)
        encoder = mmproj if sees_images else None
        found = measure_memory(model, encoder, _PROBE_CONTEXT) - _of_files(model, encoder, _PROBE_CONTEXT, 0).total
    with suppress(OSError):  # a home that cannot be written costs a second each time
        write_atomically(kept, canonical_json({"bytes": found}), kept.parent)
    return found
