"""What several commands take, and how they print what programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of the runs.", metavar="FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RUNS: Final = Path("runs")


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))
