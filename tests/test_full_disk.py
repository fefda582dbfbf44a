"""Disks that are full and processes that are killed: nothing half is ever seen, one clear message, a rerun finishes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from layout_damage import layout_damage
from registry_setting import small_bundle
from rude_server import Answer, Planted, RudeServer

from artifacts.bundle import Bundle
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json
from artifacts.registry import transport
from artifacts.registry.manifest import EMPTY, MEDIA_EMPTY, MEDIA_INDEX, TITLE, Descriptor, OciManifest
from artifacts.registry.oci_layout import Layout, read_tags
from artifacts.registry.transfer import copy, pull, push
from pipeline.commands.pull import kept_bundle
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model
from stages.quantize.mmproj import write_mmproj

CLI = [sys.executable, "-m", "pipeline.cli"]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.02)


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[RudeServer, Planted]]:
    server = RudeServer()
    yield server, Planted(server, tmp_path, b"GGUF" + os.urandom(300_000))
    server.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def _files_of(size: int) -> Iterator[None]:
    """Inside, no file may become larger: of a tensor that is too long, less is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _limited(kilobytes: int, *command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run where no file may become larger: as on a disk that is full, every write beyond it fails."""
    shell = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command]
    environment = {**os.environ, "PIPELINE_HOME": str(home)}
    return subprocess.run(shell, capture_output=True, text=True, env=environment, cwd=home)


def test_what_does_not_fit_is_refused_before_anything_is_fetched(
    planted: tuple[RudeServer, Planted], disk: Path
) -> None:
    server, model = planted
    (disk / "others").write_bytes(bytes(300 << 10))
    with pytest.raises(StoreError, match="no room") as caught:
        pull(model.place, model.bundle.manifest, disk / "out")
    assert "bytes are missing" in str(caught.value) and not server.asked(model.path)
    assert not (disk / "out").exists()
    (disk / "others").unlink()
    assert pull(model.place, model.bundle.manifest, disk / "out").damage() == []


def test_a_disk_that_fills_while_a_model_arrives_is_one_message_and_a_rerun_goes_on(
    planted: tuple[RudeServer, Planted], disk: Path
) -> None:
    server, model = planted

    def fill() -> None:
        (disk / "others").write_bytes(bytes(350 << 10))

    server.plant(model.path, Answer(body=model.weights, piece=20_000, first=fill))
    with pytest.raises(StoreError, match="cannot be written here") as caught:
        pull(model.place, model.bundle.manifest, disk / "out")
    assert "No space left" in str(caught.value) and "what has arrived is kept" in str(caught.value)
    assert not (disk / "out").exists()
    (disk / "others").unlink()
    server.plant(model.path, Answer(body=model.weights))
    assert pull(model.place, model.bundle.manifest, disk / "out").damage() == []
    assert int(server.asked(model.path)[-1]["Range"].strip("bytes=-")) > 0
    assert sorted(path.name for path in disk.iterdir()) == ["out"]


def test_the_command_says_so_too_and_finishes_later(planted: tuple[RudeServer, Planted], tmp_path: Path) -> None:
    _, model = planted
    command = [*CLI, "pull", f"oci:{model.place.name.removeprefix('oci:')}@{model.bundle.digest}", "pulled"]
    done = _limited(100, *command, home=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be written here" in done.stderr and "File too large" in done.stderr
    assert not (tmp_path / "pulled").exists()
    assert _limited(1000, *command, home=tmp_path).returncode == 0
    assert Bundle.open(tmp_path / "pulled").damage() == []


def test_a_layout_on_a_full_disk_keeps_what_it_had(tmp_path: Path) -> None:
    old = push(small_bundle(tmp_path / "old"), Layout(tmp_path / "dist"), "v1")
    new = small_bundle(tmp_path / "new", os.urandom(300_000))
    command = [*CLI, "publish", str(new.folder), "--to", f"oci-layout:{tmp_path / 'dist'}:v1", "--allow-unverified"]
    done = _limited(100, *command, home=tmp_path)
    assert done.returncode == 1 and "the OCI layout cannot be written" in done.stderr, done.stderr
    assert read_tags(tmp_path / "dist") == {"v1": old} and layout_damage(tmp_path / "dist") == []
    assert not list((tmp_path / "dist").glob(".incoming-*"))
    assert _limited(1000, *command, home=tmp_path).returncode == 0
    assert read_tags(tmp_path / "dist")["v1"] not in (old, new.digest)  # marked
    assert layout_damage(tmp_path / "dist") == []


def test_a_folder_on_a_full_disk_does_not_appear(disk: Path, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "b", os.urandom(300_000))
    (disk / "others").write_bytes(bytes(300 << 10))
    with pytest.raises(StoreError, match="No space left"):
        copy(bundle, disk / "out")
    assert not (disk / "out").exists()
    (disk / "others").unlink()
    assert copy(bundle, disk / "out").damage() == []
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_conversion_that_fills_the_disk_says_so_and_leaves_room_again(tiny_llava: Path, tmp_path: Path) -> None:
    vision, written = tiny_llava_spec().vision, tmp_path / "written"
    assert vision is not None
    written.mkdir()
    with _files_of(100_000), pytest.raises(StoreError, match="the disk of the store is full"):
        convert_language_model(tiny_llava, written / "f16.gguf", tmp_path / "links", name="t", metadata={})
    with _files_of(100_000), pytest.raises(StoreError, match="the disk of the store is full"):
        write_mmproj(tiny_llava, written / "mmproj.gguf", vision, 2, name="t")
    assert not list(written.iterdir())
    convert_language_model(tiny_llava, written / "f16.gguf", tmp_path / "links", name="t", metadata={})
    write_mmproj(tiny_llava, written / "mmproj.gguf", vision, 2, name="t")
    assert min(path.stat().st_size for path in written.iterdir()) > 100_000


def test_a_pull_that_is_killed_at_any_moment_leaves_nothing_half_and_goes_on_later(
    planted: tuple[RudeServer, Planted], tmp_path: Path
) -> None:
    """Killed when it has half of an answer, of each that it gets."""
    server, model = planted
    bundle = model.bundle
    statement = b'{"made": 1}'
    layer = Descriptor.of_bytes(statement, "application/json", {TITLE: "provenance.intoto.json"})
    empty = Descriptor.of_bytes(EMPTY, MEDIA_EMPTY)
    referrer = OciManifest.make("application/json", empty, (layer,), {}, bundle.manifest.descriptor)
    index = canonical_json({"schemaVersion": 2, "manifests": [referrer.descriptor.to_dict()]})
    answers = {
        f"manifests/{bundle.digest}": bundle.manifest.data,
        **{f"blobs/{one.digest}": (bundle.folder / name).read_bytes() for name, one in bundle.manifest.files.items()},
        f"blobs/{bundle.manifest.config.digest}": bundle.config_bytes,
        f"referrers/{bundle.digest}": index,
        f"manifests/{referrer.digest}": referrer.data,
        f"blobs/{layer.digest}": statement,
    }
    headers = {"Content-Type": MEDIA_INDEX}
    for path, body in answers.items():
        server.plant(path, Answer(body=body, headers=headers))
    script = (
        "import sys; from pathlib import Path; from artifacts.registry.remote import Registry; "
        "from artifacts.registry.transfer import pull, resolve; place = Registry(sys.argv[1]); "
        "pull(place, resolve(place, sys.argv[2]), Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", script, server.name, bundle.digest, str(model.target)]
    for path, body in answers.items():
        with subprocess.Popen(command) as process:
            server.plant(path, Answer(body=body[: len(body) // 2], headers=headers, says=len(body)),
                         Answer(body=body, headers=headers, first=process.kill))  # fmt: skip
            assert process.wait() == -9, path
        server.plant(path, Answer(body=body, headers=headers))
        assert not model.target.exists()
    assert subprocess.run(command).returncode == 0
    found = Bundle.open(model.target)
    assert found.damage() == [] and [one.name for one in found.attestations()] == ["provenance.intoto.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


def test_a_second_pull_into_the_same_folder_is_refused_while_the_first_goes_on(
    planted: tuple[RudeServer, Planted],
) -> None:
    server, model = planted
    server.plant(model.path, Answer(body=model.weights, piece=100_000, pause=0.2))
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(model.pull) for _ in range(2)]
        failures = [str(one.exception()) for one in results if one.exception() is not None]
    assert len(failures) == 1 and "another process is pulling" in failures[0]
    assert Bundle.open(model.target).damage() == []


def test_a_model_that_is_wanted_twice_at_once_is_fetched_once(
    planted: tuple[RudeServer, Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model = planted
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    server.plant(model.path, Answer(body=model.weights, piece=100_000, pause=0.2))
    name = f"oci:{server.name}@{model.bundle.digest}"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(kept_bundle, [name, name])
    assert first.folder == second.folder and first.damage() == [] and len(server.asked(model.path)) == 1
