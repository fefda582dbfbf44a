"""Preference pairs in HH-RLHF's form, and the rows of files that hold them.

A row is a JSON object or a parquet row with the texts `chosen` and `rejected`, each a whole dialogue that begins with
"\\n\\nHuman:" and ends in a turn of the assistant; the two differ. Other columns are not looked at.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import sha256_bytes
from stages.data import hub, package

SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".parquet")
_TURN: Final = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_WHAT_A_ROW_IS: Final = (
    'a row holds two texts, "chosen" and "rejected", each a dialogue: "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)'
)


@dataclass(frozen=True)
class Pair:
    """Two dialogues, the better one first.

    Attributes:
        asked: the human's turns.
        source: as the recipe names it. place: file and line, or the id of a prompt.
        kind: "harmful" or "harmless" where that is known.
    """

    chosen: str
    rejected: str
    asked: tuple[str, ...]
    source: str
    place: str
    kind: str = ""


class UnusableRowError(SourceError):
    """A row that cannot be trained on; `where` is its file and line."""


def read_file(source: str) -> tuple[str, Iterator[tuple[str, object]]]:
    """The SHA-256 of a file, and its rows with their places ("pairs.jsonl:3"); a row that is no JSON comes as text.

    Raises:
        SourceError: the file cannot be had or read.
    """
    name, content = _content(source)
    return sha256_bytes(content), (_parquet(name, content) if name.endswith(".parquet") else _json_lines(name, content))


def check_source(source: str) -> None:
    """Refuse what cannot be a file of pairs, without reading it.

    Raises:
        RecipeError: no such form, no such local file, or a format that is not read.
    """
    kind = source.partition(":")[0]
    try:
        if kind == "package":
            package.parse(source)
        elif kind == "hub":
            hub.DataFile.parse(source)
        elif not Path(source).is_file():
            raise RecipeError(
                f"there is no file {source}",
                way_out="write prompts:SET, labels:pyrit, ./FILE, hub:ORG/NAME!PATH or package:NAME==VERSION!PATH",
            )
    except ValueError as error:
        raise RecipeError(
            str(error), way_out="for example hub:Anthropic/hh-rlhf!harmless-base/train.jsonl.gz"
        ) from error
    if not source.endswith(SUFFIXES):
        raise RecipeError(f"{source} is no file of pairs that can be read", way_out=f"one of {', '.join(SUFFIXES)}")


def pair_of(row: object, source: str, place: str) -> Pair:
    """A row as a pair.

    Raises:
        UnusableRowError: it is none.
    """
    if not isinstance(row, Mapping):
        raise UnusableRowError(
            "this is no row of pairs", where=place, why="it is no JSON object", way_out=_WHAT_A_ROW_IS
        )
    texts = []
    for key in ("chosen", "rejected"):
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            has = f"it has: {', '.join(map(str, row))}" if key not in row else "it is empty or no text"
            raise UnusableRowError(f"the row has no {key!r}", where=place, why=has, way_out=_WHAT_A_ROW_IS)
        texts.append(text)
    chosen, rejected = texts
    turns = [_turns(text, key, place) for text, key in ((chosen, "chosen"), (rejected, "rejected"))]
    if turns[0] == turns[1]:
        raise UnusableRowError(
            "chosen and rejected are the same",
            where=place,
            why="there is nothing to prefer",
            way_out="take the row out",
        )
    asked = tuple(dict.fromkeys(text for spoken in turns for role, text in spoken if role == "Human"))
    return Pair(chosen, rejected, asked, source, place)


def _turns(text: str, key: str, place: str) -> list[tuple[str, str]]:
    """Role and text of each turn."""
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=False)]
    why = None
    if not found or text[: marks[0].start()].strip() or found[0][0] != "Human":
        why = 'it does not begin with "\\n\\nHuman:"'
    elif found[-1][0] != "Assistant":
        why = "it does not end with a turn of the assistant"
    elif not found[-1][1]:
        why = "the assistant's last turn is empty"
    if why is not None:
        raise UnusableRowError(f"{key!r} is no dialogue", where=place, why=why, way_out=_WHAT_A_ROW_IS)
    return found


def _content(source: str) -> tuple[str, bytes]:
    """A short name for messages, and the bytes."""
    kind = source.partition(":")[0]
    if kind == "package":
        return source, package.read_member(source)
    path = hub.DataFile.parse(source).fetch() if kind == "hub" else Path(source)
    try:
        return source if kind == "hub" else str(path), path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read", where=str(path), why=error.strerror) from error


def _json_lines(name: str, content: bytes) -> Iterator[tuple[str, object]]:
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError("the file is damaged", where=name, why=str(error), way_out="get it again") from error
    # Not splitlines(): JSON strings may hold the other characters that it breaks at.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{name}:{number}", json.loads(line)
            except ValueError:
                yield f"{name}:{number}", line


def _parquet(name: str, content: bytes) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        columns = [column for column in ("chosen", "rejected") if column in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(columns=columns or None):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError("the file is damaged", where=name, why=str(error), way_out="get it again") from error
