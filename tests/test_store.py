from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from artifacts.artifact import Artifact
from artifacts.errors import StageError, StoreError
from artifacts.locks import FileLock
from artifacts.manifest import Provenance
from artifacts.store import Damage, Store

KEY = "a" * 64
OTHER = "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


def put(store: Store, key: str = KEY, text: str = "hello", name: str = "sub/file.txt") -> Artifact:
    output = store.new_output(key)
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text(text)
    return store.add(key, output, "text", {"n": 1}, Provenance(stage="toy", key=key))


def write_over(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_what_was_added_is_found_again_by_its_key(store: Store) -> None:
    made = put(store)
    found = store.lookup(KEY)
    assert found is not None and found.digest == made.digest
    assert found.path == store.object_path(made.digest)
    assert found.file("sub/file.txt").read_text() == "hello"
    assert store.lookup(OTHER) is None
    assert list((store.root / "tmp").iterdir()) == []


def test_adding_the_same_bytes_twice_keeps_one_object(store: Store) -> None:
    assert put(store, KEY).digest == put(store, OTHER).digest
    assert len(store.digests()) == 1
    assert store.lookup(KEY) is not None and store.lookup(OTHER) is not None


def test_stored_objects_are_read_only(store: Store) -> None:
    made = put(store)
    for path in [made.path, *made.path.rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH), path


def test_a_changed_byte_is_noticed_even_when_size_and_modification_time_are_kept(store: Store) -> None:
    made = put(store)
    path = made.file("sub/file.txt")
    before = path.stat()
    write_over(path, b"hellO")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    reports: list[Damage] = []
    assert store.lookup(KEY, reports.append) is None
    assert len(reports) == 1 and "sub/file.txt" in str(reports[0])
    assert (reports[0].moved_to / "sub" / "file.txt").read_bytes() == b"hellO"
    assert store.lookup(KEY) is None
    assert put(store).digest == made.digest
    assert store.lookup(KEY) is not None


@pytest.mark.parametrize("what", ["truncated", "missing", "added", "manifest", "manifest-missing"])
def test_every_kind_of_damage_sets_an_entry_aside(store: Store, what: str) -> None:
    made = put(store)
    path = made.path / "sub" / "file.txt"
    for folder in (made.path, made.path / "sub"):
        folder.chmod(0o755)
    match what:
        case "truncated":
            write_over(path, b"he")
        case "missing":
            path.unlink()
        case "added":
            (made.path / "extra").write_text("x")
        case "manifest":
            write_over(made.path / "manifest.json", b"{")
        case "manifest-missing":
            (made.path / "manifest.json").unlink()
    reports: list[Damage] = []
    assert store.lookup(KEY, reports.append) is None
    assert len(reports) == 1
    assert store.digests() == []


def test_an_untouched_object_is_not_read_again_and_a_touched_one_is_digested(store: Store) -> None:
    made = put(store)
    path = made.file("sub/file.txt")
    stamp = (store.root / "stamps" / made.digest).read_bytes()
    path.chmod(0o000)  # changes its ctime; whoever is not root could not even read it
    path.chmod(0o444)
    assert store.lookup(KEY) is not None
    assert (store.root / "stamps" / made.digest).read_bytes() != stamp


def test_a_full_check_finds_what_no_stamp_shows(store: Store) -> None:
    made = put(store)
    write_over(made.path / "sub" / "file.txt", b"HELLO")
    # As if the disk had lost the bytes without any write: the stamp agrees with the file.
    import json

    from artifacts.store import _stamp

    (store.root / "stamps" / made.digest).write_text(json.dumps(_stamp(made.path)))
    assert store.lookup(KEY) is not None
    assert store.verify(made.digest) == ["sub/file.txt does not have the digest of its manifest"]
    assert [damage.digest for damage in store.check()] == [made.digest]
    assert store.lookup(KEY) is None


def test_an_output_with_a_link_is_refused(store: Store) -> None:
    output = store.new_output(KEY)
    (output / "link").symlink_to("/etc/hostname")
    with pytest.raises(StageError, match="not a plain file"):
        store.add(KEY, output, "text", {}, Provenance(stage="toy"))


def test_scratch_survives_until_the_work_is_stored(store: Store) -> None:
    (store.scratch(KEY) / "checkpoint").write_text("3")
    assert (store.attempt(KEY), store.attempt(KEY)) == (1, 2)
    assert (store.scratch(KEY) / "checkpoint").read_text() == "3"
    put(store)
    assert not (store.root / "scratch" / KEY).exists()
    assert store.attempt(KEY) == 1


def test_what_a_killed_attempt_left_in_tmp_is_removed_by_the_next(store: Store) -> None:
    left = store.new_output(KEY)
    (left / "half").write_text("x")
    other = store.new_output(OTHER)
    store.new_output(KEY)
    assert not left.exists() and other.exists()


def test_a_key_is_locked_by_one_and_free_when_its_holder_is_killed(store: Store) -> None:
    code = (
        "import sys, time; from pathlib import Path; from artifacts.store import Store\n"
        f"with Store(Path({str(store.root)!r})).lock({KEY!r}):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with store.lock(KEY, give_up=lambda: True) as taken:
        assert not taken
    holder.kill()
    holder.wait()
    with store.lock(KEY, give_up=lambda: True) as taken:
        assert taken
    holder.stdout.close()


def test_a_lock_file_that_its_holder_removed_locks_nobody_out(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.try_acquire() and not second.try_acquire()
    first.release(remove=True)
    assert second.try_acquire()
    assert not FileLock(tmp_path / "lock").try_acquire()
    second.release()


def test_many_threads_adding_and_reading_the_same_artifact_do_no_harm(store: Store) -> None:
    digests: list[str] = []

    def work(number: int) -> None:
        key = f"{number:064x}"
        for _ in range(5):
            digests.append(put(store, key, "same").digest)
            assert Store(store.root).lookup(key) is not None

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 30 and set(digests) == set(store.digests())
    assert list((store.root / "damaged").iterdir()) == []


def test_a_place_that_cannot_be_written_says_so_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(StoreError):
        Store(file / "store").prepare()
    if os.geteuid() != 0:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
        with pytest.raises(StoreError, match="PIPELINE_HOME"):
            Store(folder / "store").prepare()


def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from artifacts.disk import explained

    with (
        pytest.raises(StoreError, match="full") as caught,
        explained(tmp_path),
        Path("/dev/full").open("wb", 0) as handle,
    ):
        handle.write(b"x")
    assert caught.value.way_out is not None and "pipeline gc" in caught.value.way_out


def test_a_short_digest_opens_an_artifact_and_an_unknown_one_says_how_to_find_one(store: Store) -> None:
    made = put(store)
    assert store.open(made.digest[:8]).digest == made.digest
    with pytest.raises(StoreError, match="pipeline runs"):
        store.open("0" * 64)
