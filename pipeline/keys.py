"""Content keys: the same key means the same work, so its artifact is reused and never made twice.

A key covers everything that the result may depend on: the stage and its code version, its parameters, the digests of
its inputs in order, the seed, the versions of the libraries that it declares, what it says about the outside
(`fingerprint`), and the device profile if it declares that it reads it. It does not cover what the result must not
depend on: where the run stands on disk, the stage's own id, and its inputs' ids as long as the stage cannot tell its
inputs apart by id (one input and no parameter that names a stage). Nor does it cover the machine and what of it a stage
may use (cores, GPU, `resources`): sums are then taken in another order, so bits may differ where the work is the same,
and a training that two processes began may be finished by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

from artifacts.artifact import Artifact
from artifacts.manifest import Provenance, canonical_json, sha256_bytes
from artifacts.store import Store
from stages.stage import Stage, StageParams

if TYPE_CHECKING:
    from pipeline.graph import Graph

KEY_VERSION = 1  # raise it when the meaning of a key changes: every artifact is then made anew


def content_key(
    stage: Stage[StageParams],
    inputs: Mapping[str, str],
    *,
    seed: int,
    device: Mapping[str, int],
) -> str:
    """The key of one stage's work, 64 hexadecimal digits.

    Args:
        stage: the stage with its parameters.
        inputs: stage id -> artifact digest, in the order in which the stage sees them.
        seed: of the stage.
        device: the device profile's numbers; counted only if the stage reads them.
    """
    named = type(stage).many or bool(stage.references())
    return sha256_bytes(
        canonical_json(
            {
                "key_version": KEY_VERSION,
                "stage": type(stage).name,
                "code_version": type(stage).code_version,
                "params": canonical_params(stage),
                "inputs": [[stage_id if named else "", digest] for stage_id, digest in inputs.items()],
                "seed": seed,
                "libraries": library_versions(stage),
                "fingerprint": stage.fingerprint(),
                "device": dict(device) if stage.uses_device() else {},
            }
        )
    )


def canonical_params(stage: Stage[StageParams]) -> dict[str, object]:
    """Every parameter, defaults included, as JSON values: writing a default out changes nothing."""
    return cast("dict[str, object]", stage.params.model_dump(mode="json"))


def library_versions(stage: Stage[StageParams]) -> dict[str, str]:
    """Distribution -> installed version, of the libraries that the stage declares."""
    return {name: _version(name) for name in sorted(stage.uses_libraries())}


def device_numbers(graph: Graph) -> dict[str, int]:
    """The recipe's device profile as bytes and tokens; empty when it names none."""
    return graph.recipe.device.numbers() if graph.recipe.device is not None else {}


@cache
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


def provenance(stage: Stage[StageParams], key: str, inputs: Mapping[str, Artifact], *, seed: int) -> Provenance:
    """What the manifest records about how an artifact was made."""
    return Provenance(
        stage=type(stage).name,
        code_version=type(stage).code_version,
        key=key,
        params=canonical_params(stage),
        inputs={name: artifact.digest for name, artifact in inputs.items()},
        seed=seed,
        libraries=library_versions(stage),
        training=stage.training(inputs),
    )


def cached_artifacts(graph: Graph, store: Store) -> dict[str, Artifact]:
    """Stage id -> artifact, for every stage that a run would take from the store; changes nothing there.

    A stage behind one that is not cached is not either: its key is not known yet.
    """
    found: dict[str, Artifact] = {}
    for node in graph.nodes:
        if not all(stage_id in found for stage_id in node.inputs):
            continue
        digests = {stage_id: found[stage_id].digest for stage_id in node.inputs}
        key = content_key(node.stage, digests, seed=graph.recipe.seed_of(node.id), device=device_numbers(graph))
        artifact = store.peek(key)
        if artifact is not None:
            found[node.id] = artifact
    return found
