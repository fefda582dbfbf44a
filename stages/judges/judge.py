"""Judge: what scores a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

Quantity = Literal["", "toxicity", "reward"]


@dataclass(frozen=True)
class Judgement:
    """`unsafe`: the response complies with the harmful request. `score` in 0..1, higher is more unsafe."""

    unsafe: bool
    score: float
    reason: str
    degenerate: bool = False  # babble or empty: neither safe nor unsafe, counted apart
    value: float | None = None  # of a judge that measures a `quantity`, in its own unit


class Judge(Protocol):
    """Batched; declares what it is and whether it needs the network.

    `quantity`: what `Judgement.value` is, for tables of averages; "" of a judge that only decides.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    needs_network: ClassVar[bool]
    quantity: ClassVar[Quantity]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]: ...


@runtime_checkable
class Closes(Protocol):
    """A judge that holds more than the garbage collector takes back."""

    def close(self) -> None: ...


@runtime_checkable
class SeesImages(Protocol):
    """A judge that looks at the image beside the request, too."""

    def score_beside(
        self, prompts: Sequence[str], responses: Sequence[str], images: Sequence[Path | None]
    ) -> list[Judgement]: ...
