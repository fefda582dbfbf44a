"""Two models side by side, from the responses that their verdicts keep: prompt by prompt, at every exit that both have.

What both were asked, beside the same image, is compared; what only one was asked is counted and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from artifacts.errors import StoreError
from stages.judges.statistics import Estimate, average_over_exits, change_over_exits, holm, mcnemar, wilson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["harmful", "benign", "vqa"]
Place = tuple[int | None, str, str | None, int]  # exit, prompt id, image, sample

_COLUMNS: Final = ("artifact", "exit", "image", "prompt_id", "intent", "prompt", "response", "refused", "unsafe",
                   "degenerate", "answer", "correct")  # fmt: skip
_SEED: Final = 0


@dataclass(frozen=True)
class Said:
    """One response."""

    kind: Kind
    prompt: str
    response: str
    hit: bool  # unsafe, refused or right, by kind
    degenerate: bool


@dataclass(frozen=True)
class Side:
    """One model. `name`: as the user called it."""

    name: str
    artifact: str
    said: Mapping[Place, Said]


@dataclass(frozen=True)
class Line:
    """One measure at one exit (None: no image), or over all shared exits with images (`average`)."""

    kind: Kind
    exit: int | None
    average: bool
    before: Estimate
    after: Estimate
    change: Estimate
    to_hit: int  # not before, but after
    to_miss: int
    p: float | None  # exact McNemar; None of an average, whose exits are no independent pairs
    p_holm: float | None  # over the exits


@dataclass(frozen=True)
class Flip:
    """A prompt on which the two differ."""

    kind: Kind
    exit: int | None
    prompt: str
    before: str
    after: str
    to_hit: bool


@dataclass(frozen=True)
class Comparison:
    """What became of it."""

    first: Side
    second: Side
    lines: Sequence[Line]
    flips: Sequence[Flip]  # towards unsafe first
    shared: int
    only_first: int
    only_second: int


def read_side(name: str, artifact: str, responses: Path) -> Side:
    """The responses of one model out of a verdict's parquet file.

    Raises:
        StoreError: it cannot be read, or holds nothing of that model.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        has = pyarrow.parquet.read_schema(responses).names
        more = [name for name in ("sample",) if name in has]  # verdicts from before sampling have none
        rows = pyarrow.parquet.read_table(responses, columns=[*_COLUMNS, *more]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise StoreError("the responses of a verdict cannot be read", where=str(responses), why=str(error)) from error
    said: dict[Place, Said] = {}
    for row in rows:
        if row["artifact"] == artifact:
            kind: Kind = "vqa" if row["answer"] is not None else "harmful" if row["intent"] == "harmful" else "benign"
            hit = {"vqa": row["correct"], "harmful": row["unsafe"], "benign": row["refused"]}[kind]
            # A question counts at the exit that is each model's own.
            place = (None if kind == "vqa" else row["exit"], row["prompt_id"], row["image"], row.get("sample") or 0)
            said[place] = Said(kind, row["prompt"], row["response"], bool(hit), bool(row["degenerate"]))
    if not said:
        raise StoreError(f"the verdict holds no response of '{artifact}'", where=str(responses))
    return Side(name, artifact, said)


def compare(first: Side, second: Side) -> Comparison:
    """Everything that both were asked.

    Raises:
        StoreError: nothing was asked of both.
    """
    shared = [
        place for place in first.said if place in second.said and first.said[place].prompt == second.said[place].prompt
    ]
    if not shared:
        raise StoreError(
            f"{first.name} and {second.name} were not asked the same",
            why=f"{len(first.said)} and {len(second.said)} responses, none to the same prompt and image at one exit",
            way_out="verify both with the same prompts and prompt_seed",
        )
    lines: list[Line] = []
    kinds: tuple[Kind, ...] = ("harmful", "benign", "vqa")
    for kind in kinds:
        by_exit: dict[int | None, list[Place]] = {}
        for place in shared:
            if first.said[place].kind == kind:
                by_exit.setdefault(place[0], []).append(place)
        lines += _lines(kind, first, second, by_exit)
    flips = [
        Flip(
            first.said[place].kind,
            place[0],
            first.said[place].prompt,
            first.said[place].response,
            second.said[place].response,
            second.said[place].hit,
        )
        for place in shared
        if first.said[place].hit != second.said[place].hit
    ]
    flips.sort(key=lambda flip: (kinds.index(flip.kind), not flip.to_hit, flip.exit or 0))
    return Comparison(
        first,
        second,
        lines,
        flips,
        shared=len(shared),
        only_first=len(first.said) - len(shared),
        only_second=len(second.said) - len(shared),
    )


def _lines(kind: Kind, first: Side, second: Side, by_exit: Mapping[int | None, Sequence[Place]]) -> list[Line]:
    exits = sorted(by_exit, key=lambda exit: (exit is None, exit or 0))
    tests = {exit: mcnemar(_hits(first, by_exit[exit]), _hits(second, by_exit[exit])) for exit in exits}
    seen = [exit for exit in exits if exit is not None]
    corrected: dict[int | None, float] = dict(zip(seen, holm([tests[exit].p for exit in seen]), strict=True))
    found: list[Line] = []
    for exit in exits:
        before, after, test = _hits(first, by_exit[exit]), _hits(second, by_exit[exit]), tests[exit]
        found.append(
            Line(
                kind,
                exit,
                False,
                wilson(sum(before), len(before)),
                wilson(sum(after), len(after)),
                change_over_exits(_column(before), _column(after), _SEED),
                test.to_unsafe,
                test.to_safe,
                test.p,
                corrected.get(exit),
            )
        )
    everywhere = _everywhere({exit: by_exit[exit] for exit in seen})
    if len(seen) > 1 and everywhere:
        found.append(_average(kind, first, second, everywhere))
    return found


def _average(kind: Kind, first: Side, second: Side, everywhere: Sequence[Sequence[Place]]) -> Line:
    import numpy as np

    before, after = (
        np.array([[float(side.said[place].hit) for place in places] for places in everywhere])
        for side in (first, second)
    )
    return Line(
        kind,
        None,
        True,
        average_over_exits(before, _SEED),
        average_over_exits(after, _SEED),
        change_over_exits(before, after, _SEED),
        int(((before == 0) & (after == 1)).sum()),
        int(((before == 1) & (after == 0)).sum()),
        None,
        None,
    )


def _everywhere(by_exit: Mapping[int, Sequence[Place]]) -> list[list[Place]]:
    """Prompts (with their image) that were asked at every exit, each at all of them."""
    places: dict[tuple[str, str | None, int], list[Place]] = {}
    for exit in by_exit:
        for place in by_exit[exit]:
            places.setdefault(place[1:], []).append(place)
    return [found for found in places.values() if len(found) == len(by_exit)]


def _hits(side: Side, places: Sequence[Place]) -> list[bool]:
    return [side.said[place].hit for place in places]


def _column(hits: Sequence[bool]) -> NDArray[np.float64]:
    import numpy as np

    return np.array(hits, dtype=float)[:, None]
