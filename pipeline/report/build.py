"""From a run folder to a `Report`: its events, the recipe as it was run, and the artifacts that they name.

A run that failed half way or was killed, or whose artifacts are gone from the store, gives a report of what is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pydantic
import yaml

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, StoreError
from artifacts.manifest import Training
from artifacts.measures import MEASURES_NAME, RESPONSES_NAME, VERDICT_NAME, Measure, Role, read_measures
from pipeline.device import Device, device
from pipeline.events import (
    Event,
    GateChecked,
    Published,
    RunFinished,
    RunStarted,
    StageFailed,
    StageFinished,
    StageMemory,
    StageMetric,
    StageProgress,
    StageStarted,
    read_events,
)
from pipeline.recipe import SOURCE_ID
from pipeline.report.formats import format_rows
from pipeline.report.headline import headline
from pipeline.report.history import Points, earlier_points
from pipeline.report.model import (
    ArtifactRow,
    Curve,
    GateRow,
    Kind,
    PromptSet,
    Report,
    ResponsesRow,
    StageRow,
    Status,
    Subject,
)
from pipeline.rundir import RECIPE_NAME

HARDENING: Final = "l-ppo"  # the stage whose absence makes a control worth the name
_CURVE_POINTS: Final = 400  # of one curve; more would only be drawn on top of each other
# In the order in which readers meet them.
_KIND_WORDS: Final[Mapping[Kind, str]] = {
    "source": "Source, uncompressed",
    "hardened": "Hardened, before quantization",
    "control": "Control",
    "shipped": "Shipped, quantized",
}


def build_report(run_dir: Path) -> Report:
    """Gather what is known of the run in `run_dir`.

    Raises:
        StoreError: there are no events.
    """
    story = _Story()
    for event in read_events(run_dir):
        story.tell(event)
    recipe_yaml = _text(run_dir / RECIPE_NAME)
    recipe = _recipe(recipe_yaml)
    artifacts = {
        id: artifact for id, stage in story.stages.items() if (artifact := _open(story.store, stage.digest)) is not None
    }
    stages = tuple(_with_key(stage, artifacts.get(stage.id)) for stage in story.stages.values())
    measuring = [artifact for artifact in artifacts.values() if artifact.type == "verdict"]
    measures = [row for artifact in measuring for row in _measures(artifact)]
    verdicts = [_verdict(artifact) for artifact in measuring]
    shipped = _shipped(stages, artifacts, verdicts)
    report = Report(
        run=story.run or run_dir.name,
        recipe=story.recipe,
        status=story.status(),
        started=story.started,
        seconds=story.seconds(),
        artifacts=tuple(_artifact_row(stage, artifacts.get(stage.id), shipped) for stage in stages if stage.digest),
        gates=tuple(story.gates.values()),
        measures=tuple(measures),
        stages=stages,
        curves=story.curves(earlier_points(run_dir, _done_elsewhere(stages))),
        subjects=_subjects(measures, stages, verdicts),
        prompt_sets=tuple(dict.fromkeys(row for verdict in verdicts for row in verdict.prompt_sets)),
        responses=tuple(row for artifact in artifacts.values() for row in _responses(artifact)),
        published=tuple(story.published),
        device=_device(recipe),
        versions=story.versions,
        store=story.store,
        recipe_yaml=recipe_yaml,
    )
    return report.model_copy(update={"headline": headline(report), "formats": format_rows(report)})


@dataclass
class _Story:
    """The events folded into the state that they leave behind."""

    run: str = ""
    recipe: str = ""
    store: str = ""
    started: float | None = None
    ended: float | None = None
    last: float | None = None
    finished: RunFinished | None = None
    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[str, StageRow] = field(default_factory=dict)
    gates: dict[str, GateRow] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    points: Points = field(default_factory=dict)

    def tell(self, event: Event) -> None:
        self.last = event.time
        match event:
            case RunStarted():
                self._begin(event)
            case StageStarted(stage=id):
                attempts = max(event.attempt, self._stage(id).attempts)
                self._update(
                    id, status="running", key=event.key, started=event.time, attempts=attempts, error=None, progress=0.0
                )
            case StageProgress(stage=id):
                self._update(id, progress=min(event.done / event.total, 1.0) if event.total > 0 else None)
            case StageMemory(stage=id):
                self._update(id, peak_rss=event.peak)
            case StageMetric():
                curve = self.points.setdefault((event.stage, event.name, event.exit), {})
                curve[float(event.step) if event.step is not None else float(len(curve))] = event.value
            case StageFinished(stage=id):
                self._update(
                    id,
                    status="cached" if event.cached else "done",
                    digest=event.digest,
                    seconds=event.seconds,
                    peak_rss=event.peak_rss or None,
                    progress=None,
                    error=None,
                )
            case StageFailed(stage=id):
                self._update(id, status="failed", error=event.error)
            case GateChecked():
                self.gates[event.name] = GateRow.model_validate(event.model_dump())
            case Published():
                self.published.append(f"{event.target}@{event.digest}")
            case RunFinished():
                self.finished = event
            case _:
                pass  # logs are for the console

    def _begin(self, event: RunStarted) -> None:
        """A run that is resumed in its folder begins again; what is done will be told again, from the cache."""
        self.run, self.recipe, self.store, self.versions = event.run, event.recipe, event.store, event.versions
        self.started = event.time if self.started is None or not event.resumed else self.started
        self.finished = None
        self.gates.clear()
        self.published.clear()
        before, self.stages = self.stages, {}
        for id, needs in event.stages.items():
            known = before.get(id, StageRow(id=id))
            self.stages[id] = known.model_copy(
                update={"uses": event.uses.get(id, ""), "needs": tuple(needs), "status": "waiting", "error": None}
            )

    def _stage(self, id: str) -> StageRow:
        return self.stages.setdefault(id, StageRow(id=id))

    def _update(self, id: str, **values: object) -> None:
        self.stages[id] = self._stage(id).model_copy(update=values)

    def status(self) -> Status:
        """As the run said, or what follows from its events: the report is first written before the run has ended."""
        if self.finished is not None:
            return self.finished.status
        if any(stage.status == "failed" for stage in self.stages.values()):
            return "failed"
        if not self.stages or any(stage.status not in ("done", "cached") for stage in self.stages.values()):
            return "unfinished"
        return "passed" if all(gate.passed for gate in self.gates.values()) else "gate_failed"

    def seconds(self) -> float | None:
        if self.finished is not None:
            return self.finished.seconds
        return self.last - self.started if self.last is not None and self.started is not None else None

    def curves(self, earlier: Points) -> tuple[Curve, ...]:
        """What earlier runs and this one reported, this one winning where both did."""
        found = []
        for (stage, name, exit), here in (earlier | self.points).items():
            by_step = earlier.get((stage, name, exit), {}) | here
            points = sorted(point for point in by_step.items() if math.isfinite(point[1]))
            if not points:
                continue
            stride = -(-len(points) // _CURVE_POINTS)
            kept = [*points[:-1:stride], points[-1]] if stride > 1 else points
            found.append(Curve(stage=stage, name=name, exit=exit, points=tuple(kept)))
        return tuple(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _recipe(text: str) -> Mapping[str, object]:
    """The recipe as plain data; it was checked before the run, so a surprise here only makes the report shorter."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _open(store: str, digest: str) -> Artifact | None:
    """Opened in place, without the store's locks and checks: a report changes nothing."""
    if not store or not digest:
        return None
    try:
        return Artifact.open(Path(store) / "objects" / digest)
    except StoreError:
        return None


