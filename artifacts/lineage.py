"""What a model was trained on, told on by every stage: it stands in the manifest, so that it ships with the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from artifacts.artifact import Artifact
from artifacts.errors import StoreError
from artifacts.manifest import Training


def trains_on_prompts(params: Mapping[str, object]) -> bool:
    """Whether a stage of these parameters trains on prompt sets: it names them, or heals on a mix that holds them."""
    return isinstance(params.get("prompts"), dict) or params.get("heal") is not None


def combined(trainings: Iterable[Training]) -> Training:
    """All that was done to any of them."""
    found = tuple(trainings)
    stages = dict.fromkeys(stage for training in found for stage in training.stages)
    return Training(stages=tuple(stages), complete=bool(found) and all(training.complete for training in found))


def training_of(artifact: Artifact) -> Training:
    """What its manifest says; of one that was made before manifests said it, what is still in its store."""
    made = artifact.manifest.provenance
    if made.training is not None:
        return made.training
    model = str(made.params.get("model", ""))
    if made.stage == "source" and model.startswith("demo:"):
        return Training(stages=(model,), complete=True)  # whichever it was, it may have been trained on prompts
    before = combined(_of_digest(artifact, digest) for digest in made.inputs.values())
    return before.then(made.stage) if trains_on_prompts(made.params) else before


def _of_digest(artifact: Artifact, digest: str) -> Training:
    try:
        return training_of(Artifact.open(artifact.path.parent / digest))
    except StoreError:
        return Training()  # no longer there
