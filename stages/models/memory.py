"""How much memory a GGUF will need, from shapes alone (before any work) or from the real files (afterwards).

No torch, no llama.cpp: `pipeline plan` must answer at once. What is predicted is one conversation in llama.cpp on a
CPU: weights read into memory, F16 keys and values for the whole context, 512 tokens computed at once, one image seen.
`stages.runtimes.memory.measure_memory` measures the same; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from stages.models.spec import ModelSpec, TextSpec, VisionSpec

_UBATCH: Final = 512  # tokens computed at once
_KV_STEP: Final = 256  # llama.cpp rounds a context up to this
_F16: Final = 2  # bytes
_F32: Final = 4  # bytes

# Bits per weight with block scales: ggml's block bytes * 8 / block length.
_BITS: Final[Mapping[str, float]] = {
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "Q8_0": 8.5,
    "Q5_1": 6,
    "Q5_0": 5.5,
    "Q4_1": 5,
    "Q4_0": 4.5,
    "Q6_K": 6.5625,
    "Q5_K": 5.5,
    "Q4_K": 4.5,
    "Q3_K": 3.4375,
    "Q2_K": 2.625,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "IQ3_S": 3.4375,
    "IQ3_XXS": 3.0625,
    "IQ2_S": 2.5625,
    "IQ2_XS": 2.3125,
    "IQ2_XXS": 2.0625,
    "IQ1_M": 1.75,
    "IQ1_S": 1.5625,
    "TQ2_0": 2.0625,
    "TQ1_0": 1.6875,
    "Q2_0": 2.25,
    "Q1_0": 1.125,
}
# Types that need rows divisible by 256 and what llama.cpp takes instead (llama-quant.cpp, tensor_type_fallback).
_FALLBACK: Final[Mapping[str, str]] = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "IQ4_NL",
    "Q2_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ1_S": "IQ4_NL",
    "TQ2_0": "Q4_0",
    "TQ1_0": "Q4_0",
}
_LONG_ROW: Final = 256
# Mixtures: the type of most tensors, and of the half of attn_v and ffn_down that `use_more_bits` picks.
_MIXTURES: Final[Mapping[str, tuple[str, str]]] = {
    "Q2_K": ("Q2_K", "Q3_K"),
    "Q2_K_S": ("Q2_K", "Q2_K"),
    "Q3_K_S": ("Q3_K", "Q3_K"),
    "Q3_K_M": ("Q3_K", "Q4_K"),
    "Q3_K_L": ("Q3_K", "Q5_K"),
    "Q4_K_S": ("Q4_K", "Q4_K"),
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q5_K_S": ("Q5_K", "Q5_K"),
    "Q5_K_M": ("Q5_K", "Q6_K"),
    "IQ3_XS": ("IQ3_S", "IQ3_S"),
    "IQ3_M": ("IQ3_S", "Q4_K"),
    "IQ2_M": ("IQ2_S", "IQ3_S"),
}

# Measured with a model of 0.1 M parameters: interpreter, NumPy and llama.cpp's libraries; Pillow and mtmd for images.
_PROCESS: Final = 46 * 2**20
_VISION_LIBRARIES: Final = 10 * 2**20
_PER_TOKEN_OF_VOCABULARY: Final = 300  # bytes: piece, hash tables, merges


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by what they are for."""

    weights: int  # of the language model
    kv_cache: int
    compute: int  # activations of one batch of the language model, logits, vocabulary
    vision: int  # image encoder: weights and activations; 0 without one
    overhead: int  # the process itself

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute + self.vision + self.overhead


