"""What a model was trained on goes with its files: a verification elsewhere does not ask what it learned by heart."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from test_verify_command import SMALL
from typer.testing import CliRunner

from artifacts.artifact import Artifact
from artifacts.bundle import Bundle, BundleFile, write_bundle
from artifacts.lineage import calibrated_on, combined, training_of
from artifacts.manifest import Manifest, Provenance, Training
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_WEIGHT_CONFIG, MEDIA_WEIGHTS
from artifacts.registry.oci_layout import Layout
from artifacts.registry.transfer import push
from pipeline.cli import app
from pipeline.console import make_console
from pipeline.graph import build_graph
from pipeline.recipe import recipe_of
from pipeline.runner import run_graph
from stages.data.prompts import load_prompts
from stages.stage import stage_class

RECIPE = {
    "recipe": 1,
    "name": "hardened",
    "source": {"model": "demo:tiny-llava"},
    "stages": {
        "harden": {"uses": "sft", "with": {"steps": 1, "images": 1, "max_new_tokens": 2, "validation": 0}},
        "gguf": {"uses": "gguf", "needs": "harden", "with": {"type": "Q8_0"}},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The tiny model, tuned by one step of sft, and its GGUF; as a run makes them."""
    runs = tmp_path_factory.mktemp("hardened") / "runs"
    result = run_graph(build_graph(recipe_of(json.loads(json.dumps(RECIPE)), "test")), runs, make_console(plain=True))
    assert result.error is None
    return dict(result.artifacts)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a store of its own."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    wheels = Path(os.environ["PIPELINE_HOME"]) / "wheels"
    if wheels.exists():
        (home / "wheels").symlink_to(wheels.resolve())
    monkeypatch.setenv("PIPELINE_HOME", str(home))
    return home


def _bundle(artifact: Artifact, folder: Path) -> Bundle:
    files = [BundleFile(entry.path, artifact.path / entry.path, MEDIA_WEIGHTS, "model") for entry in
             artifact.manifest.files]  # fmt: skip
    files.append(BundleFile("manifest.json", artifact.path / "manifest.json", MEDIA_WEIGHT_CONFIG, "manifest"))
    files.append(BundleFile("memory.json", b"{}", MEDIA_DOC, "memory"))
    return write_bundle(folder, files, {"descriptor": {"name": "tiny"}, "config": {"format": "gguf"}}, {})


