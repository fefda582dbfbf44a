"""What is stated about a bundle, as in-toto statements: how it was made, and what its verification found.

Subjects are the bundle's manifest and every file in it, by digest, so a statement holds for these bytes alone.

- SLSA provenance v1 (slsa.dev/provenance/v1): the recipe, every stage with its parameters, seed and code version, the
  artifacts that it took and the data that it read by digest, the libraries with their versions; when the run began and
  its gates were checked
- test-result v0.1 (in-toto attestation, spec/predicates/test-result.md): the gates by name, and what they were read
  from
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from artifacts.bundle import Bundle
from artifacts.card import Gate

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PROVENANCE: Final = "https://slsa.dev/provenance/v1"
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"
# Names of ours; no domain is claimed that is not ours.
BUILD_TYPE: Final = "urn:icet-pipeline:recipe:1"
BUILDER: Final = "urn:icet-pipeline:runner:1"
_LLAMA_CPP: Final = "llama.cpp"  # among the versions: no distribution, but which build computed


@dataclass(frozen=True)
class Made:
    """One stage that stands behind a bundle."""

    id: str
    uses: str
    digest: str  # of its artifact
    key: str  # content key
    code_version: str
    seed: int
    params: Mapping[str, object]
    inputs: Mapping[str, str]  # stage id -> digest of the artifact that it took


@dataclass(frozen=True)
class Material:
    """Data that stages or the verification read: a package or repository, and what of it."""

    uri: str  # a package URL
    digest: Mapping[str, str]  # algorithm -> hex, as in-toto names them (sha256, gitCommit)
    read: Sequence[str]  # files in it; () is all of it


@dataclass(frozen=True)
class Origin:
    """How a bundle was made. Times are seconds since the epoch, UTC."""

    run: str
    recipe: str  # its text
    source: str  # as the recipe names it
    started: float
    checked: float  # when the gates were checked
    stages: Sequence[Made]
    verdicts: Mapping[str, str]  # stage id -> digest
    materials: Sequence[Material]
    versions: Mapping[str, str]  # Python, platform and libraries
    base_models: Sequence[str]


def provenance(bundle: Bundle, origin: Origin) -> dict[str, object]:
    """SLSA provenance of the bundle."""
    libraries = {name: number for name, number in origin.versions.items() if name not in _PLATFORM}
    build = origin.versions.get(_LLAMA_CPP)
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "recipe": origin.recipe,
            "source": origin.source,
            "baseModels": list(origin.base_models),
        },
        "internalParameters": {
            "stages": [
                {
                    "id": made.id, "uses": made.uses, "artifact": made.digest, "key": made.key, "seed": made.seed,
                    "codeVersion": made.code_version, "parameters": dict(made.params), "inputs": dict(made.inputs),
                }
                for made in origin.stages
            ]
        },
        "resolvedDependencies": [
            *({"name": made.id, "digest": {"sha256": made.digest}} for made in origin.stages),
            *(
                {
                    "uri": data.uri,
                    "digest": dict(data.digest),
                    **({"annotations": {"read": ", ".join(data.read)}} if data.read else {}),
                }
                for data in origin.materials
            ),
            *({"uri": f"pkg:pypi/{name}@{number}"} for name, number in sorted(libraries.items())),
            *([{"name": _LLAMA_CPP, "annotations": {"build": build}}] if build is not None else []),
        ],
    }  # fmt: skip
    details = {
        "builder": {"id": BUILDER, "version": dict(sorted(origin.versions.items()))},
        "metadata": {
            "invocationId": origin.run,
            "startedOn": _time(origin.started),
            "finishedOn": _time(origin.checked),
        },
        "byproducts": [{"name": id, "digest": {"sha256": digest}} for id, digest in sorted(origin.verdicts.items())],
    }
    return _statement(bundle, PROVENANCE, {"buildDefinition": definition, "runDetails": details})


def test_result(bundle: Bundle, gates: Sequence[Gate]) -> dict[str, object]:
    """The verdict's gates: PASSED only if there are some, all hold, and the bundle is not marked as unverified."""
    files = bundle.manifest.files
    configuration = [
        {"name": name, "digest": {"sha256": files[name].hex}}
        for name in [*bundle.named("recipe"), *bundle.named("report"), *bundle.named("verdict")]
    ]
    failed = [gate.name for gate in gates if not gate.passed]
    predicate = {
        "result": "PASSED" if gates and not failed and not bundle.unverified else "FAILED",
        "configuration": configuration,
        "passedTests": [gate.name for gate in gates if gate.passed],
        "failedTests": failed,
    }
    return _statement(bundle, TEST_RESULT, predicate)


_PLATFORM: Final = ("python", "platform", "machine", "executable", _LLAMA_CPP)


def _statement(bundle: Bundle, kind: str, predicate: Mapping[str, object]) -> dict[str, object]:
    files = bundle.manifest.files
    subjects = [
        {"name": "oci/manifest.json", "digest": {"sha256": bundle.digest.removeprefix("sha256:")}},
        *({"name": name, "digest": {"sha256": layer.hex}} for name, layer in files.items()),
    ]
    return {"_type": STATEMENT, "subject": subjects, "predicateType": kind, "predicate": dict(predicate)}


def _time(seconds: float) -> str:
    """RFC 3339, whole seconds, UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
