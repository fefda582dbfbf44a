"""How large a GPTQ checkpoint will be, from shapes alone.

What transformers takes beside it while it answers is not predicted: it depends on the kernels that gptqmodel picks on
the machine, which unpack weights or do not, and on PyTorch's allocator. Of a GGUF see `stages.runtimes.prediction`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from stages.models.spec import ModelSpec, TextSpec, VisionSpec

_TYPE: Final = re.compile(r"gptq-(?P<bits>\d)bit(?:-(?P<group>\d+))?")
_SIZES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes
_SCALE: Final = 2  # bytes, F16
_INDEX: Final = 4  # bytes: the group of a column, I32


def gptq_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensors of the checkpoint that the stage `gptq` makes, AutoGPTQ's layout.

    Args:
        spec: its `quantization` is the stage's word, e.g. "gptq-4bit-128".

    Raises:
        ValueError: another word.
    """
    found = _TYPE.fullmatch(spec.quantization or "")
    if found is None:
        raise ValueError(f"{spec.quantization!r} is no type of a GPTQ checkpoint")
    bits = int(found["bits"])
    total = 0
    for row, rows in _matrices(spec.text):
        groups = row // int(found["group"]) if found["group"] else 1
        packed = (row + groups) * rows * bits // 8  # weights and zero points
        total += packed + groups * rows * _SCALE + row * _INDEX
    others = _others(spec.text) + (_tower(spec.vision, spec.text.hidden_size) if spec.vision is not None else 0)
    return total + others * _SIZES.get(spec.dtype, 2)


def text_parameters(text: TextSpec) -> int:
    """Weights of a language model; biases not counted."""
    return _others(text) + sum(row * rows for row, rows in _matrices(text))


def _matrices(text: TextSpec) -> Iterator[tuple[int, int]]:
    """(row length, rows) of every matrix in the blocks."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    width, inner = text.hidden_size, text.intermediate_size
    for _ in range(text.layers):
        yield from ((width, queries), (width, keys), (width, keys), (queries, width))
        yield from ((width, inner), (width, inner), (inner, width))


def _others(text: TextSpec) -> int:
    """Numbers outside these matrices; biases not counted."""
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tied_embeddings else 2)
    return embeddings + (2 * text.layers + 1) * text.hidden_size


def _tower(vision: VisionSpec, text_width: int) -> int:
    """Numbers in all blocks of the tower, in its last norm, which no mmproj of LLaVA holds, and in the projector."""
    from stages.runtimes.hollow import encoder_tensors

    if vision.parameters:
        return vision.parameters
    whole = encoder_tensors(replace(vision, default_exit=vision.layers), text_width)
    last_norm = 0 if vision.shuffle > 1 else 2 * vision.hidden_size
    return last_norm + sum(math.prod(tensor.shape) for tensor in whole.values())
