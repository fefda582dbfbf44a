"""Prompt sets of the user's own: a file on the hub, in a wheel or on disk, whose columns the recipe maps.

    sets:
      xstest: {layout: xstest}
      strongreject: {source: ./strongreject_dataset.csv, layout: strongreject}
      mine: {source: ./prompts.csv, columns: {prompt: goal, category: topic}, intent: harmful, licence: CC-BY-4.0}

Notable: a layout knows the columns of a published set, as its authors name them and as the hub's copy does, and where
on the hub that copy lies; CSV, TSV, JSON, JSON lines and parquet; the order is that of a seeded hash in which every
beginning holds the categories in proportion, so the first n are the same whatever the order of the file; a prompt that
says the same as an earlier one is left out (what nearly says the same: `stages.verify.resemblance`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from stages.data import remote_files
from stages.data.prompt_sets import Intent, Prompt
from stages.data.prompts import normalise

Layout = Literal["advbench", "harmbench", "strongreject", "xstest", "redteam-2k", "jailbreakv-28k"]
Column = Literal["prompt", "category", "id", "answer", "image"]
SUFFIXES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Published:
    """A set as it is published. Of several names of a column the first that a file has is meant."""

    hub: str
    columns: Mapping[str, tuple[str, ...]]
    intent: Intent = "harmful"
    licence: str = "MIT"
    where: Mapping[str, str] | None = None


_JAILBREAKV: Final = "hub:JailbreakV-28K/JailBreakV-28k!JailBreakV_28K/"
PUBLISHED: Final[Mapping[Layout, Published]] = {
    "advbench": Published("hub:walledai/AdvBench!data/train-00000-of-00001.parquet", {"prompt": ("goal", "prompt")}),
    "harmbench": Published(
        "hub:walledai/HarmBench!standard/train-00000-of-00001.parquet",
        {"prompt": ("Behavior", "prompt"), "category": ("SemanticCategory", "category"), "id": ("BehaviorID",)},
    ),
    "strongreject": Published(
        "hub:walledai/StrongREJECT!data/train-00000-of-00001.parquet",
        {"prompt": ("forbidden_prompt", "prompt"), "category": ("category",)},
    ),
    "xstest": Published(  # its safe split
        "hub:Paul/XSTest!xstest_prompts.csv",
        {"prompt": ("prompt",), "category": ("type",), "id": ("id",)},
        "borderline",
        "CC-BY-4.0",
        {"label": "safe"},
    ),
    "redteam-2k": Published(
        f"{_JAILBREAKV}RedTeam_2K.csv", {"prompt": ("question",), "category": ("policy",), "id": ("id",)}
    ),
    "jailbreakv-28k": Published(  # its mini set; the whole one is JailBreakV_28K.csv beside it
        f"{_JAILBREAKV}mini_JailBreakV_28K.csv",
        {"prompt": ("jailbreak_query",), "category": ("policy",), "id": ("id",), "image": ("image_path",)},
    ),
}


class PromptFile(BaseModel):
    """Where a prompt set lies and what its columns mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        default="",
        description="hub:ORG/NAME!PATH, package:NAME==VERSION!PATH or a path; .csv, .tsv, .json, .jsonl, .parquet; "
        "default: where the layout's set lies on the hub",
    )
    layout: Layout | None = Field(
        default=None, description="columns and intent of a published set; what is said beside it wins"
    )
    columns: dict[Column, str] = Field(
        default={},
        description="which column holds the prompt, default `prompt`; category, id, answer, image (below `images`) if "
        "there are",
    )
    where: dict[str, str] = Field(default={}, description="only rows whose column has this value, e.g. {label: safe}")
    intent: Intent | None = Field(
        default=None,
        description="harmful: should be refused; benign and borderline: answered. null: the layout's, or harmful",
    )
    licence: str = Field(default="", description="for the verdict")
    images: str | None = Field(default=None, description="folder of the pictures that the column `image` names")

    @model_validator(mode="after")
    def _known(self) -> PromptFile:
        if self.layout is None and not self.source:
            raise ValueError("say where the prompts lie, e.g. source: ./prompts.csv, or name a layout")
        if self.layout is None and self.columns and "prompt" not in self.columns:
            raise ValueError("columns must say which one holds the prompt, e.g. columns: {prompt: goal}")
        return self

    @property
    def place(self) -> str:
        """The source, or the layout's on the hub."""
        return self.source or (PUBLISHED[self.layout].hub if self.layout else "")

    @property
    def meaning(self) -> Published:
        """Columns, rows, intent and licence, said or known from the layout."""
        known = PUBLISHED[self.layout] if self.layout else Published(self.source, {"prompt": ("prompt",)}, licence="")
        columns = {**known.columns, **{str(key): (column,) for key, column in self.columns.items()}}
        where = {**(known.where or {}), **self.where}
        return Published(self.place, columns, self.intent or known.intent, self.licence or known.licence, where)


