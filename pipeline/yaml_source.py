"""YAML read as data: plain values plus the file and line of every one of them.

- PyYAML's parser only; no tag is honoured, no Python object is ever built
- scalars follow the YAML 1.2 core schema: `no` is a string, `1e-4` is a number, `2026-01-01` is a string
- size, depth and the number of values after aliases are bounded, so no file can be a bomb
- a key written twice is an error, not a silent override
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from artifacts.errors import RecipeError

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 20_000  # after aliases are written out
MAX_DEPTH: Final = 32

Value = bool | int | float | str | None | list["Value"] | dict[str, "Value"]
Place = tuple[str | int, ...]  # path into a document: ("stages", "exit", "with", "layer")

_TAG: Final = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Mark:
    """Where a value is written: a file and a line from 1, or an override and line 0."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Document:
    """Plain data and the mark of each place in it. A mapping's entry is marked at its key."""

    data: dict[str, Value]
    marks: dict[Place, Mark] = field(default_factory=dict)

    def mark(self, place: Place) -> Mark:
        """The mark of the nearest marked ancestor of `place`, itself first."""
        for length in range(len(place), -1, -1):
            if (found := self.marks.get(place[:length])) is not None:
                return found
        return Mark("recipe")


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader's scanner, parser and composer, with the resolvers of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute


_CoreLoader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_CoreLoader.add_implicit_resolver(_TAG + "int", re.compile(r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_CoreLoader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])


def read_yaml(path: Path) -> Document:
    """Read one YAML file whose top level is a mapping.

    Raises:
        RecipeError: missing, too large, not text, not YAML, or more than plain data.
    """
    try:
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise RecipeError(f"{path} {kind}", way_out="give the path of a recipe, or a name from `pipeline recipes`")
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than 1 MiB", why="a recipe is a short text", way_out="check the path")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError("this is not UTF-8 text", where=str(Mark(str(path), line))) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Document:
    """Parse text whose top level is a mapping; `file` is what messages call it.

    Raises:
        RecipeError: as `read_yaml`.
    """
    document = Document({}, {(): Mark(file, 1)})
    value = _compose(text, file, document.marks)
    if not isinstance(value, dict):
        found = "it is empty" if value is None else f"it holds a {type(value).__name__}"
        raise RecipeError("a recipe must be a mapping of keys to values", where=file, why=found)
    document.data = value
    return document


def parse_scalar(text: str, file: str) -> Value:
    """Parse the text after `=` of an override, with YAML's types.

    Raises:
        RecipeError: not YAML.
    """
    return _compose(text, file, {})


def _compose(text: str, file: str, marks: dict[Place, Mark]) -> Value:
    try:
        loader = _CoreLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Mark(file, mark.line + 1 if mark else 0)
        raise RecipeError("this is not YAML", where=str(where), why=error.problem or str(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError("a character that YAML does not allow", where=str(Mark(file, line))) from error
    except (yaml.YAMLError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError("this is not YAML that can be read", where=file, why=why) from error
    if node is None:
        return None
    return _Reader(file, marks).read(node, (), 0)


class _Reader:
    """Turns composed nodes into plain values and notes where each one stands."""

    def __init__(self, file: str, marks: dict[Place, Mark]):
        self.file = file
        self.marks = marks
        self.count = 0

    def read(self, node: yaml.Node, place: Place, depth: int) -> Value:
        self.count += 1
        here = self._mark(node)
        if self.count > MAX_VALUES:
            raise RecipeError(
                f"more than {MAX_VALUES} values", where=str(here), why="aliases that multiply are not expanded"
            )
        if depth > MAX_DEPTH:
            raise RecipeError(f"nested more than {MAX_DEPTH} deep", where=str(here))
        self.marks.setdefault(place, here)
        if isinstance(node, yaml.MappingNode):
            self._plain_tag(node, "map")
            return self._mapping(node, place, depth)
        if isinstance(node, yaml.SequenceNode):
            self._plain_tag(node, "seq")
            return [self.read(item, (*place, index), depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, place: Place, depth: int) -> dict[str, Value]:
        result: dict[str, Value] = {}
        first: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            mark = self._mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _TAG + "merge":
                what = (
                    "`<<` is not supported" if isinstance(key_node, yaml.ScalarNode) else "a key must be a plain word"
                )
                raise RecipeError(what, where=str(mark), way_out="use `include: other.yaml` to share parts of recipes")
            key = str(key_node.value)
            if key in result:
                raise RecipeError(
                    f"two entries are named {key!r}",
                    where=str(mark),
                    why=f"the first one is on line {first[key].line}",
                    way_out="rename or remove one of them",
                )
            first[key] = mark
            self.marks[(*place, key)] = mark
            result[key] = self.read(value_node, (*place, key), depth + 1)
        return result

    def _scalar(self, node: yaml.Node) -> Value:
        text = str(node.value)
        tag = node.tag.removeprefix(_TAG)
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "int":
            if len(text) > 40:
                raise RecipeError("this number has too many digits", where=str(self._mark(node)))
            return int(text, 16) if text.startswith("0x") else int(text)
        if tag == "float":
            return float(text)
        if tag in ("str", "merge"):
            return text
        raise self._tag_error(node)

    def _plain_tag(self, node: yaml.Node, tag: str) -> None:
        if node.tag != _TAG + tag:
            raise self._tag_error(node)

    def _tag_error(self, node: yaml.Node) -> RecipeError:
        return RecipeError(
            f"the tag {node.tag!r} is not allowed", where=str(self._mark(node)), why="recipes are plain data"
        )

    def _mark(self, node: yaml.Node) -> Mark:
        return Mark(self.file, node.start_mark.line + 1)


def merge(base: Document, top: Document) -> Document:
    """`base` overlaid by `top`: mappings merge key by key, everything else is replaced. Marks follow their values."""
    result = Document({}, {(): top.mark(())})
    _merge_into(result, base, top, ())
    return result


def _merge_into(result: Document, base: Document, top: Document, place: Place) -> None:
    below, above, target = (_mapping_at(document.data, place) for document in (base, top, result))
    for key in [*below, *(key for key in above if key not in below)]:
        here = (*place, key)
        if isinstance(below.get(key), dict) and isinstance(above.get(key), dict):
            target[key] = {}
            result.marks[here] = top.mark(here)
            _merge_into(result, base, top, here)
            continue
        winner, value = (top, above[key]) if key in above else (base, below[key])
        target[key] = value
        for at, mark in winner.marks.items():
            if at[: len(here)] == here:
                result.marks[at] = mark


def _mapping_at(data: dict[str, Value], place: Place) -> dict[str, Value]:
    found: Value = data
    for key in place:
        assert isinstance(found, dict) and isinstance(key, str)
        found = found[key]
    assert isinstance(found, dict)
    return found


def plain(value: Mapping[str, Value]) -> dict[str, object]:
    """A mapping of values, as the untyped mapping that pydantic takes."""
    return dict(value)
