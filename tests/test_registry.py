"""Push and pull against a real registry that is killed on the way, and against servers that misbehave."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_setting import NEEDS_REGISTRY, RegistryServer, attest, small_bundle

from artifacts.artifact import Artifact
from artifacts.bundle import Bundle
from artifacts.errors import RecipeError, StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry import remote
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_INDEX, MEDIA_MANIFEST, Descriptor, OciManifest
from artifacts.registry.place import Place, Reference, looks_like_reference
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import attestations_of, pull, push, resolve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed (apt install docker-registry)")
    server = RegistryServer(tmp_path_factory.mktemp("registry"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.02)


def test_a_bundle_goes_there_and_back_with_what_attests_it(server: RegistryServer, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b")
    attest(bundle, "model.sigstore.json", b'{"signed": 1}')
    attest(bundle, "provenance.intoto.json", b'{"made": 1}')
    place = Reference.parse(f"{server.host}/me/tiny").open()
    assert push(bundle, place, "v1") == push(bundle, place, "v1") == push(bundle, place, "v2") == bundle.digest
    assert place.tags() == ["v1", "v2"]
    assert resolve(place, "v1").data == resolve(place, bundle.digest).data == bundle.manifest.data

    pulled = pull(place, resolve(place, "v2"), tmp_path / "out")
    assert pulled.damage() == [] and pulled.digest == bundle.digest
    assert {path.name: path.read_bytes() for path in pulled.attestations()} == {
        "model.sigstore.json": b'{"signed": 1}',
        "provenance.intoto.json": b'{"made": 1}',
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


def test_plain_http_sees_the_same_manifest(server: RegistryServer, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b")
    push(bundle, Registry(f"{server.host}/me/plain"), "v1")
    assert f"sha256:{sha256_bytes(server.get('me/plain/manifests/' + bundle.digest))}" == bundle.digest
    weights = bundle.manifest.files["model.gguf"]
    assert server.get(f"me/plain/blobs/{weights.digest}") == (bundle.folder / "model.gguf").read_bytes()


class _Counting:
    """A place that dies after so many of a registry's requests, and comes back with it."""

    def __init__(self, server: RegistryServer, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests = 0
        once = Registry._once

        def counted(registry: Registry, method: str, url: str, **rest: object) -> object:
            self.requests += 1
            if self.requests == at:
                server.kill()
                threading.Timer(0.1, server.start).start()
            return once(registry, method, url, **rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Registry, "_once", counted)


@NEEDS_REGISTRY
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 7, 9, 12, 16, 20])
def test_a_registry_that_is_killed_in_the_middle_of_a_push_gets_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.1)
    server = RegistryServer(tmp_path / "registry")
    server.start()
    try:
        bundle = small_bundle(tmp_path / "b", os.urandom(300_000))
        attest(bundle, "provenance.intoto.json", b"{}")
        place = Registry(f"{server.host}/me/tiny", piece=64 << 10)
        counting = _Counting(server, at, monkeypatch)
        assert push(bundle, place, "v1") == bundle.digest
        assert counting.requests > at
        pulled = pull(place, resolve(place, "v1"), tmp_path / "out")
        assert pulled.damage() == [] and len(pulled.attestations()) == 1
    finally:
        server.kill()


