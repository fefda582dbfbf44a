"""The other processes of a stage whose work is shared, as the first one sees them, which starts and answers for them.

- they are workers like the first, in its process group, and die with it, whatever it dies of
- the first of them that fails ends the stage, with its own error: the others, which are left waiting for it or find
  their connections closed, are not asked
- no launcher of a training library: these start processes to be restarted and rendezvous between machines, this has to
  hand one job to a few processes on one machine and let the engine see each of them end
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Final, NoReturn, cast

from artifacts.errors import PipelineError, StageError
from pipeline.executors.base import Job, error_from_dict
from stages.machine import cores
from stages.resources import Team

_GRACE: Final = 0.5  # seconds in which the failure behind a failure may still be told
_END: Final = 30.0  # seconds in which the others may end once the first has


@dataclass(frozen=True)
class Failure:
    """How a process ended. Being killed explains every error beside it; else the earliest error explains the others."""

    error: PipelineError
    at: float  # seconds
    killed: bool = False

    def __lt__(self, other: Failure) -> bool:
        return (not self.killed, self.at) < (not other.killed, other.at)


class Ranks:
    """Processes 1 up to `job.resources.processes` - 1.

    Args:
        end: is called with the stage's error once any process has failed, and ends this one.
    """

    def __init__(self, job: Job, end: Callable[[PipelineError], NoReturn]):
        self._job = job
        self._end = end
        self._failures: queue.Queue[Failure] = queue.Queue()
        self._readers: list[Thread] = []
        self._size = job.resources.processes
        self._failed = Flag()

    def start(self) -> None:
        """Start them. From the main thread: Linux kills a process when the thread that started it ends."""
        if self._size == 1:
            return
        _meeting(self._job).unlink(missing_ok=True)  # of a run that was killed
        for rank in range(1, self._size):
            receiver, sender = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pipeline.executors.worker", str(sender), str(os.getpid()), str(rank)],
                    stdin=subprocess.PIPE,
                    pass_fds=(sender,),
                )
            finally:
                os.close(sender)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at birth, which its reader will notice
                process.stdin.write(self._job.model_dump_json().encode())
                process.stdin.close()
            reader = Thread(target=self._read, args=(rank, process, receiver), daemon=True)
            reader.start()
            self._readers.append(reader)
        Thread(target=self._watch, daemon=True).start()

    def settle(self, error: PipelineError) -> None:
        """End the stage because this process failed; with another's error if that explains it better.

        Returns only if no other was started, so that there is nothing to settle.
        """
        if self._readers:
            self._fail(Failure(error, time.time()))
            _never()

    def join(self) -> None:
        """Wait for all to end, as they do when their part is done."""
        deadline = time.monotonic() + _END
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        if self._failed.is_set():
            _never()

    def _fail(self, failure: Failure) -> None:
        self._failures.put(failure)
        self._failed.set()

    def _read(self, rank: int, process: subprocess.Popen[bytes], receiver: int) -> None:
        code = process.wait()
        os.set_blocking(receiver, False)  # a child of its own may still hold the other end
        with os.fdopen(receiver, "rb") as pipe:
            message = pipe.read()
        if message:
            told = json.loads(message)
            self._fail(Failure(error_from_dict(told["error"]), cast("float", told["at"])))
        elif code:
            self._fail(Failure(_ended(self._job, rank, code), time.time(), killed=True))

    def _watch(self) -> None:
        found = [self._failures.get()]
        time.sleep(_GRACE)
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        self._end(min(found).error)


def _never() -> NoReturn:
    """Leave it to the thread that watches to end this process."""
    while True:
        time.sleep(_END)


def prepare(team: Team) -> None:
    """Set up this process as one of a team, before any numerical library is loaded: its share of the cores, and the
    environment in which training libraries look for their rank."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // team.size)))
    os.environ |= {
        "RANK": str(team.rank),
        "WORLD_SIZE": str(team.size),
        "LOCAL_RANK": str(team.rank),
        "LOCAL_WORLD_SIZE": str(team.size),
    }


def team_of(job: Job, rank: int) -> Team:
    """What process `rank` of a job knows of the others."""
    if job.resources.processes == 1:
        return Team()
    return Team(rank, job.resources.processes, _meeting(job), job.resources.sharding)


def _meeting(job: Job) -> Path:
    return job.scratch / "meeting"


def _ended(job: Job, rank: int, code: int) -> StageError:
    by = f"status {code}"
    if code < 0:
        by = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return StageError(
        f"process {rank} of the {job.resources.processes} of stage '{job.stage_id}' was ended by {by}",
        why="most likely the system ran out of memory" if code == -signal.SIGKILL else None,
        way_out=f"the end of its output is in {job.log}; with fewer processes less memory is needed",
    )
