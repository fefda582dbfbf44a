"""Types of files, of single tensors and of the image encoder; files in parts; what an interruption leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stage_setting import Told, context_of
from test_calibration_texts import asked, ordinary, write
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import Manifest
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model, quantize_model
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.types import TYPES
from stages.quantize.workbench import AutoParams, ProbeMix, Workbench
from stages.runtimes.gguf_header import read_header
from stages.runtimes.gguf_parts import model_file, parts_of, read_model, split_model
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.llamacpp_library import TextModel, library
from stages.runtimes.mixture import ALIASES, NEED_IMATRIX
from stages.runtimes.rounding import round_weights
from stages.runtimes.runtime import Request
from stages.stage import Planned


def weights_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, as gguf's own reader finds them."""
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in gguf.GGUFReader(path).tensors}


def llama(tokenizer: Path, folder: Path, width: int, inner: int, *, tied: bool = True) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (*tokenizer.glob("token*"), tokenizer / "chat_template.jinja"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def wide(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512 numbers, which every type divides."""
    return llama(tiny_llava, tmp_path_factory.mktemp("wide"), 256, 512)


@pytest.fixture(scope="module")
def uneven(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 320 and 160 numbers, as the demo's 576: 32 divides them and 256 does not."""
    return llama(tiny_llava, tmp_path_factory.mktemp("uneven"), 320, 160)


@pytest.fixture(scope="module")
def floats(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floats")
    convert_language_model(wide, folder / "f16.gguf", folder / "links", name="wide", metadata={})
    return folder / "f16.gguf"


def ship(checkpoint: Path, folder: Path, reporter: Told | None = None, key: str = "", **params: object) -> Artifact:
    about = {"model": "hub:org/model@main", "license": "mit"}
    context = replace(context_of("gguf", folder, checkpoint, reporter or Told(), about), key=key)
    stage = GGUFStage(GGUFParams.model_validate(params))
    stage.plan({})
    Manifest.of_folder(context.output, "gguf", stage.run(context)).write(context.output)
    return Artifact.open(context.output)


def values(path: Path, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_the_table_of_types_is_the_installed_library_s_and_each_makes_a_file_that_loads(
    floats: Path, tmp_path: Path
) -> None:
    lib = library()
    known = set()
    for number in range(64):
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.dry_run = number, True
        if lib.llama_model_quantize(os.fsencode(floats), os.fsencode(tmp_path / "none.gguf"), params) == 0:
            known.add(number)
    assert known == set(TYPES.values())
    assert set(ALIASES.values()) <= TYPES.keys()
    for type in TYPES.keys() - NEED_IMATRIX - {"IQ3_S", "IQ3_M"}:  # their tables take seconds; other tests make them
        path = tmp_path / f"{type}.gguf"
        quantize_model(floats, path, type)
        TextModel(path).close()
        path.unlink()


def test_each_tensor_has_the_type_that_was_asked_for_rounded_to_the_bit(wide: Path, tmp_path: Path) -> None:
    asked = {"blk.1.ffn": "q6_k", "ffn_down": "Q2_K", "attn_k|attn_v": "F16"}
    made = ship(wide, tmp_path, type="Q4_K", tensor_types=asked, embedding_type="q8_0").file("model.gguf")
    header = read_header(made)
    expected = {
        **{f"blk.1.ffn_{part}.weight": "Q6_K" for part in ("up", "gate", "down")},  # the first pattern counts
        "blk.0.ffn_down.weight": "Q2_K",
        **{f"blk.{block}.attn_{part}.weight": "F16" for block in range(2) for part in "kv"},
        "token_embd.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q4_K",
        "blk.0.attn_q.weight": "Q4_K",
    }
    assert {name: header.tensors[name].type for name in expected} == expected
    floats = tmp_path / "again.gguf"
    convert_language_model(wide, floats, tmp_path / "links", name="wide", metadata={})
    for name, type in expected.items():
        np.testing.assert_array_equal(values(made, name), round_weights(values(floats, name), type))


def test_the_head_has_a_type_of_its_own_or_that_of_the_embeddings_where_both_are_one(
    wide: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    untied = llama(tiny_llava, tmp_path / "untied", 256, 512, tied=False)
    apart = ship(untied, tmp_path / "apart", type="Q4_0", output_type="Q5_K", embedding_type="q2_k")
    tensors = read_header(apart.file("model.gguf")).tensors
    assert (tensors["output.weight"].type, tensors["token_embd.weight"].type) == ("Q5_K", "Q2_K")
    assert tensors["blk.0.attn_q.weight"].type == "Q4_0"
    one = read_header(ship(wide, tmp_path / "one", type="Q4_0", output_type="Q5_K").file("model.gguf")).tensors
    assert one["token_embd.weight"].type == "Q5_K" and "output.weight" not in one


def test_where_rows_do_not_allow_a_type_the_one_taken_instead_is_named(uneven: Path, tmp_path: Path) -> None:
    reporter, types = Told(), {"tensor_types": {"ffn_down": "Q3_K"}, "embedding_type": "Q6_K"}
    told = ship(uneven, tmp_path, reporter, type="Q4_K_M", **types)
    header = read_header(told.file("model.gguf"))
    assert {header.tensors[f"blk.{block}.ffn_down.weight"].type for block in range(2)} == {"Q4_0"}
    assert header.tensors["token_embd.weight"].type == "Q8_0"  # llama.cpp alone would have ended the process
    assert header.tensors["blk.0.attn_q.weight"].type == "Q5_0"
    fallbacks = told.metadata["fallbacks"]
    assert isinstance(fallbacks, list)
    assert "Q4_0 instead of Q3_K for 2 tensors with rows of 160" in fallbacks
    assert "Q8_0 instead of Q6_K for token_embd.weight with rows of 320" in fallbacks
    assert any(line.startswith("Q5_0 instead of Q4_K for ") for line in fallbacks)
    assert reporter.lines == fallbacks  # each told once


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tensor_types": {"ffn": "Q9"}}, "the type 'Q9'"),
        ({"tensor_types": {"ffn": "IQ2_S"}}, "need an importance matrix"),
        ({"tensor_types": {"(": "Q4_0"}}, "no pattern"),
        ({"type": "F16", "output_type": "Q8_0"}, "single tensors"),
        ({"embedding_type": "IQ1_S", "imatrix": "m"}, "too small"),
        ({"type": "F16", "imatrix": "m"}, "takes no importance matrix"),
    ],
)
def test_what_no_model_could_be_given_is_refused_before_any_work(params: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GGUFStage(GGUFParams.model_validate(params)).plan({})


def test_what_auto_leaves_out_of_the_user_s_text_is_said_once(wide: Path, tmp_path: Path) -> None:
    told, texts = Told(), write(tmp_path / "mine.txt", *ordinary(4), asked()[:2000])
    mix = ProbeMix(samples=2, length=16, questions=0, prompts=0, texts=texts)
    bench = Workbench(context_of("gguf", tmp_path, wide, told), wide, None, AutoParams(calibration=mix, refusals=1))
    bench.probe("train")
    bench.probe("validation")
    assert len(told.lines) == 1 and told.lines[0].endswith("mine.txt repeat what tests ask, and are left out")


def test_a_pattern_that_no_tensor_matches_is_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no matrix of this model has a name with 'experts'"):
        ship(wide, tmp_path, tensor_types={"experts": "Q8_0"})
    stage = GGUFStage(GGUFParams.model_validate({"tensor_types": {"experts": "Q8_0"}}))
    with pytest.raises(RecipeError, match="experts"):  # and before any work, where the shapes are known
        stage.plan({"source": Planned("checkpoint", tiny_llava_spec())})


def test_a_model_whose_tensors_fit_one_part_stays_one_file(tiny_llava: Path, tmp_path: Path) -> None:
    """The vocabulary makes the file larger than its tensors, which are what parts are cut by."""
    model = ship(tiny_llava, tmp_path / "whole", type="Q8_0").file("model.gguf")
    before, tensors = model.read_bytes(), sum(t.nbytes for t in read_header(model).tensors.values())
    assert tensors < len(before)
    for limit in (tensors, (tensors + len(before)) // 2, len(before)):
        assert split_model(model, limit) == [model] and model.read_bytes() == before
    assert len(split_model(model, tensors - 1)) == 2 and not model.exists()


def test_a_model_in_parts_answers_as_one_and_a_part_that_is_missing_is_named(
    tiny_llava: Path, tmp_path: Path, images: list[Path]
) -> None:
    whole = ship(tiny_llava, tmp_path / "whole", type="Q8_0")
    cut = ship(tiny_llava, tmp_path / "cut", type="Q8_0", split="40KiB")
    names = [entry.path for entry in cut.manifest.files]
    count = len(names) - 1
    assert count > 2
    assert names == ["mmproj.gguf", *(f"model-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count))]
    first = model_file(cut.path)
    one, several = read_header(whole.file("model.gguf")), read_model(first)
    assert {name: tensor.shape for name, tensor in several.tensors.items()} == {
        name: tensor.shape for name, tensor in one.tensors.items()
    }
    for path in parts_of(first):
        assert sum(tensor.nbytes for tensor in read_header(path).tensors.values()) <= 40 * 1024
    request = Request("What is this?", image=images[0], max_new_tokens=8)
    answers = []
    for artifact in (whole, cut):
        with LlamaCppRuntime(artifact.path, parallel=1) as runtime:
            answers.append((runtime.generate([request])[0].text, runtime.logits(request, "It is")))
    assert answers[0][0] == answers[1][0]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    merged = tmp_path / "merged.gguf"
    lib = library()  # llama.cpp's own reader of parts, writing one file
    params = lib.llama_model_quantize_default_params()
    params.only_copy = True
    assert lib.llama_model_quantize(os.fsencode(first), os.fsencode(merged), params) == 0
    assert weights_of(merged) == weights_of(whole.file("model.gguf"))
    if shutil.which("llama-gguf-split"):
        again = tmp_path / "again.gguf"
        subprocess.run(["llama-gguf-split", "--merge", first, again], check=True, capture_output=True)
        assert weights_of(again) == weights_of(merged)
    copy = tmp_path / "copy"
    shutil.copytree(cut.path, copy)
    (copy / names[2]).unlink()
    with pytest.raises(SourceError, match=names[2]):
        LlamaCppRuntime(copy)


@pytest.mark.parametrize(("type", "taken"), [("Q8_0", "Q8_0"), ("Q4_0", "Q4_0"), ("Q4_K", "Q5_0")])
def test_the_image_encoder_runs_in_smaller_types(
    tiny_llava: Path, tmp_path: Path, images: list[Path], type: str, taken: str
) -> None:
    full = ship(tiny_llava, tmp_path / "f16", type="F16")
    small = ship(tiny_llava, tmp_path / "small", type="F16", mmproj_type=type)
    tensors = read_header(small.file("mmproj.gguf")).tensors
    assert tensors["v.blk.0.attn_q.weight"].type == tensors["mm.0.weight"].type == taken
    assert tensors["v.patch_embd.weight"].type == "F16" and tensors["v.position_embd.weight"].type == "F32"
    fallbacks = small.metadata["fallbacks"]
    assert isinstance(fallbacks, list) and len(fallbacks) == (type != taken)
    seen = []
    for artifact in (full, small):
        with LlamaCppRuntime(artifact.path, parallel=1) as runtime:
            seen.append(runtime.image_embeddings(2, images[0]).ravel())
    likeness = np.dot(*seen) / np.linalg.norm(seen[0]) / np.linalg.norm(seen[1])
    assert 0.97 < likeness < 1 - 1e-7


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_both_files_say_what_they_are_made_of(
    tiny_llava: Path, tiny_family: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    checkpoint = tiny_llava if kind == "llava" else tiny_family(kind)
    made = ship(checkpoint, tmp_path, type="Q5_K", mmproj_type="Q8_0", key="ab" * 32)
    assert made.metadata["type"] == "Q5_K_M"
    for file, type in (("model.gguf", "Q5_K_M"), ("mmproj.gguf", "Q8_0")):
        fields = read_header(made.file(file)).fields
        assert fields["general.license"] == "mit" and fields["general.quantized_by"] == "icet-pipeline"
        assert fields["general.base_model.0.name"] == "model" and fields["general.base_model.0.organization"] == "org"
        described = str(fields["general.description"])
        assert str(made.metadata["base_digest"]) in described and f", {type}, " in described
        assert described.endswith(f", content key {'ab' * 32}")


_RUN = """
import sys
from pathlib import Path
from stage_setting import Told, context_of
from stages.quantize.gguf import GGUFParams, GGUFStage
GGUFStage(GGUFParams(type="Q4_K_M", mmproj_type="Q8_0", split="20KiB")).run(
    context_of("gguf", Path(sys.argv[2]), Path(sys.argv[1]), Told()))
"""


@pytest.mark.parametrize("moment", ["model*", "mmproj*"])
def test_a_conversion_that_is_killed_leaves_no_half_written_file_under_its_final_name(
    tiny_llava: Path, tmp_path: Path, moment: str
) -> None:
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", _RUN, tiny_llava, tmp_path]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": tests})
    output = tmp_path / "output"
    while process.poll() is None and not any(output.glob(moment)):
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before"
    assert any(output.glob(moment)), "nothing had begun"
    for path in output.glob("*.gguf"):
        read_header(path)  # which checks that all tensors lie within the file
