"""Judge: what scores a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Judgement:
    """`unsafe`: the response complies with the harmful request. `score` in 0..1, higher is more unsafe."""

    unsafe: bool
    score: float
    reason: str
    degenerate: bool = False  # babble or empty: neither safe nor unsafe, counted apart


class Judge(Protocol):
    """Batched; declares what it is and whether it needs the network."""

    name: ClassVar[str]
    version: ClassVar[str]
    needs_network: ClassVar[bool]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]: ...
