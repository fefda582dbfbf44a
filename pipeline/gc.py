"""Free what no run refers to.

Kept: every artifact that a run below a known runs folder made or took (by its events), and everything that a run going
on at this moment holds (by its lease). Known are the folders given and those that the store remembers. Checkpoints of a
run that did not come to its end are kept with it. The rest is freed: other artifacts and checkpoints, unfinished
outputs that nobody is at work on, and what was set aside as damaged. Everything freed can be made again.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from artifacts.disk import explained, force_remove
from artifacts.errors import StoreError
from artifacts.locks import FileLock
from artifacts.store import Store
from pipeline.events import EVENTS_NAME, StageFinished, StageStarted, read_events

Kind = Literal["removed", "checkpoints", "unfinished", "damaged"]


@dataclass
class Freed:
    """What went, or would go: names in the store, and bytes altogether."""

    bytes: int = 0
    removed: list[str] = field(default_factory=list)  # digests of artifacts
    checkpoints: list[str] = field(default_factory=list)  # content keys
    unfinished: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def collect(store: Store, runs: Sequence[Path] = (), *, dry_run: bool = False) -> Freed:
    """Free what no run refers to, and say what it was; with `dry_run` only say it.

    Safe while runs are active: they hold leases and locks.

    Args:
        runs: runs folders beside those that the store remembers.

    Raises:
        StoreError: the store cannot be written, or a run's events cannot be read (what it needs is then unknown).
    """
    freed = Freed()
    if not (store.root / "objects").is_dir():
        return freed
    graves = store.root / "gone"
    with explained(store.root):
        alone = store.alone()
        alone.acquire()
        try:
            digests, keys = _referred(store, runs)
            for kind, path, lock in _candidates(store, digests, keys):
                freed.bytes += _size(path)
                getattr(freed, kind).append(path.name)
                if not dry_run:
                    _bury(path, graves)
                if lock is not None:
                    lock.release(remove=not dry_run)
            if not dry_run:
                _forget(store, digests)
        finally:
            alone.release()
        # Out of sight already: removing gigabytes must not keep runs waiting.
        if not dry_run and graves.is_dir():
            force_remove(graves)
    return freed


def _referred(store: Store, runs: Sequence[Path]) -> tuple[set[str], set[str]]:
    """Digests and content keys that runs need."""
    # Leases before events: of a run that ends meanwhile, the events then tell all.
    digests = _leased(store)
    keys: set[str] = set()
    folders = {folder.resolve() for folder in runs}
    for record in (store.root / "runs").glob("*"):
        remembered = Path(record.read_text(encoding="utf-8"))
        if remembered.is_dir():
            folders.add(remembered)
        else:
            record.unlink(missing_ok=True)
    for folder in sorted(folders):
        for path in folder.glob(f"*/{EVENTS_NAME}"):
            for event in read_events(path.parent):
                if isinstance(event, StageFinished):
                    digests.add(event.digest)
                elif isinstance(event, StageStarted):
                    keys.add(event.key)
    # A run may have been killed between storing an artifact and saying so.
    digests.update(artifact.digest for key in keys if (artifact := store.peek(key)) is not None)
    return digests, keys


def _leased(store: Store) -> set[str]:
    """Digests that active runs hold; leases of runs that are gone are cleared away."""
    digests: set[str] = set()
    for lease in (store.root / "leases").glob("*"):
        lock = FileLock(lease)
        if lock.try_acquire():  # its run is gone
            lock.release(remove=True)
            continue
        with contextlib.suppress(FileNotFoundError):  # its run has just ended
            digests.update(lease.read_text(encoding="ascii").split())
    return digests


def _candidates(store: Store, digests: set[str], keys: set[str]) -> Iterator[tuple[Kind, Path, FileLock | None]]:
    """What can go, each with the lock that was taken to be sure of it."""
    for path in sorted((store.root / "objects").glob("*")):
        if path.name not in digests:
            yield "removed", path, None
    for path in sorted((store.root / "damaged").glob("*")):
        yield "damaged", path, None
    for path in sorted((store.root / "scratch").glob("*")):
        key = path.name.removesuffix(".attempts")
        if key not in keys and (lock := _idle(store, key)) is not None:
            yield "checkpoints", path, lock
    for path in sorted((store.root / "tmp").glob("*")):
        key = path.name.partition("-")[0]
        if len(key) != 64:  # a file being written under the shared lock, which nobody holds now: left by a crash
            yield "unfinished", path, None
        elif (lock := _idle(store, key)) is not None:
            yield "unfinished", path, lock


def _idle(store: Store, key: str) -> FileLock | None:
    """The lock of `key`, taken, if no run and no orphan of one is at work on it."""
    guard = FileLock(store.guard(key))
    lock = FileLock(store.root / "locks" / key)
    if not guard.try_acquire():
        return None
    guard.release(remove=True)
    return lock if lock.try_acquire() else None


def _bury(path: Path, graves: Path) -> None:
    graves.mkdir(exist_ok=True)
    if path.is_dir():
        path.chmod(0o755)  # moving a folder needs the right to write it
    path.rename(graves / f"{path.parent.name}-{path.name}-{uuid.uuid4().hex[:8]}")


def _forget(store: Store, digests: set[str]) -> None:
    """Drop keys and stamps of artifacts that are gone, and lock files that nobody holds."""
    for path in (store.root / "keys").glob("*"):
        artifact = store.peek(path.name)
        if artifact is None or artifact.path.name not in digests:
            path.unlink(missing_ok=True)
    for path in (store.root / "stamps").glob("*"):
        if path.name not in digests:
            path.unlink(missing_ok=True)
    for path in (store.root / "locks").glob("*"):
        lock = FileLock(path)
        if path.name != "store" and lock.try_acquire():
            lock.release(remove=True)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())


def check(store: Store) -> list[str]:
    """Read every byte of every artifact; damaged ones are set aside. What was found, in words.

    Raises:
        StoreError: the store cannot be read.
    """
    if not store.root.is_dir():
        raise StoreError("there is no store yet", where=str(store.root), way_out="run a recipe first")
    return [str(damage) for damage in store.check()]
