"""Publishing: only what passed, whole, with its proof, and the same digest whenever the same files are published."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from layout_damage import layout_damage
from run_folder import RECIPE, RunFolder

from artifacts.bundle import Bundle
from artifacts.errors import GateError, StoreError
from artifacts.registry.oci_layout import read_tags
from artifacts.registry.ollama import create
from pipeline.events import GateChecked, Published, StageFinished, StageMetric, StageStarted
from pipeline.graph import Graph, build_graph
from pipeline.publish import publish
from pipeline.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("run"))


def _graph(tmp_path: Path, to: str = "", recipe: str = RECIPE) -> Graph:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    to = to or f"oci-layout:{tmp_path / 'dist'}"
    return build_graph(load_recipe(path, [f"publish.to={to}"]))


def _layers(layout: Path, digest: str) -> dict[str, dict[str, object]]:
    blob = layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
    layers = json.loads(blob.read_bytes())["layers"]
    return {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in layers}


def _content(layout: Path, layer: dict[str, object]) -> bytes:
    return (layout / "blobs" / "sha256" / str(layer["digest"]).removeprefix("sha256:")).read_bytes()


def test_what_ships_is_published_with_its_papers_and_its_proof(folder: RunFolder, tmp_path: Path) -> None:
    run = folder.write(run=tmp_path / "run")
    result = publish(_graph(tmp_path), run, folder.artifacts)

    layout = tmp_path / "dist"
    assert result.target == f"oci-layout:{layout}:smol-llava-laptop-2gb"
    assert read_tags(layout) == {"smol-llava-laptop-2gb": result.digest} == dict(result.tags)
    assert layout_damage(layout) == []
    layers = _layers(layout, result.digest)
    assert list(layers)[:2] == ["model.gguf", "mmproj.gguf"]
    assert {
        "manifest.json", "recipe.yaml", "report.json", "verdict/icet/manifest.json", "verdict/icet/measures.json",
        "README.md", "NOTICE.md", "RUN.md", "Modelfile", "chat_template.jinja", "memory.json", "exits.svg",
        "bom.cdx.json",
    } <= set(layers)  # fmt: skip
    for name in ("model.gguf", "mmproj.gguf"):
        assert _content(layout, layers[name]) == folder.artifacts["gguf"].file(name).read_bytes()
    report = json.loads(_content(layout, layers["report.json"]))
    assert report["status"] == "passed" and len(report["gates"]) == 6 and report["measures"]
    assert _content(layout, layers["recipe.yaml"]) == (run / "recipe.yaml").read_bytes()
    assert not any("responses" in name for name in layers)


def test_nothing_that_differs_between_two_runs_is_published(folder: RunFolder, tmp_path: Path) -> None:
    first = publish(_graph(tmp_path), folder.write(run=tmp_path / "first"), folder.artifacts)
    later = [
        event.model_copy(update={"time": event.time + 1e6})
        for event in folder.events
        if not isinstance(event, StageStarted | StageMetric)
    ]
    later = [
        event.model_copy(update={"cached": True, "seconds": 0.1, "peak_rss": 0})
        if isinstance(event, StageFinished)
        else event
        for event in later
    ]
    later.append(Published(time=later[-1].time + 1, target="oci-layout:elsewhere", digest="sha256:" + "0" * 64))
    again = publish(_graph(tmp_path), folder.write(later, tmp_path / "second"), folder.artifacts)
    assert again.digest == first.digest


@pytest.mark.parametrize("kind", ["failed", "unchecked"])
def test_a_gate_that_failed_or_was_not_checked_stops_publishing(folder: RunFolder, tmp_path: Path, kind: str) -> None:
    events = [
        event.model_copy(update={"passed": False, "reason": "gguf: average ASR 0.4, must be at most 0.15"})
        if isinstance(event, GateChecked) and event.name == "max_asr"
        else event
        for event in folder.events
    ]
    if kind == "unchecked":
        events = [event for event in folder.events if not isinstance(event, GateChecked)]
    with pytest.raises(GateError) as caught:
        publish(_graph(tmp_path), folder.write(events, tmp_path / "run"), folder.artifacts)
    assert caught.value.exit_code == 3
    assert "max_asr" in str(caught.value)
    assert not (tmp_path / "dist").exists()


def test_a_file_that_changed_after_it_was_verified_is_not_published(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "made")
    run = folder.write()
    model = folder.artifacts["gguf"].file("model.gguf")
    model.parent.chmod(0o755)
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="not the file that was verified"):
        publish(_graph(tmp_path), run, folder.artifacts)
    assert not (tmp_path / "dist" / "index.json").exists()
    assert not list((folder.store.root / "tmp").iterdir())


def test_a_tag_may_be_given_and_two_shipped_artifacts_get_one_each(folder: RunFolder, tmp_path: Path) -> None:
    recipe = RECIPE.replace("needs: gguf, with: {hardened: harden, controls: [plain]}", "needs: [gguf, plain]")
    graph = _graph(tmp_path, f"oci-layout:{tmp_path / 'dist'}:v2", recipe)
    result = publish(graph, folder.write(run=tmp_path / "run"), folder.artifacts, allow_unverified=True)
    assert set(read_tags(tmp_path / "dist")) == {"v2-gguf", "v2-plain"} == set(result.tags)
    assert layout_damage(tmp_path / "dist") == []


def test_a_place_that_cannot_be_written_is_one_message_and_loses_nothing(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    graph = _graph(tmp_path, f"oci-layout:{tmp_path / 'blocked' / 'dist'}")
    with pytest.raises(StoreError) as caught:
        publish(graph, folder.write(run=tmp_path / "run"), folder.artifacts)
    assert "artifacts are kept" in str(caught.value)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (apt install skopeo)")
def test_skopeo_copies_a_published_model_unchanged(folder: RunFolder, tmp_path: Path) -> None:
    result = publish(_graph(tmp_path), folder.write(run=tmp_path / "run"), folder.artifacts)
    tag = next(iter(result.tags))
    subprocess.run(["skopeo", "copy", "-q", f"oci:{tmp_path / 'dist'}:{tag}", f"oci:{tmp_path / 'copy'}:x"], check=True)
    assert read_tags(tmp_path / "copy") == {"x": result.digest}


def test_a_checkpoint_is_a_bundle_that_transformers_runs(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        "gguf: {uses: gguf, needs: harden, with: {type: Q4_0}}",
        "gguf: {uses: gptq, needs: harden, with: {group_size: 64}}",
    ).replace(", memory: device", "")
    made = RunFolder(tmp_path / "made", model=tiny_llava)
    run = made.write()
    (run / "recipe.yaml").write_text(recipe)
    publish(_graph(tmp_path, "folder:unused", recipe), run, made.artifacts, to=f"folder:{tmp_path / 'b'}")
    bundle = Bundle.open(tmp_path / "b")
    assert (
        bundle.damage() == []
        and bundle.named("model") == ["model.safetensors"]
        and "Modelfile" not in bundle.manifest.files
    )
    assert bundle.config["config"]["format"] == "safetensors"  # type: ignore[index]
    guide = (bundle.folder / "RUN.md").read_text()
    assert (
        "llama.cpp, Ollama and Docker Model Runner do not read it" in guide and "AutoModelForImageTextToText" in guide
    )
    with pytest.raises(StoreError, match="Ollama runs GGUF files"):
        create(bundle, "smol")
