"""Where a run's report is, written again if it is missing or asked for."""

from __future__ import annotations

from pathlib import Path

from pipeline.commands.runs import find_run


def find_report(name: str | None, runs_dir: Path, *, rebuild: bool) -> tuple[Path, Path]:
    """The page and the machine-readable form of a run's report.

    Raises:
        RecipeError: there is no such run. StoreError: its events cannot be read.
    """
    folder = find_run(name, runs_dir)
    page, machine = folder / "report.html", folder / "report.json"
    if rebuild or not (page.is_file() and machine.is_file()):
        from pipeline.report import write_report

        write_report(folder)
    return page, machine
