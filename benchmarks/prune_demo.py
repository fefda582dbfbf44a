"""Drop blocks of the demo's language model, with and without healing, and measure what is left.

    python benchmarks/prune_demo.py --drop 2 4 6 --steps 30

Measured on material that nothing trains on: easy-VQA accuracy at the default exit (validation pictures), and the KL of
next-token distributions to the unpruned model on held-out articles, visual questions and prompts. What is done is kept
in `--work`, so that a run that is stopped goes on. Writes benchmarks/results/prune_demo.json. About 40 minutes on one
core, of which 30 steps of healing take 7.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from artifacts.artifact import Artifact
from artifacts.home import cache_dir
from artifacts.manifest import MANIFEST_NAME, Manifest
from stages.models import checkpoint
from stages.models.family import family_of
from stages.prune.params import PruneParams
from stages.prune.stage import PruneStage
from stages.runtimes.utility import validation_utility
from stages.source import SourceParams, SourceStage
from stages.stage import Context, P, Stage

RESULTS = Path(__file__).parent / "results" / "prune_demo.json"


class Printed:
    """A reporter that prints."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        print(f"  {done / total:5.0%} {note}", flush=True)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...

    def log(self, message: str) -> None:
        print(f"  {message}", flush=True)


def make(stage: Stage[P], folder: Path, inputs: Mapping[str, Artifact]) -> Artifact:
    """A stage's artifact, unless `folder` holds it already."""
    output = folder / "output"
    if not (output / MANIFEST_NAME).is_file():
        for left in output.glob("*"):
            left.unlink()
        output.mkdir(parents=True, exist_ok=True)
        metadata = stage.run(Context(folder.name, inputs, output, folder / "scratch", 0, Printed()))
        Manifest.of_folder(output, "checkpoint", metadata).write(output)
    return Artifact.open(output)


def accuracy(artifact: Artifact, folder: Path, questions: int) -> dict[str, object]:
    """easy-VQA accuracy at the default exit."""
    vision = family_of(checkpoint.read_config(artifact.path)).spec(checkpoint.read_config(artifact.path)).vision
    assert vision is not None
    exit = vision.default_exit
    size = vision.image_size
    found = validation_utility(artifact.path, [exit], questions, size=size, seed=0, scratch=folder / "asked")[exit]
    return {"vqa_right": found.right, "vqa_asked": found.asked, "vqa_accuracy": round(found.share, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--steps", type=int, default=30, help="of healing")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--validation", type=int, default=48, help="held-out sequences that the KL is measured on")
    parser.add_argument("--work", type=Path, default=cache_dir() / "prune-demo")
    arguments = parser.parse_args()

    source = make(SourceStage(SourceParams(model="demo:smol-llava")), arguments.work / "source", {})
    work = arguments.work / source.digest[:16]
    rows: list[dict[str, object]] = []
    rows.append({"model": "unpruned", "drop": 0, **accuracy(source, work / "unpruned", arguments.questions)})
    print(rows[-1], flush=True)
    variants = [("block-influence", drop, 0) for drop in arguments.drop]
    variants += [("block-influence", drop, arguments.steps) for drop in arguments.drop]
    variants += [("angular", drop, 0) for drop in arguments.drop]
    for method, drop, steps in variants:
        name = f"{method}-{drop}" + (f"-healed-{steps}" if steps else "")
        params: dict[str, object] = {"method": method, "drop": drop, "validation": arguments.validation}
        if steps:
            params["heal"] = {"steps": steps}
        print(name, flush=True)
        made = make(PruneStage(PruneParams.model_validate(params)), work / name, {"source": source})
        told = made.metadata
        kept = ("dropped_layers", "removed_parameters", "kl_to_unpruned")
        row: dict[str, object] = {"model": name, "method": method, "drop": drop, "healing_steps": steps}
        row |= {key: told[key] for key in kept}
        rows.append(row | accuracy(made, work / name, arguments.questions))
        print(rows[-1], flush=True)
        influence = told["block_influence"]
        summary = {
            "command": "python benchmarks/prune_demo.py",
            "source": "demo:smol-llava",
            "source_digest": source.digest,
            "how": "transformers, float32, greedy; easy-VQA validation pictures, default exit; KL in nats a token",
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "block_influence": influence,
            "rows": rows,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
