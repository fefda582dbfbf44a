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

from artifacts.errors import StoreError
from artifacts.manifest import sha256_bytes
from artifacts.registry import oci_layout as oci
from artifacts.registry.oci_layout import LayoutFile, layout_damage, read_tags, write_layout

CONFIG = {"descriptor": {"name": "tiny"}, "config": {"format": "gguf", "quantization": "Q4_0"}}
NEEDS_SKOPEO = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (apt install skopeo)")


def _files(folder: Path, weights: bytes = b"GGUF" + bytes(range(256)) * 64) -> list[LayoutFile]:
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(weights)
    (folder / "recipe.yaml").write_text("recipe: 1\n")
    return [
        LayoutFile(folder / "model.gguf", oci.MEDIA_WEIGHTS, "model.gguf", sha256=sha256_bytes(weights)),
        LayoutFile(folder / "recipe.yaml", oci.MEDIA_DOC, "recipe.yaml", {"org.example.role": "recipe"}),
    ]


def _manifest(target: Path, digest: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((target / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    return found


def test_a_layout_holds_what_the_specification_asks_for(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    digest = write_layout(target, _files(tmp_path / "in"), CONFIG, {"org.opencontainers.image.title": "tiny"}, "v1")

    assert layout_damage(target) == []
    assert json.loads((target / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((target / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    assert index["manifests"][0]["digest"] == digest
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
    digest = write_layout(target, _files(tmp_path / "in"), CONFIG, {}, "v1")

    raw = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{target}:v1"], capture_output=True, check=True).stdout
    assert f"sha256:{sha256_bytes(raw)}" == digest
    copy = tmp_path / "copy"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{target}:v1", f"oci:{copy}:again"], check=True)
    assert read_tags(copy) == {"again": digest}
    assert layout_damage(copy) == []


def test_the_same_input_gives_the_same_digest_anywhere(tmp_path: Path) -> None:
    first = write_layout(tmp_path / "a", _files(tmp_path / "in"), CONFIG, {"b": "2", "a": "1"}, "v1")
    second = write_layout(
        tmp_path / "b", _files(tmp_path / "other"), dict(reversed(CONFIG.items())), {"a": "1", "b": "2"}, "v2"
    )
    assert first == second


def test_a_second_tag_joins_the_layout_and_the_same_tag_moves(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    one = write_layout(target, _files(tmp_path / "in"), CONFIG, {}, "v1")
    two = write_layout(target, _files(tmp_path / "in", b"other"), CONFIG, {}, "v2")
    assert read_tags(target) == {"v1": one, "v2": two}
    moved = write_layout(target, _files(tmp_path / "in", b"third"), CONFIG, {}, "v1")
    assert read_tags(target) == {"v1": moved, "v2": two}
    assert layout_damage(target) == []


def test_a_good_blob_is_reused_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    target, files = tmp_path / "dist", _files(tmp_path / "in")
    digest = write_layout(target, files, CONFIG, {}, "v1")
    blob = target / "blobs/sha256" / str(files[0].sha256)
    before = blob.stat().st_ino
    assert write_layout(target, files, CONFIG, {}, "v1") == digest
    assert blob.stat().st_ino == before

    blob.write_bytes(b"X" * blob.stat().st_size)
    assert layout_damage(target) != []
    assert write_layout(target, files, CONFIG, {}, "v1") == digest
    assert layout_damage(target) == []


def test_editing_a_published_blob_leaves_the_source_alone(tmp_path: Path) -> None:
    files = _files(tmp_path / "in")
    write_layout(tmp_path / "dist", files, CONFIG, {}, "v1")
    assert not files[0].path.samefile(tmp_path / "dist/blobs/sha256" / str(files[0].sha256))


def test_a_file_that_is_not_the_verified_one_is_refused_and_the_old_layout_stays(tmp_path: Path) -> None:
    target, files = tmp_path / "dist", _files(tmp_path / "in")
    digest = write_layout(target, files, CONFIG, {}, "v1")
    shutil.rmtree(target / "blobs")
    shutil.copytree(tmp_path / "in", tmp_path / "spare")
    write_layout(target, files, CONFIG, {}, "v1")
    (tmp_path / "in" / "model.gguf").write_bytes(b"tampered")
    with pytest.raises(StoreError, match="not the file that was verified"):
        write_layout(target, files, CONFIG, {}, "v1")
    assert read_tags(target) == {"v1": digest}
    assert layout_damage(target) == []
    assert not list(target.glob(".incoming-*"))


@pytest.mark.parametrize("moment", ["blob", "index"])
def test_a_killed_write_leaves_the_old_layout_valid(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "dist"
    digest = write_layout(target, _files(tmp_path / "in"), CONFIG, {}, "v1")
    new = tmp_path / "new.gguf"
    new.write_bytes(b"new weights" * 1000)
    script = textwrap.dedent(
        f"""
        import os, sys
        from pathlib import Path
        from artifacts.registry import oci_layout as oci
        keep, replace = oci._keep, oci._replace
        def die(*arguments):
            os.kill(os.getpid(), 9)
        if {moment!r} == "blob":
            oci._keep = die
        else:
            oci._replace = lambda target, name, data: die() if name == "index.json" else replace(target, name, data)
        files = [oci.LayoutFile(Path({str(new)!r}), oci.MEDIA_WEIGHTS, "model.gguf")]
        oci.write_layout(Path({str(target)!r}), files, {{}}, {{}}, "v1")
        """
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert read_tags(target) == {"v1": digest}
    assert layout_damage(target) == []
    write_layout(target, _files(tmp_path / "in"), CONFIG, {}, "v2")
    assert not list(target.glob(".incoming-*"))


def test_two_writers_at_once_lose_no_tag(tmp_path: Path) -> None:
    files = _files(tmp_path / "in")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_layout(tmp_path / "dist", files, CONFIG, {"n": str(n)}, f"v{n}"), range(8)))
    assert sorted(read_tags(tmp_path / "dist")) == [f"v{n}" for n in range(8)]
    assert layout_damage(tmp_path / "dist") == []


def test_a_place_that_cannot_be_written_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        write_layout(tmp_path / "file" / "dist", _files(tmp_path / "in"), CONFIG, {}, "v1")
    assert caught.value.way_out and "free some space" in caught.value.way_out


def test_a_damaged_index_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "dist"
    target.mkdir()
    (target / "index.json").write_text("{torn")
    with pytest.raises(StoreError, match="index of this OCI layout"):
        write_layout(target, _files(tmp_path / "in"), CONFIG, {}, "v1")
    assert (target / "index.json").read_text() == "{torn"


@pytest.mark.parametrize("tag", ["", "-v1", "a b", "a/b", "x" * 129, "v1\n"])
def test_a_tag_that_no_registry_would_take_is_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(StoreError, match="no OCI tag"):
        write_layout(tmp_path / "dist", _files(tmp_path / "in"), CONFIG, {}, tag)


def test_a_title_that_would_unpack_elsewhere_is_refused(tmp_path: Path) -> None:
    files = [LayoutFile(tmp_path / "x", oci.MEDIA_DOC, "../x")]
    with pytest.raises(StoreError, match="outside its folder"):
        write_layout(tmp_path / "dist", files, CONFIG, {}, "v1")


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_every_file_comes_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("layout")
    files = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.bin"
        path.write_bytes(content)
        files.append(LayoutFile(path, oci.MEDIA_DOC, path.name))
    digest = write_layout(folder / "dist", files, CONFIG, {}, "v1")
    layers = _manifest(folder / "dist", digest)["layers"]
    assert isinstance(layers, list)
    stored = [(folder / "dist/blobs/sha256" / layer["digest"].removeprefix("sha256:")).read_bytes() for layer in layers]
    assert stored == contents
    assert layout_damage(folder / "dist") == []
