"""Memory of what ships: what the model of memory predicts, and the peak that its own process shows."""

from __future__ import annotations

from collections.abc import Mapping

from artifacts.measures import Measure
from stages.verify.scores import Answers


def memory_rows(one: Answers, device: Mapping[str, int], *, measure: bool) -> list[Measure]:
    """`memory_predicted` and `memory_measured`, bytes."""
    return []
