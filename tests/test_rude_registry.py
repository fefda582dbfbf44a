"""Registries that misbehave: what passes is taken up again, what stays broken is said clearly, nothing half is seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_setting import small_bundle
from rude_server import Answer, Planted, RudeServer

from artifacts.errors import StoreError
from artifacts.registry import transport
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import pull, push, resolve


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.02)


@pytest.fixture
def rude() -> Iterator[RudeServer]:
    server = RudeServer()
    yield server
    server.close()


@pytest.fixture
def planted(rude: RudeServer, tmp_path: Path) -> Planted:
    return Planted(rude, tmp_path)


def test_errors_and_answers_that_break_off_are_taken_up_again(rude: RudeServer, planted: Planted) -> None:
    data, half = planted.weights, 8000
    wrong, right = ({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} for start in (9, half))
    rude.plant(
        planted.path,
        Answer(500),
        Answer(503),
        Answer(body=data[:half], says=len(data)),
        Answer(206, data[9:], wrong),
        Answer(206, data[half:], right),
    )
    manifest = planted.bundle.manifest.data
    rude.plant(
        f"manifests/{planted.bundle.digest}", Answer(500), Answer(body=manifest[:9], says=len(manifest)),
        Answer(body=manifest),
    )  # fmt: skip
    assert planted.pull().damage() == []
    assert rude.asked(planted.path)[-1]["Range"] == f"bytes={half}-"


def test_a_server_without_ranges_is_read_from_the_beginning(rude: RudeServer, planted: Planted) -> None:
    data = planted.weights
    rude.plant(planted.path, Answer(body=data[:1000], says=len(data)), Answer(body=data))
    assert planted.pull().damage() == []


def test_an_answer_that_pauses_is_waited_for_and_one_that_stops_is_asked_for_again(
    rude: RudeServer, planted: Planted
) -> None:
    data = planted.weights
    stops = Answer(body=data, piece=len(data) // 2, pause=0.8)  # longer than this place waits for a byte
    pauses = Answer(
        206, data[5000:], {"Content-Range": f"bytes 5000-{len(data) - 1}/{len(data)}"}, piece=3000, pause=0.05
    )
    rude.plant(planted.path, stops, Answer(body=data[:5000], says=len(data)), pauses)
    assert planted.pull().damage() == []


def test_a_server_that_sends_a_byte_now_and_then_does_not_hold_us(
    rude: RudeServer, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_PATIENCE", 0.2)
    rude.plant(planted.path, Answer(body=planted.weights, piece=1, pause=0.05))
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        planted.pull()
    assert "bytes a second, 3 times" in str(caught.value)
    assert not planted.target.exists()


@pytest.mark.parametrize("kind", ["500", "truncated", "longer", "other", "gone", "compressed", "empty"])
def test_what_stays_broken_is_said_clearly_and_leaves_nothing_half(
    rude: RudeServer, planted: Planted, tmp_path: Path, kind: str
) -> None:
    import gzip

    data = planted.weights
    bad, reason = {
        "500": (Answer(500), "cannot be reached"),
        "truncated": (Answer(body=b"GG", says=len(data)), "cannot be reached"),
        "longer": (Answer(body=data + b"more"), "more was sent"),
        "other": (Answer(body=bytes(len(data))), "is not what the manifest says"),
        "gone": (Answer(404), "is not there"),
        "compressed": (Answer(body=gzip.compress(bytes(1 << 25)), headers={"Content-Encoding": "gzip"}), "more was"),
        "empty": (Answer(), "cannot be reached"),
    }[kind]
    rude.plant(planted.path, bad)
    with pytest.raises(StoreError, match=reason):
        planted.pull()
    assert not planted.target.exists()
    rude.plant(planted.path, Answer(body=data))
    assert planted.pull().damage() == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["b", "out"]


def test_other_bytes_that_a_pull_left_behind_do_not_spoil_the_next(rude: RudeServer, planted: Planted) -> None:
    data = planted.weights
    for left, asked in ((bytes(5000), 2), (bytes(len(data)), 1), (data + b"more", 1), (data[:5000], 1)):
        rude.plant(planted.path, Answer(404))
        with pytest.raises(StoreError, match="is not there"):
            planted.pull()
        (planted.target.with_name("out.partial") / "model.gguf").write_bytes(left)
        rude.plant(planted.path, Answer(body=data))
        before = len(rude.asked(planted.path))
        assert planted.pull().damage() == []
        assert len(rude.asked(planted.path)) == before + asked
        shutil.rmtree(planted.target)


def test_a_registry_that_takes_pieces_and_forgets_them_is_given_up(rude: RudeServer, tmp_path: Path) -> None:
    """Each lie would be an endless loop for who believes that what was sent is there."""
    bundle = small_bundle(tmp_path / "b")
    upload = {"Location": "/v2/rude/model/blobs/uploads/1"}
    rude.plant("blobs/uploads/", Answer(202, headers=upload), method="POST")
    config, place = bundle.manifest.config.digest, Registry(rude.name, tries=3)
    for kept in ({"Range": "0-0"}, {}):
        rude.plant("blobs/uploads/1", Answer(202, headers={**upload, **kept}), method="PATCH")
        rude.plant(f"blobs/uploads/1?digest={config}", Answer(400), method="PUT")
        with pytest.raises(StoreError, match="cannot be reached") as caught:
            push(bundle, place, "v1")
        assert "3 times" in str(caught.value)


def test_another_host_that_the_registry_names_gets_no_credentials(
    rude: RudeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORAS_USER", "me")
    monkeypatch.setenv("ORAS_PASS", "s3cret-w0rd")
    bundle, other = small_bundle(tmp_path / "b"), RudeServer()
    challenge = {"WWW-Authenticate": 'Basic realm="models"'}
    try:
        for server in (rude, other):
            server.handler.planted["/v2/"] = [Answer(401, headers=challenge)]
        elsewhere = f"http://{other.host}/v2/rude/model"
        rude.plant_bundle(bundle)
        for digest in [bundle.manifest.config.digest, *(layer.digest for layer in bundle.manifest.layers)]:
            rude.plant(f"blobs/{digest}", Answer(401, headers=challenge),
                       Answer(307, headers={"Location": f"{elsewhere}/blobs/{digest}"}))  # fmt: skip
            other.plant(f"blobs/{digest}", Answer(401, headers=challenge))
        place = Registry(rude.name, tries=1)
        with pytest.raises(StoreError, match="does not let us in"):
            pull(place, resolve(place, bundle.digest), tmp_path / "out")
        rude.plant("blobs/uploads/", Answer(202, headers={"Location": f"{elsewhere}/blobs/uploads/1"}), method="POST")
        rude.plant(f"blobs/{bundle.manifest.config.digest}", Answer(404))
        other.plant("blobs/uploads/1", Answer(401, headers=challenge), method="PATCH")
        with pytest.raises(StoreError, match="does not let us in"):
            push(bundle, place, "v1")
        assert other.handler.seen and not any("Authorization" in headers for _, _, headers in other.handler.seen)
        assert any("Authorization" in headers for _, _, headers in rude.handler.seen)
    finally:
        other.close()
