"""What an executor is: something that does one stage's work somewhere, and nothing else.

The runner walks the graph and decides what is due; an executor gets a `Job`, which is plain data, runs the stage that
it names in a process of its own, passes on what the stage says, and returns its `Outcome`. The job's folders must be
the same for the runner and for that process: on more than one machine, a shared file system.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event as Flag
from typing import Final, Protocol

from pydantic import BaseModel, ConfigDict

from artifacts import errors
from artifacts.errors import PipelineError, StageError
from pipeline.events import StageLog, StageMemory, StageMetric, StageProgress
from stages.resources import Resources

StageEvent = StageProgress | StageMetric | StageLog | StageMemory
Emit = Callable[[StageEvent], None]


class Job(BaseModel):
    """One stage's work, as plain data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage_id: str
    key: str  # content key of the work
    stage_class: str  # "module:qualified name"
    params: dict[str, object]  # JSON values
    inputs: dict[str, Path]  # stage id -> artifact folder, in the order in which the stage sees them
    output: Path  # fresh and empty
    scratch: Path
    guard: Path  # lock file that the working process holds, so that an orphan never shares `scratch` with it
    log: Path  # what the stage writes to stdout and stderr is appended here
    seed: int
    device: dict[str, int]
    resources: Resources = Resources()


class Outcome(BaseModel):
    """What came of a job whose stage did its work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: dict[str, object]
    peak_rss: int = 0  # bytes, the stage's process and its children


class StoppedError(Exception):
    """The run was asked to stop while the job was at work; nothing is known to be wrong with it."""


class Executor(Protocol):
    """Runs jobs; `execute` may be called from several threads at once."""

    def execute(self, job: Job, emit: Emit, stop: Flag) -> Outcome:
        """Do one job.

        Raises:
            PipelineError: the stage's own, or a StageError for anything else that ended it.
            StoppedError: `stop` was set; the stage's processes are gone.
        """
        ...

    def close(self) -> None:
        """End every process that is left."""
        ...


_KINDS: Final = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)
}


def error_from_dict(data: dict[str, str | None]) -> PipelineError:
    """The error that `PipelineError.to_dict` described in another process."""
    kind = _KINDS.get(data.get("kind") or "", StageError)
    return kind(
        data.get("what") or "the stage failed",
        where=data.get("where"),
        why=data.get("why"),
        way_out=data.get("way_out"),
    )