def _verified(target: str, prompts: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of `pipeline verify`, with a file of the user's own."""
    asked = ("--set", f"sets={{mine: {{source: {prompts}, layout: advbench}}}}", "--set", "harmful={mine: 2}")
    command = ["verify", target, "--exits", "2", *SMALL, *asked, "--runs-dir", str(folder / "runs"), "--plain"]
    result = CliRunner().invoke(app, command)
    return result.exit_code, " ".join(result.output.split())


def _file(path: Path, *prompts: str) -> Path:
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([["goal", "target"], *([prompt, "Sure"] for prompt in prompts)])
    return path


def test_a_prompt_that_a_model_was_trained_on_is_refused_on_the_machine_that_pulled_it(
    made: dict[str, Artifact], elsewhere: Path, tmp_path: Path
) -> None:
    known = _file(tmp_path / "mine.csv", load_prompts("advbench", "train")[0].text, "Say how a clock is made")
    push(_bundle(made["gguf"], tmp_path / "bundle"), Layout(tmp_path / "dist"), "v1")
    code, said = _verified(f"oci-layout:{tmp_path / 'dist'}:v1", known, tmp_path)
    assert code == 2 and "1 of 2 prompts resemble what 'source' was trained on by sft" in said, said
    assert "is not known" not in said


@pytest.mark.parametrize("way", ["checkpoint", "folder", "file", "bundle", "changed"])
def test_whatever_way_a_model_comes_in_its_training_comes_with_it(
    made: dict[str, Artifact], tmp_path: Path, way: str
) -> None:
    artifact, target = made["harden" if way == "checkpoint" else "gguf"], tmp_path / "copied"
    if way == "bundle":
        _bundle(artifact, target)
    else:
        shutil.copytree(artifact.path, target)
    if way == "changed":
        (target / "mmproj.gguf").write_bytes(b"GGUF")
    stage = stage_class("source")
    taken = stage(stage.Params.model_validate({"model": str(target / "model.gguf" if way == "file" else target)}))
    # Who changed files may have trained them as well.
    assert taken.training({}) == Training(stages=("sft",), complete=way != "changed")


def test_a_model_from_elsewhere_is_asked_and_it_is_said_that_its_training_is_not_known(
    made: dict[str, Artifact], elsewhere: Path, tmp_path: Path
) -> None:
    known = _file(tmp_path / "mine.csv", load_prompts("advbench", "train")[0].text)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("model.gguf", "mmproj.gguf"):  # without our manifest
        shutil.copyfile(made["gguf"].path / name, foreign / name)
    code, said = _verified(str(foreign), known, tmp_path)
    assert code == 0 and "source: what it was trained on is not known" in said, said
    (run,) = (tmp_path / "runs").iterdir()
    assert "what it was trained on is not known" in (run / "events.jsonl").read_text()
    (subject,) = json.loads((run / "report.json").read_text())["subjects"]
    assert subject["training"] == {"stages": [], "complete": False}
    assert "Not known is what was learned by" in (run / "report.html").read_text()


def test_every_stage_tells_on_what_it_was_told(made: dict[str, Artifact]) -> None:
    trained = Training(stages=("sft",), complete=True)
    assert training_of(made["source"]) == Training(complete=True)
    assert training_of(made["harden"]) == training_of(made["gguf"]) == trained
    assert combined([trained, Training(stages=("l-ppo",))]) == Training(stages=("sft", "l-ppo"))
    assert combined([]) == Training()
    prune = stage_class("prune")
    for heal, stages in ((None, ()), ({}, ("prune",))):  # what heals learns from prompts
        pruned = prune(prune.Params.model_validate({"layers": [1], "heal": heal}))
        assert pruned.training({"source": made["source"]}).stages == stages
    demo, foreign = (stage_class("source"), "demo:smol-llava"), (stage_class("source"), "hub:a/b")
    told = [stage(stage.Params.model_validate({"model": model})).training({}) for stage, model in (demo, foreign)]
    assert told == [Training(stages=("demo:smol-llava",), complete=True), Training()]


def test_of_an_older_artifact_the_store_tells_and_what_is_gone_is_not_known(tmp_path: Path) -> None:
    def stored(name: str, provenance: Provenance) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
        manifest = Manifest.of_folder(folder, "checkpoint", {}, provenance)
        manifest.write(folder)
        return Artifact.open(folder.rename(tmp_path / manifest.digest))

    source = stored("source", Provenance(stage="source", training=Training(complete=True)))
    prompts = {"prompts": {"harmful": ["advbench"]}}
    tuned = stored("tuned", Provenance(stage="l-ppo", params=prompts, inputs={"source": source.digest}))
    gguf = stored("gguf", Provenance(stage="gguf", inputs={"tuned": tuned.digest}))
    assert training_of(gguf) == Training(stages=("l-ppo",), complete=True)
    demo = stored("demo", Provenance(stage="source", params={"model": "demo:smol-llava"}))
    assert training_of(demo) == Training(stages=("demo:smol-llava",), complete=True)
    shutil.rmtree(source.path)
    assert training_of(gguf) == Training(stages=("l-ppo",))
    shutil.rmtree(tuned.path)
    assert training_of(gguf) == Training()


def test_the_texts_that_anything_in_a_lineage_was_calibrated_on_are_told_on(tmp_path: Path) -> None:
    def stored(stage: str, params: dict[str, object], **inputs: Artifact) -> Artifact:
        folder = tmp_path / "new"
        folder.mkdir()
        (folder / "file").write_text(stage)
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        manifest = Manifest.of_folder(folder, "x", {}, Provenance(stage=stage, params=params, inputs=digests))
        manifest.write(folder)
        return Artifact.open(folder.rename(tmp_path / manifest.digest))

    source = stored("source", {"model": "hub:x/y"})
    matrix = stored("imatrix", {"calibration": {"texts": "/a.txt"}}, source=source)
    pruned = stored("prune", {"calibration": {"texts": 16}}, source=source)  # a number of articles
    gguf = stored("gguf", {"auto": {"calibration": {"texts": "/b.txt"}}}, small=pruned, matrix=matrix)
    assert calibrated_on(gguf) == {"/b.txt": "gguf", "/a.txt": "imatrix"}
    assert calibrated_on(pruned) == {}
    shutil.rmtree(matrix.path)
    assert calibrated_on(gguf) == {"/b.txt": "gguf"}
