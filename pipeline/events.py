"""Typed events: everything that a run says, one JSON object a line in `runs/<id>/events.jsonl`.

The console and the report only read events, so what a user sees live is what is on disk.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    time: float  # seconds since the epoch, UTC


class RunStarted(_Event):
    event: Literal["run_started"] = "run_started"
    run: str
    recipe: str  # its name
    recipe_path: str
    stages: dict[str, list[str]]  # stage id -> ids that it needs, in topological order
    uses: dict[str, str]  # stage id -> `uses:` name
    versions: dict[str, str] = Field(default_factory=dict)  # python, platform and main libraries
    resumed: bool = False


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


class Published(_Event):
    event: Literal["published"] = "published"
    target: str
    digest: str


class RunFinished(_Event):
    event: Literal["run_finished"] = "run_finished"
    status: Literal["passed", "failed", "gate_failed", "stopped"]
    seconds: float


Event = Annotated[
    RunStarted
    | StageStarted
    | StageProgress
    | StageMetric
    | StageLog
    | StageFinished
    | StageFailed
    | GateChecked
    | Published
    | RunFinished,
    Field(discriminator="event"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