def test_an_upload_goes_on_where_it_broke_off(
    server: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle(tmp_path / "b", os.urandom(400_000))
    place = Registry(f"{server.host}/me/resumed", piece=100_000)
    sent: list[int] = []
    piece = remote._piece

    def noted(source: Path | bytes, start: int, length: int) -> bytes:
        sent.append(start)
        if sent.count(200_000) == 1 and start == 200_000:
            raise remote._UnreachableError("the line went dead")
        return piece(source, start, length)

    monkeypatch.setattr(remote, "_piece", noted)
    push(bundle, place, "v1")
    of_weights = [start for start in sent if start]
    assert of_weights == [100_000, 200_000, 200_000, 300_000]


def test_a_tag_appears_only_when_everything_is_there(server: RegistryServer, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b")
    attest(bundle, "provenance.intoto.json", b"{}")
    place = Registry(f"{server.host}/me/late", tries=1)
    real, seen = place.put_manifest, []

    def watched(data: bytes, tag: str | None = None, subject: Descriptor | None = None) -> None:
        seen.append((tag, place.tags(), len(place.referrers(bundle.digest))))
        real(data, tag, subject)

    place.put_manifest = watched  # type: ignore[method-assign]
    push(bundle, place, "v1")
    assert seen[-1] == ("v1", [], 1) and all(tag is None for tag, _, _ in seen[:-1])


@NEEDS_REGISTRY
def test_credentials_come_from_docker_or_the_environment_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "s3cret-w0rd"
    hashed = bcrypt.hashpw(secret.encode(), bcrypt.gensalt(4)).decode()
    (tmp_path / "htpasswd").write_text(f"me:{hashed}\n")
    server = RegistryServer(tmp_path / "registry", htpasswd=tmp_path / "htpasswd")
    server.start()
    caplog.set_level(logging.DEBUG)
    try:
        monkeypatch.setenv("HOME", str(tmp_path))
        bundle = small_bundle(tmp_path / "b")
        with pytest.raises(StoreError, match="docker login"):
            Registry(f"{server.host}/me/tiny")
        monkeypatch.setenv("ORAS_USER", "me")
        monkeypatch.setenv("ORAS_PASS", "wrong")
        with pytest.raises(StoreError, match="does not let us in") as caught:
            push(bundle, Registry(f"{server.host}/me/tiny", tries=1), "v1")
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("ORAS_PASS", secret)
        assert push(bundle, Registry(f"{server.host}/me/tiny"), "v1") == bundle.digest
    finally:
        server.kill()
    said = caplog.text + "".join(capfd.readouterr())
    assert secret not in said


# Servers that misbehave


class _Rude(BaseHTTPRequestHandler):
    """Answers with what a test planted: path -> list of answers, the last of which stays."""

    planted: dict[str, list[tuple[int, dict[str, str], bytes]]]
    seen: list[tuple[str, str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, self.headers.get("Range", "")))
        answers = self.planted.get(self.path, [(404, {}, b"{}")])
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class RudeServer:
    """One repository, `rude/model`, that answers as planted."""

    def __init__(self) -> None:
        self.handler = type("Handler", (_Rude,), {"planted": {}, "seen": []})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.name = f"127.0.0.1:{self._server.server_address[1]}/rude/model"

    def plant(self, path: str, *answers: tuple[int, dict[str, str], bytes]) -> None:
        self.handler.planted[f"/v2/rude/model/{path}"] = list(answers)

    def plant_bundle(self, bundle: Bundle) -> None:
        self.plant(f"manifests/{bundle.digest}", (200, {}, bundle.manifest.data))
        self.plant(f"blobs/{bundle.manifest.config.digest}", (200, {}, bundle.config_bytes))
        for name, layer in bundle.manifest.files.items():
            self.plant(f"blobs/{layer.digest}", (200, {}, (bundle.folder / name).read_bytes()))

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def rude() -> Iterator[RudeServer]:
    server = RudeServer()
    yield server
    server.close()


@pytest.fixture
def planted(rude: RudeServer, tmp_path: Path) -> tuple[Bundle, Place, Callable[[], Bundle]]:
    """A bundle, the place that has it, and a pull of it."""
    bundle = small_bundle(tmp_path / "b")
    rude.plant_bundle(bundle)
    place = Registry(rude.name, timeout=(1.0, 0.5), tries=3)
    return bundle, place, lambda: pull(place, resolve(place, bundle.digest), tmp_path / "out")


Planted = tuple[Bundle, Place, Callable[[], Bundle]]


def _weights(bundle: Bundle) -> tuple[str, bytes]:
    return f"blobs/{bundle.manifest.files['model.gguf'].digest}", (bundle.folder / "model.gguf").read_bytes()


def test_errors_and_answers_that_break_off_are_taken_up_again(
    rude: RudeServer, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _, pulled = planted
    path, data = _weights(bundle)
    monkeypatch.setattr(remote, "_READ", 1000)
    half, size = 8000, {"Content-Length": str(len(data))}
    wrong, right = ({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} for start in (9, half))
    rude.plant(
        path,
        (500, {}, b""),
        (503, {}, b""),
        (200, size, data[:half]),
        (206, wrong, data[9:]),
        (206, right, data[half:]),
    )
    rude.plant(f"manifests/{bundle.digest}", (500, {}, b""), (200, {}, bundle.manifest.data))
    assert pulled().damage() == []
    assert [seen for seen in rude.handler.seen if seen[1].endswith(path)][-1][2] == f"bytes={half}-"


def test_a_server_without_ranges_is_read_from_the_beginning(rude: RudeServer, planted: Planted) -> None:
    bundle, _, pulled = planted
    path, data = _weights(bundle)
    rude.plant(path, (200, {"Content-Length": str(len(data))}, data[:1000]), (200, {}, data))
    assert pulled().damage() == []


@pytest.mark.parametrize("kind", ["500", "truncated", "longer", "other", "slow", "gone"])
def test_what_stays_broken_is_said_clearly_and_leaves_nothing_half(
    rude: RudeServer, planted: Planted, tmp_path: Path, kind: str
) -> None:
    bundle, _, pulled = planted
    path, data = _weights(bundle)
    bad, reason = {
        "500": ((500, {}, b""), "cannot be reached"),
        "truncated": ((200, {"Content-Length": str(len(data))}, b"GG"), "cannot be reached"),
        "longer": ((200, {}, data + b"more"), "more was sent"),
        "other": ((200, {}, bytes(len(data))), "is not what the manifest says"),
        "slow": ((200, {"Content-Length": str(len(data))}, b""), "cannot be reached"),
        "gone": ((404, {}, b"{}"), "is not there"),
    }[kind]
    rude.plant(path, bad)
    with pytest.raises(StoreError, match=reason):
        pulled()
    assert not (tmp_path / "out").exists()
    rude.plant(path, (200, {}, data))
    assert pulled().damage() == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["b", "out"]


def test_a_full_disk_is_one_message_and_a_rerun_finishes(planted: Planted, tmp_path: Path) -> None:
    bundle, place, _ = planted
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        with pytest.raises(StoreError, match="no room"):
            pull(place, bundle.manifest, disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert pull(place, bundle.manifest, disk / "out").damage() == []
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# Manifests that lie


def _manifest(*titles: str, size: int = 2, **more: object) -> bytes:
    digest = f"sha256:{sha256_bytes(b'{}')}"
    layers = [
        {
            "mediaType": MEDIA_DOC,
            "digest": digest,
            "size": size,
            "annotations": {"org.opencontainers.image.title": name},
        }
        for name in titles
    ]
    config = {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": digest, "size": 2}
    content = {
        "schemaVersion": 2, "mediaType": MEDIA_MANIFEST, "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": config, "layers": layers, **more,
    }  # fmt: skip
    return canonical_json(content)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a//b", "./x", "", "a\\..\\x", "C:x", "a\x00b", "a\nb", "oci/manifest.json",
     "attestations/model.sigstore.json", "OCI/config.json", "x/", "NUL", "a/con.txt", "x.", "x" * 600],
)  # fmt: skip
def test_a_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="is refused"):
        OciManifest.parse(_manifest(name), "test")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "A"), ("a", "a/b"), ("a/b", "a"), ("\u00e9", "e\u0301")])
