"""GGUF files without weights: whole headers, and a hole where the tensors would lie, which takes no disk.

So llama.cpp can be asked about a model before there is one: which buffers it would need (`rehearsal`), and, since a
hole reads as zeros, what a process takes that runs a model of these shapes (`benchmarks/memory_plan.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.models.spec import VisionSpec
from stages.runtimes.mixture import Fallback, Outline, differing
from stages.runtimes.rounding import row_type

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `shape` is in ggml's order: the row length comes first."""

    shape: tuple[int, ...]
    type: str  # "F32", "Q4_0", ...

    @property
    def nbytes(self) -> int:
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // int(block) * int(block_bytes)


def text_tensors(outline: Outline, types: str | Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor of a language model.

    Args:
        types: of the matrices, by name, as `mixture.tensor_types` gives them; or "F32", "F16" or "BF16" for all.
    """
    found = {name: Tensor(shape, "F32") for name, shape in outline.vectors.items()}
    for name, shape in outline.shapes.items():
        found[name] = Tensor(shape, types if isinstance(types, str) else types[name])
    return found


def encoder_tensors(vision: VisionSpec, text_width: int) -> dict[str, Tensor]:
    """Every tensor of the mmproj that holds the blocks up to the default exit; matrices whose rows the type does not
    divide have the one that llama.cpp takes instead."""
    type = vision.quantization
    width, middle = vision.hidden_size, vision.intermediate_size
    positions = vision.patches + vision.has_cls
    found = {
        "v.patch_embd.weight": Tensor((vision.patch_size, vision.patch_size, 3, width), _patch_type(vision, type)),
        "v.position_embd.weight": Tensor((width, positions), "F32"),
    }
    vectors: dict[str, int] = {}
    matrices: dict[str, tuple[int, int]] = {}  # (row length, rows)
    if vision.has_cls:
        vectors |= {"v.class_embd": width, "v.pre_ln.weight": width, "v.pre_ln.bias": width}
    else:
        vectors["v.patch_embd.bias"] = width
    for block in range(vision.default_exit):
        for norm in ("ln1", "ln2"):
            vectors |= {f"v.blk.{block}.{norm}.{kind}": width for kind in ("weight", "bias")}
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            matrices[f"v.blk.{block}.{part}"] = (width, width)
        matrices |= {f"v.blk.{block}.ffn_up": (width, middle), f"v.blk.{block}.ffn_down": (middle, width)}
    vectors |= {f"{name}.bias": rows for name, (_, rows) in matrices.items()}
    if vision.shuffle > 1:
        vectors |= {"v.post_ln.weight": width, "v.post_ln.bias": width}
        matrices["mm.model.fc"] = (width * vision.shuffle**2, text_width)
    else:
        hidden = vision.projector_hidden or text_width
        matrices |= {"mm.0": (width, hidden), "mm.2": (hidden, text_width)}
        vectors |= {"mm.0.bias": hidden, "mm.2.bias": text_width}
        if vision.tiles > 1:
            vectors["v.image_newline"] = text_width
    found |= {name: Tensor((rows,), "F32") for name, rows in vectors.items()}
    return found | {f"{name}.weight": Tensor(shape, row_type(type, shape[0])) for name, shape in matrices.items()}


def encoder_fallbacks(vision: VisionSpec, text_width: int) -> tuple[Fallback, ...]:
    """Where rows of the mmproj do not allow its type."""
    tensors = encoder_tensors(vision, text_width)
    matrices = {name: tensor.shape for name, tensor in tensors.items() if quantized_in_encoder(name, tensor.shape)}
    return differing({name: (vision.quantization, tensors[name].type) for name in matrices}, matrices)


def quantized_in_encoder(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp gives a tensor of an mmproj the type that the file is to have (llama-quant.cpp,
    tensor_allows_quantization); the patch embedding, positions, norms and biases stay floats."""
    return len(shape) == 2 and name != "v.position_embd.weight"


def write_hollow_model(
    target: Path,
    outline: Outline,
    tensors: Mapping[str, Tensor],
    write_vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write a language model without weights.

    Args:
        write_vocabulary: adds the tokenizer's keys; default: a vocabulary of the right size without words in it.
    """
    import gguf

    writer = gguf.GGUFWriter(target, outline.architecture)
    outline.write_keys(writer)
    if write_vocabulary is not None:
        write_vocabulary(writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    size = gguf.Keys.LLM.VOCAB_SIZE.format(arch=outline.architecture)
    if size not in writer.kv_data[0]:
        writer.add_vocab_size(outline.shapes["token_embd.weight"][-1])
    write_hollow(writer, target, tensors)


def write_hollow_encoder(target: Path, vision: VisionSpec, text_width: int, tensors: Mapping[str, Tensor]) -> None:
    """Write an image encoder without weights, of as many blocks as there are among the tensors."""
    import gguf

    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("v.blk."))
    writer = gguf.GGUFWriter(target, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for key, value in (
        ("image_size", vision.image_size),
        ("patch_size", vision.patch_size),
        ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size),
        ("projection_dim", text_width),
        ("block_count", blocks),
        ("attention.head_count", vision.heads),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    if vision.shuffle > 1:
        writer.add_string("clip.projector_type", "idefics3")
        writer.add_uint32("clip.vision.projector.scale_factor", vision.shuffle)
        writer.add_uint32("clip.vision.preproc_image_size", vision.image_size)
    else:
        writer.add_string("clip.projector_type", "mlp")
        writer.add_array("clip.vision.feature_layer", [blocks])
    write_hollow(writer, target, tensors)


def write_hollow(writer: gguf.GGUFWriter, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what the writer holds, and these tensors as a hole."""
    import gguf

    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    pad = writer.ggml_pad
    alignment = writer.data_alignment
    size = sum(pad(tensor.nbytes, alignment) for tensor in tensors.values())
    with target.open("r+b") as handle:
        handle.truncate(pad(target.stat().st_size, alignment) + size)


def _patch_type(vision: VisionSpec, type: str) -> str:
    """It has four dimensions and is not quantized; llama.cpp's converter, which writes Idefics3's, leaves it F32. BF16
    is made of F32."""
    return "F32" if type in ("F32", "BF16") or vision.shuffle > 1 else "F16"
