"""Which type llama.cpp gives each tensor: not computed here, but asked of the installed library.

A file type such as Q4_K_M or Q2_K is a mixture: `llama_model_quantize` looks at a tensor's name, its block, the heads
of the model, the length of its rows and whether there is an importance matrix. None of this depends on the weights or
on the number of rows. So a model of the same architecture, names and row lengths, two rows a matrix, is quantized by
the library, in milliseconds, and what is in that file is the answer for the whole one.

Notable: names and architecture come from llama.cpp's own converter, run lazily, without reading a weight.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import RecipeError, StageError
from stages.runtimes.gguf_header import Value, read_header
from stages.runtimes.imatrix import Importance, native_importance
from stages.runtimes.llamacpp_library import library, log_tail

if TYPE_CHECKING:
    import gguf

    from stages.models.spec import TextSpec

ALIASES: Final[Mapping[str, str]] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize has them
_ROWS: Final = 2  # a matrix with one row counts as a vector, which llama.cpp does not quantize
_LONGEST_BLOCK: Final = 256  # numbers that share a scale, in any type
_NOT_TYPES: Final = frozenset({"F16", "BF16", "NVFP4"})  # NVFP4: llama.cpp reads it and writes none
# File types that hold tensors which llama.cpp does not write without an importance matrix; a test asks the library.
NEED_IMATRIX: Final = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS"}
)


@dataclass(frozen=True)
class Outline:
    """What decides types: everything about a GGUF but its weights."""

    architecture: str  # llama.cpp's name, e.g. "llama"
    shapes: Mapping[str, tuple[int, ...]]  # of matrices, by GGUF name, in ggml's order: the row length comes first
    write_keys: Callable[[gguf.GGUFWriter], None]
    vectors: Mapping[str, tuple[int, ...]]  # the other tensors, which stay F32


def file_types() -> tuple[str, ...]:
    """Names of all quantized file types, mixtures or not: Q4_0, Q4_K_M, IQ3_M, ..."""
    import gguf

    names = (kind.name.partition("_")[2] for kind in gguf.LlamaFileType if kind.name.startswith("MOSTLY_"))
    return tuple(name for name in names if name not in _NOT_TYPES)


def check_file_type(name: str, *, imatrix: bool) -> None:
    """Raises:
    RecipeError: the file type needs an importance matrix, and there is none.
    """
    if name in NEED_IMATRIX and not imatrix:
        raise RecipeError(
            f"weights cannot be rounded to {name!r} without an importance matrix",
            why="llama.cpp writes no file of types this small without one",
            way_out="give one, or use Q2_K, IQ3_S or larger",
        )


def tensor_types(source: Path | Outline, file_type: str, *, importance: Importance | None = None) -> dict[str, str]:
    """The type of every matrix, by its GGUF name, in the file that `llama_model_quantize` writes.

    Args:
        source: a checkpoint (folder), a GGUF of the model in F16 or F32, or its outline.
        file_type: e.g. "Q4_K_M".
        importance: the importance matrix that it will be made with.

    Raises:
        StageError: llama.cpp knows no such model, or writes no such type without an importance matrix.
    """
    import gguf

    outline = source if isinstance(source, Outline) else outline_of(source)
    with tempfile.TemporaryDirectory() as folder:
        small, quantized = Path(folder) / "outline.gguf", Path(folder) / "quantized.gguf"
        writer = gguf.GGUFWriter(small, outline.architecture)
        outline.write_keys(writer)
        noise = np.random.default_rng(0)
        for name, (width, _, *more) in outline.shapes.items():
            shape = (*reversed(more), _ROWS, width)
            writer.add_tensor(name, noise.standard_normal(shape, dtype=np.float32).astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        lib = library()
        params = lib.llama_model_quantize_default_params()
        params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
        params.nthread = 1
        entries = None if importance is None else native_importance(lib, importance)
        if entries is not None:
            params.imatrix = entries
        if lib.llama_model_quantize(os.fsencode(small), os.fsencode(quantized), params):
            raise StageError(
                f"llama.cpp makes no {file_type} file of this model",
                where=None if isinstance(source, Outline) else str(source),
                why=log_tail(),
                way_out="choose another type, or give an importance matrix of this model if that is what is missing",
            )
        return {name: tensor.type for name, tensor in read_header(quantized).tensors.items()}


@dataclass(frozen=True)
class Fallback:
    """Matrices whose rows are too uneven for the type that the file type means for them."""

    wanted: str
    taken: str  # what llama.cpp stores instead
    rows: tuple[int, ...]  # their lengths
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        many = f"{len(self.tensors)} tensors" if len(self.tensors) > 1 else self.tensors[0]
        return f"{self.taken} instead of {self.wanted} for {many} with rows of {' or '.join(map(str, self.rows))}"


def fallbacks(source: Path | Outline, file_type: str, *, importance: Importance | None = None) -> tuple[Fallback, ...]:
    """Where llama.cpp stores another type than it would if all rows were multiples of 256; the same two files asked.

    Raises:
        StageError: as `tensor_types`.
    """
    outline = source if isinstance(source, Outline) else outline_of(source)
    even = {name: (-(-row // _LONGEST_BLOCK) * _LONGEST_BLOCK, *rest) for name, (row, *rest) in outline.shapes.items()}
    if even == outline.shapes:
        return ()
    taken = tensor_types(outline, file_type, importance=importance)
    uniform = None if importance is None else uniform_importance(even)
    wanted = tensor_types(replace(outline, shapes=even), file_type, importance=uniform)
    return differing({name: (wanted[name], taken[name]) for name in outline.shapes}, outline.shapes)


def differing(types: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Fallback, ...]:
    """Of matrices, by name, with the type wanted and the one taken: those where both differ."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kinds in types.items():
        if kinds[0] != kinds[1]:
            groups.setdefault(kinds, []).append(name)
    return tuple(
        Fallback(*kinds, tuple(sorted({shapes[name][0] for name in names})), tuple(names))
        for kinds, names in groups.items()
    )


