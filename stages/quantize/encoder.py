"""mmproj.gguf in any type: written in floats, by us or by llama.cpp's converter, and quantized by llama.cpp.

The patch embedding stays as it is, positions, norms and biases stay F32 (llama-quant.cpp, tensor_allows_quantization).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from stages.models.spec import ModelSpec
from stages.quantize.convert import convert_image_encoder, quantize_model
from stages.quantize.mmproj import FloatType, write_mmproj
from stages.runtimes.gguf_header import ClsOrder, read_header
from stages.runtimes.hollow import quantized_in_encoder
from stages.runtimes.mixture import ALIASES, Fallback, differing

MmprojType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"
]


def write_encoder(
    checkpoint: Path,
    target: Path,
    spec: ModelSpec,
    *,
    scratch: Path,
    type: MmprojType,
    name: str,
    metadata: Mapping[str, object] = MappingProxyType({}),
    cls: ClsOrder | None,
) -> tuple[Fallback, ...]:
    """Write the image encoder of a checkpoint up to its default exit; the file appears whole or not at all.

    Args:
        name, metadata, cls: as `write_mmproj` takes them.

    Returns:
        Where rows did not allow the type.

    Raises:
        StageError: llama.cpp has no such encoder, or tensors are missing.
    """
    vision = spec.vision
    assert vision is not None
    floats: FloatType = "F32" if type in ("F32", "BF16") else "F16"
    written = target if type == floats else scratch / f"mmproj-{floats.lower()}.gguf"
    scratch.mkdir(parents=True, exist_ok=True)
    if spec.family == "idefics3":
        convert_image_encoder(checkpoint, written, scratch, type=floats, name=name, metadata=metadata)
    else:
        exit = vision.default_exit
        write_mmproj(checkpoint, written, vision, exit, name=name, metadata=metadata, type=floats, cls=cls)
    if written == target:
        return ()
    quantize_model(written, target, ALIASES.get(type, type), pure=True)
    written.unlink()
    held = read_header(target).tensors
    shapes = {tensor: info.shape for tensor, info in held.items() if quantized_in_encoder(tensor, info.shape)}
    return differing({tensor: (type, held[tensor].type) for tensor in shapes}, shapes)
