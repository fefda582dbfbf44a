"""The store: where artifacts live, addressed by digest, and found again by content key.

    objects/<digest>/     one artifact, read-only once it is in place
    keys/<content key>    JSON `{"digest": ...}`: which artifact that work gave
    stamps/<digest>       size, times and inode of each file when its digest was last checked
    scratch/<key>/        a stage's checkpoints; survives a crash, goes when the work is done
    tmp/  damaged/        unfinished outputs; entries that no longer match their digest
    locks/                one a key, held while that work is done; dies with its process
    leases/  runs/        what active runs hold; the runs folders whose runs refer to objects

- An object appears by rename, after its bytes are on disk: a reader sees all of it or nothing.
- Several processes may share a store. What they do to it happens under a shared lock; only `gc` takes it alone.
- Damage is noticed on every lookup. Reading gigabytes each time would cost more than the work it guards, so a lookup
  compares size, modification and change time and inode with those of the last full check, and digests the files again
  only when one differs. `verify` and `check` always read every byte.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.artifact import Artifact
from artifacts.disk import explained, force_remove, fsync_tree, make_read_only, write_atomically
from artifacts.errors import StageError, StoreError
from artifacts.locks import FileLock, holding
from artifacts.manifest import Manifest, Provenance, sha256_bytes

_FOLDERS = ("objects", "keys", "stamps", "scratch", "tmp", "damaged", "locks", "leases", "runs")


@dataclass(frozen=True)
class Damage:
    """A store entry that no longer matches its digest, and where it was put."""

    digest: str
    reasons: tuple[str, ...]
    moved_to: Path

    def __str__(self) -> str:
        return f"artifact {self.digest[:12]} was damaged ({'; '.join(self.reasons)}); set aside in {self.moved_to}"


def _ignore(_: Damage) -> None:
    return None


@dataclass
class Store:
    """A store at `root`; nothing is created before `prepare` or the first write."""

    root: Path
    _lease: Path | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Create the folders and prove that they can be written.

        Raises:
            StoreError: the place cannot be written, or the disk is full.
        """
        with explained(self.root):
            for name in _FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with self._shared():
                probe = self.root / "tmp" / f"probe-{uuid.uuid4().hex}"
                probe.write_bytes(b"x")
                probe.unlink()

    # Reading

    def peek(self, key: str) -> Artifact | None:
        """The artifact of that key, looked up without checking it, moving anything or taking a lock."""
        digest = self._digest_of(key)
        if digest is None:
            return None
        try:
            return Artifact.open(self.object_path(digest))
        except StoreError:
            return None

    def lookup(self, key: str, on_damage: Callable[[Damage], None] = _ignore) -> Artifact | None:
        """The artifact that the work behind `key` gave, if it is here and sound.

        A damaged one is set aside, reported through `on_damage`, and counts as absent.
        """
        with explained(self.root), self._shared():
            digest = self._digest_of(key)
            if digest is None:
                return None
            artifact = self._sound(digest, on_damage)
            if artifact is None:
                (self.root / "keys" / key).unlink(missing_ok=True)
            return artifact

    def open(self, digest: str, on_damage: Callable[[Damage], None] = _ignore) -> Artifact:
        """The artifact of a digest, which may be shortened to what is still unique (8 digits or more).

        Raises:
            StoreError: not here, not unique, or damaged (it is set aside then).
        """
        found = [path.name for path in (self.root / "objects").glob(f"{digest}*")] if len(digest) >= 8 else []
        if len(found) != 1:
            raise StoreError(
                f"no artifact {digest} in the store" if not found else f"{digest} fits {len(found)} artifacts",
                where=str(self.root),
                way_out="`pipeline runs` lists the digests of each run",
            )
        with explained(self.root), self._shared():
            reported: list[Damage] = []
            artifact = self._sound(found[0], reported.append)
            for damage in reported:
                on_damage(damage)
            if artifact is None:
                raise StoreError(
                    str(reported[0]) if reported else f"artifact {digest} is gone",
                    way_out="run its recipe again: the stage that made it is done anew",
                )
            return artifact

    def object_path(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def digests(self) -> list[str]:
        """Every artifact here, sorted."""
        return sorted(path.name for path in (self.root / "objects").glob("*"))

    def verify(self, digest: str) -> list[str]:
        """Read every byte of one artifact; the differences in words, empty when all is well."""
        with explained(self.root), self._shared():
            return self._differences(digest, full=True)

    def check(self) -> list[Damage]:
        """Read every byte of every artifact; damaged ones are set aside and returned."""
        found: list[Damage] = []
        with explained(self.root), self._shared():
            for digest in self.digests():
                reasons = self._differences(digest, full=True)
                if reasons:
                    found.append(self._set_aside(digest, reasons))
        return found

    # Writing

    @contextmanager
    def lock(self, key: str, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Be the only one to do the work behind `key`; yields False if `give_up()` came true while waiting."""
        lock = FileLock(self.root / "locks" / key)
        with explained(self.root):
            taken = lock.acquire(give_up=give_up)
        try:
            yield taken
        finally:
            lock.release()

    def guard(self, key: str) -> Path:
        """The lock file that the process doing the work holds, so that an orphan never shares a scratch folder."""
        return self.root / "locks" / f"{key}.worker"

    def new_output(self, key: str) -> Path:
        """A fresh empty folder for the work behind `key`; what killed attempts left is removed. Hold the key's lock."""
        with explained(self.root):
            for left in (self.root / "tmp").glob(f"{key}-*"):
                force_remove(left)
            folder = self.root / "tmp" / f"{key}-{uuid.uuid4().hex[:8]}"
            folder.mkdir(parents=True)
        return folder

    def discard(self, output: Path) -> None:
        """Remove the folder of an attempt that came to nothing."""
        force_remove(output)

    def scratch(self, key: str) -> Path:
        """The folder of the checkpoints of `key`, found again after a crash."""
        folder = self.root / "scratch" / key
        with explained(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def attempt(self, key: str) -> int:
        """Count one more attempt at `key`: 1 for the first, more when earlier ones did not finish."""
        counter = self.root / "scratch" / f"{key}.attempts"
        with explained(self.root):
            counter.parent.mkdir(parents=True, exist_ok=True)
            count = 1 + (int(counter.read_text() or "0") if counter.exists() else 0)
            counter.write_text(str(count))
        return count

    def add(
        self, key: str, folder: Path, type: str, metadata: Mapping[str, object], provenance: Provenance
    ) -> Artifact:
        """Make the content of `folder` (from `new_output`) the artifact of `key`, and drop the scratch of `key`.

        Idempotent: when an artifact of that digest is already here, that one is kept and `folder` is removed.

        Raises:
            StageError: the folder holds something other than plain files. StoreError: it cannot be stored.
        """
        _refuse_special_files(folder, provenance.stage)
        with explained(self.root):
            manifest = Manifest.of_folder(folder, type, metadata, provenance)
            manifest.write(folder)
            digest = manifest.digest
            fsync_tree(folder)
            with self._shared():
                self._hold(digest)
                self._place(folder, digest)
                record = json.dumps({"digest": digest}).encode()
                write_atomically(self.root / "keys" / key, record, self.root / "tmp")
            self._drop_scratch(key)
        return Artifact.open(self.object_path(digest))

    @contextmanager
    def lease(self, run_id: str, runs: Path) -> Iterator[None]:
        """While the body runs, `gc` keeps everything that this run looks up or adds; later, what `runs` refers to."""
        path = self.root / "leases" / run_id
        lock = FileLock(path)
        with explained(self.root):
            lock.acquire()
            home = str(runs.resolve()).encode()
            with self._shared():
                write_atomically(self.root / "runs" / sha256_bytes(home), home, self.root / "tmp")
        self._lease = path
        try:
            yield
        finally:
            self._lease = None
            lock.release(remove=True)

    def alone(self) -> FileLock:
        """The lock that keeps every other process from changing the store; for `gc`, briefly."""
        return FileLock(self.root / "locks" / "store")

    # Inside

    @contextmanager
    def _shared(self) -> Iterator[None]:
        with holding(self.root / "locks" / "store", shared=True):
            yield

    def _hold(self, digest: str) -> None:
        if self._lease is not None:
            with self._lease.open("a", encoding="ascii") as handle:
                handle.write(digest + "\n")

    def _digest_of(self, key: str) -> str | None:
        try:
            record = json.loads((self.root / "keys" / key).read_bytes())
            return str(record["digest"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def _sound(self, digest: str, on_damage: Callable[[Damage], None]) -> Artifact | None:
        path = self.object_path(digest)
        if not path.is_dir():
            return None
        self._hold(digest)
        reasons = self._differences(digest)
        if reasons:
            on_damage(self._set_aside(digest, reasons))
            return None
        return Artifact.open(path)

    def _differences(self, digest: str, *, full: bool = False) -> list[str]:
        path = self.object_path(digest)
        try:
            artifact = Artifact.open(path)
        except StoreError as error:
            return [error.why or error.what]
        if artifact.digest != digest:
            return ["the manifest does not have the digest of its name"]
        stamp = _stamp(path)
        if not full and stamp == self._recorded_stamp(digest):
            return []
        found = artifact.damage()
        if not found:
            write_atomically(self.root / "stamps" / digest, json.dumps(stamp).encode(), self.root / "tmp")
        return found

    def _recorded_stamp(self, digest: str) -> object:
        try:
            recorded: object = json.loads((self.root / "stamps" / digest).read_bytes())
            return recorded
        except (FileNotFoundError, ValueError):
            return None

    def _set_aside(self, digest: str, reasons: Sequence[str]) -> Damage:
        target = self.root / "damaged" / f"{digest}-{time.time_ns():x}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path = self.object_path(digest)
        try:
            path.chmod(0o755)  # moving a folder needs the right to write it
            path.rename(target)
        except FileNotFoundError:
            pass  # another run set it aside a moment ago
        (self.root / "stamps" / digest).unlink(missing_ok=True)
        return Damage(digest=digest, reasons=tuple(reasons), moved_to=target)

    def _place(self, folder: Path, digest: str) -> None:
        target = self.object_path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            reasons = self._differences(digest)
            if not reasons:
                force_remove(folder)
                return
            self._set_aside(digest, reasons)
        make_read_only(folder, files_only=True)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            force_remove(folder)  # another run put the same bytes there a moment ago
            return
        make_read_only(target)
        fsync_tree(target.parent, deep=False)
        # The bytes were digested a moment ago for the manifest.
        stamp = json.dumps(_stamp(target)).encode()
        write_atomically(self.root / "stamps" / digest, stamp, self.root / "tmp")

    def _drop_scratch(self, key: str) -> None:
        scratch = self.root / "scratch" / key
        if scratch.exists():
            # Renamed first: a crash in the middle of a removal must not leave half a checkpoint to resume from.
            leftover = self.root / "tmp" / f"{key}-scratch-{uuid.uuid4().hex[:8]}"
            scratch.rename(leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        (self.root / "scratch" / f"{key}.attempts").unlink(missing_ok=True)


def _stamp(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            name = path.relative_to(folder).as_posix()
            found[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def _refuse_special_files(folder: Path, stage: str) -> None:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise StageError(
                    f"the output of stage '{stage}' holds {path.relative_to(folder).as_posix()}, "
                    "which is not a plain file",
                    why="an artifact must mean the same wherever it is copied; links and devices do not",
                    way_out="copy the file into the output folder",
                )