def uniform_importance(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """An importance matrix that weighs all columns alike: which types a file gets depends only on there being one."""
    return {name: np.ones(row * math.prod(more), np.float32) for name, (row, _, *more) in shapes.items()}


def outline_of(source: Path) -> Outline:
    """The outline of a checkpoint folder or of a GGUF.

    Raises:
        StageError: llama.cpp's converter does not know the model. SourceError: no GGUF.
    """
    if source.is_dir():
        return _converted(source)
    header = read_header(source)
    shapes = header.matrices
    vectors = {name: tensor.shape for name, tensor in header.tensors.items() if name not in shapes}
    # Tokenizers are long and decide nothing here.
    keys = {key: value for key, value in header.fields.items() if not key.startswith(("tokenizer.", "general."))}

    def write(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            _write_key(writer, key, value)

    return Outline(header.architecture, shapes, write, vectors)


def outline_of_text(text: TextSpec) -> Outline:
    """What is known before there is a checkpoint: a model of these shapes whose layers are called as llama's.

    For the plan. The file itself may hold layers joined to one (Phi-3), and llama.cpp treats Falcon otherwise.
    """
    width, inner = text.hidden_size, text.intermediate_size
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    block = {
        "attn_q": (width, heads),
        "attn_k": (width, kv_heads),
        "attn_v": (width, kv_heads),
        "attn_output": (heads, width),
        "ffn_gate": (width, inner),
        "ffn_up": (width, inner),
        "ffn_down": (inner, width),
    }
    shapes = {"token_embd.weight": (width, text.vocab_size)}
    if not text.tied_embeddings:
        shapes["output.weight"] = (width, text.vocab_size)
    vectors = {"output_norm.weight": (width,)}
    for number in range(text.layers):
        shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in block.items()}
        vectors |= {f"blk.{number}.{norm}.weight": (width,) for norm in ("attn_norm", "ffn_norm")}

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(text.layers)
        writer.add_context_length(2048)
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(text.heads)
        writer.add_head_count_kv(text.kv_heads)
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(text.vocab_size)

    return Outline("llama", shapes, write, vectors)


def language_model_class(config: Mapping[str, object]) -> str:
    """The class name under which llama.cpp's converter knows the language model of a checkpoint.

    Raises:
        NotImplementedError: transformers has no language model of this type. ValueError: config.json names no class.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = str(text.get("model_type") or "llama")
        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
        if found is None:
            raise NotImplementedError(f"transformers has no causal language model for {kind!r}")
        return str(found)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ValueError("config.json names no architecture")
    return str(architectures[0])


def _converted(folder: Path) -> Outline:
    from stages.models import checkpoint

    logging.getLogger("hf-to-gguf").setLevel(logging.WARNING)
    try:
        import gguf
        import torch
        from conversion import ModelBase, get_model_class

        with torch.inference_mode(), Path(os.devnull).open("w") as sink, contextlib.redirect_stderr(sink):
            model = get_model_class(language_model_class(checkpoint.read_config(folder)), mmproj=False)(
                folder,
                gguf.LlamaFileType.MOSTLY_F16,
                Path(os.devnull),
                model_name="outline",
                hparams=ModelBase.load_hparams(folder, False),
            )
            model.prepare_tensors()
            model.set_gguf_parameters()
    except (NotImplementedError, ValueError, KeyError, TypeError, OSError, AssertionError) as error:
        raise StageError(
            "llama.cpp's converter does not know this language model",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            way_out="llama.cpp must know the model class; `supported` lists are in its documentation",
        ) from error
    writer = model.gguf_writer
    tensors = {
        name: tuple(int(size) for size in reversed(info.shape))
        for part in writer.tensors
        for name, info in part.items()
    }
    shapes = {name: shape for name, shape in tensors.items() if len(shape) > 1}
    vectors = {name: shape for name, shape in tensors.items() if name not in shapes}

    def write(target: gguf.GGUFWriter) -> None:
        for part in writer.kv_data:
            for key, item in part.items():
                if not key.startswith("general."):
                    target.add_key_value(key, item.value, item.type, item.sub_type)

    return Outline(str(writer.arch), shapes, write, vectors)


def _write_key(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
