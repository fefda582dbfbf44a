"""The stage `gguf`: what it writes, that it writes it twice alike, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stage_setting import Told, context_of

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError, StageError
from artifacts.manifest import Manifest, sha256_file
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model
from stages.quantize.encoder import MmprojType, write_encoder
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.mmproj import derive_exit, write_mmproj
from stages.runtimes.gguf_header import check_pair, read_header, read_vision_header
from stages.stage import Context, Planned


def run_stage(checkpoint: Path, folder: Path, reporter: Told | None = None, **params: str) -> Artifact:
    context = context_of("gguf", folder, checkpoint, reporter or Told(), {"model": "demo:tiny-llava"})
    metadata = GGUFStage(GGUFParams.model_validate(params)).run(context)
    Manifest.of_folder(context.output, "gguf", metadata).write(context.output)
    return Artifact.open(context.output)


@pytest.fixture(scope="module")
def shipped(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage(tiny_llava, tmp_path_factory.mktemp("q4"), type="q4_0")


def test_the_artifact_holds_model_and_image_encoder_and_says_what_they_are(shipped: Artifact) -> None:
    assert [entry.path for entry in shipped.manifest.files] == ["mmproj.gguf", "model.gguf"]
    assert shipped.metadata["family"] == "llava-siglip"
    assert shipped.metadata["type"] == "Q4_0"
    assert shipped.metadata["exits"] == [1, 2]
    assert shipped.metadata["default_exit"] == 2
    assert shipped.metadata["image_tokens"] == 16
    assert shipped.metadata["base"] == "demo:tiny-llava"
    header = read_header(shipped.file("model.gguf"))
    assert header.fields["general.name"] == "tiny-llava"
    assert header.fields["general.quantized_by"] == "icet-pipeline"
    assert "<|im_start|>" in str(header.fields["tokenizer.chat_template"])
    assert {tensor.type for name, tensor in header.tensors.items() if name.startswith("blk.0.ffn")} == {"Q4_0", "F32"}


def test_the_same_checkpoint_elsewhere_gives_the_same_bytes(
    tiny_llava: Path, shipped: Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "Another-7B-Chat-v2"  # the converter guesses names out of folder names
    shutil.copytree(tiny_llava, copy)
    reporter = Told()
    again = run_stage(copy, tmp_path, reporter, type="Q4_0")
    assert again.digest == shipped.digest
    assert reporter.shares == sorted(reporter.shares) and reporter.shares[-1] == 1.0


def test_a_conversion_that_was_done_before_an_interruption_is_not_repeated(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llava, source)
    Manifest.of_folder(source, "checkpoint", {}).write(source)
    scratch, output = tmp_path / "scratch", tmp_path / "output"
    scratch.mkdir()
    output.mkdir()
    convert_language_model(source, scratch / "f16.gguf", scratch, name="tiny", metadata={})
    (scratch / "f16.part").write_bytes(b"half a file")

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("stages.quantize.gguf.convert_language_model", refused)
    context = Context("gguf", {"source": Artifact.open(source)}, output, scratch, 0, Told())
    GGUFStage(GGUFParams(type="Q8_0")).run(context)
    assert {tensor.type for tensor in read_header(output / "model.gguf").tensors.values()} == {"Q8_0", "F32"}


def test_the_image_encoder_leaves_after_the_default_exit_without_a_final_norm(shipped: Artifact) -> None:
    vision = read_vision_header(shipped.file("mmproj.gguf"))
    fields = vision.header.fields
    assert fields["clip.vision.block_count"] == 2
    assert fields["clip.vision.feature_layer"] == [2]
    assert fields["clip.projector_type"] == "mlp"
    assert fields["icet.image.resample"] == "bicubic"
    assert not any(name.startswith(("v.post_ln", "v.blk.2", "v.class_embd")) for name in vision.header.tensors)
    assert vision.image_tokens == 16


@pytest.mark.parametrize("kind", ["F16", "F32", "Q8_0", "Q4_0"])
def test_another_exit_keeps_the_bytes_of_every_weight(tiny_llava: Path, tmp_path: Path, kind: MmprojType) -> None:
    spec = tiny_llava_spec()
    full, derived, again = tmp_path / "full.gguf", tmp_path / "derived.gguf", tmp_path / "again.gguf"
    write_encoder(tiny_llava, full, spec.with_exit(3), scratch=tmp_path / "scratch", type=kind, name="t", cls=None)
    derive_exit(full, 1, derived)
    derive_exit(full, 3, again)
    before, after = read_header(full), read_header(derived)
    assert sorted(after.tensors) == sorted(
        name for name in before.tensors if not name.startswith(("v.blk.1.", "v.blk.2."))
    )
    raw_before, raw_after = full.read_bytes(), derived.read_bytes()
    for name, tensor in after.tensors.items():
        old = before.tensors[name]
        assert tensor.shape == old.shape and tensor.type == old.type
        assert (
            raw_after[tensor.offset : tensor.offset + tensor.nbytes] == raw_before[old.offset : old.offset + old.nbytes]
        )
    changed = {key for key in before.fields if before.fields[key] != after.fields[key]}
    assert changed == {"clip.vision.block_count", "clip.vision.feature_layer"}
    assert read_header(again).tensors.keys() == before.tensors.keys()


def test_an_exit_that_is_not_in_the_file_is_refused(shipped: Artifact, tmp_path: Path) -> None:
    for exit in (0, 3):
        with pytest.raises(StageError, match=f"no exit {exit}"):
            derive_exit(shipped.file("mmproj.gguf"), exit, tmp_path / "x.gguf")


@pytest.mark.parametrize(("type", "hint"), [("Q4_KM", "Q4_K_M"), ("Q8", "Q8_0"), ("fp16", "F16")])
def test_an_unknown_type_names_the_nearest(type: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        GGUFStage(GGUFParams(type=type)).plan({})
    assert hint in str(caught.value.way_out)


def test_the_plan_knows_the_quantization_and_where_the_encoder_ends() -> None:
    planned = GGUFStage(GGUFParams(type="q5_k_m")).plan({"exit": Planned("checkpoint", tiny_llava_spec())})
    assert planned.type == "gguf"
    assert planned.spec is not None and planned.spec.vision is not None
    assert planned.spec.quantization == "Q5_K_M"
    assert planned.spec.vision.layers == planned.spec.vision.default_exit == 2


def test_an_unknown_tower_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llava, tmp_path / "pixtral")
    config = json.loads((tmp_path / "pixtral" / "config.json").read_text())
    config["vision_config"]["model_type"] = "pixtral"
    (tmp_path / "pixtral" / "config.json").write_text(json.dumps(config))
    vision = tiny_llava_spec().vision
    assert vision is not None
    with pytest.raises(StageError, match="the tower 'pixtral'"):
        write_mmproj(tmp_path / "pixtral", tmp_path / "mmproj.gguf", vision, 2, name="pixtral")


def test_a_text_only_model_becomes_a_gguf_without_image_encoder(tiny_llava: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, LlamaForCausalLM

    folder = tmp_path / "text"
    llava = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    text = LlamaForCausalLM(llava.config.text_config)
    text.model.load_state_dict(llava.model.language_model.state_dict())
    text.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_llava / name, folder / name)
    artifact = run_stage(folder, tmp_path, type="F16")
    assert [entry.path for entry in artifact.manifest.files] == ["model.gguf"]
    assert artifact.metadata["exits"] == [] and artifact.metadata["default_exit"] is None


def test_what_a_gguf_stores_is_the_checkpoint_s(tiny_llava: Path, shipped: Artifact) -> None:
    from safetensors.numpy import load_file

    weights = load_file(tiny_llava / "model.safetensors")
    vision = read_vision_header(shipped.file("mmproj.gguf"))
    tensor = vision.header.tensors["v.blk.1.ffn_up.weight"]
    raw = shipped.file("mmproj.gguf").read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    stored = np.frombuffer(raw, dtype=np.float16).reshape(tensor.shape[::-1])
    original = next(value for name, value in weights.items() if name.endswith("encoder.layers.1.mlp.fc1.weight"))
    np.testing.assert_array_equal(stored, original.astype(np.float16))


def test_missing_truncated_and_foreign_files_are_refused_before_llama_cpp_sees_them(
    shipped: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(SourceError, match="not a GGUF"):
        read_header(tmp_path / "text.gguf")
    whole = shipped.file("model.gguf").read_bytes()
    for size in (4, 30, 5_000, len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(SourceError, match="damaged"):
            read_header(tmp_path / "cut.gguf")
    with pytest.raises(SourceError, match="no image encoder"):
        read_vision_header(shipped.file("model.gguf"))


def test_a_header_with_any_byte_changed_is_read_or_refused_but_never_crashes(shipped: Artifact, tmp_path: Path) -> None:
    whole = bytearray(shipped.file("mmproj.gguf").read_bytes())
    generator = np.random.default_rng(0)
    for place in generator.integers(4, 3_000, 200):
        damaged = bytearray(whole)
        damaged[place] ^= int(generator.integers(1, 256))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            read_vision_header(tmp_path / "damaged.gguf")
        except SourceError as error:
            assert error.what


def test_an_encoder_of_another_model_is_refused(shipped: Artifact, tiny_llava: Path, tmp_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(shipped.file("mmproj.gguf"), "r")
    width = reader.get_field("clip.vision.projection_dim")
    assert width is not None
    raw = bytearray(shipped.file("mmproj.gguf").read_bytes())
    place = raw.index(b"clip.vision.projection_dim") + len(b"clip.vision.projection_dim") + 4
    raw[place : place + 4] = (128).to_bytes(4, "little")
    (tmp_path / "other.gguf").write_bytes(raw)
    with pytest.raises(StageError, match="does not belong to"):
        check_pair(read_header(shipped.file("model.gguf")), read_vision_header(tmp_path / "other.gguf"))


def test_the_files_are_what_the_manifest_says(shipped: Artifact) -> None:
    assert shipped.damage() == []
    assert shipped.manifest.files[1].sha256 == sha256_file(shipped.file("model.gguf"))


def test_an_encoder_whose_projector_is_not_known_is_refused(shipped: Artifact, tmp_path: Path) -> None:
    data = shipped.file("mmproj.gguf").read_bytes()
    key = b"clip.projector_type" + (8).to_bytes(4, "little")
    assert data.count(key + (3).to_bytes(8, "little") + b"mlp") == 1
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(data.replace(key + (3).to_bytes(8, "little") + b"mlp", key + (3).to_bytes(8, "little") + b"ldp"))
    with pytest.raises(SourceError, match="projector that is not known here: ldp"):
        read_vision_header(path)


def test_a_model_that_was_never_tuned_to_chat_is_shipped_all_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llava, folder)
    (folder / "chat_template.jinja").unlink()
    stage = GGUFStage(GGUFParams(type="Q8_0"))
    context = context_of("gguf", tmp_path, folder, Told())
    stage.run(context)
    assert "tokenizer.chat_template" not in read_header(context.output / "model.gguf").fields
