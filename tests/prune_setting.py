"""What the tests of `prune` share: a stage run without a pipeline, and a tiny model that is deep enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest
from stages.data.calibration import Passage
from stages.prune.params import PruneParams
from stages.prune.stage import PruneStage
from stages.stage import Context

DEPTH = 6


@dataclass
class Reporter:
    metrics: list[tuple[str, float, int | None]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.done.append(done / total)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.metrics.append((name, value, step))

    def log(self, message: str) -> None: ...


def prune(
    source: Path, folder: Path, params: Mapping[str, object], reporter: Reporter | None = None
) -> tuple[Path, Mapping[str, object]]:
    output = folder / "output"
    output.mkdir(parents=True)
    artifact = Artifact(source, Manifest.of_folder(source, "checkpoint", {}))
    context = Context("prune", {"source": artifact}, output, folder / "scratch", 0, reporter or Reporter())
    return output, PruneStage(PruneParams.model_validate(params)).run(context)


def passages(model: PreTrainedModel) -> list[Passage]:
    embed = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 5, 12)
    with torch.no_grad():
        return [Passage(embed(torch.randint(5, 90, (length,), generator=generator)), 2) for length in lengths]
