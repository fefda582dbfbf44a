"""Predicted and measured memory of a GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import StageError
from stages.models.memory import predict_memory, text_bytes, vision_bytes
from stages.models.smol_llava import smol_llava_spec
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import TYPES, convert_language_model, quantize_model
from stages.quantize.mmproj import write_mmproj
from stages.runtimes.gguf_header import read_header
from stages.runtimes.memory import measure_memory


@pytest.fixture(scope="module")
def files(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    vision = tiny_llava_spec().vision
    assert vision is not None
    convert_language_model(tiny_llava, folder / "f16.gguf", folder / "scratch", name="t", metadata={})
    write_mmproj(tiny_llava, folder / "mmproj.gguf", vision, 2, name="t")
    return folder


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_the_size_of_a_file_is_known_from_shapes(files: Path, tmp_path: Path, type: str) -> None:
    path = tmp_path / "model.gguf"
    quantize_model(files / "f16.gguf", path, type)
    stored = sum(tensor.nbytes for tensor in read_header(path).tensors.values())
    assert text_bytes(tiny_llava_spec().text, type) == pytest.approx(stored, rel=0.03)


def test_the_size_of_an_image_encoder_is_known_from_shapes(files: Path) -> None:
    vision = tiny_llava_spec().vision
    assert vision is not None
    stored = sum(tensor.nbytes for tensor in read_header(files / "mmproj.gguf").tensors.values())
    assert vision_bytes(vision, 64) == pytest.approx(stored, rel=0.01)


def test_the_demo_model_s_measured_sizes_are_predicted() -> None:
    # Measured: file sizes of the demo model, peak resident set at a context of 2048 tokens, exit 11.
    spec = smol_llava_spec().with_exit(11)
    measured = {
        "Q4_0": (91727168, 261.2),
        "Q8_0": (144811328, 311.6),
        "Q4_K_M": (105454400, 275.1),
        "F16": (270886208, 432.4),
    }
    for type, (size, peak) in measured.items():
        assert text_bytes(spec.text, type) == pytest.approx(size, rel=0.03)
        assert predict_memory(spec, type, 2048).total == pytest.approx(peak * 2**20, rel=0.04)
        assert predict_memory(spec, type, 2048, (size, 40820928)).total == pytest.approx(peak * 2**20, rel=0.03)


def test_a_fresh_process_shows_what_was_predicted(files: Path) -> None:
    model, mmproj = files / "f16.gguf", files / "mmproj.gguf"
    sizes = (model.stat().st_size, mmproj.stat().st_size)
    measured = measure_memory(model, mmproj, 512)
    predicted = predict_memory(tiny_llava_spec().with_exit(2), "F16", 512, sizes).total
    assert predicted == pytest.approx(measured, rel=0.15)  # nearly all of it is the interpreter and libraries
    assert measure_memory(model, None, 512) < measured


def test_a_context_without_room_for_the_image_is_refused(files: Path) -> None:
    with pytest.raises(StageError, match="no room"):
        measure_memory(files / "f16.gguf", files / "mmproj.gguf", 16)


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 100_000))
def test_every_type_has_a_size_and_a_longer_context_never_needs_less(type: str, context: int) -> None:
    spec = smol_llava_spec()
    plan = predict_memory(spec, type, context)
    assert plan.total == plan.weights + plan.kv_cache + plan.compute + plan.vision + plan.overhead
    assert predict_memory(spec, type, context + 300).total > plan.total
    assert text_bytes(spec.text, "F32") >= plan.weights > 0


def test_an_unknown_type_has_no_size() -> None:
    with pytest.raises(ValueError, match="Q9_9"):
        predict_memory(tiny_llava_spec(), "Q9_9", 512)
