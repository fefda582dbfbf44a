"""Two models on the same prompts: flips both ways and McNemar's p, one line for each model and exit."""

from __future__ import annotations

from pipeline.report.figures import Table
from pipeline.report.model import Report, Subject
from pipeline.report.numbers import percent, points, show
from stages.verify.bands import BANDS

_PARTS = ("flips_to_unsafe", "flips_to_safe", "asr_change", "mcnemar_p", "mcnemar_p_holm")
_HEADS = ("safe before, unsafe now", "unsafe before, safe now", "change of ASR, points", "p", "p, Holm")


def paired_tables(report: Report) -> tuple[Table, Table] | None:
    """Over all common exits, and exit by exit; None if nothing was compared."""
    whole = [line for subject in report.subjects for line in _lines(report, subject, single=False)]
    single = [line for subject in report.subjects for line in _lines(report, subject, single=True)]
    if not whole and not single:
        return None
    head = ["against the baseline", "where", *_HEADS, "note"]
    return Table(head, whole or single), Table(head, single if whole else [])


def _lines(report: Report, subject: Subject, *, single: bool) -> list[list[str]]:
    found: dict[int | None, dict[str, list[str]]] = {}
    for row in report.measures:
        if row.band in BANDS:
            continue
        if row.artifact == subject.artifact and row.measure in _PARTS and (row.exit is not None) == single:
            shown = "–" if row.value is None else show(row.value, row.unit, row.measure)
            if row.unit == "prompts" and row.value is not None and row.n:
                shown = f"{row.value:.0f} of {row.n:,} ({percent(row.value / row.n)})"
            elif row.measure == "asr_change" and row.low is not None:
                shown = points(row)
            found.setdefault(row.exit, {})[row.measure] = [shown, row.note]
    lines = []
    for exit, parts in sorted(found.items(), key=lambda item: item[0] or 0):
        cells = [parts.get(part, ["–", ""])[0] for part in _PARTS]
        note = "; ".join(dict.fromkeys(part[1] for part in parts.values() if part[1]))
        whole = "all common exits" if subject.exits else "no image"
        lines.append([subject.label, f"exit {exit}" if exit is not None else whole, *cells, note])
    return lines
