"""What a stage needs to run by itself, and a reporter that remembers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest
from stages.stage import Context, Reporter


class Told:
    """Attributes: metrics as (name, value, step, exit); done, as it was said, and as a share of the total; lines."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int | None, int | None]] = []
        self.done: list[float] = []
        self.shares: list[float] = []
        self.lines: list[str] = []

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.done.append(done)
        self.shares.append(done / total)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.metrics.append((name, value, step, exit))

    def log(self, message: str) -> None:
        self.lines.append(message)


def context_of(
    id: str, folder: Path, source: Path, reporter: Reporter, metadata: Mapping[str, object] | None = None
) -> Context:
    """A copy of the checkpoint in `source` as the one input; all below `folder`, and the same when asked again."""
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder / "input", dirs_exist_ok=True)
    Manifest.of_folder(folder / "input", "checkpoint", metadata or {}).write(folder / "input")
    artifact = Artifact.open(folder / "input")
    return Context(id, {"source": artifact}, folder / "output", folder / "scratch", 0, reporter)
