"""`matrix`: one stage written once, run for every combination of its axes.

A stage with its own `matrix` runs once for each combination. With a matrix at the top of the recipe, a stage runs for
the axes that it mentions as `${{ matrix.AXIS }}` in `with`, `uses` or `needs`. Ids become `gguf-Q4_0`. A stage that
needs `gguf` takes all of them (it fans in), except that it agrees with what it needs on the axes that both have.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

from artifacts.errors import RecipeError
from pipeline.explain import nearest
from pipeline.yaml_source import Document, Place, Value

MAX_STAGES: Final = 256  # after expansion

_EXPRESSION: Final = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
Combination = dict[str, Value]


def expand_matrix(document: Document) -> Document:
    """The same recipe with every stage written out; `matrix` is gone.

    Raises:
        RecipeError: an expression that names no axis, an empty axis, or too many stages.
    """
    result = Document({key: value for key, value in document.data.items() if key != "matrix"}, dict(document.marks))
    shared = _axes(document, ("matrix",))
    stages = document.data.get("stages")
    assert isinstance(stages, dict)
    instances = {name: _combinations(document, name, shared) for name in stages}
    if sum(map(len, instances.values())) > MAX_STAGES:
        raise RecipeError(f"the matrix makes more than {MAX_STAGES} stages", where=str(document.mark(("matrix",))))
    expanded: dict[str, Value] = {}
    for name, entry in stages.items():
        assert isinstance(entry, dict)
        for combination in instances[name]:
            new = _id(name, combination)
            if new in expanded or (new != name and new in stages):
                raise RecipeError(f"two stages are named {new!r}", where=str(document.mark(("stages", name))))
            body = {key: value for key, value in entry.items() if key != "matrix"}
            filled = _fill(body, combination, document, ("stages", name))
            assert isinstance(filled, dict)
            if "needs" in filled:
                filled["needs"] = _fan_in(filled["needs"], combination, instances)
            expanded[new] = filled
            _copy_marks(document, result, name, new)
    result.data["stages"] = expanded
    return result


def _axes(document: Document, place: Place) -> dict[str, list[Value]]:
    found: Value = document.data
    for key in place:
        found = found.get(str(key)) if isinstance(found, dict) else None
    axes: dict[str, list[Value]] = {}
    for axis, values in (found if isinstance(found, dict) else {}).items():
        assert isinstance(values, list)  # the schema has been checked
        if not values:
            raise RecipeError(f"the matrix axis {axis!r} is empty", where=str(document.mark((*place, axis))))
        axes[axis] = values
    return axes


def _combinations(document: Document, name: str, shared: dict[str, list[Value]]) -> list[Combination]:
    place: Place = ("stages", name)
    own = _axes(document, (*place, "matrix"))
    stages = document.data["stages"]
    assert isinstance(stages, dict)
    mentioned: list[str] = []
    for text, at in _texts(stages[name], place):
        for expression in _EXPRESSION.findall(text):
            axis = str(expression).removeprefix("matrix.")
            known = {**shared, **own}
            if not str(expression).startswith("matrix.") or axis not in known:
                raise RecipeError(
                    f"${{{{ {expression} }}}} names nothing",
                    where=str(document.mark(at)),
                    why="only the axes of a matrix can be filled in",
                    way_out=nearest(str(expression), [f"matrix.{key}" for key in known])
                    if known
                    else "add a `matrix:` with that axis",
                )
            mentioned.append(axis)
    axes = {**{axis: values for axis, values in shared.items() if axis in mentioned}, **own}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _texts(value: Value, place: Place) -> list[tuple[str, Place]]:
    if isinstance(value, str):
        return [(value, place)]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _texts(item, (*place, key))]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _texts(item, (*place, index))]
    return []


def _id(name: str, combination: Combination) -> str:
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "_", str(value)) for value in combination.values()]
    return "-".join([name, *parts])


def _fill(value: Value, combination: Combination, document: Document, place: Place) -> Value:
    if isinstance(value, dict):
        return {key: _fill(item, combination, document, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, combination, document, (*place, index)) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    whole = _EXPRESSION.fullmatch(value)
    if whole:  # the axis keeps its type
        return combination[whole.group(1).removeprefix("matrix.")]
    return _EXPRESSION.sub(lambda match: str(combination[match.group(1).removeprefix("matrix.")]), value)


def _fan_in(needs: Value, combination: Combination, instances: dict[str, list[Combination]]) -> Value:
    names = needs if isinstance(needs, list) else [needs]
    found: list[Value] = []
    for name in names:
        choices = instances.get(str(name))
        if choices is None:
            found.append(name)
            continue
        found.extend(
            _id(str(name), other)
            for other in choices
            if all(other[axis] == value for axis, value in combination.items() if axis in other)
        )
    return found


def _copy_marks(document: Document, result: Document, old: str, new: str) -> None:
    if old == new:
        return
    for at, mark in document.marks.items():
        if at[:2] == ("stages", old):
            result.marks[("stages", new, *at[2:])] = mark
