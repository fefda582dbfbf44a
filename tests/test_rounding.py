"""What is rounded in training is what llama.cpp's quantizer writes: types, fallbacks, mixtures, importance matrix."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from artifacts.errors import RecipeError, SourceError, StageError
from stages.quantize import convert
from stages.runtimes import mixture
from stages.runtimes.gguf_header import read_header
from stages.runtimes.imatrix import Collected, native_importance, read_imatrix, write_imatrix
from stages.runtimes.llamacpp_library import library
from stages.runtimes.mixture import Outline, file_types, tensor_types
from stages.runtimes.rounding import NEED_IMATRIX, TYPES, check_type, round_weights, row_type

WIDE, DEMO, ODD = 256, 288, 80  # numbers in a row: what K types need, a multiple of 32 only, a multiple of 16 only
# libggml builds tables for these when they are first used: 9 to 19 seconds.
_slow = pytest.mark.skipif(
    "SLOW_TESTS" not in os.environ, reason="libggml needs half a minute for its tables: set SLOW_TESTS to run this"
)
_SLOW = ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M", "IQ3_XXS")  # file types; an IQ3_XXS file has IQ2_S in it


def _marked(names: Iterable[str], slow: Sequence[str]) -> list[object]:
    return [pytest.param(name, marks=_slow) if name in slow else name for name in names]


def _name(block: int, part: str) -> str:
    return f"blk.{block}.{part}.weight"


def _write_model(path: Path, *, blocks: int = 2, width: int = WIDE, inner: int = WIDE, kv_heads: int = 4) -> None:
    """A llama of random matrices, F16."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(8)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    noise = np.random.default_rng(7)
    shapes = {"token_embd.weight": (32, width)}
    for block in range(blocks):
        shapes |= {_name(block, part): (24, width) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {_name(block, "ffn_up"): (24, width), _name(block, "ffn_gate"): (24, width)}
        shapes[_name(block, "ffn_down")] = (24, inner)
    for name, shape in shapes.items():
        writer.add_tensor(name, (noise.standard_normal(shape) * 0.05).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    importance: dict[str, NDArray[np.float32]] | None = None,
    type: str | None = None,
) -> int:
    """llama.cpp's own quantizer; `type` overrides the type of every matrix in a block."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = convert.TYPES[file_type]
    params.nthread = 1
    if importance is not None:
        entries = native_importance(lib, importance)
        params.imatrix = entries
    if type is not None:
        overrides = (lib.llama_model_tensor_override * 2)()
        overrides[0].pattern, overrides[0].type = b"^blk", int(gguf.GGMLQuantizationType[type])
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(lib.llama_model_tensor_override))
    return int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


def _values(path: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Type and dequantized value of every tensor, by name; dequantized by gguf, not by libggml."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "f16.gguf"
    _write_model(path)
    return path


@pytest.fixture(scope="module")
def demo_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 288 numbers, and of 80 in ffn_down."""
    path = tmp_path_factory.mktemp("demo") / "f16.gguf"
    _write_model(path, width=DEMO, inner=ODD)
    return path


@pytest.fixture(scope="module")
def importance(wide: Path) -> dict[str, NDArray[np.float32]]:
    noise = np.random.default_rng(3)
    return {
        name: noise.gamma(0.5, size=tensor.shape[0]).astype(np.float32) + 1e-3
        for name, tensor in read_header(wide).tensors.items()
        if name.startswith("blk.")
    }


_UNWEIGHED = ("Q8_0", "MXFP4", "TQ2_0", "TQ1_0")  # libggml has nothing to choose there


@pytest.mark.parametrize("type", _marked(TYPES, ("IQ1_S", "IQ1_M", "IQ2_S")))
def test_every_type_is_rounded_to_the_bit_with_an_importance_matrix(
    wide: Path, importance: dict[str, NDArray[np.float32]], tmp_path: Path, type: str
) -> None:
    weights = _values(wide)
    assert _quantize(wide, tmp_path / "q.gguf", "Q4_K_M", importance=importance, type=type) == 0
    compared = 0
    for name, (stored_as, value) in _values(tmp_path / "q.gguf").items():
        if name not in importance:
            continue
        assert stored_as == type
        assert np.array_equal(round_weights(weights[name][1], type, importance[name]), value), name
        if type not in (*NEED_IMATRIX, *_UNWEIGHED):
            assert not np.array_equal(round_weights(weights[name][1], type), value)
        compared += 1
    assert compared == 14


@pytest.mark.parametrize("type", [type for type in TYPES if type not in NEED_IMATRIX])
@pytest.mark.parametrize("model", ["wide", "demo_shaped"])
def test_every_type_and_its_replacement_are_rounded_to_the_bit(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, type: str
) -> None:
    source: Path = request.getfixturevalue(model)
    weights = _values(source)
    assert _quantize(source, tmp_path / "q.gguf", "Q4_K_M", type=type) == 0
    for name, (stored_as, value) in _values(tmp_path / "q.gguf").items():
        if not name.startswith("blk"):
            continue
        assert stored_as == row_type(type, value.shape[1]), name
        assert np.array_equal(round_weights(weights[name][1], type), value), name


@pytest.mark.parametrize("type", sorted(NEED_IMATRIX))
def test_types_that_need_an_importance_matrix_fall_back_as_in_the_file(
    demo_shaped: Path, tmp_path: Path, type: str
) -> None:
    assert _quantize(demo_shaped, tmp_path / "q.gguf", "Q4_K_M", type=type) == 0
    for name, (stored_as, value) in _values(tmp_path / "q.gguf").items():
        assert not name.startswith("blk") or stored_as == row_type(type, value.shape[1]), name


@pytest.mark.parametrize("type", sorted(NEED_IMATRIX))
def test_a_type_that_needs_an_importance_matrix_is_refused_without_one(wide: Path, tmp_path: Path, type: str) -> None:
    assert _quantize(wide, tmp_path / "q.gguf", "Q4_K_M", type=type) != 0  # llama.cpp says the same
    check_type(type, imatrix=True)
    with pytest.raises(RecipeError, match="importance matrix"):
        check_type(type)
    with pytest.raises(StageError, match="importance matrix"):
        round_weights(np.ones((1, 256), np.float32), type)


def test_importance_of_another_width_is_refused() -> None:
    with pytest.raises(StageError, match="64 columns for rows of 256"):
        round_weights(np.ones((1, 256), np.float32), "Q4_K", np.ones(64, np.float32))


def _types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("file_type", file_types())
def test_the_library_is_asked_for_the_same_types_that_it_writes(wide: Path, tmp_path: Path, file_type: str) -> None:
    needed = _quantize(wide, tmp_path / "q.gguf", file_type) != 0
    assert needed == (file_type in mixture.NEED_IMATRIX)
    if needed:
        with pytest.raises(StageError, match="makes no"):
            tensor_types(wide, file_type)
    else:
        assert tensor_types(wide, file_type) == _types(tmp_path / "q.gguf")


@pytest.mark.parametrize("file_type", _marked(file_types(), _SLOW))
def test_with_an_importance_matrix_types_are_those_of_the_file_too(
    wide: Path, importance: dict[str, NDArray[np.float32]], tmp_path: Path, file_type: str
) -> None:
    assert _quantize(wide, tmp_path / "q.gguf", file_type, importance=importance) == 0
    assert tensor_types(wide, file_type, importance=importance) == _types(tmp_path / "q.gguf")


def test_file_types_are_those_of_the_gguf_stage() -> None:
    assert {name for name in convert.TYPES if name not in ("F32", "F16", "BF16")} == set(file_types())


def test_a_mixture_depends_on_blocks_heads_rows_and_importance(tmp_path: Path) -> None:
    def types(file_type: str, block: int, part: str, **shape: int) -> str:
        _write_model(tmp_path / "model.gguf", **shape)
        return tensor_types(tmp_path / "model.gguf", file_type)[_name(block, part)]

    # By hand, from llama-quant.cpp: the first eighth, the last eighth and every third block between get more bits.
    assert [types("Q4_K_M", block, "ffn_down", blocks=8) for block in range(8)] == [
        *("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K")
    ]
    assert types("Q2_K", 0, "attn_v") == "Q3_K"
    assert types("Q2_K", 0, "attn_v", kv_heads=2) == "Q4_K"
    assert types("Q2_K", 0, "attn_q", width=DEMO) == "Q4_0"
    assert types("Q2_K", 0, "ffn_down", inner=ODD) == "F16"


def test_an_outline_needs_no_weights(wide: Path) -> None:
    found = mixture.outline_of(wide)
    huge = Outline("llama", {name: (width, 10**9) for name, (width, _) in found.shapes.items()}, found.write_keys, {})
    assert tensor_types(huge, "Q4_K_M") == tensor_types(wide, "Q4_K_M")


def test_an_architecture_that_llama_cpp_does_not_know_is_refused(wide: Path) -> None:
    with pytest.raises(StageError, match="makes no Q4_0 file"):
        tensor_types(Outline("no-such-model", mixture.outline_of(wide).shapes, lambda writer: None, {}), "Q4_0")


def test_an_importance_matrix_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    dense = Collected(np.array([[2, 4, 6]], np.float32), np.array([2], np.float32))
    experts = Collected(np.array([[8, 4], [5, 5]], np.float32), np.array([4, 0], np.float32))
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {"a.weight": dense, "b.weight": experts}, datasets=["by hand"], chunks=3, chunk_size=512)
    found = read_imatrix(path)
    assert found["a.weight"].tolist() == [1, 2, 3]
    assert found["b.weight"].tolist() == [2, 1, 1, 1]  # an expert that was never asked weighs its columns alike
    fields = gguf.GGUFReader(path).fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.datasets"].contents() == ["by hand"]
    assert fields["imatrix.chunk_count"].contents() == 3 and fields["imatrix.chunk_size"].contents() == 512
    assert "general.architecture" not in fields
    assert {tensor.name for tensor in gguf.GGUFReader(path).tensors} == {
        *("a.weight.in_sum2", "a.weight.counts", "b.weight.in_sum2", "b.weight.counts")
    }


def test_a_model_is_not_taken_for_an_importance_matrix(wide: Path) -> None:
    with pytest.raises(SourceError, match="not an importance matrix"):
        read_imatrix(wide)


@pytest.mark.parametrize(("sums", "counts"), [([[np.nan, 1]], b"a.weight.counts"), ([[2, 1]], b"a.weight.COUNTS")])
def test_a_damaged_importance_matrix_is_refused(tmp_path: Path, sums: list[list[float]], counts: bytes) -> None:
    path = tmp_path / "imatrix.gguf"
    entry = Collected(np.array(sums, np.float32), np.array([1], np.float32))
    write_imatrix(path, {"a.weight": entry}, datasets=["none"], chunks=1, chunk_size=1)
    path.write_bytes(path.read_bytes().replace(b"a.weight.counts", counts))
    with pytest.raises(SourceError, match=r"damaged at a\.weight"):
        read_imatrix(path)
