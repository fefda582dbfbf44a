"""Predicted and measured memory of a GGUF, and the size of a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import StageError
from stages.models.checkpoint import read_config
from stages.models.family import family_of
from stages.models.memory import gptq_bytes
from stages.models.smol_llava import smol_llava_spec
from stages.models.spec import ModelSpec, TextSpec
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model, quantize_model
from stages.quantize.encoder import MmprojType, write_encoder
from stages.quantize.mmproj import write_mmproj
from stages.runtimes.gguf_header import read_header
from stages.runtimes.hollow import Tensor, encoder_tensors, text_tensors, write_hollow_model
from stages.runtimes.llamacpp_library import CacheType
from stages.runtimes.memory import measure_memory
from stages.runtimes.mixture import NEED_IMATRIX, file_types, outline_of, outline_of_text, tensor_types
from stages.runtimes.prediction import (
    least_memory,
    planned_fallbacks,
    planned_types,
    predict_files,
    predict_memory,
    predict_outline,
    second_copy,
)


@pytest.fixture(scope="module")
def files(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    vision = tiny_llava_spec().vision
    assert vision is not None
    convert_language_model(tiny_llava, folder / "f16.gguf", folder / "scratch", name="t", metadata={})
    write_mmproj(tiny_llava, folder / "mmproj.gguf", vision, 2, name="t")
    return folder


def of_type(spec: ModelSpec, type: str) -> ModelSpec:
    return replace(spec, quantization=type)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K"])
def test_every_byte_of_the_weights_is_known_from_shapes(files: Path, tmp_path: Path, type: str) -> None:
    path = tmp_path / "model.gguf"
    quantize_model(files / "f16.gguf", path, type)
    stored: dict[str, int] = {}
    for tensor in read_header(path).tensors.values():
        stored[tensor.type] = stored.get(tensor.type, 0) + tensor.nbytes
    plan = predict_memory(of_type(tiny_llava_spec(), type), 512)
    assert plan.by_type == stored
    assert plan.weights >= sum(stored.values())


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 9),
    widths=st.tuples(st.sampled_from([96, 256, 320]), st.sampled_from([160, 512])),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    kind=st.sampled_from(sorted(set(file_types()) - NEED_IMATRIX)),
)
def test_what_llama_cpp_writes_of_any_shape_is_what_was_planned(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    widths: tuple[int, int],
    kv_heads: int,
    tied: bool,
    kind: str,
) -> None:
    width, inner = widths
    text = TextSpec(layers, width, inner, 4, kv_heads, width // 4, 64, tied)
    folder = tmp_path_factory.mktemp("planned")
    outline = outline_of_text(text)
    write_hollow_model(folder / "f16.gguf", outline, text_tensors(outline, "F16"))  # zeros are weights, too
    try:
        quantize_model(folder / "f16.gguf", folder / "model.gguf", kind)
    except StageError:  # Q1_0 has no fallback where a row is no multiple of 128: the plan says so, too
        with pytest.raises(StageError, match=f"makes no {kind} file"):
            planned_types(ModelSpec("llama", text, quantization=kind))
        return
    written = read_header(folder / "model.gguf").tensors
    planned = text_tensors(outline, planned_types(ModelSpec("llama", text, quantization=kind)))
    assert {name: (tensor.shape, tensor.type, tensor.nbytes) for name, tensor in planned.items()} == {
        name: (tensor.shape, tensor.type, tensor.nbytes) for name, tensor in written.items()
    }


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
@pytest.mark.parametrize("type", get_args(MmprojType))
def test_every_byte_of_an_image_encoder_is_known_from_shapes_and_what_they_do_not_allow_is_named(
    tiny_llava: Path, tiny_family: Callable[[str], Path], tmp_path: Path, kind: str, type: MmprojType
) -> None:
    folder = tiny_llava if kind == "llava" else tiny_family(kind)
    config = read_config(folder)
    spec = family_of(config).spec(config)
    assert spec.vision is not None
    spec = replace(spec, quantization="F16", vision=replace(spec.vision, quantization=type))
    path = tmp_path / "mmproj.gguf"
    told = write_encoder(folder, path, spec, scratch=tmp_path / "s", type=type, name="t", cls=None)
    planned = encoder_tensors(spec.vision, spec.text.hidden_size)  # type: ignore[arg-type]
    assert {name: (tensor.type, tensor.nbytes) for name, tensor in planned.items()} == {
        name: (tensor.type, tensor.nbytes) for name, tensor in read_header(path).tensors.items()
    }
    assert sorted(map(str, told)) == sorted(map(str, planned_fallbacks(spec)))
    assert bool(told) == (type in ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS"))  # rows of 64, 96, 128


def test_a_plan_made_of_shapes_is_the_plan_of_the_files(files: Path) -> None:
    before = predict_memory(of_type(tiny_llava_spec(), "F16"), 512)
    after = predict_files(files / "f16.gguf", files / "mmproj.gguf", 512)
    assert before.by_type == after.by_type
    for part in ("weights", "kv_cache", "compute", "vision"):
        assert getattr(before, part) == pytest.approx(getattr(after, part), rel=0.01)
    assert before.total == pytest.approx(after.total, rel=0.05)  # the vocabulary is not known before


def test_a_fresh_process_shows_what_was_predicted(files: Path) -> None:
    model, mmproj = files / "f16.gguf", files / "mmproj.gguf"
    with_image, without = measure_memory(model, mmproj, 512), measure_memory(model, None, 512)
    assert predict_files(model, mmproj, 512).total == pytest.approx(with_image, rel=0.04)
    assert predict_files(model, None, 512).total == pytest.approx(without, rel=0.04)
    assert without < with_image


def test_keys_and_values_in_q8_0_take_what_is_predicted(tmp_path: Path) -> None:
    text = TextSpec(4, 512, 512, 8, 8, 64, 1000, tied_embeddings=True)
    outline, model = outline_of_text(text), tmp_path / "model.gguf"
    write_hollow_model(
        model, outline, text_tensors(outline, planned_types(ModelSpec("llama", text, quantization="Q8_0")))
    )
    kinds: tuple[CacheType, ...] = ("F16", "Q8_0")
    whole, small = (predict_files(model, None, 2048, cache_type=kind) for kind in kinds)
    assert whole.kv_cache == 2 * 4 * 2048 * 512 * 2 and small.kv_cache == whole.kv_cache * 34 // 64
    measured = [measure_memory(model, None, 2048, cache_type=kind) for kind in kinds]
    assert measured[0] - measured[1] == pytest.approx(whole.total - small.total, rel=0.15)


def test_what_the_weights_add_to_a_process_is_predicted(files: Path, tmp_path: Path) -> None:
    # Most of a tiny model's figure is the interpreter; here are 90 MB of weights, 24 MB of keys and values.
    text = TextSpec(6, 512, 2048, 8, 8, 64, 32000, tied_embeddings=False)
    outline = outline_of_text(text)
    path = tmp_path / "model.gguf"
    tensors = text_tensors(outline, planned_types(ModelSpec("llama", text, quantization="Q8_0")))
    write_hollow_model(path, outline, tensors)
    predicted = predict_files(path, None, 1024).total - predict_files(files / "f16.gguf", None, 512).total
    measured = measure_memory(path, None, 1024) - measure_memory(files / "f16.gguf", None, 512)
    assert predicted == pytest.approx(measured, rel=0.02)


def test_keys_and_values_take_half_as_much_in_8_bits() -> None:
    spec = of_type(smol_llava_spec(), "Q4_0")
    f16, q8 = (predict_memory(spec, 2048, cache_type=kind).kv_cache for kind in ("F16", "Q8_0"))
    assert f16 == 30 * 2048 * 2 * 3 * 64 * 2  # layers, tokens, keys and values, heads, width, bytes
    assert q8 == pytest.approx(f16 * 34 / 64, rel=0.001)


def test_tied_embeddings_that_llama_cpp_keeps_twice_count_twice(tmp_path: Path) -> None:
    # The table is read row by row from one copy; the head multiplies with another, rearranged for the processor.
    outline = outline_of_text(TextSpec(1, 1024, 256, 4, 4, 64, 32000, tied_embeddings=True))
    predicted, measured = [], []
    for kind in ("Q8_0", "Q4_0"):
        types, path = dict.fromkeys(outline.shapes, kind), tmp_path / f"{kind}.gguf"
        write_hollow_model(path, outline, text_tensors(outline, types))
        plan = predict_files(path, None, 256)
        assert plan.weights - sum(plan.by_type.values()) == second_copy(Tensor((1024, 32000), kind))
        predicted.append(plan.total)
        measured.append(measure_memory(path, None, 256))
    assert second_copy(Tensor((1024, 32000), "Q4_0")) in (0, 1024 * 32000 // 32 * 18)  # a processor may have no such
    assert predicted[1] - predicted[0] == pytest.approx(measured[1] - measured[0], abs=1e6)  # layout; a copy is 18 MB


def test_the_type_that_a_shape_does_not_allow_is_named_with_what_is_stored_instead() -> None:
    found = planned_fallbacks(of_type(smol_llava_spec(), "Q4_K_M"))
    assert [(one.wanted, one.taken, one.rows) for one in found] == [("Q6_K", "Q8_0", (576,)), ("Q4_K", "Q5_0", (576,))]
    assert "token_embd.weight" in found[0].tensors
    assert str(found[1]) == f"Q5_0 instead of Q4_K for {len(found[1].tensors)} tensors with rows of 576"
    assert planned_fallbacks(of_type(smol_llava_spec(), "Q4_0")) != ()  # the head would be Q6_K
    assert planned_fallbacks(of_type(smol_llava_spec(), "Q8_0")) == ()
    assert planned_fallbacks(of_type(smol_llava_spec(), "F16")) == ()


def test_types_of_single_tensors_are_planned_and_what_their_rows_do_not_allow_is_named(
    files: Path, tmp_path: Path
) -> None:
    single = (("blk.0.ffn_down.weight", "Q8_0"), ("blk.1.attn_q.weight", "Q6_K"))  # rows of 128, and of 64
    spec = replace(of_type(tiny_llava_spec(), "Q4_0"), tensor_types=single)
    quantize_model(
        files / "f16.gguf",
        tmp_path / "m.gguf",
        "Q4_0",
        tensors={"blk.0.ffn_down.weight": "Q8_0", "blk.1.attn_q.weight": "Q8_0"},
    )
    written = read_header(tmp_path / "m.gguf").tensors
    assert planned_types(spec) == {name: tensor.type for name, tensor in written.items() if len(tensor.shape) > 1}
    assert str(planned_fallbacks(spec)[0]) == "Q8_0 instead of Q6_K for blk.1.attn_q.weight with rows of 64"


def test_the_least_that_a_model_takes_is_no_more_than_with_any_type_and_less_with_an_importance_matrix() -> None:
    spec = ModelSpec("llama", TextSpec(2, 256, 512, 4, 4, 64, 512, tied_embeddings=False))
    least = least_memory(spec, 512)
    assert least_memory(replace(spec, imatrix=True), 512).weights < least.weights
    assert all(least.weights <= predict_memory(of_type(spec, kind), 512).weights for kind in ("Q2_K", "IQ3_S", "Q4_0"))


def test_the_least_of_a_tied_model_counts_the_copy_of_its_table() -> None:
    text = TextSpec(1, 576, 96, 9, 3, 64, 16000, tied_embeddings=True)
    outline, least = outline_of_text(text), least_memory(ModelSpec("llama", text), 256)
    for table in ("MXFP4", "Q4_0", "Q4_1", "Q5_0", "Q8_0"):
        types = {**dict.fromkeys(outline.shapes, "MXFP4"), "token_embd.weight": table}
        assert least.weights <= predict_outline(outline, types, 256).weights


def test_a_type_that_needs_an_importance_matrix_is_planned_as_if_there_were_one() -> None:
    spec = of_type(smol_llava_spec(), "IQ2_XS")
    assert predict_memory(spec, 512).weights < predict_memory(of_type(spec, "Q8_0"), 512).weights


def test_the_types_planned_are_those_of_a_checkpoint(tiny_llava: Path) -> None:
    assert planned_types(of_type(tiny_llava_spec(), "Q4_K_M")) == {
        name: kind for name, kind in tensor_types(tiny_llava, "Q4_K_M").items() if name in outline_of(tiny_llava).shapes
    }


def test_a_context_without_room_for_the_image_is_refused(files: Path) -> None:
    with pytest.raises(StageError, match="no room"):
        measure_memory(files / "f16.gguf", files / "mmproj.gguf", 16)


@pytest.mark.parametrize("type", ["Q4_0", "F16"])
def test_a_longer_context_never_needs_less(type: str) -> None:
    plans = [predict_memory(of_type(smol_llava_spec(), type), context) for context in (64, 512, 513, 4096)]
    assert all(
        plan.total == plan.weights + plan.kv_cache + plan.compute + plan.vision + plan.overhead for plan in plans
    )
    totals = [plan.total for plan in plans]
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_an_unknown_type_has_no_size() -> None:
    with pytest.raises(ValueError, match="Q9_9"):
        predict_memory(of_type(tiny_llava_spec(), "Q9_9"), 512)
    with pytest.raises(ValueError, match="Q4_0"):
        gptq_bytes(of_type(tiny_llava_spec(), "Q4_0"))
