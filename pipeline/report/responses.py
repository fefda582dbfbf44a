"""A readable share of `responses.parquet`: the same requests for every model and exit, the telling ones first.

Before all others, at each exit, stand requests that were safe before quantization and are not in the shipped file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.measures import RESPONSES_NAME
from pipeline.report.model import Report
from stages.verify.attacks import attack_of

EMBEDDED: Final = 480  # answers on the page, about; all of them would make it slow to open
_DISPUTED: Final = 100  # responses on the page on which judges differ
_LONGEST: Final = 600  # characters of one answer
_COLUMNS: Final = ("artifact", "exit", "image", "prompt_id", "intent", "prompt", "response", "refused", "unsafe",
                   "degenerate", "answer", "correct")  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """A short judgement beside an answer; `kind` is its colour."""

    kind: str
    words: str


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    unsafe: bool
    chips: Sequence[Chip]


@dataclass(frozen=True)
class Group:
    label: str
    harmful: bool
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Exit:
    label: str
    groups: Sequence[Group]


@dataclass(frozen=True)
class Model:
    label: str
    exits: Sequence[Exit]


@dataclass(frozen=True)
class Disputed:
    """A response on which judges differ: who gave it first, and what each of them says."""

    prompt: str
    text: str
    where: str
    chips: Sequence[Chip]


@dataclass(frozen=True)
class Undone:
    """A request that was safe before quantization and is not in the shipped file, and where."""

    model: str
    prompt: str
    where: str


@dataclass(frozen=True)
class Responses:
    """What the page shows, how much there is, and where the rest is."""

    models: Sequence[Model]
    embedded: int
    total: int
    where: str
    disputed: Sequence[Disputed] = ()
    disputed_total: int = 0
    undone: Sequence[Undone] = ()


@dataclass(frozen=True)
class _Row:
    artifact: str
    exit: int | None
    image: str | None
    prompt_id: str
    intent: str
    prompt: str
    response: str
    refused: bool
    unsafe: bool
    degenerate: bool
    answer: str | None
    correct: bool | None
    judgements: str = "{}"

    @property
    def part(self) -> tuple[int, str, bool]:
        """Order, name, and whether the answers stay folded."""
        if self.answer is not None:
            return 3, "Questions about pictures", False
        if self.intent != "harmful":
            return 2, "Harmless requests", False
        attack = attack_of(self.prompt_id)
        return (1, f"Harmful requests, {attack}", True) if attack else (0, "Harmful requests", True)


def read_responses(report: Report) -> Responses | None:
    """A share of the responses of this run; None when the store has them no more."""
    rows: list[_Row] = []
    where = ""
    for kept in report.responses:
        path = Path(report.store) / "objects" / kept.artifact / kept.file
        found = _read(path)
        if found:
            rows += found
            where = where or str(path)
    return _arranged(report, rows, where) if rows else None


def _read(path: Path) -> list[_Row]:
    if not path.is_file():
        return []
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return []  # the report can be read where the stages cannot run
    try:
        has = pyarrow.parquet.read_schema(path).names
        more = [name for name in ("judgements",) if name in has]  # verdicts from before other judges have none
        table = pyarrow.parquet.read_table(path, columns=[*_COLUMNS, *more])
    except (pyarrow.ArrowException, OSError, KeyError):
        return []
    return [_Row(**row) for row in table.to_pylist()]


def _arranged(report: Report, rows: Sequence[_Row], where: str) -> Responses:
    undone = _undone(report, rows)
    first = {(exit, id) for _, exit, id in undone}
    telling = _telling(rows)
    groups: dict[tuple[str, int | None], dict[tuple[int, str, bool], list[_Row]]] = {}
    for row in rows:
        groups.setdefault((row.artifact, row.exit), {}).setdefault(row.part, []).append(row)
    parts = sum(len(group) for group in groups.values())
    each = max(3, EMBEDDED // max(parts, 1))
    labels = {subject.artifact: subject.label for subject in report.subjects}
    defaults = {subject.artifact: subject.default_exit for subject in report.subjects}
    known = [*labels, *dict.fromkeys(row.artifact for row in rows if row.artifact not in labels)]
    models, embedded = [], 0
    for artifact in known:
        exits = []
        own = [exit for name, exit in groups if name == artifact]
        for exit in sorted(own, key=lambda exit: (exit is None, exit or 0)):
            found = []
            for (_, label, harmful), members in sorted(groups[artifact, exit].items()):
                chosen = sorted(
                    members, key=lambda row: ((row.exit, row.prompt_id) not in first, *telling[row.prompt_id])
                )[:each]
                embedded += len(chosen)
                words = f"{label} ({len(chosen)} of {len(members)})"
                found.append(
                    Group(
                        words,
                        harmful,
                        [_answer(row, (row.artifact, row.exit, row.prompt_id) in undone) for row in chosen],
                    )
                )
            exits.append(Exit(_exit_label(exit, defaults.get(artifact), groups[artifact, exit]), found))
        if exits:
            models.append(Model(f"{labels.get(artifact, artifact)} ({artifact})", exits))
    disputed = _disputed(rows, labels)
    return Responses(
        models,
        embedded,
        len(rows),
        where or RESPONSES_NAME,
        disputed[:_DISPUTED],
        len(disputed),
        _listed(undone, rows, labels),
    )


def _disputed(rows: Iterable[_Row], labels: Mapping[str, str]) -> list[Disputed]:
    """Responses to harmful requests on which judges differ, each once, as the verdict counts them."""
    found: dict[tuple[str, str], Disputed] = {}
    for row in rows:
        said: Mapping[str, Mapping[str, object]] = json.loads(row.judgements) if row.intent == "harmful" else {}
        if len({bool(opinion["unsafe"]) for opinion in said.values()}) > 1:
            where = f"{labels.get(row.artifact, row.artifact)}, {_place(row.exit)}"
            chips = [_opinion(name, opinion) for name, opinion in said.items()]
            found.setdefault((row.prompt, row.response), Disputed(row.prompt, _shown(row.response), where, chips))
    return list(found.values())


def _opinion(judge: str, said: Mapping[str, object]) -> Chip:
    word = "unsafe" if said["unsafe"] else "babble" if said["degenerate"] else "safe"
    reason = str(said.get("reason") or "")
    told = f"{judge}: {word}" + (f" ({reason})" if reason not in ("", word) else "")
    return Chip("plain" if word == "babble" else word, told)


def _shown(text: str) -> str:
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …") or "(empty)"


def _exit_label(exit: int | None, default: int | None, parts: Mapping[tuple[int, str, bool], Sequence[_Row]]) -> str:
    name = "No image" if exit is None else f"Exit {exit}" + (", the default" if exit == default else "")
    harmful = [row for part, rows in parts.items() if part[0] == 0 for row in rows]
    if not harmful:
        return name
    return f"{name}: {sum(row.unsafe for row in harmful)} of {len(harmful)} harmful requests answered"


def _undone(report: Report, rows: Iterable[_Row]) -> set[tuple[str, int | None, str]]:
    """(artifact, exit, prompt) of what ships where quantization undid safety: no sample unsafe before it, one in the
    file. Only where the verdict compares a file with what it was made from, which the notes of those rows name."""
    before = {
        row.artifact: row.note.partition("'")[2].partition("'")[0]
        for row in report.measures
        if row.measure == "unsafe_by_quantization"
    }
    harmful = [row for row in rows if row.intent == "harmful"]
    asked = {(row.artifact, row.exit, row.prompt_id) for row in harmful}
    unsafe = {(row.artifact, row.exit, row.prompt_id) for row in harmful if row.unsafe}
    safe = asked - unsafe
    return {(artifact, exit, id) for artifact, exit, id in unsafe if (before.get(artifact), exit, id) in safe}


def _listed(undone: Set[tuple[str, int | None, str]], rows: Iterable[_Row], labels: Mapping[str, str]) -> list[Undone]:
    """Each request once for each model, with all its exits."""
    found: dict[tuple[str, str], dict[int | None, None]] = {}
    for row in rows:
        if (row.artifact, row.exit, row.prompt_id) in undone:
            found.setdefault((row.artifact, row.prompt), {})[row.exit] = None
    return [
        Undone(labels.get(artifact, artifact), prompt, ", ".join(_place(exit) for exit in exits))
        for (artifact, prompt), exits in found.items()
    ]


def _place(exit: int | None) -> str:
    return f"exit {exit}" if exit is not None else "no image"


def _telling(rows: Iterable[_Row]) -> dict[str, tuple[float, int]]:
    """Prompt id -> sort key: first those on which models and exits differ most, then the order of asking."""
    judged: dict[str, list[bool]] = {}
    for row in rows:
        judged.setdefault(row.prompt_id, []).append(row.unsafe)
    return {
        id: (abs(sum(flags) / len(flags) - 0.5) if any(flags) else 1.0, place)
        for place, (id, flags) in enumerate(judged.items())
    }


def _answer(row: _Row, undone: bool = False) -> Answer:
    chips = []
    if row.answer is not None:
        chips.append(
            Chip("safe" if row.correct else "unsafe", "right" if row.correct else f"wrong, it is {row.answer}")
        )
    elif row.degenerate:
        chips.append(Chip("plain", "babble"))
    elif row.intent == "harmful":
        chips.append(Chip("unsafe", "answered") if row.unsafe else Chip("safe", "refused" if row.refused else "safe"))
    else:
        chips.append(Chip("unsafe", "refused") if row.refused else Chip("safe", "answered"))
    if undone:
        chips.append(Chip("unsafe", "safe before quantization"))
    return Answer(row.prompt, _shown(row.response), row.unsafe, chips)
