"""On a laptop: a bundle is served within its device's memory and asked through openai's client; nobody else gets in."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from registry_setting import NEEDS_REGISTRY, RegistryServer
from trust_setting import write_key
from typer.testing import CliRunner

from artifacts.artifact import Artifact
from artifacts.bundle import Bundle, BundleFile, write_bundle
from artifacts.errors import GateError, RecipeError, StoreError
from artifacts.home import cache_dir
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_WEIGHT_CONFIG, MEDIA_WEIGHTS
from artifacts.registry.oci_layout import Layout
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import push
from artifacts.signing import Signer, sign_bundle
from artifacts.store import Store
from pipeline.cli import app
from pipeline.commands.chat import Chat, open_chat
from pipeline.commands.check import policy_of
from pipeline.commands.model import Room, find_model, room_for
from pipeline.commands.serve import application, prepare
from pipeline.commands.serve import serve as run_server

KEY = "k3y-for-tests"


@pytest.fixture(scope="module")
def bundle(tiny_verified: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with its image encoder, planned for 512 tokens and more memory than tests have taken by now."""
    made = tiny_verified["gguf"]
    files = [
        BundleFile(entry.path, made.path / entry.path, MEDIA_WEIGHTS, "model", sha256=entry.sha256)
        for entry in sorted(made.manifest.files, key=lambda entry: entry.path, reverse=True)
    ]
    plan = {"device": "inline", "budget": 1 << 40, "context": 512}
    files += [
        BundleFile("manifest.json", made.path / "manifest.json", MEDIA_WEIGHT_CONFIG, "manifest"),
        BundleFile("memory.json", json.dumps(plan).encode(), MEDIA_DOC, "memory"),
    ]
    config = {"descriptor": {"name": "tiny"}, "config": {"format": "gguf"}}
    title = {"org.opencontainers.image.title": "tiny"}
    return write_bundle(tmp_path_factory.mktemp("served") / "bundle", files, config, title)


