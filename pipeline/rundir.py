"""The folder of a run: `runs/<recipe>-<YYYYmmdd-HHMMSS>-<4 hex>/`.

events.jsonl    everything that the run said (pipeline.events)
recipe.yaml     the recipe as it was understood: includes, overrides and matrix applied, paths absolute
logs/           one file a stage: what it wrote to stdout and stderr
report.json  report.html
lock            held while the run is active
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import yaml

from artifacts.disk import explained
from artifacts.locks import FileLock
from pipeline.events import EVENTS_NAME, RunFinished, read_events

if TYPE_CHECKING:
    from pipeline.graph import Graph

RECIPE_NAME: Final = "recipe.yaml"
LOGS_NAME: Final = "logs"
_LOCK_NAME: Final = "lock"


def create_run(runs: Path, name: str) -> tuple[Path, FileLock]:
    """A new run folder below `runs`, and its lock, held.

    Raises:
        StoreError: the place cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with explained(runs):
        folder = runs / f"{name}-{stamp}-{secrets.token_hex(2)}"
        folder.mkdir(parents=True)
        (folder / LOGS_NAME).mkdir()
        lock = FileLock(folder / _LOCK_NAME)
        lock.acquire()
    return folder, lock


def write_recipe(graph: Graph, folder: Path) -> None:
    """Write the resolved recipe: running it again from any folder asks for the same work.

    Raises:
        StoreError: the place cannot be written.
    """
    data = graph.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for node in graph.nodes:
        params = node.stage.params.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if not node.inputs and node.id not in data["stages"]:
            data["source"] = params
        elif params:
            data["stages"][node.id]["with"] = params
    data.pop("include", None)
    data.pop("matrix", None)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    with explained(folder):
        (folder / RECIPE_NAME).write_text(text, encoding="utf-8")


def is_active(folder: Path) -> bool:
    """Whether the run is going on at this moment."""
    if not (folder / _LOCK_NAME).exists():
        return False
    lock = FileLock(folder / _LOCK_NAME)
    if lock.try_acquire():
        lock.release()
        return False
    return True


def ended_early(runs: Path, name: str) -> bool:
    """Whether the newest run of the recipe `name` did not come to its end, so that the next one continues it."""
    for folder in sorted(runs.glob(f"{name}-????????-??????-????"), reverse=True):
        if not (folder / EVENTS_NAME).is_file() or is_active(folder):
            continue
        events = read_events(folder)
        ends = {event.status for event in events if isinstance(event, RunFinished)}
        return bool(events) and not ends & {"passed", "gate_failed"}
    return False
