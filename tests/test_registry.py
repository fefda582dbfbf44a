"""Push and pull against a real registry: killed on the way, behind a bad line, and behind a password."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import get_args

import bcrypt
import pytest
import requests
from registry_setting import NEEDS_REGISTRY, RegistryServer, attest, attest_as_others, small_bundle
from rude_server import BadLine, Fault
from token_server import TokenServer

from artifacts.artifact import Artifact
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry import remote, transport
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_INDEX, Descriptor
from artifacts.registry.place import Place, Reference
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import attestations_of, pull, push, resolve
from artifacts.registry.transport import Transport, UnreachableError


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
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.02)


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


@NEEDS_REGISTRY
def test_loopback_is_loopback_in_ip_version_6_too(tmp_path: Path) -> None:
    if not Path("/proc/net/if_inet6").exists() or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 here")
    server = RegistryServer(tmp_path / "registry", address="[::1]")
    server.start()
    try:
        bundle, place = small_bundle(tmp_path / "b"), Reference.parse(f"oci:{server.host}/me/tiny").open()
        assert push(bundle, place, "v1") == bundle.digest
        assert pull(place, resolve(place, "v1"), tmp_path / "out").damage() == []
    finally:
        server.kill()


def test_what_other_tools_keep_beside_a_model_is_passed_over(server: RegistryServer, tmp_path: Path) -> None:
    bundle, place = small_bundle(tmp_path / "b"), Registry(f"{server.host}/me/signed-by-others")
    push(bundle, place, "v1")
    attest_as_others(place, bundle.manifest)
    nested = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": []})
    known = json.loads(place.manifest(bundle.digest.replace(":", "-")))
    known["manifests"].append(Descriptor.of_bytes(nested, MEDIA_INDEX).to_dict())
    for tag, data in (("nested", nested), (bundle.digest.replace(":", "-"), canonical_json(known))):
        url, headers = f"http://{server.host}/v2/me/signed-by-others/manifests/{tag}", {"Content-Type": MEDIA_INDEX}
        assert requests.put(url, data=data, headers=headers).status_code == 201
    attest(bundle, "provenance.intoto.json", b'{"made": 1}')
    push(bundle, place, "v2")
    assert len(place.referrers(bundle.digest)) == 5  # what others put there stays
    pulled = pull(place, resolve(place, "v1"), tmp_path / "out")
    assert [path.name for path in pulled.attestations()] == ["provenance.intoto.json"]


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
        once = Transport.once

        def counted(way: Transport, method: str, url: str, **rest: object) -> object:
            self.requests += 1
            if self.requests == at:
                server.kill()
                threading.Timer(0.1, server.start).start()
            return once(way, method, url, **rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Transport, "once", counted)


@NEEDS_REGISTRY
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 7, 9, 12, 16, 20])
def test_a_registry_that_is_killed_in_the_middle_of_a_push_gets_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.1)
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
            raise UnreachableError("the line went dead")
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
def test_a_push_survives_a_fault_at_every_one_of_its_requests(server: RegistryServer, tmp_path: Path) -> None:
    """The faults take turns."""
    bundle = small_bundle(tmp_path / "b", os.urandom(150_000))
    attest(bundle, "provenance.intoto.json", b"{}")
    line, faults = BadLine(server.port), cycle(get_args(Fault))

    def pushed(at: int) -> Place:
        way = Registry(f"{line.set(next(faults), at).host}/me/bad-line-{at}", timeout=(1.0, 0.4), piece=64 << 10)
        assert push(bundle, way, "v1") == bundle.digest
        return Registry(f"{server.host}/me/bad-line-{at}")

    try:
        pushed(0)
        for at in range(1, line.requests + 1):
            place = pushed(at)
            assert place.tags() == ["v1"] and resolve(place, "v1").data == bundle.manifest.data
            assert [name for name, _ in attestations_of(place, bundle.manifest)] == ["provenance.intoto.json"]
    finally:
        line.close()


@NEEDS_REGISTRY
def test_a_pull_survives_a_fault_at_every_one_of_its_requests(server: RegistryServer, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b", os.urandom(150_000))
    attest(bundle, "provenance.intoto.json", b"{}")
    push(bundle, Registry(f"{server.host}/me/pulled"), "v1")
    line = BadLine(server.port)

    def pulled(fault: Fault, at: int) -> None:
        place = Registry(f"{line.set(fault, at).host}/me/pulled", timeout=(1.0, 0.4))
        found = pull(place, resolve(place, "v1"), tmp_path / f"out-{fault}-{at}")
        assert found.damage() == [] and len(found.attestations()) == 1

    try:
        pulled("500", 0)
        for at in range(1, line.requests + 1):
            for fault in ("500", "half") if at % 2 else ("late", "refused"):
                pulled(fault, at)
    finally:
        line.close()


@NEEDS_REGISTRY
def test_a_line_that_stays_bad_is_said_clearly_and_a_rerun_finishes(server: RegistryServer, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b", os.urandom(150_000))
    line = BadLine(server.port)
    place = Registry(f"{line.host}/me/stays-bad", tries=3, piece=64 << 10)
    try:
        for at in (1, 4, 7, 10):
            line.set("500", at, times=1000)
            with pytest.raises(StoreError, match="cannot be reached") as caught:
                push(bundle, place, "v1")
            assert "it answers 500, 3 times" in str(caught.value) and place.name in str(caught.value)
            assert Registry(f"{server.host}/me/stays-bad").tags() == []
        line.set(None)
        assert push(bundle, place, "v1") == bundle.digest
    finally:
        line.close()


@NEEDS_REGISTRY
def test_credentials_come_from_docker_or_the_environment_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "s3cret-w0rd"
    hashed = bcrypt.hashpw(secret.encode(), bcrypt.gensalt(4)).decode()
    (tmp_path / "htpasswd").write_text(f"me:{hashed}\n")
    server = RegistryServer(tmp_path / "registry", f"htpasswd: {{realm: models, path: {tmp_path / 'htpasswd'}}}")
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
        monkeypatch.delenv("ORAS_USER")
        config = tmp_path / ".docker" / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps({"auths": {server.host: {"auth": b64encode(f"me:{secret}".encode()).decode()}}}))
        assert Registry(f"{server.host}/me/tiny").tags() == ["v1"]
        helper = tmp_path / "bin" / "docker-credential-vault"
        helper.parent.mkdir()
        helper.write_text(f"#!/bin/sh\nprintf '%s' '{json.dumps({'Username': 'me', 'Secret': secret})}'\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{helper.parent}{os.pathsep}{os.environ['PATH']}")
        config.write_text(json.dumps({"auths": {}, "credHelpers": {server.host: "vault"}}))
        assert Registry(f"{server.host}/me/tiny").tags() == ["v1"]
    finally:
        server.kill()
    said = caplog.text + "".join(capfd.readouterr())
    assert secret not in said and b64encode(f"me:{secret}".encode()).decode() not in said


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TokenServer, RegistryServer]]:
    """A registry that takes tokens, as Docker Hub and Harbor do; `me` is logged in."""
    given = TokenServer(tmp_path, "s3cret-w0rd")
    server = RegistryServer(tmp_path / "registry", given.auth)
    server.start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ORAS_USER", "me")
    monkeypatch.setenv("ORAS_PASS", "s3cret-w0rd")
    yield given, server
    server.kill()
    given.close()


@NEEDS_REGISTRY
def test_a_token_for_reading_gives_way_to_one_for_writing(
    tokens: tuple[TokenServer, RegistryServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, server = tokens
    bundle = small_bundle(tmp_path / "b")
    attest(bundle, "provenance.intoto.json", b'{"made": 1}')
    assert push(bundle, Registry(f"{server.host}/me/tiny"), "v1") == bundle.digest
    assert [{*scope.rpartition(":")[2].split(",")} for scope in given.scopes] == [{"pull"}, {"pull", "push"}]
    monkeypatch.delenv("ORAS_USER")
    place = Registry(f"{server.host}/me/tiny")
    assert pull(place, resolve(place, "v1"), tmp_path / "out").damage() == []
    other = small_bundle(tmp_path / "c", b"GGUF other")
    with pytest.raises(StoreError, match="does not let us in"):
        push(other, place, "v1")
    monkeypatch.setenv("ORAS_USER", "somebody")
    with pytest.raises(StoreError, match="does not let us in"):
        push(other, Registry(f"{server.host}/me/tiny"), "v1")


@NEEDS_REGISTRY
def test_a_token_that_ends_in_the_middle_of_a_transfer_is_replaced(
    tokens: tuple[TokenServer, RegistryServer], tmp_path: Path
) -> None:
    given, server = tokens
    given.seconds = 3.0
    bundle, place = small_bundle(tmp_path / "b"), Registry(f"{server.host}/me/brief")

    def later(name: str, done: int, total: int) -> None:
        time.sleep(3.1 if name == "model.gguf" else 0)

    assert push(bundle, place, "v1", later) == bundle.digest
    assert sum("push" in scope for scope in given.scopes) > 1
    before = len(given.scopes)
    assert pull(place, resolve(place, "v1"), tmp_path / "out", later).damage() == []
    assert len(given.scopes) > before


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
