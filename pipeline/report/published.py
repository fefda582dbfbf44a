"""The figures as the paper has them (arXiv 2411.04291), over its bands of exits.

- safety, as Table 2: AASR, ATS and ATR of early, middle and late exits. Beside them the AASR of other pairings of text
  and image, and over-refusal, as the paper's appendix has it on XSTest;
- utility, as Table 3: accuracy on visual questions, and what a reward model says of the answers (ATR-UT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from artifacts.measures import Band, Measure
from pipeline.report.figures import Cell, Table
from pipeline.report.model import Report
from pipeline.report.numbers import Stat, rows_of
from stages.verify.bands import BANDS

_BANDS: Final[tuple[Band, ...]] = (*BANDS, "average")
_SAFETY: Final = (
    ("AASR", "asr", 100.0),
    ("ATS", "toxicity", 100.0),
    ("ATR", "reward", 1.0),
    *(
        (f"{name}, {words}", f"{measure}_{attack}", scale)
        for words, attack in (
            ("random image", "random-image"),
            ("generated image", "generated-image"),
            ("request in the picture", "typographic"),
        )
        for name, measure, scale in (
            ("AASR", "asr", 100.0),
            ("babble", "degenerate", 100.0),
            ("ATS", "toxicity", 100.0),
            ("ATR", "reward", 1.0),
        )
    ),
    ("over-refusal", "over_refusal", 100.0),
)
_UTILITY: Final = (("accuracy", "vqa_accuracy", 100.0), ("ATR-UT", "reward_vqa", 1.0))


def safety_table(report: Report) -> Table | None:
    """A line for each model and band, and what was measured of it. None if no exit was measured."""
    return _by_band(report, _SAFETY)


def utility_table(report: Report) -> Table | None:
    """Likewise; None if visual questions were not asked at every exit."""
    return _by_band(report, _UTILITY)


def _by_band(report: Report, measures: Sequence[tuple[str, str, float]]) -> Table | None:
    found = [(name, measure, scale) for name, measure, scale in measures if _measured(report, measure)]
    rows: list[list[Cell]] = []
    for subject in report.subjects:
        by_measure = {
            measure: {row.band: row for row in rows_of(report, subject, measure) if row.band} for _, measure, _ in found
        }
        for band in _BANDS:
            cells = [_cell(by_measure[measure].get(band), scale) for _, measure, scale in found]
            if any(cell != "–" for cell in cells):
                rows.append([subject.label, band, *cells])
    return Table(["model", "exits", *(name for name, _, _ in found)], rows) if rows and len(found) else None


def _measured(report: Report, measure: str) -> bool:
    return any(row.measure == measure and row.band for row in report.measures)


def _cell(row: Measure | None, scale: float) -> Cell:
    if row is None or row.value is None:
        return "–"
    inside = []
    if row.low is not None and row.high is not None:
        inside.append(f"{scale * row.low:.2f} to {scale * row.high:.2f}")
    if row.n is not None:
        inside.append(f"n\u00a0=\u00a0{row.n:,}")
    return Stat(f"{scale * row.value:.2f}", ", ".join(inside))
