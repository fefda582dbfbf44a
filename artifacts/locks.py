"""Advisory file locks between processes: `flock`, so that a lock dies with its holder however that one dies.

POSIX only. The lock belongs to the open file, is not inherited across `exec`, and works between threads too, because
every acquisition opens the file anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL = 0.1  # seconds between attempts while another process holds the lock


class FileLock:
    """One lock file; `shared` lets several readers in at once."""

    def __init__(self, path: Path, *, shared: bool = False):
        self.path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if nobody holds it; say whether it was taken."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, self._operation | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file: a lock on a name that is gone locks nobody out.
            if not self._is_the_file_on_disk(descriptor):
                os.close(descriptor)
                return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        self._descriptor = descriptor
        return True

    def acquire(self, *, timeout: float | None = None, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the lock until `timeout` seconds have passed or `give_up()` is true; say whether it was taken."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.try_acquire():
            if give_up() or (deadline is not None and time.monotonic() >= deadline):
                return False
            time.sleep(_POLL)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let go; `remove` deletes the lock file first, while it is still ours."""
        if self._descriptor is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def close_in_forked_children(self) -> None:
        """A child made by `fork` would otherwise keep the lock alive after its parent's death."""
        os.register_at_fork(after_in_child=self.release)

    def _is_the_file_on_disk(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def holding(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock at `path` for the body, waiting as long as it takes."""
    lock = FileLock(path, shared=shared)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
