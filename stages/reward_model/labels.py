"""`labels:pyrit`: responses to risky requests that people have scored, as pairs: of two responses to one request, the
less harmful one is preferred. Read in place out of the pinned wheel.

`harm/*.csv` score 0 to 1, some by three people; `objective/*.csv` 0 or 1 (the request was fulfilled). The labels of
`refusal_scorer/` are left alone: they are what the refusal rule is tested on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Final

from artifacts.errors import SourceError
from stages.data import package
from stages.judges.reward_model import dialogue
from stages.reward_model.pairs import Pair

SOURCE: Final = "labels:pyrit"
_FOLDER: Final = "package:pyrit==1.1.0!pyrit/datasets/scorer_evals/"
_FILES: Final = (
    *(f"harm/{n}.csv" for n in ("exploits", "hate_speech", "hate_speech_multi_score", "info_integrity", "privacy")),
    *(f"harm/{n}.csv" for n in ("representational", "self_harm", "sexual", "violence", "violence_multi_score")),
    *(f"objective/{n}.csv" for n in ("bias", "exploits", "hate_speech", "info_integrity", "privacy", "self_harm")),
    *(f"objective/{n}.csv" for n in ("sexual", "violence")),
)
SOURCES: Final = (_FOLDER + _FILES[0],)  # what `pipeline fetch` brings: one wheel holds everything
_GAP: Final = 0.5  # between two scores: people agree on which is worse
_WORDS: Final = 60  # of a response; what is judged later is as short


def label_pairs() -> list[Pair]:
    """Each response stands in one pair at most.

    Raises:
        SourceError: the wheel cannot be read.
    """
    scored: dict[str, list[tuple[float, str, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for request, response, score, place in _responses():
        if (request, response) not in seen:
            seen.add((request, response))
            scored.setdefault(request, []).append((score, response, place))
    found = []
    for request, responses in scored.items():
        responses.sort()
        half = len(responses) // 2
        for (low, better, place), (high, worse, _) in zip(
            responses[:half], responses[len(responses) - half :], strict=True
        ):
            if high - low >= _GAP and better != worse:
                texts = dialogue(request, better), dialogue(request, worse)
                found.append(Pair(*texts, (request,), SOURCE, place, "harmful"))
    return found


def _responses() -> Iterator[tuple[str, str, float, str]]:
    """Request, response (its beginning), score, place."""
    for name in _FILES:
        text = package.read_member(_FOLDER + name).decode("utf-8", errors="replace")
        lines = text.splitlines(keepends=True)  # the first ones are comments of another width
        rows = csv.DictReader(io.StringIO("".join(line for line in lines if not line.startswith("#"))))
        for number, row in enumerate(rows):
            scores = [float(value) for key, value in row.items() if key and key.startswith("human_score") and value]
            request, response = (row.get("objective") or "").strip(), (row.get("assistant_response") or "").strip()
            if not scores or not request or not response:
                raise SourceError("a row of labels does not have the expected form", where=f"{_FOLDER}{name}")
            yield request, " ".join(response.split(" ")[:_WORDS]), sum(scores) / len(scores), f"{name}/{number}"
