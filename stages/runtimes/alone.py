"""A module run as a program in a process of its own: what it takes and how fast it is are then its own, too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from artifacts.errors import StageError

_SECONDS: Final = 900


def run_alone(module: str, arguments: Sequence[str], *, measures: str, where: Path, way_out: str) -> str:
    """The last line that `python -m module ARGUMENTS` prints.

    Args:
        measures: what it is run for, in words. where, way_out: for the error.

    Raises:
        StageError: it ended badly, or took too long.
    """
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    # Its own working folder: nothing there may shadow a module.
    with tempfile.TemporaryDirectory(prefix="icet-alone-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"measuring {measures} took longer than {_SECONDS} s", where=str(where)) from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise StageError(
            f"the process that measures {measures} ended badly",
            where=str(where),
            why=reason[-1] if reason else f"exit code {done.returncode}; the system may have run out of memory",
            way_out=way_out,
        )
    return done.stdout.strip().splitlines()[-1]
