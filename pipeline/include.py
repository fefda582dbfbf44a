"""`include`: one recipe laid over others."""

from __future__ import annotations

from pathlib import Path

from artifacts.errors import RecipeError
from pipeline.explain import nearest
from pipeline.yaml_source import Document, merge, read_yaml


def read_with_includes(path: Path, including: tuple[Path, ...] = ()) -> Document:
    """A recipe's file laid over those that it includes, unchecked; every value knows its file and line.

    Args:
        including: the files that led here, each including the next.

    Raises:
        RecipeError: a file is missing, no YAML, or includes itself; or a stage is dropped that is not there.
    """
    real = path.resolve()
    if real in including:
        chain = " -> ".join(str(item) for item in (*including[including.index(real) :], real))
        raise RecipeError(f"{path} includes itself", where=str(including[-1]), why=chain, way_out="remove one include")
    document = read_yaml(path)
    included = document.data.pop("include", None)
    if included is None:
        return document
    names = included if isinstance(included, list) else [included]
    base: Document | None = None
    for name in names:
        where = str(document.mark(("include",)))
        if not isinstance(name, str):
            raise RecipeError("`include` takes a path or a list of paths", where=where)
        target = path.parent / name
        if not target.is_file():
            raise RecipeError(
                f"the included recipe {name!r} does not exist",
                where=where,
                why=f"looked for {target}",
                way_out="paths in a recipe are relative to the recipe",
            )
        part = read_with_includes(target, (*including, real))
        base = part if base is None else merge(base, part)
    return document if base is None else _without_dropped(base, merge(base, document))


def _without_dropped(base: Document, merged: Document) -> Document:
    """Without the stages of an included recipe for which this one says null.

    Raises:
        RecipeError: it has no such stage.
    """
    known, stages = base.data.get("stages"), merged.data.get("stages")
    if not isinstance(stages, dict):
        return merged
    for id in [id for id, entry in stages.items() if entry is None]:
        if not isinstance(known, dict) or id not in known:
            raise RecipeError(
                f"there is no stage {id!r} to drop",
                where=str(merged.mark(("stages", id))),
                why="null drops a stage of an included recipe",
                way_out=nearest(id, tuple(known) if isinstance(known, dict) else ()),
            )
        del stages[id]
    return merged
