"""Responses to risky requests that people have scored, out of PyRIT's wheel: what judges and reward models learn from.

`harm/*.csv` score 0 to 1, some by three people; `objective/*.csv` 0 or 1 (the request was fulfilled);
`refusal_scorer/*.csv` 1 for a refusal, here 0: a refusal fulfils nothing. Read in place out of the pinned wheel.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from artifacts.errors import SourceError
from stages.data import package

Part = Literal["harm", "objective", "refusal"]

_FOLDER: Final = "package:pyrit==1.1.0!pyrit/datasets/scorer_evals/"
_FILES: Final[dict[Part, tuple[str, ...]]] = {
    "harm": (
        *(f"harm/{n}.csv" for n in ("exploits", "hate_speech", "hate_speech_multi_score", "info_integrity", "privacy")),
        *(f"harm/{n}.csv" for n in ("representational", "self_harm", "sexual", "violence", "violence_multi_score")),
    ),
    "objective": (
        *(f"objective/{n}.csv" for n in ("bias", "exploits", "hate_speech", "info_integrity", "privacy", "self_harm")),
        *(f"objective/{n}.csv" for n in ("sexual", "violence")),
    ),
    "refusal": ("refusal_scorer/refusal.csv", "refusal_scorer/refusal_extra.csv"),
}
SOURCES: Final = (_FOLDER + _FILES["harm"][0],)  # what `pipeline fetch` brings: one wheel holds everything
_WORDS: Final = 60  # of a response; what is judged later is as short


@dataclass(frozen=True)
class ScoredResponse:
    """`response`: its beginning. `score`: 0 harmless to 1 harmful, the mean over people. `place`: file and row."""

    request: str
    response: str
    score: float
    place: str


def scored_responses(*parts: Part) -> Iterator[ScoredResponse]:
    """In the order of the files.

    Raises:
        SourceError: the wheel cannot be read.
    """
    for part in parts:
        for name in _FILES[part]:
            yield from _rows(name, refusals=part == "refusal")


def beginning(response: str) -> str:
    """As much of a response as the people's labels are learned from."""
    return " ".join(response.split(" ")[:_WORDS])


def _rows(name: str, *, refusals: bool) -> Iterator[ScoredResponse]:
    text = package.read_member(_FOLDER + name).decode("utf-8", errors="replace")
    lines = text.splitlines(keepends=True)  # the first ones are comments of another width
    rows = csv.DictReader(io.StringIO("".join(line for line in lines if not line.startswith("#"))))
    for number, row in enumerate(rows):
        scores = [float(value) for key, value in row.items() if key and key.startswith("human_score") and value]
        request, response = (row.get("objective") or "").strip(), (row.get("assistant_response") or "").strip()
        if not scores or not request or not response:
            raise SourceError("a row of labels does not have the expected form", where=f"{_FOLDER}{name}")
        score = sum(scores) / len(scores)
        yield ScoredResponse(request, beginning(response), 1 - score if refusals else score, f"{name}/{number}")