@contextmanager
def _serving(bundle: str, folder: Path) -> Iterator[str]:
    import uvicorn

    found, room = prepare(bundle, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with application(found, room, KEY) as served:
        server = uvicorn.Server(uvicorn.Config(served, host="127.0.0.1", port=port, log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)


@NEEDS_REGISTRY
def test_a_model_from_a_registry_is_asked_about_an_image_through_the_openai_client(
    bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    registry = RegistryServer(tmp_path / "registry")
    registry.start()
    try:
        push(bundle, Registry(f"{registry.host}/me/tiny"), "v1")
        reference = f"oci:{registry.host}/me/tiny:v1"
        picture = base64.b64encode(images[0].read_bytes()).decode()
        with _serving(reference, tmp_path) as url:
            assert json.load(urllib.request.urlopen(f"{url}/health"))["status"] == "ok"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
            assert [model.id for model in client.models.list()] == ["tiny"]

            def ask(image: str, stream: bool = False) -> openai.types.chat.ChatCompletion:
                content = [{"type": "text", "text": "What is it?"}]
                content += [{"type": "image_url", "image_url": {"url": image}}] if image else []  # type: ignore[dict-item]
                asked = [{"role": "user", "content": content}]
                return client.chat.completions.create(
                    model="tiny", messages=asked, max_tokens=4, temperature=0, stream=stream
                )  # type: ignore[call-overload, no-any-return]

            answer = ask(f"data:image/png;base64,{picture}")
            assert answer.usage is not None and answer.usage.completion_tokens > 0
            blind = ask("").usage
            assert (
                blind is not None and answer.usage.prompt_tokens - blind.prompt_tokens == 16 + 1
            )  # patches and the template's newline
            streamed = list(ask(f"data:image/png;base64,{picture}", stream=True))
            assert len(streamed) > 1
            for elsewhere in ("file:///etc/hostname", f"{url}/health", "http://169.254.169.254/"):
                with pytest.raises(openai.BadRequestError) as caught:
                    ask(elsewhere)
                assert "must be in the request" in caught.value.response.text
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0).models.list()
            asked = urllib.request.Request(f"{url}/health", headers={"Origin": "https://evil.example"})
            assert "Access-Control-Allow-Origin" not in urllib.request.urlopen(asked).headers
    finally:
        registry.kill()


def _evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What the server's llama.cpp evaluates from now on: tokens, and the pixels of images by their digest."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    seen: list[int | str] = []
    eval, bitmap, image = llama_cpp.Llama.eval, mtmd_cpp.mtmd_bitmap_init, mtmd_cpp.mtmd_helper_eval_chunk_single

    def spied(model: llama_cpp.Llama, tokens: list[int]) -> None:
        seen.extend(tokens)
        eval(model, tokens)

    def looked(width: int, height: int, pixels: object) -> object:
        raw = bytes(ctypes.string_at(pixels, width * height * 3))  # type: ignore[arg-type]
        bitmaps.append(hashlib.sha256(raw).hexdigest())
        return bitmap(width, height, pixels)

    def encoded(*given: object) -> object:
        seen.append(bitmaps.pop(0))
        return image(*given)

    bitmaps: list[str] = []
    monkeypatch.setattr(llama_cpp.Llama, "eval", spied)
    monkeypatch.setattr(mtmd_cpp, "mtmd_bitmap_init", looked)
    monkeypatch.setattr(mtmd_cpp, "mtmd_helper_eval_chunk_single", encoded)
    return seen


def test_a_served_request_is_the_verified_one_token_for_token(
    bundle: Bundle, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    from stages.runtimes.gguf_header import read_vision_header
    from stages.runtimes.llamacpp import LlamaCppRuntime
    from stages.runtimes.llamacpp_vision import prepare_image
    from stages.runtimes.runtime import Request

    asked = "Is it <image>,\nor\nred? "
    text = {"type": "text", "text": asked}
    seeing, blind = bundle.folder / "model.gguf", tmp_path / "blind.gguf"
    shutil.copyfile(seeing, blind)
    url = f"data:image/png;base64,{base64.b64encode(images[0].read_bytes()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    vision = read_vision_header(bundle.folder / "mmproj.gguf")
    pixels = prepare_image(images[0].read_bytes(), vision, where=images[0])
    picture = hashlib.sha256(pixels.tobytes()).hexdigest()
    with LlamaCppRuntime(seeing, bundle.folder / "mmproj.gguf") as runtime:
        about, plain = (runtime._prepare(0, Request(asked, image=path)) for path in (images[0], None))
    contents: list[tuple[Path, object, bool]] = [
        (seeing, [image, text], True),
        (seeing, [text, image], True),
        (seeing, asked, False),
        (seeing, [text], False),
        (blind, asked, False),
        (blind, [text], False),
    ]
    for model, content, sees in contents:
        found, room = prepare(str(model), tmp_path)
        with application(found, room) as served, monkeypatch.context() as patched:
            seen = _evaluated(patched)
            question = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
            answer = TestClient(served).post("/v1/chat/completions", json=question).json()
        job = about if sees else plain
        verified = [*job.before, *([picture] if sees else []), *job.after]
        assert seen[: len(verified)] == verified
        assert answer["usage"]["completion_tokens"] > 0


def test_what_the_server_cannot_put_to_its_model_is_refused(
    bundle: Bundle, images: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastapi.testclient import TestClient

    blind = tmp_path / "blind.gguf"
    shutil.copyfile(bundle.folder / "model.gguf", blind)
    picture = base64.b64encode(images[0].read_bytes()).decode()
    for model, data, reason in (
        (blind, picture, "sees no images"),
        (bundle.folder / "model.gguf", base64.b64encode(b"no image").decode(), "not a readable image"),
    ):
        found, room = prepare(str(model), tmp_path)
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        with application(found, room) as served:
            question = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            answer = TestClient(served).post("/v1/chat/completions", json=question)
            question["messages"] = [{"role": "user", "content": "An image where there is none: <__media__>"}]
            assert TestClient(served).post("/v1/chat/completions", json=question).status_code == 200
        assert answer.status_code == 400 and reason in answer.text


def test_the_image_encoder_is_the_one_that_a_verification_finds(
    bundle: Bundle, tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    model, projector = tmp_path / "model.gguf", tmp_path / "mmproj-model-f16.gguf"
    for source, target in (("model.gguf", model), ("mmproj.gguf", projector)):
        shutil.copyfile(bundle.folder / source, target)
    assert find_model(str(model), tmp_path).mmproj == projector
    assert find_model(str(model), tmp_path, mmproj=Path("none")).mmproj is None
    shutil.copyfile(projector, tmp_path / "mmproj.gguf")
    with pytest.raises(RecipeError, match="2 image encoders lie beside"):
        find_model(str(model), tmp_path)
    assert find_model(str(model), tmp_path, mmproj=projector).mmproj == projector
    for name in (bundle.folder, tiny_verified["gguf"].path):
        with pytest.raises(RecipeError, match="--mmproj has no meaning for"):
            find_model(str(name), tmp_path, mmproj=projector)


def test_who_lacks_the_server_is_told_what_has_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python comes with `stages`, what it serves with comes with `publish`."""
    monkeypatch.setitem(sys.modules, "llama_cpp.server", None)
    with pytest.raises(StoreError, match=r"icet-pipeline\[stages,publish\]"):
        prepare(str(bundle.folder), tmp_path)


def test_the_context_is_what_the_device_has_room_for(bundle: Bundle, tmp_path: Path) -> None:
    _, planned = prepare(str(bundle.folder), tmp_path)
    assert (planned.context, planned.budget) == (512, 1 << 40)
    assert planned.predicted is not None and planned.predicted < 1 << 40
    assert prepare(str(bundle.folder), tmp_path, context=256)[1].context == 256
    small = _planned_for(bundle, tmp_path / "small", planned.predicted // 4)
    with pytest.raises(RecipeError, match="does not fit the device"):
        prepare(str(small.folder), tmp_path)


def test_keys_and_values_are_kept_as_the_memory_plan_counts_them(
    bundle: Bundle, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process of these tests takes a gigabyte, more with every test.
    monkeypatch.setattr("pipeline.commands.model._taken", lambda found: 0)
    small = _planned_for(bundle, tmp_path / "small", 1 << 30, kv_cache="Q8_0")
    found, room = prepare(str(small.folder), tmp_path)
    assert room.kv_cache == "Q8_0"
    assert room.predicted is not None and room.predicted < (prepare(str(bundle.folder), tmp_path)[1].predicted or 0)
    with application(found, room):
        pass  # llama.cpp takes the settings
    with open_chat(found, images[0], None, 4, room) as chat:
        assert isinstance("".join(chat.answer("What is this?")), str)


def _planned_for(bundle: Bundle, folder: Path, budget: int, **more: str) -> Bundle:
    plan = json.dumps({"device": "small", "budget": budget, "context": 512, **more}).encode()
    files = [
        BundleFile(name, plan if name == "memory.json" else bundle.folder / name, layer.media_type, "x")
        for name, layer in bundle.manifest.files.items()
    ]
    return write_bundle(folder, files, {"descriptor": {}, "config": {}}, bundle.manifest.annotations)


def test_a_conversation_takes_the_context_and_the_batch_of_the_plan(
    tiny_verified: dict[str, Artifact], images: list[Path], tmp_path: Path
) -> None:
    """More tokens at once than the plan counts with would take more memory than it allows."""
    from stages.runtimes.llamacpp import LlamaCppRuntime
    from stages.runtimes.llamacpp_library import library
    from stages.runtimes.rehearsal import DEFAULT_UBATCH

    found = find_model(str(tiny_verified["gguf"].path), tmp_path)
    with open_chat(found, images[0], None, 2, Room(1024)) as conversation:
        first = "".join(conversation.answer("What is it?"))
        assert isinstance(conversation.runtime, LlamaCppRuntime) and conversation.runtime._batch is not None
        pointer, lib = conversation.runtime._batch.context.pointer, library()
        assert (lib.llama_n_ctx(pointer), lib.llama_n_ubatch(pointer)) == (1024, DEFAULT_UBATCH)
        again = conversation.about(images[1])
        assert again.image == images[1] and "".join(conversation.answer("What is it?")) == first
        with pytest.raises(RecipeError, match="there is no image"):
            conversation.about(tmp_path / "none.png")


def test_another_picture_may_be_shown_in_a_conversation(
    tiny_verified: dict[str, Artifact], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path | None, str]] = []
    answer = Chat.answer

    def noted(self: Chat, prompt: str) -> Iterator[str]:
        asked.append((self.image, prompt))
        yield from answer(self, prompt)

    monkeypatch.setattr(Chat, "answer", noted)
    command = ["chat", str(tiny_verified["gguf"].path / "model.gguf"), "--image", str(images[0])]
    said = f"What is it?\n\n/image  {images[1]}\nAnd this?\n/image nowhere.png\nAnd this?\n"
    done = CliRunner().invoke(app, [*command, "--max-new-tokens", "2"], input=said)
    assert asked == [(images[0], "What is it?"), (images[1], "And this?")]
    assert done.exit_code == 2 and "there is no image nowhere.png" in done.output, done.output


def test_a_checkpoint_that_its_device_has_no_room_for_is_refused(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    made = tiny_verified["source"]
    for needed, device, fits in ((1 << 29, None, True), (1 << 31, None, False), (3 << 30, "laptop-8gb", True)):
        plan = {"device": "inline", "budget": 1 << 30, "context": 512, "predicted": needed}
        names = ["manifest.json", *(entry.path for entry in made.manifest.files)]
        files = [BundleFile(name, made.path / name, MEDIA_WEIGHTS, "model") for name in names]
        files.append(BundleFile("memory.json", json.dumps(plan).encode(), MEDIA_DOC, "memory"))
        bundle = write_bundle(tmp_path / f"{needed}", files, {"descriptor": {}, "config": {}}, {})
        found = find_model(str(bundle.folder), tmp_path)
        if fits:
            assert room_for(found, device, None).predicted == needed
        else:
            with pytest.raises(RecipeError, match="does not fit the device 'inline'"):
                room_for(found, device, None)
    with pytest.raises(RecipeError, match="is not known"):
        room_for(find_model(str(made.path), tmp_path), "laptop-8gb", None)
    (tmp_path / "unplanned").mkdir()
    plan = {"device": "inline", "budget": 1 << 30, "context": 512, "predicted": None, "measured": None}
    files[-1] = BundleFile("memory.json", json.dumps(plan).encode(), MEDIA_DOC, "memory")
    bundle = write_bundle(tmp_path / "unplanned", files, {"descriptor": {}, "config": {}}, {})
    found = find_model(str(bundle.folder), tmp_path)
    with pytest.raises(RecipeError, match="no figure for a checkpoint"):
        room_for(found, "laptop-8gb", None)
    assert room_for(found, None, None) == Room(0)


def test_a_policy_may_be_set_for_every_command(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(tmp_path / "signer.pem")
    (tmp_path / "policy.yaml").write_text("policy: 1\nsigners: [{key: signer.pub}]\n")
    monkeypatch.setenv("PIPELINE_POLICY", str(tmp_path / "policy.yaml"))
    for model, code, reason in (
        (str(bundle.folder), 3, "there is no signature"),
        (str(bundle.folder / "model.gguf"), 2, "is no bundle"),
    ):
        for command in (["chat", model, "--prompt", "x"], ["serve", model]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == code and reason in result.output, result.output


def test_a_policy_is_checked_before_anything_is_loaded(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle.folder, copy)
    key = write_key(tmp_path / "signer.pem")
    sign_bundle(Bundle.open(copy), Signer(key))
    with pytest.raises(GateError, match="no provenance attestation"):
        prepare(str(copy), tmp_path, policy=policy_of(key.with_suffix(".pub"), None))
    (copy / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(StoreError, match="damaged"):
        prepare(str(copy), tmp_path)


def test_what_a_policy_refuses_is_not_left_where_it_was_pulled_to(bundle: Bundle, tmp_path: Path) -> None:
    push(bundle, Layout(tmp_path / "dist"), "v1")
    key = write_key(tmp_path / "signer.pem")
    (tmp_path / "policy.yaml").write_text("policy: 1\nsigners: [{key: signer.pub}]\n")
    assert key.with_suffix(".pub").is_file()
    ask = [
        "pull",
        f"oci-layout:{tmp_path / 'dist'}:v1",
        str(tmp_path / "out"),
        "--policy",
        str(tmp_path / "policy.yaml"),
    ]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 3 and "there is no signature" in result.output
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_run_is_refused(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not run"):
        prepare(str(tiny_verified["source"].path), tmp_path)


def test_another_machine_gets_in_only_with_a_key(bundle: Bundle, tmp_path: Path) -> None:
    found, room = prepare(str(bundle.folder), tmp_path)
    with pytest.raises(RecipeError, match="other machines"):
        run_server(found, room, "0.0.0.0", 8080, None)


def test_a_bundle_a_reference_a_file_and_a_digest_answer_in_a_chat(
    bundle: Bundle, tiny_verified: dict[str, Artifact], images: list[Path], tmp_path: Path
) -> None:
    push(bundle, Layout(tmp_path / "dist"), "v1")
    said = []
    store = Store(cache_dir() / "store")
    store.prepare()
    copy = store.new_output("0" * 64)
    shutil.copytree(tiny_verified["gguf"].path, copy, dirs_exist_ok=True)
    digest = Artifact.open(copy).digest
    store.object_path(digest).parent.mkdir(parents=True, exist_ok=True)
    if not store.object_path(digest).exists():  # another test may have made the same
        copy.rename(store.object_path(digest))
    models = (bundle.folder, f"oci-layout:{tmp_path / 'dist'}:v1", bundle.folder / "model.gguf", digest[:12])
    for model in map(str, models):
        assert prepare(model, tmp_path)[0].model is not None
        ask = ["chat", model, "--image", str(images[0]), "--prompt", "What is it?", "--max-new-tokens", "3"]
        result = CliRunner().invoke(app, ask)
        assert result.exit_code == 0, result.output
        said.append(result.stdout)
    assert len(set(said)) == 1


def test_the_command_serves_within_the_memory_that_it_says_and_stops(
    bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.cli", "serve", str(bundle.folder), "--port", str(port)]
    command += ["--device", "laptop-2gb"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1, context 2048" in line
        try:
            for _ in range(600):
                try:
                    assert json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/health"))["context"] == 2048
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                raise AssertionError("it never answered")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
            picture = f"data:image/png;base64,{base64.b64encode(images[0].read_bytes()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "a cat " * 450}]
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": content}],
                max_tokens=4,  # type: ignore[list-item, misc]
            )
            assert answer.usage is not None and answer.usage.prompt_tokens > 900
            if (status := Path(f"/proc/{process.pid}/status")).is_file():
                peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) >> 10
                said = int(line.split("context 2048, ")[1].split()[0])
                assert peak <= said, f"{peak} MiB of {said}"
        finally:
            process.terminate()
        assert process.wait(30) is not None
