"""The shipped recipes, found by name wherever the package is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted by name."""
    folder = Path(str(files(__name__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def purpose(path: Path) -> str:
    """The first line of a recipe's opening comment: what it is for, in one line."""
    with path.open(encoding="utf-8") as handle:
        first = handle.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""
