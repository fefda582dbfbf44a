"""What `uses:` may name, and what each stage's `with:` may say: read from the code that checks recipes."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from artifacts.errors import RecipeError
from pipeline.explain import nearest
from stages.stage import Stage, StageParams, stage_class, stage_names

_INTRODUCTION: Final = """\
# Stages

What a recipe's `uses:` may name, and what `with:` may say; `pipeline stages NAME` prints the same. This page is made
from the code that checks recipes:

    pipeline stages --markdown > docs/stages.md
"""


@dataclass(frozen=True)
class Parameter:
    """`default` as it would be written in a recipe; None: it must be given."""

    name: str
    type: str
    default: str | None
    description: str


@dataclass(frozen=True)
class Kind:
    """A kind of stage."""

    name: str
    summary: str
    takes: tuple[str, ...]
    makes: str
    parameters: tuple[Parameter, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def list_stages() -> list[Kind]:
    """Every stage that is installed, by name."""
    return [_kind(name) for name in stage_names()]


def find_stage(name: str) -> Kind:
    """One of them.

    Raises:
        RecipeError: no such stage.
    """
    if name not in stage_names():
        raise RecipeError(f"there is no stage {name!r}", way_out=nearest(name, stage_names()))
    return _kind(name)


def show_stages(found: Sequence[Kind]) -> str:
    """One line each, for the terminal."""
    width = max(len(kind.name) for kind in found)
    return "\n".join(f"{kind.name.ljust(width)}  {kind.summary}" for kind in found)


def show_stage(kind: Kind) -> str:
    """All about one, for the terminal."""
    lines = [f"{kind.name}: {kind.summary}", _flow(kind), ""]
    for parameter in kind.parameters:
        default = "required" if parameter.default is None else parameter.default
        lines += [f"{parameter.name}: {parameter.type} = {default}", f"    {parameter.description}"]
    return "\n".join(lines).rstrip()


def write_stages(found: Sequence[Kind]) -> str:
    """docs/stages.md, without its last newline."""
    lines = [_INTRODUCTION]
    for kind in found:
        lines += [f"## {kind.name}", "", f"{_sentence(kind.summary)} {_sentence(_flow(kind))}", ""]
        if kind.parameters:
            lines += ["| parameter | type | default | |", "| --- | --- | --- | --- |"]
        for parameter in kind.parameters:
            default = "required" if parameter.default is None else f"`{parameter.default}`"
            cells = (f"`{parameter.name}`", parameter.type, default, parameter.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _kind(name: str) -> Kind:
    cls: type[Stage[StageParams]] = stage_class(name)
    takes = cls.accepts
    return Kind(name, cls.summary, takes, cls.output_type, tuple(_parameters(cls.Params, "")))


def _flow(kind: Kind) -> str:
    return f"takes {' or '.join(kind.takes)}, makes {kind.makes}" if kind.takes else f"makes {kind.makes}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def _parameters(model: type[BaseModel], prefix: str) -> list[Parameter]:
    """Of a model and of the models inside it, those as `outer.inner`."""
    found = []
    for field_name, field in model.model_fields.items():
        name = prefix + (field.alias or field_name)
        inner = next((part for part in _parts(field.annotation) if _is_model(part)), None)
        if inner is not None:
            optional = type(None) in _parts(field.annotation)
            default = "null" if optional and field.default is None else "{}"
            found.append(Parameter(name, "section", default, field.description or ""))
            found += _parameters(inner, f"{name}.")
        else:
            found.append(Parameter(name, _type(field.annotation), _default(field), field.description or ""))
    return found


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for part in get_args(annotation) for found in _parts(part)]
    if get_origin(annotation) is typing.Annotated:
        return _parts(get_args(annotation)[0])
    return [annotation]


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _type(annotation: Any) -> str:
    words = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Path: "path",
        ByteSize: "number of bytes",
    }
    found = []
    for part in _parts(annotation):
        origin, inside = get_origin(part), get_args(part)
        if part is type(None):
            found.append("null")
        elif origin is Literal:
            found += [str(value) for value in inside]
        elif origin is tuple:
            found.append(f"list of {_type(inside[0])}")
        elif origin is dict:
            found.append(f"mapping of {_type(inside[0])} to {_type(inside[1])}")
        else:
            found.append(words.get(part, getattr(part, "__name__", str(part)).lower()))
    return " or ".join(dict.fromkeys(found))


def _default(field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=False)
    return None if value is PydanticUndefined and field.is_required() else _written(value)


def _written(value: object) -> str:
    """As YAML would have it in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and value.startswith(tuple("{[&*!|>%@`\"'#")):
        return json.dumps(value)  # YAML takes it for something else without quotes
    return f"{value:g}" if isinstance(value, float) else str(value)
