"""The process that does one stage's work: `python -m pipeline.executors.worker FD PARENT < job.json`.

Messages go to file descriptor FD, one JSON object a line: events, at the end `{"outcome": ...}` or `{"error": ...}`.
What the stage prints goes to its log. The process dies with the runner, whatever the runner dies of.

If the job asks for several processes, this one starts the others and speaks for all (`pipeline.executors.ranks`). They
are called with their rank behind PARENT, and say nothing unless they fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import NoReturn, cast

from artifacts.artifact import Artifact
from artifacts.disk import disk_error
from artifacts.errors import PipelineError, StageError
from artifacts.locks import FileLock
from artifacts.manifest import canonical_json
from pipeline.events import StageLog, StageMetric, StageProgress
from pipeline.executors.base import Job, Outcome, StageEvent
from pipeline.executors.ranks import Ranks, prepare, team_of
from stages.machine import peak_resident
from stages.stage import Context, Reporter, Stage, StageParams

_PROGRESS_EVERY = 0.25  # seconds; progress in between is dropped, the last step never is
_ORPHAN_PATIENCE = 60.0  # seconds to wait for a killed run's process to be gone


class _Channel:
    """The way back to the runner; also what the stage reports through (`stages.stage.Reporter`)."""

    def __init__(self, descriptor: int, stage_id: str):
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "wb")
        self._stage_id = stage_id
        self._lock = Lock()
        self._last_progress = 0.0

    def send(self, message: Mapping[str, object]) -> None:
        with self._lock:
            self._pipe.write(json.dumps(message).encode() + b"\n")
            self._pipe.flush()

    def _event(self, event: StageEvent) -> None:
        self.send(event.model_dump(mode="json"))

    def progress(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_EVERY or done >= total:
            self._last_progress = now
            self._event(StageProgress(stage=self._stage_id, done=float(done), total=float(total), note=note))

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        number = float(value)
        if not math.isfinite(number):  # JSON has no word for it
            self.log(f"metric {name} is {number}" + (f" at step {step}" if step is not None else ""))
            return
        self._event(StageMetric(stage=self._stage_id, name=name, value=number, step=step, exit=exit))

    def log(self, message: str) -> None:
        with contextlib.suppress(OSError):  # the disk of the log may be full; the event still counts
            sys.stderr.write(message + "\n")
        self._event(StageLog(stage=self._stage_id, message=message))


class _Mute:
    """What a rank beside the first reports through: the first says the same."""

    def progress(self, done: float, total: float, note: str = "") -> None: ...

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...

    def log(self, message: str) -> None: ...


class _UndeclaredDevice(Mapping[str, int]):
    """Stands in for the device profile where a stage has not declared that it reads it: its key would be untrue."""

    def __init__(self, stage: type[Stage[StageParams]]):
        self._stage = stage

    def _refuse(self) -> StageError:
        return StageError(
            f"stage '{self._stage.name}' reads the device profile without saying so",
            why="the profile would change the result but not its content key",
            way_out=f"set `reads_device = True` in {self._stage.__module__}.{self._stage.__qualname__}",
        )

    def __getitem__(self, name: str) -> int:
        raise self._refuse()

    def __iter__(self) -> Iterator[str]:
        raise self._refuse()

    def __len__(self) -> int:
        raise self._refuse()


def main(arguments: list[str]) -> int:
    """Do the job on stdin, or a rank's part of it; 0 when that was done, 1 when an error was sent."""
    descriptor, parent = int(arguments[0]), int(arguments[1])
    _die_with(parent)
    job = Job.model_validate_json(sys.stdin.buffer.read())
    channel = _Channel(descriptor, job.stage_id)
    return _first(job, channel) if len(arguments) == 2 else _other(job, channel, int(arguments[2]))


def _first(job: Job, channel: _Channel) -> int:
    def end(error: PipelineError) -> NoReturn:
        channel.send({"error": error.to_dict()})
        os._exit(1)

    ranks = Ranks(job, end)
    try:
        outcome = _guarded(job, channel, ranks)
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        ranks.settle(_for_users(error, job))
        channel.send({"error": _for_users(error, job).to_dict()})
        return 1
    channel.send({"outcome": outcome.model_dump(mode="json")})
    return 0


def _other(job: Job, channel: _Channel, rank: int) -> int:
    try:
        _work(job, _Mute(), rank)
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        channel.send({"error": _for_users(error, job).to_dict(), "at": time.time()})
        os._exit(1)  # at once: the others notice when the sockets close, and this must have been told by then
    return 0


def _guarded(job: Job, channel: _Channel, ranks: Ranks) -> Outcome:
    guard = FileLock(job.guard)
    if not guard.acquire(timeout=_ORPHAN_PATIENCE):
        raise StageError(
            f"another process is still at work on stage '{job.stage_id}'",
            where=str(job.guard),
            why="a run that was killed left it behind",
            way_out="end that process (`fuser` on the file above names it), then run again",
        )
    guard.close_in_forked_children()
    try:
        ranks.start()
        metadata = _work(job, channel, 0)
        ranks.join()
        return Outcome(metadata=_as_json(metadata, job), peak_rss=peak_resident())
    finally:
        guard.release(remove=True)


def _work(job: Job, reporter: Reporter, rank: int) -> Mapping[str, object]:
    team = team_of(job, rank)
    if team.size > 1:
        prepare(team)
    random.seed(job.seed)  # for what libraries draw behind a stage's back
    cls = _load(job.stage_class)
    stage = cls(cls.Params.model_validate_json(json.dumps(job.params)))
    context = Context(
        stage_id=job.stage_id,
        inputs={stage_id: Artifact.open(path) for stage_id, path in job.inputs.items()},
        output=job.output,
        scratch=job.scratch,
        seed=job.seed,
        reporter=reporter,
        device=job.device if stage.uses_device() else _UndeclaredDevice(cls),
        team=team,
        key=job.key,
    )
    return stage.run(context)


def _load(name: str) -> type[Stage[StageParams]]:
    module, _, qualified = name.partition(":")
    found: object = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return cast("type[Stage[StageParams]]", found)


def _as_json(metadata: Mapping[str, object], job: Job) -> dict[str, object]:
    try:
        return cast("dict[str, object]", json.loads(canonical_json(dict(metadata))))
    except (TypeError, ValueError) as error:
        raise StageError(
            f"the metadata that stage '{job.stage_id}' returned is not JSON", why=str(error), way_out=f"see {job.log}"
        ) from error


def _for_users(error: BaseException, job: Job) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, MemoryError):
        return StageError(
            f"stage '{job.stage_id}' ran out of memory",
            why=f"it had taken {peak_resident() / 2**30:.1f} GiB",
            way_out="close other programs, choose a smaller batch, or start from a smaller model; then run again",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_error(error, job.output)
    if os.strerror(errno.ENOSPC) in str(error):  # safetensors, tokenizers: libraries that raise their own kind
        return disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), job.output)
    text = str(error).strip().splitlines()
    return StageError(
        f"stage '{job.stage_id}' failed: {type(error).__name__}{': ' + text[0] if text else ''}",
        why=_raised_at(error),
        way_out=f"the whole traceback is in {job.log}",
    )


def _raised_at(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    return f"raised in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}"


def _die_with(parent: int) -> None:
    """Linux: be killed when the runner ends, even in the middle of native code (elsewhere the guardian sees to it)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
