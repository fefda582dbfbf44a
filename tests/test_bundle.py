"""A bundle's papers: what users and tools read is in the forms that their specifications define, and says the truth."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from run_folder import RunFolder
from test_cli import cli
from trust_setting import Setting

from artifacts.bundle import Bundle
from artifacts.card_run import Runnable, llama_server, run_guide
from artifacts.errors import RecipeError, StoreError
from artifacts.registry.transfer import copy
from pipeline.publish import publish
from pipeline.targets import Target


@pytest.fixture
def bundle(setting: Setting) -> Bundle:
    return Bundle.open(setting.root / "bundle")


def _text(bundle: Bundle, name: str) -> str:
    return (bundle.folder / name).read_text(encoding="utf-8")


def test_the_manifest_is_a_models_and_its_config_says_which(bundle: Bundle) -> None:
    manifest = json.loads(bundle.manifest.data)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {layer["mediaType"] for layer in manifest["layers"]}
    assert kinds == {f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc")}
    assert bundle.config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    config = bundle.config["config"]
    assert config["format"] == "gguf" and config["quantization"] == "Q4_0"  # type: ignore[index]


def test_docker_model_runner_finds_model_encoder_and_template(bundle: Bundle) -> None:
    """It unpacks by file path, and takes the first GGUF whose name is not an mmproj's (bundle/unpack.go)."""
    paths = [layer.annotations["org.cncf.model.filepath"] for layer in bundle.manifest.layers]
    weights = [path for path in paths if path.endswith(".gguf")]
    assert weights == ["model.gguf", "mmproj.gguf"]
    assert bundle.named("chat-template") == ["chat_template.jinja"]


def test_the_card_says_in_the_hubs_format_what_it_is_and_what_was_measured(bundle: Bundle) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(_text(bundle, "README.md"))
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["base_model_relation"] == "quantized"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in data["base_model"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    report = json.loads(_text(bundle, "report.json"))
    assert values == {gate["name"]: gate["value"] for gate in report["gates"]}
    assert "![Attack success rate at every exit](exits.svg)" in card.content
    assert "<svg" in _text(bundle, "exits.svg")[:200]
    for said in ("| exit | early-exit |", "objective: ppo", "layers 1 to 9", "291 MiB predicted"):
        assert said in card.content
    limits = card.content.partition("## Intended use and limits\n")[2].partition("\n## ")[0]
    for said in ("questions about text and images on a user's own machine", "base model rules out are ruled out here",
                 "judged by refusal-rule 1 with 20 prompts behind the smallest rate", "these very files",
                 "Compression costs quality"):  # fmt: skip
        assert said in limits


def test_commands_name_files_that_are_there_and_the_planned_context(bundle: Bundle) -> None:
    guide = _text(bundle, "RUN.md")
    context = str(json.loads(_text(bundle, "memory.json"))["context"])
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()
    ]
    assert {command[0] for command in commands} == {"pipeline", "llama-server", "llama-mtmd-cli", "ollama", "docker"}
    for command in commands:
        for file in command:
            if file.endswith((".gguf", ".jinja", "Modelfile")):
                assert file.removeprefix("$PWD/") in bundle.manifest.files, command
                assert file.startswith("$PWD/") == (command[0] == "docker"), "it takes absolute paths only"
        if command[0].startswith("llama"):
            assert command[command.index("-c") + 1] == context


def test_commands_keep_keys_and_values_as_the_plan_counts_them() -> None:
    what = Runnable("m", "model.gguf", "", 512, small_cache=True)
    line = " ".join(llama_server(what))
    assert "-c 512 -ctk q8_0 -ctv q8_0 -fa on" in line
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in run_guide(what)
    assert "q8_0" not in run_guide(replace(what, small_cache=False))


def test_ollama_gets_the_prompt_of_the_models_own_template(bundle: Bundle) -> None:
    text = _text(bundle, "Modelfile")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("FROM")] == [
        "./model.gguf",
        "./mmproj.gguf",
    ]
    assert 'TEMPLATE """<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"""' in text
    assert "PARAMETER num_ctx 2048" in text


def test_no_folder_of_this_machine_is_in_a_bundle(bundle: Bundle) -> None:
    for name in bundle.manifest.files:
        assert str(bundle.folder.parent).encode() not in (bundle.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "text",
    [
        "dist",
        "oci-layout:",
        "folder:",
        "hf:me",
        "hf:me/x/y",
        "oci:ghcr.io/me/x@sha256:" + "0" * 64,
        "s3:bucket",
        "ollama:",
        "ollama:a b",
        "ollama:A/b/c",
    ],
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        Target.parse(text)


def test_a_folder_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "made")
    setting_folder = run.write()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    from pipeline.graph import build_graph
    from pipeline.recipe import load_recipe

    graph = build_graph(load_recipe(setting_folder / "recipe.yaml"))
    with pytest.raises(StoreError, match="is there already"):
        publish(graph, setting_folder, run.artifacts, to=f"folder:{tmp_path / 'taken'}")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_the_folder_that_one_is_in_is_not_replaced(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = f"oci-layout:{tmp_path / 'dist'}:v1"
    assert cli("publish", str(setting.root / "bundle"), "--to", layout).exit_code == 0
    (tmp_path / "empty" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "below")
    for here in (".", str(tmp_path / "empty" / "below")):
        for command in (["pull", layout, here], ["publish", str(setting.root / "bundle"), "--to", f"folder:{here}"]):
            done = cli(*command)
            assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
            assert "the folder that you are in" in done.output and "name a folder" in done.output
    assert "is there already" in cli("pull", layout, "..").output
    with pytest.raises(StoreError, match="you are in"):
        publish(setting.graph("folder:."), setting.folder, setting.run.artifacts)
    assert [path.name for path in tmp_path.rglob("*") if "dist" not in path.parts] == ["empty", "below"]
    assert cli("pull", layout, "./out").exit_code == 0 and Bundle.open(Path("out")).damage() == []


def test_a_bundle_is_on_the_disk_before_it_has_its_name(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses power after the rename keeps a folder of empty files."""
    synced: list[Path] = []
    really, rename = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        really(handle)

    def replace(old: Path, new: Path) -> Path:
        if old.is_dir():
            assert {path for path in old.rglob("*")} | {old} <= set(synced)
            synced.append(new)
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    for number, make in enumerate(
        (
            lambda folder: publish(setting.graph(f"folder:{folder}"), setting.folder, setting.run.artifacts),
            lambda folder: copy(Bundle.open(setting.root / "bundle"), folder),
        )
    ):
        make(tmp_path / str(number))
        assert synced[-2:] == [tmp_path / str(number), tmp_path]
