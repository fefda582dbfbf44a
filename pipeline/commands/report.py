"""Where a run's report is, written again if it is missing or asked for."""

from __future__ import annotations

from pathlib import Path

from artifacts.errors import RecipeError
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


def draw_curve(machine: Path, target: Path, *, training: bool = False) -> None:
    """Write the curve of ASR by exit of a report.json, or those of its trainings, as an SVG file of its own.

    Raises:
        RecipeError: the run measured none, or the file cannot be written.
    """
    from pipeline.report.drawings import asr_curve_svg, training_svg
    from pipeline.report.model import Report

    draw = training_svg if training else asr_curve_svg
    try:
        target.write_text(draw(Report.model_validate_json(machine.read_bytes())), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"no curve was written to {target}",
            where=str(machine),
            why=str(error),
            way_out=f"give a run that {'trained' if training else 'verified'}",
        ) from error


def write_logs(machine: Path, folder: Path) -> list[Path]:
    """Write the responses of a report.json as logs of inspect_ai, one a model.

    Raises:
        StoreError: inspect_ai is not installed, or the responses are gone. RecipeError: there are none, or the folder
            cannot be written.
    """
    from pipeline.report.inspect_log import write_inspect_logs
    from pipeline.report.model import Report

    return write_inspect_logs(Report.model_validate_json(machine.read_bytes()), folder)
