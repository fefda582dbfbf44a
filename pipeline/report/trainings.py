"""What trained the models, side by side: method, what it cost, and what came of it on the files that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pipeline.device import show_bytes
from pipeline.report.figures import Cell, Table
from pipeline.report.model import Report, StageRow
from pipeline.report.numbers import at_default, average, percent, plain, rows_of, seconds, stat
from stages.verify.bands import BANDS

TRAININGS: Final = ("l-ppo", "sft")


def trainings_table(report: Report) -> Table | None:
    """A line for each measured model that a training stands behind; None if there is none.

    KL is to the original model, in nats a response, of what the weights that are kept answer on validation prompts.
    """
    stages = {stage.id: stage for stage in report.stages}
    rows: list[list[Cell]] = []
    for subject in report.subjects:
        trained = _training(subject.artifact, stages)
        if trained is None:
            continue
        asr = rows_of(report, subject, "asr")
        by_band = {row.band: row for row in asr if row.exit is None}
        rows.append(
            [
                subject.label,
                _method(report, trained),
                _steps(report, trained),
                "reused" if trained.status == "cached" else seconds(trained.seconds) or "–",
                show_bytes(trained.peak_rss) if trained.peak_rss else "–",
                _kl(report, trained),
                *(stat(by_band.get(band)) for band in BANDS),
                stat(average(asr)),
                stat(average(rows_of(report, subject, "over_refusal"))),
                stat(at_default(rows_of(report, subject, "vqa_accuracy"), subject)),
            ]
        )
    bands = [f"ASR, {band}" for band in (*BANDS, "average")]
    head = ["model", "training", "steps", "time", "memory", "KL", *bands, "over-refusal", "VQA"]
    return Table(head, rows) if rows else None


def _training(id: str, stages: Mapping[str, StageRow]) -> StageRow | None:
    """The last training that went into what a stage made."""
    stage = stages.get(id)
    while stage is not None and stage.uses not in TRAININGS:
        stage = stages.get(stage.needs[0]) if stage.needs else None
    return stage


def _metadata(report: Report, stage: StageRow) -> Mapping[str, object]:
    return next((row.metadata for row in report.artifacts if row.stage == stage.id), {})


def _method(report: Report, stage: StageRow) -> str:
    told = _metadata(report, stage)
    parts = [str(told.get("objective") or stage.uses)]
    if told.get("variant") == "paper":
        parts.append("as in the paper")
    parts += [f"with {part}" for part in ("demonstrations", "contrast") if told.get(part)]
    if told.get("quantizer"):
        parts.append(f"rounded to {told['quantizer']}")
    return ", ".join(parts)


def _steps(report: Report, stage: StageRow) -> str:
    told = _metadata(report, stage)
    done, used = told.get("steps"), told.get("weights_of_step")
    if done is None:
        return "–"
    share = told.get("interpolation")
    way = f", {percent(share)} of the way" if isinstance(share, float) else ""
    return (str(done) if used in (None, done) else f"{done}, best {used}") + way


def _kl(report: Report, stage: StageRow) -> str:
    used = _metadata(report, stage).get("weights_of_step")
    last = [
        dict(curve.points).get(used, curve.points[-1][1]) if isinstance(used, int) else curve.points[-1][1]
        for curve in report.curves
        if curve.stage == stage.id and curve.name == "validation_kl" and curve.points
    ]
    return plain(sum(last) / len(last), 3) if last else "–"
