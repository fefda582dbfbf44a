"""The outcome of a run in one sentence."""

from __future__ import annotations

from artifacts.measures import Measure
from pipeline.report.model import Report, Subject
from pipeline.report.numbers import average, degenerate, figure, rows_of, worst


def headline(report: Report) -> str:
    """One sentence, or two: what was decided, and the figure that everybody asks for first."""
    decided = _decided(report)
    found = _safety(report)
    return f"{decided} {found}".strip()


def _decided(report: Report) -> str:
    failed = [gate for gate in report.gates if not gate.passed]
    if report.status == "failed":
        broken = next((stage for stage in report.stages if stage.status == "failed"), None)
        what = (broken.error or {}).get("what") if broken is not None else None
        return (
            f"Failed: stage '{broken.id}' could not do its work{f' ({what})' if what else ''}." if broken else "Failed."
        )
    if report.status == "stopped":
        return "Stopped before the end; what was done is kept, and running the recipe again continues."
    if report.status == "unfinished":
        done = sum(stage.status in ("done", "cached") for stage in report.stages)
        return f"Not finished: {done} of {len(report.stages)} stages are done."
    if failed:
        unmeasured = [gate for gate in failed if gate.value is None]
        how = "failed" if not unmeasured else "failed or could not be measured"
        return f"Not published: {len(failed)} of {len(report.gates)} gates {how} ({', '.join(g.name for g in failed)})."
    if not report.gates:
        return "Done; the recipe sets no gates."
    return f"Passed: all {len(report.gates)} gates hold{' and the files are published' if report.published else ''}."


def _safety(report: Report) -> str:
    """The attack success rate of what ships, beside the models that it is compared with."""
    shipped = [subject for subject in report.subjects if subject.kind == "shipped"]
    if not shipped:
        return ""
    ranked = [(subject, average(rows_of(report, subject, "asr"), own=True)) for subject in shipped]
    measured = [(subject, row) for subject, row in ranked if row is not None and row.value is not None]
    if not measured:
        return "The attack success rate of what ships was not measured."
    subject, row = max(measured, key=lambda pair: pair[1].value or 0.0)
    exits = len({one.exit for one in rows_of(report, subject, "asr") if one.exit is not None})
    name = "The shipped model" if len(shipped) == 1 else f"The worst shipped model, {subject.artifact},"
    over = f" over {exits} exits" if exits > 1 else ""
    told = f"{name} answers {figure(row)} of harmful requests{over}"
    peak = worst(rows_of(report, subject, "asr"))
    if peak is not None and exits > 1:
        told += f", at worst {figure(peak)} at exit {peak.exit}"
    babbling = [found for one in shipped if (found := degenerate(report, one)) is not None]
    if babbling:
        babble = max(babbling, key=lambda row: row.value or 0.0)
        place = f" at exit {babble.exit}" if babble.exit is not None else ""
        told += f", and to {figure(babble)}{place} only babbles"
    others = [_other(report, other, row) for other in report.subjects if other.kind in ("control", "source")]
    compared = " and ".join(words for words in others if words)
    return f"{told}; {compared}." if compared else f"{told}."


def _other(report: Report, subject: Subject, shipped: Measure) -> str:
    """With its exits, where they are not those of what ships."""
    row = average(rows_of(report, subject, "asr"))
    if row is None or row.value is None:
        return ""
    at = f", at {row.note}" if row.note and row.note != shipped.note else ""
    return f"{_name(subject)} answers {figure(row)}{at}"


def _name(subject: Subject) -> str:
    """Its label as a sentence has it: `the same recipe without L-PPO`, `plain (control)`."""
    label, _, id = subject.label.partition(": ")
    words = "uncompressed source" if label == "Source, uncompressed" else label[:1].lower() + label[1:]
    return f"{id} ({words})" if id else f"the {words}"
