"""Stages on this machine, one process each.

- memory goes back to the system when a stage ends, and a stage that is killed kills nothing else
- each stage leads its own process group; stopping it means SIGTERM, a grace, SIGKILL to the whole group
- the stage dies when the runner dies, even by `kill -9`: the kernel tells the stage itself (Linux), and a guardian, a
  bare interpreter that waits for the runner's end of a pipe to close, kills whatever is left of the group
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event as Flag
from threading import Lock
from typing import cast

import psutil

from artifacts.disk import disk_error
from artifacts.errors import StageError
from pipeline.events import EVENT, StageMemory
from pipeline.executors.base import Emit, Job, Outcome, StageEvent, StoppedError, error_from_dict

_TICK = 0.25  # seconds between looks at the process and the stop flag
_SAMPLE = 0.5  # seconds between looks at its memory; each walks the system's process table
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_MEMORY_EVERY = 2.0  # seconds between memory events, and only when the peak has grown by 2%

# Reads "+PGID" and "-PGID" lines; when the pipe closes, kills the groups that are still there.
_GUARDIAN = """
import os, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class LocalExecutor:
    """Runs each job as `python -m pipeline.executors.worker`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._guardian: subprocess.Popen[bytes] | None = None

    def execute(self, job: Job, emit: Emit, stop: Flag) -> Outcome:
        """See `Executor.execute`."""
        if stop.is_set():
            raise StoppedError
        receiver, sender = os.pipe()
        try:
            with _log(job.log) as log:
                process = subprocess.Popen(
                    # -P: a folder named `stages` in the working directory must not shadow ours.
                    [sys.executable, "-P", "-m", "pipeline.executors.worker", str(sender), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(sender,),
                    start_new_session=True,
                    env=_environment(),
                )
        except BaseException:
            os.close(receiver)
            raise
        finally:
            os.close(sender)
        self._guard("+", process.pid)
        try:
            return _Watch(job, process, receiver, emit, stop).follow()
        finally:
            os.close(receiver)
            _kill_group(process.pid, signal.SIGKILL)  # children that the stage left behind
            process.wait()
            self._guard("-", process.pid)

    def close(self) -> None:
        """End the guardian."""
        with self._lock:
            if self._guardian is not None and self._guardian.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._guardian.stdin.close()
                self._guardian.wait()
            self._guardian = None

    def _guard(self, sign: str, group: int) -> None:
        with self._lock:
            if self._guardian is None:
                self._guardian = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _GUARDIAN], stdin=subprocess.PIPE, start_new_session=True
                )
            assert self._guardian.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # without a guardian a stage still dies with us on Linux
                self._guardian.stdin.write(f"{sign}{group}\n".encode())
                self._guardian.stdin.flush()


class _Watch:
    """Follows one worker from its start to its end."""

    def __init__(self, job: Job, process: subprocess.Popen[bytes], receiver: int, emit: Emit, stop: Flag):
        self._job = job
        self._process = process
        self._receiver = receiver
        self._emit = emit
        self._stop = stop
        self._buffer = b""
        self._result: dict[str, object] = {}
        self._peak = 0  # bytes
        self._told_peak = 0
        self._told_at = 0.0

    def follow(self) -> Outcome:
        os.set_blocking(self._receiver, False)
        self._hand_over()
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            sampled = 0.0
            while self._process.poll() is None:
                selector.select(_TICK)
                if not self._read():
                    # The worker closed its end: it is about to exit, and select would return at once from now on.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(_TICK)
                if self._stop.is_set():
                    self._end()
                    raise StoppedError
                if time.monotonic() - sampled >= _SAMPLE:
                    self._sample()
                    sampled = time.monotonic()
        self._read()
        return self._judge()

    def _hand_over(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at birth; its exit status says more
            self._process.stdin.write(self._job.model_dump_json().encode())
            self._process.stdin.close()

    def _read(self) -> bool:
        """Take in what the worker has said; False when it has closed its end."""
        while True:
            try:
                data = os.read(self._receiver, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, message: dict[str, object]) -> None:
        if "event" in message:
            self._emit(cast(StageEvent, EVENT.validate_python(message)))
        else:
            self._result = message

    def _sample(self) -> None:
        total = 0
        with contextlib.suppress(psutil.Error):
            worker = psutil.Process(self._process.pid)
            for process in (worker, *worker.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        self._peak = max(self._peak, total)
        now = time.monotonic()
        if self._peak > 1.02 * self._told_peak and now - self._told_at >= _MEMORY_EVERY:
            self._told_peak, self._told_at = self._peak, now
            self._emit(StageMemory(stage=self._job.stage_id, rss=total, peak=self._peak))

    def _end(self) -> None:
        _kill_group(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        _kill_group(self._process.pid, signal.SIGKILL)

    def _judge(self) -> Outcome:
        code = self._process.returncode
        error = self._result.get("error")
        if isinstance(error, dict):
            raise error_from_dict(error)
        outcome = self._result.get("outcome")
        if outcome is not None:  # native libraries may still crash while the interpreter ends; the work was done
            done = Outcome.model_validate(outcome)
            return done.model_copy(update={"peak_rss": max(done.peak_rss, self._peak)})
        raise self._ended(code)

    def _ended(self, code: int) -> StageError:
        stage_id = self._job.stage_id
        see = f"the end of its output is in {self._job.log}"
        if code >= 0:
            return StageError(
                f"the process of stage '{stage_id}' ended without a result", why=f"status {code}", way_out=see
            )
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        what = f"the process of stage '{stage_id}' was killed by {name}"
        if -code == signal.SIGKILL:
            total = psutil.virtual_memory().total
            return StageError(
                what,
                why=f"most likely the system ran out of memory: the stage held {self._peak / 2**30:.1f} GiB "
                f"of {total / 2**30:.1f} GiB",
                way_out="close other programs, choose a smaller batch or a smaller model, then run again to continue",
            )
        if -code == signal.SIGILL:
            return StageError(
                what,
                why="native code met an instruction that this processor refuses; most likely llama.cpp was compiled on "
                "another machine, or with AMX",
                way_out=f"pipeline doctor says how to compile it anew; {see}",
            )
        if -code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE):
            return StageError(what, why="native code crashed (llama.cpp, torch, ...)", way_out=see)
        return StageError(what, way_out="run again to continue")


@contextlib.contextmanager
def _log(path: Path) -> Iterator[int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        # The worker finds every module that the runner would find.
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PYTHONHASHSEED": "0",  # the order of sets must not change a result
        "PYTHONUNBUFFERED": "1",  # the log of a killed stage is complete
    }


def _kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
