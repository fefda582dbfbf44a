"""The report of a run: `report.json` for programs, `report.html` for people. Light to import; the work is below."""

from __future__ import annotations

from pathlib import Path

JSON_NAME = "report.json"
PAGE_NAME = "report.html"


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into the run folder from its events; each appears whole or not at all.

    Returns:
        Their paths, in that order.

    Raises:
        StoreError: there are no events, or the folder cannot be written.
    """
    from artifacts.disk import explained, write_atomically
    from pipeline.report.build import build_report
    from pipeline.report.page import render_page
    from pipeline.report.responses import read_responses

    report = build_report(run_dir)
    page = render_page(report, read_responses(report))
    with explained(run_dir):
        write_atomically(run_dir / JSON_NAME, report.model_dump_json(indent=1).encode() + b"\n", run_dir)
        write_atomically(run_dir / PAGE_NAME, page.encode(), run_dir)
    return run_dir / JSON_NAME, run_dir / PAGE_NAME
