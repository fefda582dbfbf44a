"""What the tests of verification share: a small one on tiny real models, and its rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest
from artifacts.measures import MEASURES_NAME, Measure, read_measures
from stages.stage import Context, stage_class
from stages.verify.stage import IcetVerifyStage

SMALL: Mapping[str, object] = {
    "harmful": {"donotanswer": 3, "advbench": 2},
    "over_refusal": {"overrefusal": 2, "everyday": 1},
    "images": 2,
    "vqa": 4,
    "max_new_tokens": 5,
    "fidelity_images": 2,
    "language": 2,
    "measure_memory": False,
}


class Heard:
    """A reporter that remembers."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.done: list[tuple[float, float, str]] = []
        self.metrics: list[tuple[str, float, int | None]] = []
        self.stop_after = stop_after

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.done.append((done, total, note))
        if self.stop_after is not None and done >= self.stop_after:
            raise KeyboardInterrupt

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.metrics.append((name, value, exit))

    def log(self, message: str) -> None:
        pass


def artifact_of(folder: Path, type: str, metadata: Mapping[str, object]) -> Artifact:
    Manifest.of_folder(folder, type, metadata).write(folder)
    return Artifact.open(folder)


def run_stage(
    base: Path, inputs: dict[str, Artifact], reporter: Heard | None = None, scratch: str = "scratch", **params: object
) -> Artifact:
    output = base / f"out-{len(list(base.iterdir()))}"
    output.mkdir()
    stage = IcetVerifyStage(IcetVerifyStage.Params.model_validate({**SMALL, **params}))
    context = Context("icet", inputs, output, base / scratch, 7, reporter or Heard())
    return artifact_of(output, "verdict", stage.run(context))


def rows_of(verdict: Artifact, artifact: str, measure: str) -> list[Measure]:
    rows = read_measures(verdict.file(MEASURES_NAME))
    return [row for row in rows if row.artifact == artifact and row.measure == measure]


def make_inputs(base: Path, tiny_llava: Path) -> dict[str, Artifact]:
    """`gguf` made by the gguf stage from `source`, all below `base`."""
    source = base / "source"
    shutil.copytree(tiny_llava, source)
    made = artifact_of(source, "checkpoint", {"exits": [1, 2, 3], "default_exit": 2, "family": "llava-siglip"})
    stage = stage_class("gguf")
    (base / "gguf").mkdir()
    context = Context("gguf", {"source": made}, base / "gguf", base / "gguf-scratch", 0, Heard())
    metadata = stage(stage.Params.model_validate({"type": "Q8_0"})).run(context)
    return {"gguf": artifact_of(base / "gguf", "gguf", metadata), "source": made}
