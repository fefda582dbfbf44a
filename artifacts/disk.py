"""Writing that survives a crash, removal of read-only trees, and disk errors in words."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from artifacts.errors import StoreError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StoreError` that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, root) from error


def disk_error(error: OSError, root: Path) -> StoreError:
    """The `StoreError` for what the system said about a file below `root`."""
    where = str(error.filename) if error.filename else str(root)
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        free = _free_bytes(root)
        return StoreError(
            "the disk of the store is full",
            where=where,
            why=f"{reason}, {free / 2**20:.0f} MiB free" if free is not None else reason,
            way_out="`pipeline gc` frees what no run needs; or set PIPELINE_HOME to a larger disk. "
            "Finished stages are kept: run again to continue",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            "the store cannot be written",
            where=where,
            why=reason,
            way_out="set PIPELINE_HOME to a folder that you may write, or make this one writable",
        )
    return StoreError("the store cannot be used", where=where, why=reason)


def write_atomically(path: Path, data: bytes, temporary: Path) -> None:
    """Write `path` so that after a crash it holds either the old bytes or all of the new ones.

    `temporary` is a folder on the same file system, where the bytes are written first.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary / f"write-{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_tree(path.parent, deep=False)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Under which name to write a file, so that it appears whole or not at all; of one that fails nothing stays.

    Raises:
        StoreError: the disk is full.
    """
    part = target.with_suffix(".part")
    try:
        yield part
        part.replace(target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # numpy's tofile says how many numbers it wrote, and gives no errno.
        if isinstance(error, OSError) and (error.errno in _FULL or "requested and" in str(error)):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            raise disk_error(full, target.parent) from error
        raise


def write_cached(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Let a cache's file hold what `content` writes, whole or not at all, whoever else writes it meanwhile.

    What a crash of the machine takes can be had again, so nothing waits for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            content(handle)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def fsync_tree(folder: Path, *, deep: bool = True) -> None:
    """Put a folder's entries on disk; `deep` also every file and folder below it."""
    paths = [folder]
    if deep:
        paths = [*(path for path in folder.rglob("*") if not path.is_symlink()), folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def new_folder(folder: Path) -> Path:
    """`folder`, absolute, if a finished folder may be given this name: nothing is there, or an empty folder.

    Raises:
        StoreError: something is there, or it is where this process works.
    """
    place = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link
    if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise StoreError(f"{folder} is there already", way_out="name a folder that does not exist yet")
    here = Path.cwd()
    if place == here or place in here.parents:
        raise StoreError(
            f"{folder} cannot be replaced",
            where=str(place),
            why="it is the folder that you are in",
            way_out="name a folder that does not exist yet",
        )
    return place


def give_name(partial: Path, folder: Path) -> None:
    """Let a finished folder appear under its name (see `new_folder`), whole even after a crash."""
    fsync_tree(partial)
    if folder.exists():
        folder.rmdir()
    partial.replace(folder)
    fsync_tree(folder.parent, deep=False)


def make_read_only(folder: Path, *, files_only: bool = False) -> None:
    """Take away every right to write below `folder`, so that no accident changes a stored artifact."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            if not files_only:
                path.chmod(0o555)
        else:
            path.chmod(0o444)


def force_remove(path: Path) -> int:
    """Remove a file or a tree, read-only or not; how many bytes that freed."""
    if not path.is_dir() or path.is_symlink():
        size = path.lstat().st_size if path.exists() or path.is_symlink() else 0
        path.unlink(missing_ok=True)
        return size
    freed = 0
    for parent, _, files in os.walk(path):
        Path(parent).chmod(0o755)
        freed += sum((Path(parent) / name).lstat().st_size for name in files)
    shutil.rmtree(path, ignore_errors=True)
    return freed


def _free_bytes(root: Path) -> int | None:
    for place in (root, *root.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