def test_two_names_that_are_one_on_some_disk_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(StoreError, match="would be one on disk"):
        OciManifest.parse(_manifest(*names), "test")


@pytest.mark.parametrize("size", [-1, True, "2", None, 1.5])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(StoreError, match="no size"):
        OciManifest.parse(_manifest("a", size=size), "test")  # type: ignore[arg-type]


def test_a_size_that_lies_is_noticed_while_streaming(rude: RudeServer, tmp_path: Path) -> None:
    place = Registry(rude.name, tries=1)
    for size, reason in ((1, "more was sent"), (3, "cannot be reached")):
        data = _manifest("a", size=size)
        digest = f"sha256:{sha256_bytes(data)}"
        rude.plant(f"manifests/{digest}", (200, {}, data))
        rude.plant(f"blobs/sha256:{sha256_bytes(b'{}')}", (200, {}, b"{}"))
        with pytest.raises(StoreError, match=reason):
            pull(place, resolve(place, digest), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_indexes_are_never_followed(rude: RudeServer) -> None:
    index = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [{"mediaType": MEDIA_INDEX}]})
    rude.plant("manifests/v1", (200, {}, index))
    place = Registry(rude.name, tries=1)
    with pytest.raises(StoreError, match="an index stands here"):
        resolve(place, "v1")
    assert len([seen for seen in rude.handler.seen if "manifests" in seen[1]]) == 1


def test_a_manifest_that_is_not_its_digest_too_large_or_no_json_is_refused(rude: RudeServer) -> None:
    place, digest = Registry(rude.name, tries=1), "sha256:" + "0" * 64
    rude.plant(f"manifests/{digest}", (200, {}, _manifest("a")))
    with pytest.raises(StoreError, match="not the one that was asked for"):
        resolve(place, digest)
    for body in (b"x" * (5 << 20), b"[" * 100_000, b"\xff", b"[]", b'{"schemaVersion": 1}'):
        rude.plant("manifests/v1", (200, {}, body))
        with pytest.raises(StoreError, match=r"too large|cannot be read|no OCI image manifest"):
            resolve(place, "v1")