class _Subject(pydantic.BaseModel):
    """One model in `verdict.json` (stages.verify.verdict)."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    stage: str
    role: Role
    gated: bool
    type: str = ""
    digest: str = ""
    exits: tuple[int, ...] = ()
    default_exit: int | None = None
    training: Training | None = None


class _Verdict(pydantic.BaseModel):
    """The part of `verdict.json` that the report needs."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    subjects: tuple[_Subject, ...] = ()
    prompt_sets: tuple[PromptSet, ...] = ()

    @pydantic.field_validator("prompt_sets", mode="before")
    @classmethod
    def _as_rows(cls, told: object) -> object:
        """Verdicts of earlier versions told less, and in another form."""
        return told if isinstance(told, list) else ()


def _verdict(artifact: Artifact) -> _Verdict:
    try:
        return _Verdict.model_validate_json(artifact.file(VERDICT_NAME).read_bytes())
    except (StoreError, OSError, pydantic.ValidationError):
        return _Verdict()


def _measures(verdict: Artifact) -> list[Measure]:
    try:
        return read_measures(verdict.file(MEASURES_NAME))
    except (StoreError, OSError, pydantic.ValidationError):
        return []


def _responses(artifact: Artifact) -> list[ResponsesRow]:
    return [
        ResponsesRow(artifact=artifact.digest, file=entry.path, sha256=entry.sha256, size=entry.size)
        for entry in artifact.manifest.files
        if artifact.type == "verdict" and entry.path == RESPONSES_NAME
    ]


