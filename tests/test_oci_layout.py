"""The OCI layout: what is written can be read by standard tools, survives a kill, and is the same every time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_damage import layout_damage
from registry_setting import attest, attest_as_others

from artifacts.bundle import Bundle, BundleFile, write_bundle
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_INDEX, MEDIA_WEIGHTS, Descriptor
from artifacts.registry.oci_layout import Layout, read_tags
from artifacts.registry.transfer import attestations_of, pull, push, resolve

CONFIG = {"descriptor": {"name": "tiny"}, "config": {"format": "gguf", "quantization": "Q4_0"}}
NEEDS_SKOPEO = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (apt install skopeo)")


def _bundle(folder: Path, weights: bytes = b"GGUF" + bytes(range(256)) * 64) -> Bundle:
    files = [
        BundleFile("model.gguf", weights, MEDIA_WEIGHTS, "model", sha256=sha256_bytes(weights)),
        BundleFile("recipe.yaml", b"recipe: 1\n", MEDIA_DOC, "recipe"),
    ]
    return write_bundle(folder, files, CONFIG, {"org.opencontainers.image.title": "tiny"})


def _manifest(target: Path, digest: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((target / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    return found


def test_a_layout_holds_what_the_specification_asks_for(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    digest = push(_bundle(tmp_path / "in"), Layout(target), "v1")

    assert layout_damage(target) == []
    assert json.loads((target / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((target / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    assert [entry["digest"] for entry in index["manifests"]] == [digest]
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
    manifest = _manifest(target, digest)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    layers = manifest["layers"]
    assert isinstance(layers, list)
    assert [layer["annotations"]["org.opencontainers.image.title"] for layer in layers] == ["model.gguf", "recipe.yaml"]
    config = manifest["config"]
    assert isinstance(config, dict)
    assert _manifest(target, config["digest"])["modelfs"] == {
        "type": "layers",
        "diffIds": [layer["digest"] for layer in layers],
    }
    assert sorted(path.name for path in target.iterdir()) == ["blobs", "index.json", "oci-layout"]


@NEEDS_SKOPEO
def test_skopeo_inspects_and_copies_it(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    digest = push(_bundle(tmp_path / "in"), Layout(target), "v1")

    raw = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{target}:v1"], capture_output=True, check=True).stdout
    assert f"sha256:{sha256_bytes(raw)}" == digest
    copy = tmp_path / "copy"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{target}:v1", f"oci:{copy}:again"], check=True)
    assert read_tags(copy) == {"again": digest}
    assert layout_damage(copy) == []


def test_a_second_tag_joins_the_layout_and_the_same_tag_moves(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    one = push(_bundle(tmp_path / "one"), Layout(target), "v1")
    two = push(_bundle(tmp_path / "two", b"other"), Layout(target), "v2")
    assert read_tags(target) == {"v1": one, "v2": two}
    moved = push(_bundle(tmp_path / "three", b"third"), Layout(target), "v1")
    assert read_tags(target) == {"v1": moved, "v2": two}
    assert layout_damage(target) == []


def test_a_good_blob_is_reused_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    target, bundle = tmp_path / "dist", _bundle(tmp_path / "in")
    digest = push(bundle, Layout(target), "v1")
    blob = target / "blobs/sha256" / bundle.manifest.files["model.gguf"].hex
    before = blob.stat().st_ino
    assert push(bundle, Layout(target), "v1") == digest
    assert blob.stat().st_ino == before

    blob.write_bytes(b"X" * blob.stat().st_size)
    assert layout_damage(target) != []
    assert push(bundle, Layout(target), "v1") == digest
    assert layout_damage(target) == []


def test_editing_a_published_blob_leaves_the_source_alone(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "in")
    push(bundle, Layout(tmp_path / "dist"), "v1")
    blob = tmp_path / "dist/blobs/sha256" / bundle.manifest.files["model.gguf"].hex
    assert not (bundle.folder / "model.gguf").samefile(blob)


def test_a_damaged_bundle_is_not_published_and_the_old_layout_stays(tmp_path: Path) -> None:
    target, bundle = tmp_path / "dist", _bundle(tmp_path / "in")
    digest = push(bundle, Layout(target), "v1")
    (bundle.folder / "model.gguf").write_bytes(b"tampered")
    with pytest.raises(StoreError, match="bundle is damaged"):
        push(bundle, Layout(target), "v1")
    assert read_tags(target) == {"v1": digest}
    assert layout_damage(target) == []
    assert not list(target.glob(".incoming-*"))


@pytest.mark.parametrize("moment", ["blob", "index"])
def test_a_killed_write_leaves_the_old_layout_valid(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "dist"
    digest = push(_bundle(tmp_path / "old"), Layout(target), "v1")
    new = _bundle(tmp_path / "new", b"new weights" * 1000)
    script = textwrap.dedent(
        f"""
        import os
        from pathlib import Path
        from artifacts.bundle import Bundle
        from artifacts.registry import oci_layout as oci
        from artifacts.registry.transfer import push
        replace = oci._replace
        def die(*arguments):
            os.kill(os.getpid(), 9)
        if {moment!r} == "blob":
            oci._keep = die
        else:
            oci._replace = lambda target, name, data: die() if name == "index.json" else replace(target, name, data)
        push(Bundle.open(Path({str(new.folder)!r})), oci.Layout(Path({str(target)!r})), "v1")
        """
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert read_tags(target) == {"v1": digest}
    assert layout_damage(target) == []
    push(new, Layout(target), "v2")
    assert not list(target.glob(".incoming-*"))


def test_two_writers_at_once_lose_no_tag(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "in")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: push(bundle, Layout(tmp_path / "dist"), f"v{n}"), range(8)))
    assert sorted(read_tags(tmp_path / "dist")) == [f"v{n}" for n in range(8)]
    assert layout_damage(tmp_path / "dist") == []


def test_a_place_that_cannot_be_written_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        push(_bundle(tmp_path / "in"), Layout(tmp_path / "file" / "dist"), "v1")
    assert caught.value.way_out and "free some space" in caught.value.way_out


def test_a_damaged_index_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    target.mkdir()
    (target / "index.json").write_text("{torn")
    with pytest.raises(StoreError, match="index of this OCI layout"):
        push(_bundle(tmp_path / "in"), Layout(target), "v1")
    assert (target / "index.json").read_text() == "{torn"


@pytest.mark.parametrize("tag", ["", "-v1", "a b", "a/b", "x" * 129, "v1\n"])
def test_a_tag_that_no_registry_would_take_is_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(StoreError, match="no OCI tag"):
        push(_bundle(tmp_path / "in"), Layout(tmp_path / "dist"), tag)


def test_what_attests_a_model_lies_beside_it_and_goes_with_it(tmp_path: Path) -> None:
    layout, bundle = Layout(tmp_path / "dist"), _bundle(tmp_path / "in")
    attest(bundle, "provenance.intoto.json", b'{"a": 1}')
    push(bundle, layout, "v1")
    push(bundle, layout, "v1")
    manifest = resolve(layout, "v1")
    assert list(attestations_of(layout, manifest)) == [("provenance.intoto.json", b'{"a": 1}')]
    assert layout.tags() == ["v1"] and layout_damage(tmp_path / "dist") == []
    push(_bundle(tmp_path / "other", b"other"), layout, "v1")
    assert layout.referrers(manifest.digest) == []


def test_what_other_tools_keep_beside_a_model_is_passed_over(tmp_path: Path) -> None:
    layout, bundle = Layout(tmp_path / "dist"), _bundle(tmp_path / "in")
    attest(bundle, "provenance.intoto.json", b'{"a": 1}')
    push(bundle, layout, "v1")
    attest_as_others(layout, bundle.manifest)
    nested = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [],
                             "subject": bundle.manifest.descriptor.to_dict()})  # fmt: skip
    entry = Descriptor.of_bytes(nested, MEDIA_INDEX)
    layout.put_blob(entry, nested)
    index = json.loads((tmp_path / "dist" / "index.json").read_bytes())
    # Written by a tool that leaves the artifact types out.
    index["manifests"] = [{k: v for k, v in one.items() if k != "artifactType"} for one in index["manifests"]]
    index["manifests"].append(entry.to_dict())
    (tmp_path / "dist" / "index.json").write_text(json.dumps(index))
    assert len(layout.referrers(bundle.digest)) == 5
    pulled = pull(layout, resolve(layout, "v1"), tmp_path / "out")
    assert [path.name for path in pulled.attestations()] == ["provenance.intoto.json"]


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_every_file_comes_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("many")
    files = [BundleFile(f"{n}.bin", content, MEDIA_DOC, "doc") for n, content in enumerate(contents)]
    bundle = write_bundle(folder / "in", files, CONFIG, {})
    layout = Layout(folder / "dist")
    assert push(bundle, layout, "v1") == bundle.digest
    pulled = pull(layout, resolve(layout, bundle.digest), folder / "out")
    assert [(pulled.folder / name).read_bytes() for name in pulled.manifest.files] == contents
    assert pulled.damage() == [] and pulled.digest == bundle.digest
