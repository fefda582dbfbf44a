"""Curves of work that an earlier run did: a stage that was reused, or continued after a kill, was trained over there.

The other runs beside this one are looked through for events of the same content key; nothing else is taken from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from artifacts.errors import StoreError
from pipeline.events import EVENTS_NAME, StageMetric, StageStarted, read_events

Points = dict[tuple[str, str, int | None], dict[float, float]]  # (stage, metric, exit) -> step -> value


def earlier_points(run_dir: Path, keys: Mapping[str, str]) -> Points:
    """What was reported for each of these keys in other runs, under the stage ids of this one.

    Args:
        keys: content key -> stage id here.
    """
    found: Points = {}
    if not keys:
        return found
    for folder in _others(run_dir, keys):
        at_work: dict[str, str] = {}  # stage id there -> stage id here
        try:
            events = read_events(folder)
        except StoreError:
            continue
        for event in events:
            if isinstance(event, StageStarted):
                if event.key in keys:
                    at_work[event.stage] = keys[event.key]
                else:
                    at_work.pop(event.stage, None)
            elif isinstance(event, StageMetric) and event.step is not None and event.stage in at_work:
                curve = found.setdefault((at_work[event.stage], event.name, event.exit), {})
                curve[float(event.step)] = event.value
    return found


def _others(run_dir: Path, keys: Mapping[str, str]) -> Iterator[Path]:
    """Run folders beside this one that mention a key, the oldest first: later ones correct earlier ones."""
    marks = [key.encode() for key in keys]
    paths = [path for path in run_dir.resolve().parent.glob(f"*/{EVENTS_NAME}") if path.parent != run_dir.resolve()]
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path)):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if any(mark in content for mark in marks):
            yield path.parent
