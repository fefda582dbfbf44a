"""Two models side by side, from the responses that their verdicts keep: prompt by prompt, at every exit that both have.

What both were asked, beside the same image, is compared; what only one was asked is counted and left out. Requests put
in another way (`stages.verify.attacks`) have lines of their own. Several samples of a prompt are one observation: their
mean for rates and changes, and for McNemar's test whether any of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from artifacts.errors import StoreError
from stages.judges.statistics import Estimate, average_over_exits, change_over_exits, holm, mcnemar, wilson
from stages.verify.attacks import attack_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["harmful", "benign", "vqa"]
Place = tuple[int | None, str, str | None, int]  # exit, prompt id, image, sample
Samples = list[Place]  # of one prompt at one exit

_COLUMNS: Final = ("artifact", "exit", "image", "prompt_id", "intent", "prompt", "response", "refused", "unsafe",
                   "degenerate", "answer", "correct")  # fmt: skip
_SEED: Final = 0


@dataclass(frozen=True)
class Said:
    """One response. `credit`: 1 or 0 as `hit`, but for visual questions that may be partly right."""

    kind: Kind
    attack: str
    prompt: str
    response: str
    hit: bool  # unsafe, refused or right, by kind
    credit: float
    degenerate: bool


@dataclass(frozen=True)
class Side:
    """One model. `name`: as the user called it. `judge`: who decided what is unsafe; `decoding`: how answers were
    drawn, and of what length; "" where that is not told."""

    name: str
    artifact: str
    said: Mapping[Place, Said]
    judge: str = ""
    decoding: str = ""


@dataclass(frozen=True)
class Line:
    """One measure at one exit (None: no image), or over all shared exits with images (`average`); n counts prompts."""

    kind: Kind
    attack: str  # "" for the requests as they are
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
    """A response in which the two differ."""

    kind: Kind
    attack: str
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

    @property
    def caveats(self) -> list[str]:
        """What differs beside the models: who judged, and how answers were drawn."""
        one, other = self.first, self.second
        return [
            f"{what} {first} and {second}: that may be what differs"
            for what, first, second in (
                ("what is unsafe was decided by", one.judge, other.judge),
                ("answers are", one.decoding, other.decoding),
            )
            if first and second and first != second
        ]


def read_side(name: str, artifact: str, responses: Path, judge: str = "", decoding: str = "") -> Side:
    """The responses of one model out of a verdict's parquet file.

    Raises:
        StoreError: it cannot be read, or holds nothing of that model.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        has = pyarrow.parquet.read_schema(responses).names
        more = [name for name in ("sample", "correctness", "own_exit") if name in has]  # older verdicts have none
        rows = pyarrow.parquet.read_table(responses, columns=[*_COLUMNS, *more]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise StoreError("the responses of a verdict cannot be read", where=str(responses), why=str(error)) from error
    said: dict[Place, Said] = {}
    everywhere = any(row["artifact"] == artifact and row.get("own_exit") is False for row in rows)
    for row in rows:
        if row["artifact"] == artifact:
            kind: Kind = "vqa" if row["answer"] is not None else "harmful" if row["intent"] == "harmful" else "benign"
            hit = {"vqa": row["correct"], "harmful": row["unsafe"], "benign": row["refused"]}[kind]
            credit = row.get("correctness") if kind == "vqa" else None
            one = Said(
                kind,
                attack_of(row["prompt_id"]),
                row["prompt"],
                row["response"],
                bool(hit),
                float(hit or 0) if credit is None else credit,
                bool(row["degenerate"]),
            )
            places = {row["exit"]}
            if kind == "vqa":  # counts as asked at no exit where it is each model's own
                own = row.get("own_exit") is not False
                places = {*((row["exit"],) if everywhere else ()), *((None,) if own else ())}
            for exit in places:
                said[exit, row["prompt_id"], row["image"], row.get("sample") or 0] = one
    if not said:
        raise StoreError(f"the verdict holds no response of '{artifact}'", where=str(responses))
    return Side(name, artifact, said, judge, decoding)


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
    kinds: tuple[Kind, ...] = ("harmful", "benign", "vqa")
    groups: dict[tuple[Kind, str], dict[int | None, dict[tuple[str, str | None], Samples]]] = {}
    for place in shared:
        exit, id, image, _ = place
        one = first.said[place]
        groups.setdefault((one.kind, one.attack), {}).setdefault(exit, {}).setdefault((id, image), []).append(place)
    lines: list[Line] = []
    for kind, attack in sorted(groups, key=lambda group: (kinds.index(group[0]), group[1])):
        lines += _lines(kind, attack, first, second, groups[kind, attack])
    told = _once(shared, first, second)
    flips = [
        Flip(
            first.said[place].kind,
            first.said[place].attack,
            place[0],
            first.said[place].prompt,
            first.said[place].response,
            second.said[place].response,
            second.said[place].hit,
        )
        for place in told
        if first.said[place].hit != second.said[place].hit
    ]
    flips.sort(key=lambda flip: (kinds.index(flip.kind), not flip.to_hit, flip.attack, flip.exit or 0))
    return Comparison(
        first,
        second,
        lines,
        flips,
        shared=len(told),
        only_first=len(first.said) - len(shared),
        only_second=len(second.said) - len(shared),
    )


def _once(shared: Sequence[Place], first: Side, second: Side) -> list[Place]:
    """Without what a question at both models' own exit is told a second time."""
    found: dict[tuple[int, int], Place] = {}
    for place in sorted(shared, key=lambda place: place[0] is None):
        found.setdefault((id(first.said[place]), id(second.said[place])), place)
    return list(found.values())


def _lines(
    kind: Kind,
    attack: str,
    first: Side,
    second: Side,
    by_exit: Mapping[int | None, Mapping[tuple[str, str | None], Samples]],
) -> list[Line]:
    exits = sorted(by_exit, key=lambda exit: (exit is None, exit or 0))
    prompts = {exit: list(by_exit[exit].values()) for exit in exits}
    tests = {exit: mcnemar(_hits(first, prompts[exit]), _hits(second, prompts[exit])) for exit in exits}
    seen = [exit for exit in exits if exit is not None]
    corrected: dict[int | None, float] = dict(zip(seen, holm([tests[exit].p for exit in seen]), strict=True))
    found: list[Line] = []
    for exit in exits:
        at_exit, test = [[samples] for samples in prompts[exit]], tests[exit]
        before, after = _credits(first, at_exit), _credits(second, at_exit)
        found.append(
            Line(
                kind,
                attack,
                exit,
                False,
                _rate(before),
                _rate(after),
                change_over_exits(before, after, _SEED),
                test.to_unsafe,
                test.to_safe,
                test.p,
                corrected.get(exit),
            )
        )
    # Prompts that were asked at every exit, each at all of them.
    everywhere = [
        [by_exit[exit][prompt] for exit in seen]
        for prompt in (by_exit[seen[0]] if seen else ())
        if all(prompt in by_exit[exit] for exit in seen)
    ]
    if len(seen) > 1 and everywhere:
        found.append(_average(kind, attack, first, second, everywhere))
    return found


def _average(kind: Kind, attack: str, first: Side, second: Side, everywhere: Sequence[Sequence[Samples]]) -> Line:
    before, after = _credits(first, everywhere), _credits(second, everywhere)
    flips = [mcnemar(_hits(first, at_exit), _hits(second, at_exit)) for at_exit in zip(*everywhere, strict=True)]
    return Line(
        kind,
        attack,
        None,
        True,
        average_over_exits(before, _SEED),
        average_over_exits(after, _SEED),
        change_over_exits(before, after, _SEED),
        sum(test.to_unsafe for test in flips),
        sum(test.to_safe for test in flips),
        None,
        None,
    )


def _hits(side: Side, prompts: Sequence[Samples]) -> list[bool]:
    return [any(side.said[place].hit for place in samples) for samples in prompts]


def _credits(side: Side, prompts: Sequence[Sequence[Samples]]) -> NDArray[np.float64]:
    """(prompts, exits): the mean over samples."""
    import numpy as np

    return np.array(
        [[np.mean([side.said[place].credit for place in samples]) for samples in exits] for exits in prompts]
    )


def _rate(credits: NDArray[np.float64]) -> Estimate:
    """Of each prompt at one exit; Wilson's interval where each counts or does not."""
    if ((credits == 0) | (credits == 1)).all():
        return wilson(int(credits.sum()), len(credits))
    return average_over_exits(credits, _SEED)
