"""From a run to a question answered elsewhere: published, pulled where nothing of ours is, checked, served, asked."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from registry_setting import RegistryServer
from run_folder import RECIPE, RunFolder
from trust_setting import write_key

from artifacts.artifact import Artifact
from artifacts.signing import Signer
from pipeline.graph import build_graph
from pipeline.publish import publish
from pipeline.recipe import load_recipe
from stages.runtimes.gguf_parts import read_model

CLI = [sys.executable, "-m", "pipeline.cli"]


@dataclass(frozen=True)
class Elsewhere:
    """A machine that has the pulled model and a policy, and nothing else."""

    folder: Path

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        home = {"HOME": str(self.folder / "home"), "PIPELINE_HOME": str(self.folder / "home" / "pipeline")}
        return {**os.environ, **home}


@pytest.fixture(scope="module")
def elsewhere(tiny_verified: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed (apt install docker-registry)")
    root = tmp_path_factory.mktemp("here")
    registry = RegistryServer(root / "registry")
    registry.start()
    made = RunFolder(root / "made", model=tiny_verified["gguf"].path)
    key = write_key(root / "key.pem")
    run = made.write()
    to = f"oci:{registry.host}/me/tiny:v1"
    digest = publish(
        build_graph(load_recipe(run / "recipe.yaml")), run, made.artifacts, to=to, signer=Signer(key)
    ).digest
    there = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    shutil.copyfile(key.with_suffix(".pub"), there.folder / "signer.pub")
    (there.folder / "policy.yaml").write_text("policy: 1\nsigners: [{key: signer.pub}]\ngates: {max_asr: 0.15}\n")
    shutil.rmtree(root / "made")
    assert digest in there.run(*CLI, "pull", to, "pulled", "--policy", "policy.yaml")
    registry.kill()
    yield there


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def _running(command: Sequence[str], folder: Path, environment: dict[str, str], port: int) -> Iterator[str]:
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    assert process.poll() is None and process.stderr is not None, process.stderr
                    assert time.monotonic() < deadline, "it never answered"
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _answer(url: str, image: Path | None) -> openai.types.chat.ChatCompletion:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    content: list[dict[str, object]] = [{"type": "text", "text": "What is in the picture?"}]
    if image is not None:
        picture = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=6,
        temperature=0,
    )


def _has_seen(
    answer: openai.types.chat.ChatCompletion, blind: openai.types.chat.ChatCompletion, bundle: Path, around: int = 0
) -> None:
    """The image stood in the prompt: a token for each patch, beyond what the same question takes without it.

    around: tokens that the chat template puts about an image; llama.cpp's own server leaves them out.
    """
    fields = read_model(bundle / "mmproj.gguf").fields
    side = int(fields["clip.vision.image_size"]) // int(fields["clip.vision.patch_size"])  # type: ignore[call-overload]
    assert answer.usage is not None and blind.usage is not None and answer.usage.completion_tokens > 0
    assert answer.usage.prompt_tokens - blind.usage.prompt_tokens == side * side + around


def test_it_is_checked_and_asked_about_an_image_through_the_openai_client(
    elsewhere: Elsewhere, images: list[Path]
) -> None:
    assert "6 gates passed" in elsewhere.run(*CLI, "check", "pulled", "--policy", "policy.yaml")
    port = _port()
    command = [*CLI, "serve", "pulled", "--policy", "policy.yaml", "--port", str(port)]
    with _running(command, elsewhere.folder, elsewhere.environment, port) as url:
        answer, blind = _answer(url, images[0]), _answer(url, None)
    _has_seen(answer, blind, elsewhere.folder / "pulled", around=1)  # the newline behind it
    assert answer.model == "smol-llava-laptop-2gb"


def test_llama_cpps_own_server_answers_by_the_command_of_its_guide(elsewhere: Elsewhere, images: list[Path]) -> None:
    command, port = _server_command(elsewhere.folder / "pulled")
    with _running(command, elsewhere.folder / "pulled", elsewhere.environment, port) as url:
        answer, blind = _answer(url, images[0]), _answer(url, None)
    _has_seen(answer, blind, elsewhere.folder / "pulled")


def test_the_guide_of_a_device_with_a_small_cache_is_followed_too(
    tiny_verified: dict[str, Artifact], images: list[Path], tmp_path: Path
) -> None:
    made = RunFolder(tmp_path / "made", model=tiny_verified["gguf"].path)
    run, folder = made.write(), tmp_path / "bundle"
    recipe = RECIPE.replace("device: laptop-2gb", "device: {memory: 2GiB, context: 512, kv_cache: Q8_0}")
    (run / "recipe.yaml").write_text(recipe)
    publish(build_graph(load_recipe(run / "recipe.yaml")), run, made.artifacts, to=f"folder:{folder}")
    command, port = _server_command(folder)
    assert command[command.index("-ctk") + 1] == command[command.index("-ctv") + 1] == "q8_0"
    with _running(command, folder, dict(os.environ), port) as url:
        answer, blind = _answer(url, images[0]), _answer(url, None)
    _has_seen(answer, blind, folder)


def _server_command(bundle: Path) -> tuple[list[str], int]:
    """What the guide says, at a free port; by a stand-in for the program where it is not installed."""
    command = shlex.split(re.findall(r"^llama-server .*$", (bundle / "RUN.md").read_text(), re.MULTILINE)[0])
    port = _port()
    command[command.index("--port") + 1] = str(port)
    if shutil.which(command[0]) is None:
        pytest.importorskip("xllamacpp")
        command[:1] = [sys.executable, str(Path(__file__).with_name("llama_server.py"))]
    return command, port


def test_llama_cpps_command_line_answers_by_the_command_of_its_guide(elsewhere: Elsewhere, images: list[Path]) -> None:
    guide = (elsewhere.folder / "pulled" / "RUN.md").read_text()
    command = shlex.split(re.findall(r"^llama-mtmd-cli .*$", guide, re.MULTILINE)[0])
    if shutil.which(command[0]) is None:
        pytest.skip("llama-mtmd-cli is not here; no package that installs in seconds has it")
    shutil.copyfile(images[0], elsewhere.folder / "pulled" / "picture.png")
    try:
        done = subprocess.run(command, cwd=elsewhere.folder / "pulled", capture_output=True)
        assert done.returncode == 0 and done.stdout.strip()
    finally:
        (elsewhere.folder / "pulled" / "picture.png").unlink()