def _done_elsewhere(stages: Sequence[StageRow]) -> dict[str, str]:
    """Content key -> id of the stages that this run did not do from the start."""
    return {stage.key: stage.id for stage in stages if stage.key and (stage.status == "cached" or stage.attempts > 1)}


def _with_key(stage: StageRow, artifact: Artifact | None) -> StageRow:
    """A stage whose artifact was reused does not say its key; the artifact does."""
    if stage.key or artifact is None:
        return stage
    return stage.model_copy(update={"key": artifact.manifest.provenance.key})


def _artifact_row(stage: StageRow, artifact: Artifact | None, shipped: Iterable[str]) -> ArtifactRow:
    if artifact is None:
        return ArtifactRow(stage=stage.id, digest=stage.digest, shipped=stage.id in shipped)
    return ArtifactRow(
        stage=stage.id,
        type=artifact.type,
        digest=stage.digest,
        size=sum(entry.size for entry in artifact.manifest.files),
        files=artifact.manifest.files,
        metadata=artifact.metadata,
        shipped=stage.id in shipped,
    )


def _shipped(stages: Sequence[StageRow], artifacts: Mapping[str, Artifact], verdicts: Sequence[_Verdict]) -> set[str]:
    """What was verified in order to be shipped; without a verdict, every GGUF that no other stage took."""
    gated = {one.stage for verdict in verdicts for one in verdict.subjects if one.gated}
    if gated:
        return gated
    taken = {need for stage in stages for need in stage.needs if artifacts.get(stage.id) is not None}
    return {id for id, artifact in artifacts.items() if artifact.type == "gguf" and id not in taken}


def _subjects(
    measures: Sequence[Measure], stages: Sequence[StageRow], verdicts: Sequence[_Verdict]
) -> tuple[Subject, ...]:
    """The models that were measured, the source first and what ships last."""
    uses = {stage.id: stage.uses for stage in stages}
    needs = {stage.id: stage.needs for stage in stages}

    def hardened(id: str) -> bool:
        return uses.get(id) == HARDENING or any(hardened(need) for need in needs.get(id, ()))

    measured: dict[str, _Subject] = {one.stage: one for verdict in verdicts for one in verdict.subjects}
    for row in measures:
        measured.setdefault(row.artifact, _Subject(stage=row.artifact, role=row.role, gated=row.role == "quantized"))
    kinds = {one.stage: _kind(one) for one in measured.values()}
    found: list[Subject] = []
    for one in measured.values():
        kind = kinds[one.stage]
        alone = list(kinds.values()).count(kind) == 1
        words = _KIND_WORDS[kind]
        if kind == "source" and (one.stage != SOURCE_ID or one.type not in ("", "checkpoint")):
            words = "Baseline"
        if kind == "control":
            unhardened = "Same recipe without L-PPO" if alone else "Without L-PPO"
            words = "Control" if hardened(one.stage) else unhardened
        exits = one.exits or sorted({r.exit for r in measures if r.artifact == one.stage and r.exit is not None})
        found.append(
            Subject(
                artifact=one.stage,
                role=one.role,
                kind=kind,
                label=words if alone and words != "Control" else f"{words}: {one.stage}",
                digest=one.digest,
                default_exit=one.default_exit,
                exits=tuple(exits),
                training=one.training,
            )
        )
    order = list(_KIND_WORDS)
    return tuple(sorted(found, key=lambda subject: order.index(subject.kind)))


def _kind(one: _Subject) -> Kind:
    if one.role != "quantized":
        return one.role
    return "shipped" if one.gated else "control"


def _device(recipe: Mapping[str, object]) -> dict[str, int | str]:
    written = recipe.get("device")
    try:
        if isinstance(written, str):
            found = device(written)
        elif isinstance(written, Mapping):
            found = Device.model_validate(dict(written))
        else:
            return {}
    except (KeyError, RecipeError, pydantic.ValidationError):
        return {}
    return {"name": found.name, **found.numbers()}
