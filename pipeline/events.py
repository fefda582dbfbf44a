"""Typed events: everything that a run says, one JSON object a line in `runs/<id>/events.jsonl`.

The console and the report only read events, so what a user sees live is what is on disk.
"""

from __future__ import annotations

import time
from pathlib import Path
from threading import Lock
from typing import Annotated, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from artifacts.disk import disk_error
from artifacts.errors import StoreError

EVENTS_NAME: Final = "events.jsonl"


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    time: float = Field(default_factory=time.time)  # seconds since the epoch, UTC


class RunStarted(_Event):
    event: Literal["run_started"] = "run_started"
    run: str
    recipe: str  # its name
    recipe_path: str
    stages: dict[str, list[str]]  # stage id -> ids that it needs, in topological order
    uses: dict[str, str]  # stage id -> `uses:` name
    versions: dict[str, str] = Field(default_factory=dict)  # python, platform and main libraries
    resumed: bool = False  # the run before it, of the same recipe, did not come to its end
    store: str = ""  # root folder of the store that holds the artifacts


class StageStarted(_Event):
    event: Literal["stage_started"] = "stage_started"
    stage: str
    key: str
    attempt: int = 1


class StageProgress(_Event):
    event: Literal["stage_progress"] = "stage_progress"
    stage: str
    done: float
    total: float
    note: str = ""


class StageMetric(_Event):
    event: Literal["stage_metric"] = "stage_metric"
    stage: str
    name: str
    value: float
    step: int | None = None
    exit: int | None = None


class StageLog(_Event):
    event: Literal["stage_log"] = "stage_log"
    stage: str
    message: str


class StageMemory(_Event):
    event: Literal["stage_memory"] = "stage_memory"
    stage: str
    rss: int  # bytes, the stage's process and its children now
    peak: int  # bytes, the most of it so far


class StageFinished(_Event):
    event: Literal["stage_finished"] = "stage_finished"
    stage: str
    digest: str
    cached: bool
    seconds: float
    peak_rss: int = 0  # bytes; 0 when cached


class StageFailed(_Event):
    event: Literal["stage_failed"] = "stage_failed"
    stage: str
    error: dict[str, str | None]  # PipelineError.to_dict()
    log: str = ""  # path of the stage's own stderr, relative to the run folder


class GateChecked(_Event):
    event: Literal["gate_checked"] = "gate_checked"
    name: str
    limit: float | str
    value: float | None
    passed: bool
    reason: str
    warning: str = ""  # what the data cannot show of it


class Published(_Event):
    event: Literal["published"] = "published"
    target: str
    digest: str


class RunFinished(_Event):
    event: Literal["run_finished"] = "run_finished"
    status: Literal["passed", "failed", "gate_failed", "stopped"]
    seconds: float
    report: str = ""  # path of the page, written again right after this event; "" for a run that was stopped


Event = Annotated[
    RunStarted
    | StageStarted
    | StageProgress
    | StageMetric
    | StageLog
    | StageMemory
    | StageFinished
    | StageFailed
    | GateChecked
    | Published
    | RunFinished,
    Field(discriminator="event"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Listener(Protocol):
    """Who wants to hear events as they happen: a console."""

    def handle(self, event: Event) -> None: ...

    def close(self) -> None: ...


class EventLog:
    """Appends events to a run's `events.jsonl`, each line flushed, and passes them on. Threads may share it."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()):
        self.path = path
        self._listeners = listeners
        self._lock = Lock()
        try:
            self._handle = path.open("ab")
        except OSError as error:
            raise disk_error(error, path.parent) from error

    def emit(self, event: Event) -> None:
        """Write one event, then tell the listeners.

        Raises:
            StoreError: the disk is full or gone.
        """
        with self._lock:
            try:
                self._handle.write(event.model_dump_json().encode() + b"\n")
                self._handle.flush()
            except OSError as error:
                raise disk_error(error, self.path.parent) from error
            for listener in self._listeners:
                listener.handle(event)

    def close(self) -> None:
        self._handle.close()
        for listener in self._listeners:
            listener.close()


def read_events(run: Path) -> list[Event]:
    """The events of a run folder, in order. A torn last line, which a killed run may leave, is passed over.

    Raises:
        StoreError: no events there, or a line before the last is not an event.
    """
    path = run / EVENTS_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(f"no run at {run}", why=error.strerror, way_out="`pipeline runs` lists the runs") from error
    found: list[Event] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found.append(EVENT.validate_json(line))
        except ValidationError as error:
            if number == len(lines):  # no newline after it: it was being written
                break
            raise StoreError("not an event", where=f"{path}:{number}", why=str(error.errors()[0]["msg"])) from error
    return found