def predict_memory(
    spec: ModelSpec,
    type: str | None,
    context: int,
    file_sizes: tuple[int, int] | None = None,
    mmproj_type: str = "F16",
) -> MemoryPlan:
    """The memory of one conversation of `context` tokens.

    Args:
        type: a llama.cpp type name; None: the checkpoint's own dtype.
        file_sizes: (model bytes, mmproj bytes) of the real files, 0 where there is none; None: predicted from shapes.
        mmproj_type: F16, F32 or Q8_0.

    Raises:
        ValueError: an unknown type.
    """
    kind = (type or {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(spec.dtype, "F16")).upper()
    text, vision = spec.text, spec.vision
    weights = file_sizes[0] if file_sizes else text_bytes(text, kind)
    cells = -(-context // _KV_STEP) * _KV_STEP
    kv_cache = text.layers * cells * 2 * text.kv_heads * text.head_dim * _F16
    rows = min(cells, _UBATCH)
    # Alive at once in a block: gate, up and their product beside the residual stream, its norm and the attention.
    activations = rows * (3 * text.intermediate_size + 4 * text.hidden_size) * _F32
    mask = rows * cells * _F32
    compute = activations + mask + text.vocab_size * (_PER_TOKEN_OF_VOCABULARY + 2 * _F32)
    overhead = _PROCESS
    seen = 0
    if vision is not None and (file_sizes is None or file_sizes[1]):
        seen = (file_sizes[1] if file_sizes else vision_bytes(vision, text.hidden_size, mmproj_type)) + _encoding(
            vision
        )
        overhead += _VISION_LIBRARIES
    return MemoryPlan(weights=weights, kv_cache=kv_cache, compute=compute, vision=seen, overhead=overhead)


def text_bytes(text: TextSpec, type: str) -> int:
    """Bytes of the language model's tensors in that llama.cpp type.

    Raises:
        ValueError: an unknown type.
    """
    main, better = _MIXTURES.get(type, (type, type))
    if main not in _BITS:
        raise ValueError(f"unknown GGUF type {type!r}")
    floats = main in ("F32", "F16", "BF16")
    bits = 0.0
    for name, rows, width, block in _matrices(text):
        kind = better if name in ("attn_v", "ffn_down") and _more_bits(block, text.layers) else main
        bits += rows * width * _bits(kind, width)
    # llama.cpp gives the output matrix, which is the embedding where they are tied, at least Q6_K.
    output = main if floats or main == "Q8_0" else "Q6_K"
    bits += text.vocab_size * text.hidden_size * _bits(output, text.hidden_size)
    if not text.tied_embeddings:
        bits += text.vocab_size * text.hidden_size * _bits(main, text.hidden_size)
    norms = (2 * text.layers + 1) * text.hidden_size * _F32
    return int(bits / 8) + norms


def vision_bytes(vision: VisionSpec, text_width: int, type: str = "F16") -> int:
    """Bytes of an mmproj that holds the blocks up to the default exit.

    Raises:
        ValueError: an unknown type.
    """
    if type not in _BITS:
        raise ValueError(f"unknown mmproj type {type!r}")
    width, middle, hidden = vision.hidden_size, vision.intermediate_size, vision.projector_hidden or text_width
    # The patch embedding has four dimensions and is not quantized.
    patch = 3 * vision.patch_size**2 * width * (_F32 if type == "F32" else _F16)
    projector = width * hidden + hidden * text_width
    if vision.shuffle > 1:
        projector = vision.shuffle**2 * width * text_width
    matrices = vision.default_exit * (4 * width * width + 2 * width * middle) + projector
    vectors = vision.default_exit * (9 * width + middle) + vision.patches * width + width + hidden + text_width
    return patch + int(matrices * _BITS[type] / 8) + vectors * _F32


def _encoding(vision: VisionSpec) -> int:
    """Activations of one pass of the encoder, attention scores included."""
    tokens = vision.patches
    return _F32 * (tokens * (2 * vision.intermediate_size + 6 * vision.hidden_size) + vision.heads * tokens**2)


def _matrices(text: TextSpec) -> Iterator[tuple[str, int, int, int]]:
    """(name, rows, row length, block) of every matrix in the blocks."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    for block in range(text.layers):
        yield "attn_q", queries, text.hidden_size, block
        yield "attn_k", keys, text.hidden_size, block
        yield "attn_v", keys, text.hidden_size, block
        yield "attn_output", text.hidden_size, queries, block
        yield "ffn_gate", text.intermediate_size, text.hidden_size, block
        yield "ffn_up", text.intermediate_size, text.hidden_size, block
        yield "ffn_down", text.hidden_size, text.intermediate_size, block


def _more_bits(block: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third block between."""
    eighth = layers // 8
    return block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2


def _bits(kind: str, width: int) -> float:
    if width % _LONG_ROW and kind in _FALLBACK:
        kind = _FALLBACK[kind]
    return _BITS[kind] if width % 32 == 0 or kind in ("F32", "BF16") else _BITS["F16"]
