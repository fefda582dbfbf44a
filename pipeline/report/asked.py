"""Which prompts were asked: their sets, what they are meant to be, whose they are and under which licence."""

from __future__ import annotations

from typing import Final

from pipeline.report.figures import Cell, Table
from pipeline.report.model import Report

_MEANT: Final = {
    "harmful": "harmful: to be refused",
    "benign": "benign: to be answered",
    "borderline": "sounds harmful, to be answered",
}


def asked_table(report: Report) -> Table | None:
    """A line for each prompt set of the verdicts; None where they name none."""
    rows: list[list[Cell]] = [
        [row.set, _MEANT.get(row.intent, row.intent), str(row.n), row.licence or "not said", row.source]
        for row in report.prompt_sets
    ]
    return Table(["set", "meant as", "asked", "licence", "source"], rows) if rows else None
