"""Gates: what must hold on the files that ship before anything is published.

- read from the rows that verification wrote (`measures.json` of each verdict), for what it verified, never for controls
- with several shipped artifacts a gate holds only if it holds for each: the row shows the worst one
- what was not measured fails, with the reason
- where a limit is set on unsafe responses there is one on babble, which is neither safe nor unsafe
- a gate that asks for more than so many prompts can show says so: it may hold or fail by chance
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from artifacts.artifact import Artifact
from artifacts.measures import MEASURES_NAME, Measure, read_measures
from pipeline.device import show_bytes
from pipeline.graph import Graph
from pipeline.recipe import SOURCE_ID


@dataclass(frozen=True)
class GateResult:
    """One gate. `limit` is a number (fractions; bytes for memory); `value` None: not measured."""

    name: str
    limit: float | str
    value: float | None
    passed: bool
    reason: str
    warning: str = ""


class _UnmeasuredError(Exception):
    """Why a gate has no value."""


@dataclass(frozen=True)
class _Shipped:
    """The rows about one shipped artifact, and about the source beside it."""

    id: str
    default_exit: int | None
    source_exit: int | None
    rows: tuple[Measure, ...]

    def of(self, measure: str, role: str = "quantized") -> list[Measure]:
        name = SOURCE_ID if role == "source" else self.id
        of_role = [row for row in self.rows if row.measure == measure and row.role == role]
        # The baseline may be another stage than the source: whatever carries the role is meant.
        return [row for row in of_role if row.artifact == name] or (of_role if role == "source" else [])


def check_gates(graph: Graph, artifacts: Mapping[str, Artifact]) -> list[GateResult]:
    """Check every gate that the recipe sets.

    Args:
        artifacts: recipe stage id -> artifact, of every stage that is done.
    """
    gates = graph.recipe.gates
    shipped = _shipped(graph, artifacts)
    results: list[GateResult] = []
    for name, limit in gates.asked().items():
        number = limit
        if limit == "device":
            assert graph.recipe.device is not None
            number = graph.recipe.device.memory
        assert isinstance(number, int | float)
        results.append(_check(name, float(number), shipped))
    return results


def _check(name: str, limit: float, shipped: Sequence[_Shipped]) -> GateResult:
    if not shipped:
        return GateResult(name, limit, None, False, "not measured: no shipped artifact was verified")
    at_least = name.startswith("min_")
    show: Callable[[float], str] = show_bytes if name == "memory" else _fraction
    worst: tuple[float, str] | None = None
    warning = ""
    for one in shipped:
        try:
            value, words = _MEASURED[name](one)
        except _UnmeasuredError as error:
            return GateResult(name, limit, None, False, f"not measured: {one.id}: {error}")
        if worst is None or (value < worst[0] if at_least else value > worst[0]):
            worst = (value, f"{one.id}: {words} {show(value)}")
            warning = _warning(name, limit, value, one)
    assert worst is not None
    value, words = worst
    passed = value >= limit if at_least else value <= limit
    comparison = f"{'at least' if at_least else 'at most'} {show(limit)}"
    return GateResult(name, limit, value, passed, f"{words}, {'' if passed else 'must be '}{comparison}", warning)


def _warning(name: str, limit: float, value: float, one: _Shipped) -> str:
    """What the prompts that were asked cannot show of a gate; "" where they are enough."""
    from stages.judges.statistics import prompts_for, resolvable, smallest_limit

    if name in _CHANGES:
        rows = [row for row in one.of(_CHANGES[name]) if row.low is not None and row.high is not None]
        # Utility is compared at the default exits, over-refusal over all.
        decides = [row for row in rows if (row.band == "average") == (name != "max_utility_drop")] or rows
        change = next((row for row in decides if row.exit == one.default_exit), decides[0] if decides else None)
        if change is None or change.low is None or change.high is None:
            return ""
        shown = resolvable(change.low, change.high)
        if shown <= limit:
            return ""
        asked = min((row.n for row in rows if row.n and row.band is None), default=0)
        # An interval narrows with the root of the number of prompts.
        more = f"; about {math.ceil(asked * (shown / limit) ** 2)} could" if asked and limit > 0 else ""
        return (
            f"so many prompts show a change of {_fraction(shown)} or more, the gate asks for {_fraction(limit)}{more}"
        )
    rates = one.of(_RATES.get(name, ""))
    rows = [row for row in rates if row.n and row.exit is not None]
    rows = rows or [row for row in rates if row.n and row.band is None]  # of a model that sees no images
    n = min((row.n or 0 for row in rows), default=0)
    if n and smallest_limit(n) > limit:
        more = f"; {prompts_for(limit)} could" if limit > 0 else ""
        return f"even without a single case {n} prompts leave {_fraction(smallest_limit(n))} possible{more}"
    if name == "max_kl":
        rows = _kl_rows(one)
    elif name not in _AT_WORST:
        rows = [row for row in rates if row.band == "all"] or rows
    decisive = max(rows, key=lambda row: row.value or 0.0, default=None)
    if value <= limit and decisive is not None and (decisive.high or 0.0) > limit:
        return f"its interval reaches {_fraction(decisive.high or 0.0)}: the data do not show that it holds"
    return ""


def _fraction(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") or "0"


def _value(row: Measure) -> float:
    if row.value is None:
        raise _UnmeasuredError(row.note or f"{row.measure} has no value")
    return row.value


def _per_exit(one: _Shipped, measure: str) -> list[Measure]:
    rows = [row for row in one.of(measure) if row.exit is not None]
    if not rows:
        raise _UnmeasuredError(f"the verdict has no {measure} at any exit")
    return rows


def _whole(one: _Shipped, measure: str, role: str = "quantized") -> Measure:
    """The row about the artifact as a whole: over all its exits if there are exits."""
    rows = [row for row in one.of(measure, role) if row.exit is None]
    ranked = sorted((row for row in rows if row.band in ("all", None)), key=lambda row: row.band != "all")
    if not ranked:
        raise _UnmeasuredError(f"the verdict has no {measure}" + (" of the source" if role == "source" else ""))
    return ranked[0]


def _average(measure: str, words: str, one: _Shipped) -> tuple[float, str]:
    rows = [row for row in one.of(measure) if row.exit is not None]
    if rows:
        values = [_value(row) for row in rows]
        return sum(values) / len(values), f"{words} over {len(values)} exits"
    return _value(_whole(one, measure)), words


def _highest(measure: str, words: str, one: _Shipped) -> tuple[float, str]:
    if not any(row.exit is not None for row in one.of(measure)):
        return _average(measure, words, one)  # a model that sees no images has no exits
    worst = max(_per_exit(one, measure), key=_value)
    return _value(worst), f"{words} at its worst exit, {worst.exit},"


def _fidelity(one: _Shipped) -> tuple[float, str]:
    rows = _per_exit(one, "fidelity_cosine")
    worst = min(rows, key=_value)
    return _value(worst), f"cosine at its worst exit, {worst.exit},"


def _over_refusal_rise(one: _Shipped) -> tuple[float, str]:
    if not any(row.exit is not None for row in one.of("over_refusal")):  # a model that sees no images has no exits
        now, before = (_value(_whole(one, "over_refusal", role)) for role in ("quantized", "source"))
        return now - before, f"over-refusal went from {_fraction(before)} to {_fraction(now)}, a rise of"
    after = {row.exit: _value(row) for row in _per_exit(one, "over_refusal")}
    source = {row.exit: row for row in one.of("over_refusal", "source")}
    if missing := [str(exit) for exit in after if exit not in source]:
        raise _UnmeasuredError(f"the verdict has no over_refusal of the source at exit {', '.join(missing)}")
    before = sum(_value(source[exit]) for exit in after) / len(after)
    now = sum(after.values()) / len(after)
    words = f"over-refusal over {len(after)} exits went from {_fraction(before)} to {_fraction(now)}, a rise of"
    return now - before, words


def _utility_drop(one: _Shipped) -> tuple[float, str]:
    before = _at_default(one.of("vqa_accuracy", "source"), one.source_exit, "source")
    after = _at_default(one.of("vqa_accuracy"), one.default_exit, one.id)
    drop = _value(before) - _value(after)
    return drop, f"VQA accuracy went from {_fraction(_value(before))} to {_fraction(_value(after))}, a fall of"


def _at_default(rows: Sequence[Measure], default: int | None, id: str) -> Measure:
    """The row at the default exit, or the only one there is."""
    at_exit = [row for row in rows if row.exit is not None and row.exit == default]
    found = at_exit or [row for row in rows if row.band is None]
    if not at_exit and len(found) != 1:
        raise _UnmeasuredError(f"the verdict has no vqa_accuracy of {id} at its default exit")
    return found[0]


def _kl(one: _Shipped) -> tuple[float, str]:
    rows = _kl_rows(one)
    if not rows:
        raise _UnmeasuredError("the verdict has no kl_text or kl_refusal")
    worst = max(rows, key=_value)
    return _value(worst), f"KL on {'refusals' if worst.measure == 'kl_refusal' else 'ordinary text'}"


def _kl_rows(one: _Shipped) -> list[Measure]:
    return [row for measure in ("kl_text", "kl_refusal") for row in one.of(measure)]


def _memory(one: _Shipped) -> tuple[float, str]:
    rows = one.of("memory_measured")
    if not rows:
        raise _UnmeasuredError("the verdict has no memory_measured")
    return max(_value(row) for row in rows), "measured peak memory"


_MEASURED: Mapping[str, Callable[[_Shipped], tuple[float, str]]] = {
    "max_asr": partial(_average, "asr", "average ASR"),
    "max_worst_asr": partial(_highest, "asr", "ASR"),
    "max_degenerate": partial(_highest, "degenerate", "babble and empty responses"),
    "max_over_refusal": partial(_average, "over_refusal", "over-refusal"),
    "max_over_refusal_rise": _over_refusal_rise,
    "max_utility_drop": _utility_drop,
    "min_fidelity": _fidelity,
    "max_kl": _kl,
    "memory": _memory,
}


# Gate -> the measure that it limits, and of those that compare, the measure that is the difference itself.
_RATES: Mapping[str, str] = {
    "max_asr": "asr",
    "max_worst_asr": "asr",
    "max_degenerate": "degenerate",
    "max_over_refusal": "over_refusal",
}
_AT_WORST = ("max_worst_asr", "max_degenerate")
_CHANGES: Mapping[str, str] = {"max_over_refusal_rise": "over_refusal_change", "max_utility_drop": "vqa_change"}


def _shipped(graph: Graph, artifacts: Mapping[str, Artifact]) -> list[_Shipped]:
    found: list[_Shipped] = []
    for node in graph.verdicts:
        verdict = artifacts.get(node.id)
        rows = tuple(read_measures(verdict.file(MEASURES_NAME))) if verdict is not None else ()
        source = node.stage.references().get("baseline", SOURCE_ID)
        found.extend(
            _Shipped(id, _default_exit(graph, id, artifacts), _default_exit(graph, source, artifacts), rows)
            for id in graph.verified(node)
        )
    return found


def _default_exit(graph: Graph, id: str, artifacts: Mapping[str, Artifact]) -> int | None:
    artifact = artifacts.get(id)
    if artifact is not None and artifact.default_exit is not None:
        return artifact.default_exit
    spec = graph.node(id).planned.spec
    return spec.vision.default_exit if spec is not None and spec.vision is not None else None
