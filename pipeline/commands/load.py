"""From what a user types to a checked graph, or to an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError
from pipeline.explain import nearest

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.store import Store
    from pipeline.graph import Graph


def recipe_path(name: str) -> Path:
    """The file that `name` means: a path, or the name of a shipped recipe.

    Raises:
        RecipeError: neither.
    """
    from recipes import shipped

    path = Path(name).expanduser()
    if path.exists():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise RecipeError(
        f"there is no recipe {name!r}",
        why="no file of that name here, and no shipped recipe",
        way_out=nearest(name, known),
    )


def load_graph(name: str, overrides: Sequence[str] = (), *, within_budget: bool = True) -> Graph:
    """The checked graph of a recipe, overrides applied.

    Args:
        within_budget: False: what does not fit the device is taken, too.

    Raises:
        RecipeError.
    """
    from pipeline.graph import build_graph
    from pipeline.recipe import load_recipe

    return build_graph(load_recipe(recipe_path(name), overrides), within_budget=within_budget)


def open_store() -> Store:
    """The user's store; nothing is created."""
    from artifacts.home import cache_dir
    from artifacts.store import Store

    return Store(cache_dir() / "store")


def find_artifact(name: str, runs_dir: Path) -> Artifact:
    """The artifact that `name` means, not yet checked for damage.

    Args:
        name: a folder; a digest or at least 8 digits of one; RUN:STAGE; or a stage id, of the run that `latest_with`
            finds.

    Raises:
        StoreError, RecipeError: there is none, or more than one.
    """
    from artifacts.artifact import Artifact
    from artifacts.errors import StoreError
    from pipeline.commands.runs import find_run, latest_with, run_artifacts

    folder = Path(name).expanduser()
    if folder.is_dir():
        return Artifact.open(folder)
    if "/" in name:
        raise RecipeError(
            f"there is no {name}",
            why="neither a folder nor a file; a stage of a run is given as ID, or RUN:ID",
            way_out="look at the path, or take what `pipeline inspect` shows of the latest run",
        )
    store = open_store()
    run, _, stage = name.rpartition(":")
    digest = name.lower()
    if run or not _is_hex(digest):
        found = find_run(run, runs_dir) if run else latest_with(stage, runs_dir)
        made = run_artifacts(found)
        if stage not in made:
            raise RecipeError(
                f"the run {found.name} has no artifact of a stage {stage!r}",
                why=f"it has: {', '.join(made) or 'none yet'}",
                way_out=nearest(stage, made) if made else "run the recipe first",
            )
        digest = made[stage]
    matches = [known for known in store.digests() if known.startswith(digest)]
    if len(matches) != 1:
        raise StoreError(
            f"{len(matches)} artifacts begin with {digest}" if matches else f"no artifact {digest} in the store",
            where=str(store.root),
            why=None if matches else "it was removed, or made with another $PIPELINE_HOME",
            way_out="give more digits" if matches else "run its recipe again; `pipeline runs` lists what there is",
        )
    return Artifact.open(store.object_path(matches[0]))


def _is_hex(text: str) -> bool:
    return len(text) >= 8 and set(text) <= set("0123456789abcdef")
