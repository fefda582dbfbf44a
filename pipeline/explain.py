"""Words for what pydantic found: the place in the file, the reason, and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from artifacts.errors import RecipeError
from pipeline.yaml_source import Document, Place


def nearest(word: str, choices: Iterable[str]) -> str:
    """`did you mean 'prune'?`, or the list of what there is."""
    known = list(choices)
    lowered = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"did you mean {lowered[close[0]]!r}?"
    return f"choose one of: {', '.join(known)}" if known else "there is nothing to choose from"


def explain(error: ValidationError, model: type[BaseModel], document: Document, prefix: Place) -> RecipeError:
    """The first thing wrong, in the order of the file, as a RecipeError.

    Args:
        model: what was validated; `prefix`: where its data stands in the document.
    """
    details = error.errors(include_url=False)

    def line(item: ErrorDetails) -> tuple[bool, int, int]:
        mark = document.mark((*prefix, *_written(item["loc"], document, prefix)))
        # A key that is missing is often one that is misspelt: the unknown key is the better message.
        return (item["type"] == "missing", mark.line, -len(item["loc"]))

    first = min(details, key=line)
    place = (*prefix, *_written(first["loc"], document, prefix))
    what, way_out = _words(first, model)
    others = len({tuple(_written(item["loc"], document, prefix)) for item in details}) - 1
    why = f"{others} more problem{'s' if others > 1 else ''} after this one" if others > 0 else None
    return RecipeError(what, where=str(document.mark(place)), why=why, way_out=way_out)


def _written(loc: tuple[int | str, ...], document: Document, prefix: Place) -> Place:
    """`loc` without the tags that pydantic adds for union members: only keys that are in the file, and the last one."""
    kept: list[int | str] = []
    for key in loc:
        if (*prefix, *kept, key) in document.marks:
            kept.append(key)
    return tuple(kept)


def _words(item: ErrorDetails, model: type[BaseModel]) -> tuple[str, str | None]:
    key = ".".join(str(part) for part in item["loc"] if part != "[key]")
    last = str(item["loc"][-1]) if item["loc"] else ""
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"unknown key {last!r}", nearest(last, _keys(model, item["loc"][:-1]))
    if kind == "missing":
        return f"the key {key!r} is missing", None
    if kind in ("literal_error", "enum"):
        expected = str(item.get("ctx", {}).get("expected", ""))
        choices = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
        return f"{key} cannot be {item['input']!r}", nearest(str(item["input"]), choices)
    if kind == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        what, _, way_out = message.partition("; ")
        return f"{key}: {what}" if key and key not in what else what, way_out or None
    if kind == "string_pattern_mismatch":
        return (
            f"{item['input']!r} is not a valid name",
            "use letters, digits, '.', '_' and '-', beginning with a letter",
        )
    message = item["msg"][0].lower() + item["msg"][1:]
    shown = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
    return f"{key}: {message}{shown}", None


def _keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at `loc` below `model`."""
    found: list[type[BaseModel]] = [model]
    for part in loc:
        step = [field for one in found for field in _field(one, str(part))]
        if step:
            found = step
    return [field.alias or name for one in found for name, field in one.model_fields.items()]


def _field(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            return _models(field.annotation)
    return []


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
