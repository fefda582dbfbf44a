"""Publishing to the Hugging Face hub and into Ollama, each through its own client, by command and by recipe.

Neither service can be had here: `stand_ins` speaks their interfaces. What the services themselves make of it (Xet, the
hub's checks of a card, a model that answers in Ollama) is not shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from stand_ins import Hub, Ollama
from trust_setting import Setting

from artifacts.attestation_check import check_bundle
from artifacts.bundle import Bundle, write_bundle
from artifacts.errors import StoreError
from artifacts.registry import ollama
from pipeline.publish import publish

TOKEN = "hf_s3cret"
CLI = [sys.executable, "-m", "pipeline.cli"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    service = Hub(TOKEN)
    yield service
    service.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ollama]:
    service = Ollama()
    monkeypatch.setenv("OLLAMA_HOST", service.url)
    yield service
    service.close()


def _publish(bundle: Path, to: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "publish", str(bundle), "--to", to], capture_output=True, text=True, env={**os.environ, **environment}
    )


def _hub_environment(endpoint: str, home: Path, token: str = TOKEN) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
    }  # fmt: skip


def test_a_bundle_becomes_one_commit_on_the_hub_and_what_was_there_before_goes(
    setting: Setting, hub: Hub, tmp_path: Path
) -> None:
    hub.files["of-an-older-bundle.txt"] = b"x"
    done = _publish(setting.root / "bundle", "hf:me/model", _hub_environment(hub.url, tmp_path / "hf"))
    bundle = Bundle.open(setting.root / "bundle")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hf:me/model", bundle.digest] and TOKEN not in done.stdout + done.stderr
    assert hub.repositories == {"me/model": "private"} and hub.commits == [bundle.digest]
    for path, content in hub.files.items():
        target = tmp_path / "there" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (tmp_path / "there" / ".gitattributes").unlink()  # the hub's own
    assert all(finding.holds for finding in check_bundle(Bundle.open(tmp_path / "there"), setting.policy))


def test_a_hub_that_refuses_or_cannot_be_reached_is_one_message(setting: Setting, hub: Hub, tmp_path: Path) -> None:
    for endpoint, token, reason in ((hub.url, "hf_wrong", "401"), ("http://127.0.0.1:9", TOKEN, "refused")):
        environment = _hub_environment(endpoint, tmp_path / "hf", token)
        done = _publish(setting.root / "bundle", "hf:me/model", environment)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "hub did not take me/model" in done.stderr and reason in done.stderr and token not in done.stderr
    assert hub.commits == []


def test_ollama_gets_the_weights_the_template_the_context_and_the_licence(setting: Setting, server: Ollama) -> None:
    done = _publish(setting.root / "bundle", "ollama:smol:q4", {})
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(setting.root / "bundle")
    model = server.models["smol:q4"]
    assert model["files"] == {name: bundle.manifest.files[name].digest for name in ("model.gguf", "mmproj.gguf")}
    assert model["template"] == "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    assert model["parameters"] == {"num_ctx": 2048, "temperature": 0}
    assert "Apache License" in json.dumps(model["license"])


def test_a_recipe_publishes_into_ollama_too(setting: Setting, server: Ollama) -> None:
    result = publish(setting.graph("ollama:smol"), setting.folder, setting.run.artifacts)
    assert result.target == "ollama:smol:latest" and list(server.models) == ["smol:latest"]


def test_an_ollama_that_is_not_there_or_refuses_is_one_message(
    setting: Setting, server: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(setting.root / "bundle")
    monkeypatch.setattr(Ollama, "answer", lambda *_: (500, {"error": "no room on this disk"}))
    with pytest.raises(StoreError, match="no room on this disk"):
        ollama.create(bundle, "smol")
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="ollama serve"):
        ollama.create(bundle, "smol")


def test_what_ollama_does_not_run_is_not_sent(tmp_path: Path, server: Ollama) -> None:
    from artifacts.bundle import BundleFile
    from artifacts.registry.manifest import MEDIA_WEIGHTS

    for names, reason in ((["model.safetensors"], "GGUF"), (["model-1.gguf", "model-2.gguf"], "parts")):
        files = [BundleFile(name, b"GGUF", MEDIA_WEIGHTS, "model") for name in names]
        bundle = write_bundle(tmp_path / reason, files, {"descriptor": {}, "config": {}}, {})
        with pytest.raises(StoreError, match=reason):
            ollama.create(bundle, "smol")
    assert server.calls == []
