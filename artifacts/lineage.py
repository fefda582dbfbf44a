"""What a model was trained on, told on by every stage: it stands in the manifest, so that it ships with the files.

What it was calibrated on stands in its parameters and in those of what it was made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

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


def calibrated_on(artifact: Artifact) -> dict[str, str]:
    """The texts of a user's own, as a recipe names them, that it or what it was made of was calibrated on -> by which
    stage; as far as its store still tells."""
    found: dict[str, str] = {}
    waiting, seen = [artifact], set[str]()
    while waiting:
        one = waiting.pop()
        made = one.manifest.provenance
        for section in (made.params, made.params.get("auto")):
            mix = section.get("calibration") if isinstance(section, dict) else None
            text = mix.get("texts") if isinstance(mix, dict) else None
            if isinstance(text, str):
                found.setdefault(text, made.stage)
        for digest in set(made.inputs.values()) - seen:
            seen.add(digest)
            with suppress(StoreError):  # no longer there
                waiting.append(Artifact.open(one.path.parent / digest))
    return found


def _of_digest(artifact: Artifact, digest: str) -> Training:
    try:
        return training_of(Artifact.open(artifact.path.parent / digest))
    except StoreError:
        return Training()  # no longer there
