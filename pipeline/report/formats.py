"""The same weights in several formats: what each costs and what is left of the model in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from pipeline.device import show_bytes
from pipeline.report.figures import Cell, Table
from pipeline.report.model import ArtifactRow, FormatRow, Report, Subject
from pipeline.report.numbers import Stat, at_default, average, per_exit, plain, rows_of, stat

_SPEEDS: Final = ("load_seconds", "prompt_speed", "generation_speed")


def format_rows(report: Report) -> tuple[FormatRow, ...]:
    """A row for each measured GGUF or GPTQ checkpoint that shares its weights with another one; largest first."""
    artifacts = {row.stage: row for row in report.artifacts}
    made = [
        (subject, artifact)
        for subject in report.subjects
        if subject.role == "quantized" and (artifact := artifacts.get(subject.artifact)) is not None
    ]
    bases = Counter(_base(artifact) for _, artifact in made)
    found = [_row(report, subject, artifact) for subject, artifact in made if bases[_base(artifact)] > 1]
    return tuple(sorted((row for row in found if row.base), key=lambda row: (row.base, -(row.size or 0))))


def _base(artifact: ArtifactRow) -> str:
    return str(artifact.metadata.get("base_digest") or "")


def _row(report: Report, subject: Subject, artifact: ArtifactRow) -> FormatRow:
    def value(measure: str) -> float | None:
        row = at_default(rows_of(report, subject, measure), subject)
        return row.value if row is not None else None

    asr = rows_of(report, subject, "asr")
    mean = average(asr)
    return FormatRow(
        artifact=subject.artifact,
        base=_base(artifact),
        format=f"{artifact.type.upper()} {artifact.metadata.get('type', '')}".strip(),
        size=artifact.size,
        memory=value("memory_measured"),
        kl_text=value("kl_text"),
        kl_refusal=value("kl_refusal"),
        perplexity=value("perplexity"),
        vqa_accuracy=value("vqa_accuracy"),
        asr=mean.value if mean is not None else None,
        asr_by_exit={row.exit: row.value for row in per_exit(asr) if row.exit is not None and row.value is not None},
        load_seconds=value("load_seconds"),
        prompt_speed=value("prompt_speed"),
        generation_speed=value("generation_speed"),
    )


def format_tables(report: Report) -> list[Table]:
    """What each format costs and keeps; and the attack success rate in it, exit by exit. Empty where there are not
    two formats of the same weights."""
    if not report.formats:
        return []
    whole: list[list[Cell]] = []
    for row in report.formats:
        subject = next(one for one in report.subjects if one.artifact == row.artifact)
        kept = [
            stat(at_default(rows_of(report, subject, name), subject))
            for name in ("kl_text", "kl_refusal", "perplexity", "vqa_accuracy")
        ]
        asr = stat(average(rows_of(report, subject, "asr")))
        size, memory = (show_bytes(number) if number is not None else "–" for number in (row.size, row.memory))
        speeds = [plain(number, 3) if number is not None else "–" for number in _speeds(row)]
        whole.append([Stat(row.format, row.artifact), size, memory, *kept, asr, *speeds])
    head = ["format", "size", "memory", "KL, text", "KL, refusals", "perplexity", "VQA", "ASR, average"]
    tables = [Table([*head, "load, s", "prompt, tokens/s", "answer, tokens/s"], whole)]
    exits = sorted({exit for row in report.formats for exit in row.asr_by_exit})
    if exits:
        by_exit = [_at_exits(report, row, exits) for row in report.formats]
        tables.append(Table(["ASR at exit", *map(str, exits)], by_exit))
    return tables


def _speeds(row: FormatRow) -> Sequence[float | None]:
    return [getattr(row, name) for name in _SPEEDS]


def _at_exits(report: Report, row: FormatRow, exits: Sequence[int]) -> list[Cell]:
    found = {one.exit: one for one in per_exit(rows_of(report, row.artifact, "asr"))}
    return [row.format, *(stat(found.get(exit)) for exit in exits)]
