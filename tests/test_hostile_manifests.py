"""What a stranger sent: names that lead elsewhere, sizes that lie, indexes, links in the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry_setting import attest, small_bundle
from rude_server import Answer, Planted, RudeServer

from artifacts.bundle import Bundle
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_INDEX, MEDIA_MANIFEST, Descriptor, OciManifest
from artifacts.registry.oci_layout import Layout
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import attestations_of, pull, push, resolve


@pytest.fixture
def rude() -> Iterator[RudeServer]:
    server = RudeServer()
    yield server
    server.close()


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
        rude.plant(f"manifests/{digest}", Answer(body=data))
        rude.plant(f"blobs/sha256:{sha256_bytes(b'{}')}", Answer(body=b"{}"))
        with pytest.raises(StoreError, match=reason):
            pull(place, resolve(place, digest), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_indexes_are_never_followed(rude: RudeServer) -> None:
    index = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [{"mediaType": MEDIA_INDEX}]})
    rude.plant("manifests/v1", Answer(body=index))
    place = Registry(rude.name, tries=1)
    with pytest.raises(StoreError, match="an index stands here"):
        resolve(place, "v1")
    assert len(rude.asked("manifests/v1")) == 1


def test_a_manifest_that_is_not_its_digest_too_large_or_no_json_is_refused(rude: RudeServer) -> None:
    place, digest = Registry(rude.name, tries=1), "sha256:" + "0" * 64
    rude.plant(f"manifests/{digest}", Answer(body=_manifest("a")))
    with pytest.raises(StoreError, match="not the one that was asked for"):
        resolve(place, digest)
    for body in (b"x" * (5 << 20), b"[" * 100_000, b"\xff", b"[]", b'{"schemaVersion": 1}'):
        rude.plant("manifests/v1", Answer(body=body))
        with pytest.raises(StoreError, match=r"too large|cannot be read|no OCI image manifest"):
            resolve(place, "v1")


def test_referrers_that_lie_or_speak_of_others_are_refused(rude: RudeServer) -> None:
    place, model = Registry(rude.name, tries=1), OciManifest.parse(_manifest("a"), "test")

    def referring(*entries: dict[str, object]) -> None:
        body = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": list(entries)})
        rude.plant(f"referrers/{model.digest}", Answer(body=body, headers={"Content-Type": MEDIA_INDEX}))

    subject = {"mediaType": MEDIA_MANIFEST, "digest": "sha256:" + "1" * 64, "size": 9}
    other = _manifest("a.intoto.json", subject=subject, artifactType="application/vnd.in-toto+json")
    entry = Descriptor.of_bytes(other, MEDIA_MANIFEST)
    rude.plant(f"manifests/{entry.digest}", Answer(body=other))
    for one, reason in (
        (entry.to_dict(), "about another model"),
        ({**entry.to_dict(), "size": entry.size + 1}, "not what its entry says"),
        ({**entry.to_dict(), "size": 1 << 40}, "too large"),
    ):
        referring(one)
        with pytest.raises(StoreError, match=reason):
            list(attestations_of(place, model))
    referring(*({**entry.to_dict(), "digest": f"sha256:{number:064}"} for number in range(300)))
    with pytest.raises(StoreError, match="300 attestations, at most"):
        list(attestations_of(place, model))


def test_a_list_of_referrers_goes_on_for_some_pages_on_the_same_host(rude: RudeServer) -> None:
    place, model = Registry(rude.name, tries=1), OciManifest.parse(_manifest("a"), "test")
    entry = Descriptor.of_bytes(b"{}", MEDIA_MANIFEST)
    body = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [entry.to_dict()]})

    def page(link: str) -> Answer:
        return Answer(body=body, headers={"Content-Type": MEDIA_INDEX, **({"Link": link} if link else {})})

    first, second = f"referrers/{model.digest}", f"referrers/{model.digest}?last=1"
    rude.plant(first, page(f'</v2/rude/model/{second}>; rel="next"'))
    rude.plant(second, page(""))
    assert place.referrers(model.digest) == [entry, entry]
    for link, reason in ((f"</v2/rude/model/{second}>", "does not end"), ("<http://127.0.0.1:9/x>", "elsewhere")):
        rude.plant(second, page(f'{link}; rel="next"'))
        with pytest.raises(StoreError, match=reason):
            place.referrers(model.digest)


def test_links_in_the_way_are_not_followed(rude: RudeServer, tmp_path: Path) -> None:
    planted = Planted(rude, tmp_path)
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").symlink_to(victim)
    with pytest.raises(StoreError, match="is there already"):
        planted.pull()
    (tmp_path / "out").unlink()
    (tmp_path / "out.partial").symlink_to(victim)
    assert planted.pull().damage() == []
    assert list(victim.iterdir()) == []


def test_a_link_planted_into_a_half_pulled_folder_is_not_written_through(rude: RudeServer, tmp_path: Path) -> None:
    planted = Planted(rude, tmp_path)
    partial = tmp_path / "out.partial"
    (partial / "oci").mkdir(parents=True)
    (partial / "oci" / "manifest.json").write_bytes(planted.bundle.manifest.data)
    (tmp_path / "precious").write_text("mine")
    (partial / "model.gguf").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError):
        planted.pull()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def layout(tmp_path: Path) -> tuple[Layout, Bundle]:
    """A model with an attestation, in a layout on disk."""
    bundle = small_bundle(tmp_path / "b")
    attest(bundle, "provenance.intoto.json", b'{"made": 1}')
    push(bundle, Layout(tmp_path / "dist"), "v1")
    return Layout(tmp_path / "dist"), bundle


def _huge(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole; whoever reads it whole is killed


def _link(path: Path) -> None:
    precious = path.parent / "elsewhere"
    path.rename(precious)
    path.symlink_to(precious)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # whoever opens it to read waits for ever


@pytest.mark.parametrize("harm", [_huge, _link, _pipe])
def test_a_layouts_index_manifests_and_blobs_are_plain_and_small(
    layout: tuple[Layout, Bundle], tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    place, bundle = layout
    blobs = place.folder / "blobs" / "sha256"

    def refused(path: Path, reason: str) -> None:
        kept = path.read_bytes()
        harm(path)
        with pytest.raises(StoreError, match=reason):
            pull(place, resolve(place, "v1"), tmp_path / "out")
        path.unlink()
        path.write_bytes(kept)
        assert not (tmp_path / "out").exists()

    refused(place.folder / "index.json", "index of this OCI layout cannot be read")
    refused(blobs / bundle.manifest.descriptor.hex, r"cannot be read|too large")
    refused(blobs / bundle.manifest.files["model.gguf"].hex, r"cannot be read|more was sent")
    (attestation,) = place.referrers(bundle.digest)
    harm(blobs / attestation.hex)
    assert place.referrers(bundle.digest) == []  # nothing that says whose it is
    assert pull(place, resolve(place, "v1"), tmp_path / "out").attestations() == []
    assert push(bundle, place, "v2") == bundle.digest and place.referrers(bundle.digest) == [attestation]


def test_a_layouts_index_that_nests_or_leads_elsewhere_is_refused(layout: tuple[Layout, Bundle]) -> None:
    place, bundle = layout
    for entry, reason in (
        ({"digest": "sha256:../../../etc/passwd"}, "there is no v3"),
        ({"digest": bundle.digest, "mediaType": MEDIA_INDEX}, ""),
        ({"digest": 7}, "no list of descriptors"),
    ):
        tagged = {**entry, "size": 2, "annotations": {"org.opencontainers.image.ref.name": "v3"}}
        (place.folder / "index.json").write_bytes(canonical_json({"schemaVersion": 2, "manifests": [tagged]}))
        if reason:
            with pytest.raises(StoreError, match=reason):
                resolve(place, "v3")
        else:
            assert resolve(place, "v3").digest == bundle.digest  # what counts is what stands there
    index = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [{"mediaType": MEDIA_INDEX}]})
    entry = Descriptor.of_bytes(index, MEDIA_INDEX, {"org.opencontainers.image.ref.name": "v3"})
    place.put_blob(entry, index)
    (place.folder / "index.json").write_bytes(canonical_json({"schemaVersion": 2, "manifests": [entry.to_dict()]}))
    with pytest.raises(StoreError, match="an index stands here"):
        resolve(place, "v3")
