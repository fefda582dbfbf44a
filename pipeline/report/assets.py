"""Templates and styles of the pages."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path


@cache
def asset(name: str) -> str:
    """The text of a file in `templates/`."""
    return (Path(str(files("pipeline.report"))) / "templates" / name).read_text(encoding="utf-8")