def test_referrers_that_nest_lie_or_speak_of_others_are_refused(rude: RudeServer) -> None:
    place, model = Registry(rude.name, tries=1), OciManifest.parse(_manifest("a"), "test")

    def referring(*entries: dict[str, object]) -> None:
        body = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": list(entries)})
        rude.plant(f"referrers/{model.digest}", (200, {"Content-Type": MEDIA_INDEX}, body))

    other = _manifest("a.intoto.json", subject={"mediaType": MEDIA_MANIFEST, "digest": "sha256:" + "1" * 64, "size": 9})
    entry = Descriptor.of_bytes(other, MEDIA_MANIFEST)
    rude.plant(f"manifests/{entry.digest}", (200, {}, other))
    for one, reason in (
        ({**entry.to_dict(), "mediaType": MEDIA_INDEX}, "nests"),
        (entry.to_dict(), "about another model"),
        ({**entry.to_dict(), "size": entry.size + 1}, "not what its entry says"),
        ({**entry.to_dict(), "size": 1 << 40}, "too large"),
    ):
        referring(one)
        with pytest.raises(StoreError, match=reason):
            list(attestations_of(place, model))


def test_links_in_the_way_are_not_followed(planted: Planted, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").symlink_to(victim)
    with pytest.raises(StoreError, match="is there already"):
        planted[2]()
    (tmp_path / "out").unlink()
    (tmp_path / "out.partial").symlink_to(victim)
    assert planted[2]().damage() == []
    assert list(victim.iterdir()) == []


def test_a_link_planted_into_a_half_pulled_folder_is_not_written_through(planted: Planted, tmp_path: Path) -> None:
    bundle, _, pulled = planted
    partial = tmp_path / "out.partial"
    (partial / "oci").mkdir(parents=True)
    (partial / "oci" / "manifest.json").write_bytes(bundle.manifest.data)
    (tmp_path / "precious").write_text("mine")
    (partial / "model.gguf").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError):
        pulled()
    assert (tmp_path / "precious").read_text() == "mine"


# Names


@pytest.mark.parametrize(
    ("text", "kind", "repository", "reference"),
    [
        ("localhost:5000/a/b:v1", "registry", "localhost:5000/a/b", "v1"),
        ("oci:ghcr.io/me/model", "registry", "ghcr.io/me/model", ""),
        ("oci://ghcr.io/me/model:v1@sha256:" + "a" * 64, "registry", "ghcr.io/me/model", "sha256:" + "a" * 64),
        ("oci-layout:dist/x", "layout", "dist/x", ""),
        ("oci-layout:./dist:v1", "layout", "dist", "v1"),
    ],
)
def test_names_are_understood(text: str, kind: str, repository: str, reference: str) -> None:
    found = Reference.parse(text)
    assert (found.kind, found.repository, found.reference) == (kind, repository, reference)
    assert looks_like_reference(text)


@pytest.mark.parametrize("text", ["dist", "./dist/x", "gguf", "run:gguf", "/abs/path", "quickstart-20261124:gguf"])
def test_folders_and_stages_are_no_references(text: str) -> None:
    assert not looks_like_reference(text)


def test_a_name_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(RecipeError) as caught:
        Reference.parse("oci:me:s3cret@ghcr.io/me/model:v1")
    assert "s3cret" not in str(caught.value)


@given(text=st.text(max_size=60))
def test_no_name_breaks_the_parser(text: str) -> None:
    with suppress(RecipeError, StoreError):
        Reference.parse(text)


def test_what_was_pulled_is_an_artifact_like_any_other(server: RegistryServer, tmp_path: Path) -> None:
    from run_folder import RunFolder

    from artifacts.bundle import BundleFile, write_bundle

    made = RunFolder(tmp_path / "made").artifacts["gguf"]
    names = ["manifest.json", *(entry.path for entry in made.manifest.files)]
    files = [BundleFile(name, made.path / name, MEDIA_DOC, "x") for name in names]
    bundle = write_bundle(tmp_path / "b", files, {"descriptor": {"name": "x"}, "config": {}}, {})
    place = Registry(f"{server.host}/me/artifact")
    push(bundle, place, "v1")
    pulled = pull(place, resolve(place, "v1"), tmp_path / "out")
    assert Artifact.open(pulled.folder).digest == made.digest
    assert json.loads((pulled.folder / "oci" / "config.json").read_bytes())["modelfs"]["type"] == "layers"