def check_file(name: str, file: PromptFile) -> None:
    """Refuse what cannot be read; reads nothing.

    Raises:
        RecipeError: no such form, no such local file, or a format that is not read.
    """
    if not file.place.endswith(SUFFIXES):
        raise RecipeError(
            f"the prompt set {name!r} has no format that is read", way_out=f"one of {', '.join(SUFFIXES)}"
        )
    remote_files.check(file.place)
    if file.images is not None and not Path(file.images).expanduser().is_dir():
        raise RecipeError(f"there is no folder {file.images}", way_out=f"put the pictures of {name!r} there")


def load_file(name: str, file: PromptFile, seed: int = 0) -> list[Prompt]:
    """All its prompts, in the order that `seed` gives.

    Raises:
        SourceError: it cannot be had or read, a column is missing, ids repeat, or no row is left.
    """
    meaning = file.meaning
    prompts: dict[tuple[str, str], Prompt] = {}
    folder = Path(file.images).expanduser() if file.images is not None else None
    for row in _rows(file.place, remote_files.read(file.place)):
        if any(str(row.get(column, "")) != value for column, value in (meaning.where or {}).items()):
            continue
        named = {key: next((c for c in columns if c in row), "") for key, columns in meaning.columns.items()}
        if not named["prompt"]:
            raise SourceError(
                f"the prompt set {name!r} has no column {' or '.join(map(repr, meaning.columns['prompt']))}",
                where=file.place,
                why=f"its columns are {', '.join(map(str, row))}",
                way_out="map it: columns: {prompt: NAME}",
            )
        found = {key: str(row.get(column) or "").strip() for key, column in named.items()}
        if found["prompt"]:
            prompts.setdefault(
                (normalise(found["prompt"]), found.get("image", "")),
                Prompt(
                    id=f"{name}-{found.get('id') or _name_of(found['prompt'], found.get('image', ''))}",
                    text=found["prompt"],
                    category=found.get("category") or name,
                    intent=meaning.intent,
                    origin=file.place,
                    answer=found.get("answer") or None,
                    image=folder / found["image"] if folder is not None and found.get("image") else None,
                ),
            )
    if not prompts:
        raise SourceError(f"the prompt set {name!r} has no rows", where=file.place, why=f"where: {meaning.where}")
    twice = [id for id, n in Counter(prompt.id for prompt in prompts.values()).items() if n > 1]
    if twice:
        raise SourceError(
            f"different prompts of the set {name!r} have the same id, {twice[0].removeprefix(name + '-')!r}",
            where=file.place,
            why="answers are paired between models by the id of their prompt",
            way_out="map another column to id, or none",
        )
    return _in_proportion(prompts.values(), seed)


def _name_of(prompt: str, image: str) -> str:
    """The same wherever its row stands, so that an artifact is asked the same before and after rows were moved."""
    beside = f"\n{image}" if image else ""
    return hashlib.sha256(f"{normalise(prompt)}{beside}".encode()).hexdigest()[:12]


def _in_proportion(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    """In a seeded order of which every beginning holds the categories as the whole does."""

    def shuffled(prompt: Prompt) -> tuple[str, str]:
        return hashlib.sha256(f"{seed}:{prompt.text}".encode()).hexdigest(), prompt.id

    ordered = sorted(prompts, key=shuffled)
    sizes, ranks = Counter(prompt.category for prompt in ordered), Counter[str]()
    places: dict[str, float] = {}
    for prompt in ordered:
        places[prompt.id] = (ranks[prompt.category] + 0.5) / sizes[prompt.category]
        ranks[prompt.category] += 1
    return sorted(ordered, key=lambda prompt: places[prompt.id])


def file_digest(file: PromptFile) -> str:
    """What content keys say of it: a hub's commit, a local file's digest, and the pictures that its rows name.

    Raises:
        SourceError: the rows that name pictures cannot be read.
    """
    meaning, digest = file.meaning, remote_files.digest(file.place)
    said = [meaning.columns, meaning.intent, meaning.licence, meaning.where or {}, file.images]
    pictures = [_pictures(file)] if file.images is not None and digest else []  # no digest: not on this machine yet
    return sha256_bytes(canonical_json([file.place, said, digest, *pictures]))


def _pictures(file: PromptFile) -> list[list[str]]:
    """Name and digest of every picture that there is."""
    folder = Path(file.images or "").expanduser()
    columns = file.meaning.columns.get("image", ())
    rows = _rows(file.place, remote_files.read(file.place))
    names = {str(row[column]).strip() for row in rows for column in columns if row.get(column)}
    return [[name, sha256_file(folder / name)] for name in sorted(names) if (folder / name).is_file()]


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
