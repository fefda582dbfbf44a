"""`pipeline publish`: a run, or a bundle that exists, to where others find it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.keyless import Keyless
    from artifacts.registry.transfer import Moved
    from artifacts.signing import Signer
    from pipeline.publish import PublishResult


def publish_named(
    name: str | None,
    to: str | None,
    runs_dir: Path,
    signer: Signer | Keyless | None,
    *,
    allow_unverified: bool,
    moved: Moved | None = None,
) -> PublishResult:
    """Publish the run that `name` means (None: the latest), or the bundle in that folder.

    Raises:
        GateError: what would be published did not pass. RecipeError, StoreError.
    """
    from artifacts.bundle import MANIFEST_NAME, Bundle
    from pipeline.commands.runs import find_run
    from pipeline.graph import build_graph
    from pipeline.publish import publish, publish_bundle
    from pipeline.recipe import load_recipe
    from pipeline.rundir import RECIPE_NAME

    if name is not None and (Path(name) / MANIFEST_NAME).is_file():
        if to is None:
            raise RecipeError("a bundle does not say where to go", way_out="add --to oci:HOST/NAME:TAG")
        if signer is not None:
            raise RecipeError(
                "a bundle that exists is passed on as it is",
                why="who signs it says how it was made, and only its run knows that",
                way_out="publish the run with --key, or leave --key out",
            )
        return publish_bundle(Bundle.open(Path(name)), to, allow_unverified=allow_unverified, moved=moved)
    folder = find_run(name, runs_dir)
    graph = build_graph(load_recipe(folder / RECIPE_NAME))
    return publish(
        graph,
        folder,
        _artifacts(folder),
        to=to,
        signer=signer,
        allow_unverified=allow_unverified,
        moved=moved,
    )


def _artifacts(folder: Path) -> Mapping[str, Artifact]:
    """What the run made, as far as its store still holds it."""
    from artifacts.artifact import Artifact
    from artifacts.store import Store
    from pipeline.commands.load import open_store
    from pipeline.commands.runs import run_artifacts
    from pipeline.events import RunStarted, read_events

    used = [event.store for event in read_events(folder) if isinstance(event, RunStarted) and event.store]
    store = Store(Path(used[-1])) if used and Path(used[-1]).is_dir() else open_store()
    paths = {id: store.object_path(digest) for id, digest in run_artifacts(folder).items()}
    return {id: Artifact.open(path) for id, path in paths.items() if path.is_dir()}
