"""`report.json`: the stable machine-readable form of a run.

`pipeline schema report` prints its JSON Schema. Fields are only ever added; a reader ignores those it does not know.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from artifacts.manifest import FileEntry, Training
from artifacts.measures import Measure, Role

Status = Literal["passed", "failed", "gate_failed", "stopped", "unfinished"]
Kind = Literal["source", "hardened", "control", "shipped"]
StageStatus = Literal["done", "cached", "failed", "running", "waiting"]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class GateRow(_Row):
    """One gate, as it was checked."""

    name: str = Field(description="As in the recipe, e.g. max_asr.")
    limit: float | str
    value: float | None = Field(description="What was measured; null when it could not be, and then the gate failed.")
    passed: bool
    reason: str
    warning: str = Field(default="", description="What so many prompts cannot show of it.")


class StageRow(_Row):
    """One stage of the run."""

    id: str
    uses: str = ""
    needs: tuple[str, ...] = ()
    status: StageStatus = "waiting"
    digest: str = Field(default="", description="Full digest of the artifact that it made.")
    key: str = Field(default="", description="Content key; the same key gives the same artifact.")
    started: float | None = Field(default=None, description="Seconds since the epoch, UTC.")
    seconds: float | None = None
    peak_rss: int | None = Field(default=None, description="Peak resident memory of the stage's process, bytes.")
    attempts: int = 0
    error: dict[str, str | None] | None = Field(default=None, description="what, where, why, way_out.")
    progress: float | None = Field(default=None, description="Fraction done, of a stage that has not finished.")


class ArtifactRow(_Row):
    """What a stage made. Sizes are null when the store does not hold the artifact any more."""

    stage: str
    type: str = ""
    digest: str
    size: int | None = Field(default=None, description="Bytes, all files together.")
    files: tuple[FileEntry, ...] = ()
    metadata: dict[str, object] = Field(default_factory=dict)
    shipped: bool = Field(default=False, description="Whether it is what the recipe publishes.")


class Curve(_Row):
    """A metric that a stage reported while it worked, e.g. the reward during L-PPO."""

    stage: str
    name: str
    exit: int | None = None
    points: tuple[tuple[float, float], ...] = Field(description="(step, value), by step.")


class Subject(_Row):
    """One model that was measured, as the report speaks of it.

    `kind`: `source` is the baseline, as a rule what came in; `hardened` is before quantization; `shipped` is what the
    recipe publishes; `control` is compressed like it, but hardened otherwise or not at all.
    """

    artifact: str = Field(description="As in `measures`.")
    role: Role
    kind: Kind
    label: str
    digest: str = ""
    default_exit: int | None = Field(default=None, description="Where it leaves its encoder unless told otherwise.")
    exits: tuple[int, ...] = Field(default=(), description="Exits that were measured.")
    training: Training | None = Field(
        default=None, description="What it was trained on by this program; null: the verdict does not say."
    )


class PromptSet(_Row):
    """A set of prompts that was asked at every exit."""

    set: str
    intent: str = Field(description="harmful, benign or borderline (sounds harmful and is not).")
    n: int = Field(description="How many of it were asked.")
    licence: str = Field(default="", description="Of where it comes from.")
    source: str = ""
    digest: str = Field(default="", description="SHA-256 of the file, of a set of the user's own.")


class FormatRow(_Row):
    """One file format of weights that were measured in several; null: not measured. Intervals are in `measures`."""

    artifact: str = Field(description="As in `measures`.")
    base: str = Field(description="Full digest of the checkpoint whose weights it holds.")
    format: str = Field(description="E.g. GGUF Q4_0, GPTQ gptq-4bit-64.")
    size: int | None = Field(description="Bytes, all files together.")
    memory: float | None = Field(description="Measured peak, bytes.")
    kl_text: float | None = Field(description="To the checkpoint, nats a token.")
    kl_refusal: float | None
    perplexity: float | None
    vqa_accuracy: float | None
    asr: float | None = Field(description="Average over exits.")
    asr_by_exit: dict[int, float]
    load_seconds: float | None
    prompt_speed: float | None = Field(description="Tokens a second.")
    generation_speed: float | None


class ResponsesRow(_Row):
    """Where every response of the verification is kept."""

    artifact: str = Field(description="Digest of the verdict artifact.")
    file: str
    sha256: str
    size: int


class Report(_Row):
    """Everything that one run found, in one file."""

    schema_version: int = 1
    run: str = Field(description="Run id, the name of its folder.")
    recipe: str = Field(description="The recipe's name.")
    status: Status
    headline: str = Field(default="", description="The outcome in one sentence.")
    started: float | None = Field(default=None, description="Seconds since the epoch, UTC.")
    seconds: float | None = None
    artifacts: tuple[ArtifactRow, ...] = ()
    gates: tuple[GateRow, ...] = ()
    measures: tuple[Measure, ...] = ()
    stages: tuple[StageRow, ...] = ()
    curves: tuple[Curve, ...] = ()
    formats: tuple[FormatRow, ...] = Field(default=(), description="The same weights in several file formats.")
    responses: tuple[ResponsesRow, ...] = ()
    published: tuple[str, ...] = Field(default=(), description="TARGET@DIGEST of everything published.")
    device: dict[str, int | str] = Field(default_factory=dict, description="name, memory (bytes), context (tokens).")
    subjects: tuple[Subject, ...] = Field(default=(), description="The models that `measures` speaks of, in order.")
    prompt_sets: tuple[PromptSet, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict, description="Python, platform and main libraries.")
    store: str = Field(default="", description="Root folder of the store that holds the artifacts.")
    recipe_yaml: str = Field(default="", description="The recipe as it was run.")

    def publishable(self) -> Report:
        """The report without what differs between two runs that made the same files: ids, times, host facts."""
        stages = tuple(
            stage.model_copy(
                update={"status": "done", "started": None, "seconds": None, "peak_rss": None, "attempts": 0}
            )
            for stage in self.stages
        )
        return self.model_copy(
            update={
                "run": "",
                "status": "passed",
                "started": None,
                "seconds": None,
                "stages": stages,
                "curves": (),
                "published": (),
                "versions": {},
                "store": "",
            }
        )
