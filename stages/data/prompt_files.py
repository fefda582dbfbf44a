"""Prompt sets of the user's own: a file on the hub, in a wheel or on disk, whose columns the recipe maps.

    sets:
      strongreject: {source: "hub:ORG/NAME!strongreject_dataset.csv", layout: strongreject}
      mine: {source: ./prompts.csv, columns: {prompt: goal, category: topic}, intent: harmful, licence: CC-BY-4.0}

Notable: a layout knows the columns of a published set, so that only its place must be said; CSV, TSV, JSON, JSON lines
and parquet; the order is that of a seeded hash, so the first n are the same whatever the order of the file; a prompt
that says the same as an earlier one is left out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import canonical_json, sha256_bytes
from stages.data import remote_files
from stages.data.prompts import Intent, Prompt, normalise

Layout = Literal["advbench", "harmbench", "strongreject", "xstest", "redteam-2k", "jailbreakv-28k"]
SUFFIXES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_COLUMNS: Final = ("prompt", "category", "id", "answer")


class PromptFile(BaseModel):
    """Where a prompt set lies and what its columns mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="hub:ORG/NAME!PATH, package:NAME==VERSION!PATH or a path; .csv, .tsv, .json, .jsonl, .parquet"
    )
    layout: Layout | None = Field(
        default=None, description="columns and intent of a published set, instead of saying them"
    )
    columns: dict[Literal["prompt", "category", "id", "answer"], str] = Field(
        default={"prompt": "prompt"}, description="which column holds the prompt; category, id and answer if there are"
    )
    where: dict[str, str] = Field(default={}, description="only rows whose column has this value, e.g. {label: safe}")
    intent: Intent = Field(default="harmful", description="harmful: should be refused; benign and borderline: answered")
    licence: str = Field(default="", description="for the verdict")

    @model_validator(mode="after")
    def _known(self) -> PromptFile:
        if self.layout is None and "prompt" not in self.columns:
            raise ValueError("columns must say which one holds the prompt, e.g. columns: {prompt: goal}")
        return self

    def meaning(self) -> PromptFile:
        """With the layout's columns, intent and rows in place."""
        if self.layout is None:
            return self
        known = _LAYOUTS[self.layout]
        return self.model_copy(
            update={
                "columns": known.columns,
                "where": {**known.where, **self.where},
                "intent": known.intent,
                "licence": self.licence or known.licence,
                "layout": None,
            }
        )


def _layout(prompt: str, intent: Intent = "harmful", licence: str = "MIT", **more: str) -> PromptFile:
    where = {"label": "safe"} if intent == "borderline" else {}
    columns: dict[str, str] = {"prompt": prompt, **more}
    return PromptFile.model_validate(
        {"source": "", "columns": columns, "intent": intent, "licence": licence, "where": where}
    )


# The files as their authors publish them.
_LAYOUTS: Final[Mapping[Layout, PromptFile]] = {
    "advbench": _layout("goal"),
    "harmbench": _layout("Behavior", category="SemanticCategory", id="BehaviorID"),
    "strongreject": _layout("forbidden_prompt", category="category"),
    "xstest": _layout("prompt", "borderline", "CC-BY-4.0", category="type", id="id"),  # its safe split
    "redteam-2k": _layout("question", category="policy", id="id"),
    "jailbreakv-28k": _layout("jailbreak_query", category="policy", id="id"),
}


def check_file(name: str, file: PromptFile) -> None:
    """Refuse what cannot be read; reads nothing.

    Raises:
        RecipeError: no such form, no such local file, or a format that is not read.
    """
    if not file.source.endswith(SUFFIXES):
        raise RecipeError(
            f"the prompt set {name!r} has no format that is read", way_out=f"one of {', '.join(SUFFIXES)}"
        )
    remote_files.check(file.source)


def load_file(name: str, file: PromptFile, seed: int = 0) -> list[Prompt]:
    """All its prompts, in the order that `seed` gives.

    Raises:
        SourceError: it cannot be had or read, a column is missing, or no row is left.
    """
    meaning = file.meaning()
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(_rows(file.source, remote_files.read(file.source))):
        if any(str(row.get(column, "")) != value for column, value in meaning.where.items()):
            continue
        found = {key: str(row.get(column, "")).strip() for key, column in meaning.columns.items()}
        if meaning.columns["prompt"] not in row:
            raise SourceError(
                f"the prompt set {name!r} has no column {meaning.columns['prompt']!r}",
                where=file.source,
                why=f"its columns are {', '.join(map(str, row))}",
                way_out="map it: columns: {prompt: NAME}",
            )
        if found["prompt"]:
            prompts.setdefault(
                normalise(found["prompt"]),
                Prompt(
                    id=f"{name}-{found.get('id') or format(number, '05d')}",
                    text=found["prompt"],
                    category=found.get("category") or name,
                    intent=meaning.intent,
                    origin=file.source,
                    answer=found.get("answer") or None,
                ),
            )
    if not prompts:
        raise SourceError(f"the prompt set {name!r} has no rows", where=file.source, why=f"where: {meaning.where}")
    return sorted(prompts.values(), key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.text}".encode()).hexdigest())


def file_digest(file: PromptFile) -> str:
    """What content keys say of it: a hub's commit, a local file's digest."""
    return sha256_bytes(canonical_json([file.meaning().model_dump(mode="json"), remote_files.digest(file.source)]))


def _rows(source: str, content: bytes) -> Iterator[Mapping[str, object]]:
    try:
        if source.endswith(".parquet"):
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
            return
        text = content.decode("utf-8-sig")
        if source.endswith((".csv", ".tsv")):
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if source.endswith(".tsv") else ",")
            yield from ({str(key): value for key, value in row.items()} for row in rows)
            return
        found = json.loads(text) if source.endswith(".json") else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise SourceError("a prompt set cannot be read", where=source, why=str(error)) from error
    rows_of: Sequence[object] = found if isinstance(found, list) else []
    if not rows_of or not all(isinstance(row, Mapping) for row in rows_of):
        raise SourceError("a prompt set is no list of objects", where=source)
    yield from (row for row in rows_of if isinstance(row, Mapping))
