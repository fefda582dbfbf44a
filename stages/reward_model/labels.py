"""`labels:pyrit`: responses to risky requests that people have scored, as pairs: of two responses to one request, the
less harmful one is preferred.

The labels of refusals are left alone: they are what the refusal rule is tested on.
"""

from __future__ import annotations

from typing import Final

from stages.data import scored_responses
from stages.judges.reward_model import dialogue
from stages.reward_model.pairs import Pair

SOURCE: Final = "labels:pyrit"
SOURCES: Final = scored_responses.SOURCES
_GAP: Final = 0.5  # between two scores: people agree on which is worse


def label_pairs() -> list[Pair]:
    """Each response stands in one pair at most.

    Raises:
        SourceError: the wheel cannot be read.
    """
    scored: dict[str, list[tuple[float, str, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for one in scored_responses.scored_responses("harm", "objective"):
        if (one.request, one.response) not in seen:
            seen.add((one.request, one.response))
            scored.setdefault(one.request, []).append((one.score, one.response, one.place))
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
