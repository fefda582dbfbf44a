"""Finding a run, and showing the list of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from artifacts.errors import RecipeError
from pipeline.events import EVENTS_NAME, RunFinished, RunStarted, StageFailed, StageFinished, read_events
from pipeline.explain import nearest
from pipeline.rundir import is_active

# "interrupted": it ended without saying so, by `kill -9` or a power cut.
RunStatus = Literal["running", "passed", "failed", "gate_failed", "stopped", "interrupted"]

VERIFICATION: Final = "pipeline verify"
"""What stands for a recipe's path in the runs of that command."""


@dataclass(frozen=True)
class RunSummary:
    """One line of `pipeline runs`."""

    id: str
    folder: Path
    recipe: str
    started: float  # seconds since the epoch
    status: RunStatus
    seconds: float | None  # None: not ended, or nobody knows
    verification: bool  # made by `pipeline verify`


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Every run below `runs_dir`, the newest first.

    Raises:
        StoreError: a run's events cannot be read.
    """
    found = [_summary(path.parent) for path in runs_dir.glob(f"*/{EVENTS_NAME}")]
    return sorted((run for run in found if run is not None), key=lambda run: run.started, reverse=True)


def _summary(folder: Path) -> RunSummary | None:
    """None when the run was ended before its first event."""
    events = read_events(folder)
    if not events or not isinstance(events[0], RunStarted):
        return None
    start = events[0]
    end = next((event for event in reversed(events) if isinstance(event, RunFinished)), None)
    status: RunStatus = end.status if end is not None else "running" if is_active(folder) else "interrupted"
    seconds = end.seconds if end is not None else None
    verification = start.recipe_path == VERIFICATION
    return RunSummary(folder.name, folder, start.recipe, start.time, status, seconds, verification)


def find_run(name: str | None, runs_dir: Path) -> Path:
    """The folder of the run that `name` means: an id, the beginning of one, or a run's folder; None is the latest.

    Raises:
        RecipeError: there is none, or more than one.
    """
    if name is not None and (Path(name) / EVENTS_NAME).is_file():
        return Path(name)
    runs = list_runs(runs_dir)
    if not runs:
        raise RecipeError(f"there are no runs in {runs_dir}", way_out="start one: pipeline run quickstart")
    if name is None:
        return runs[0].folder
    matches = [run for run in runs if run.id == name] or [run for run in runs if run.id.startswith(name)]
    if len(matches) != 1:
        raise RecipeError(
            f"{len(matches)} runs begin with {name!r}" if matches else f"there is no run {name!r} in {runs_dir}",
            way_out="`pipeline runs` lists them" if matches else nearest(name, [run.id for run in runs]),
        )
    return matches[0].folder


def latest_with(stage: str, runs_dir: Path) -> Path:
    """The folder of the latest run that has an artifact of the stage, or else of the latest one.

    Runs of `pipeline verify` are passed over: their stages have the same names whatever they verify.

    Raises:
        RecipeError: there is no other run.
    """
    runs = list_runs(runs_dir)
    made = [run.folder for run in runs if not run.verification]
    if not made:
        raise RecipeError(
            f"no recipe was run in {runs_dir}, so there is no stage {stage!r}",
            why="the stages of `pipeline verify` are known only by RUN:ID" if runs else None,
            way_out="run one: pipeline run quickstart; `pipeline runs` lists what there is",
        )
    return next((folder for folder in made if stage in run_artifacts(folder)), made[0])


def run_artifacts(folder: Path) -> dict[str, str]:
    """Stage id -> artifact digest, of every stage that the run finished or took from the store."""
    return {event.stage: event.digest for event in read_events(folder) if isinstance(event, StageFinished)}


def told(folder: Path) -> bool:
    """Whether the run's events, and so the console, have said what ended it."""
    return any(isinstance(event, StageFailed) for event in read_events(folder))


def show_runs(runs: list[RunSummary], runs_dir: Path) -> str:
    """The runs as text, one a line."""
    if not runs:
        return f"no runs in {runs_dir}; start one: pipeline run quickstart"
    rows = [("run", "recipe", "started", "time", "status")]
    for run in runs:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
        took = f"{run.seconds:.0f} s" if run.seconds is not None else "-"
        rows.append((run.id, run.recipe, started, took, run.status))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
