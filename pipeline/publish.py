"""Publishing: what ships, with the recipe that made it and the proof, into an OCI layout; only if every gate held.

Each shipped artifact becomes one manifest with one tag. Its layers: the model's files, `recipe.yaml`, `report.json`
(without run ids and times, so that the same files give the same digest), the artifact's `manifest.json`, and the
verdict's `measures.json` and `manifest.json`. Responses of models are not published.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from artifacts.artifact import Artifact
from artifacts.errors import GateError, StoreError
from artifacts.manifest import MANIFEST_NAME
from artifacts.measures import MEASURES_NAME
from artifacts.registry.oci_layout import MEDIA_DOC, MEDIA_WEIGHT_CONFIG, MEDIA_WEIGHTS, LayoutFile, write_layout
from pipeline.graph import Graph
from pipeline.report.build import build_report
from pipeline.report.model import GateRow, Report
from pipeline.rundir import RECIPE_NAME

SCHEME: Final = "oci-layout:"
_WEIGHTS: Final = (".gguf", ".safetensors")
# Annotations of ours, beside the standard ones; no domain is claimed that is not ours.
_DIGEST: Final = "icet-pipeline.artifact"
_VERDICT: Final = "icet-pipeline.verdict"
_ROLE: Final = "icet-pipeline.role"


@dataclass(frozen=True)
class PublishResult:
    """Where it is now. `digest` is that of the first shipped artifact's manifest; `tags` has every one."""

    target: str
    digest: str
    tags: Mapping[str, str] = field(default_factory=dict)  # tag -> manifest digest


def publish(graph: Graph, run_dir: Path, artifacts: Mapping[str, Artifact]) -> PublishResult:
    """Write every shipped artifact where the recipe says.

    Args:
        artifacts: recipe stage id -> artifact.

    Raises:
        GateError: a gate of the recipe failed or was not checked. StoreError: nothing to ship, or it cannot be written.
    """
    where = graph.recipe.publish
    if where is None:
        raise StoreError("the recipe does not say where to publish", way_out="add `publish: {to: oci-layout:dist}`")
    report = build_report(run_dir)
    _refuse_unless_passed(graph, report.gates)
    shipped = [id for id in graph.shipped if id in artifacts]
    if not shipped:
        raise StoreError("there is nothing to publish", why="no shipped artifact was made")
    folder, tag = _target(where.to, graph.name)
    written: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        proof = Path(temporary) / "report.json"
        proof.write_text(report.publishable().model_dump_json(indent=1) + "\n", encoding="utf-8")
        for id in shipped:
            name = tag if len(shipped) == 1 else f"{tag}-{id}"
            written[name] = _write(graph, folder, name, id, artifacts, run_dir / RECIPE_NAME, proof, report)
    first = next(iter(written))
    return PublishResult(target=f"{SCHEME}{folder}:{first}", digest=written[first], tags=written)


def _target(to: str, name: str) -> tuple[Path, str]:
    """`oci-layout:FOLDER` or `oci-layout:FOLDER:TAG`; the tag is the recipe's name unless given."""
    if not to.startswith(SCHEME):
        raise StoreError(f"cannot publish to {to!r}", way_out="write oci-layout:FOLDER")
    folder, colon, tag = to.removeprefix(SCHEME).rpartition(":")
    if not colon or "/" in tag or not tag:
        folder, tag = to.removeprefix(SCHEME).rstrip(":"), re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return Path(folder).expanduser(), tag


def _refuse_unless_passed(graph: Graph, gates: tuple[GateRow, ...]) -> None:
    """The runner asks only when all is well; who calls this by another way gets the same answer."""
    checked = {gate.name: gate for gate in gates}
    missing = [name for name in graph.recipe.gates.asked() if name not in checked]
    failed = [gate for gate in gates if not gate.passed]
    if missing or failed:
        raise GateError(
            f"nothing is published: {len(failed)} gates failed, {len(missing)} were not checked",
            why="; ".join([*(f"{gate.name}: {gate.reason}" for gate in failed), *(f"{n}: no result" for n in missing)]),
            way_out="run the recipe to its end; the report shows every measure",
        )


def _write(
    graph: Graph,
    folder: Path,
    tag: str,
    id: str,
    artifacts: Mapping[str, Artifact],
    recipe: Path,
    proof: Path,
    report: Report,
) -> str:
    artifact = artifacts[id]
    verdicts = {node.id: artifacts[node.id] for node in graph.verdicts if id in node.needs and node.id in artifacts}
    files = [
        LayoutFile(
            path=artifact.path / entry.path,
            media_type=MEDIA_WEIGHTS if entry.path.endswith(_WEIGHTS) else MEDIA_WEIGHT_CONFIG,
            title=entry.path,
            annotations={_ROLE: _role(entry.path)},
            sha256=entry.sha256,
        )
        # The language model first: runners take the first weights that they find.
        for entry in sorted(artifact.manifest.files, key=lambda entry: (_order(entry.path), entry.path))
    ]
    files += [
        LayoutFile(artifact.path / MANIFEST_NAME, MEDIA_WEIGHT_CONFIG, MANIFEST_NAME, {_ROLE: "manifest"}),
        LayoutFile(recipe, MEDIA_DOC, RECIPE_NAME, {_ROLE: "recipe"}),
        LayoutFile(proof, MEDIA_DOC, "report.json", {_ROLE: "report"}),
    ]
    for name, verdict in verdicts.items():
        files += [
            LayoutFile(verdict.path / MANIFEST_NAME, MEDIA_DOC, f"verdict/{name}/{MANIFEST_NAME}", {_ROLE: "verdict"}),
            LayoutFile(verdict.file(MEASURES_NAME), MEDIA_DOC, f"verdict/{name}/{MEASURES_NAME}", {_ROLE: "verdict"}),
        ]
    annotations = {
        "org.opencontainers.image.title": graph.name,
        "org.opencontainers.image.description": report.headline,
        _DIGEST: artifact.digest,
        **({_VERDICT: ",".join(verdict.digest for verdict in verdicts.values())} if verdicts else {}),
    }
    return write_layout(folder, files, _config(graph, id, artifact), annotations, tag)


def _role(path: str) -> str:
    if not path.endswith(_WEIGHTS):
        return "config"
    return "mmproj" if "mmproj" in path else "model"


def _order(path: str) -> int:
    return ("model", "mmproj", "config").index(_role(path))


def _config(graph: Graph, id: str, artifact: Artifact) -> dict[str, object]:
    """The ModelPack config: what a registry shows of the model (model-spec, docs/config.md). No dates."""
    spec = graph.node(id).planned.spec
    vision = spec is not None and spec.vision is not None
    config: dict[str, object] = {
        "architecture": "transformer",
        "format": artifact.type,
        "capabilities": {"inputTypes": ["text", "image"] if vision else ["text"], "outputTypes": ["text"]},
    }
    quantization = artifact.metadata.get("type") or (spec.quantization if spec is not None else None)
    if isinstance(quantization, str):
        config["quantization"] = quantization
    descriptor: dict[str, object] = {"name": graph.name}
    if spec is not None:
        descriptor["family"] = spec.family
    try:
        descriptor["vendor"] = f"icet-pipeline {version('icet-pipeline')}"
    except PackageNotFoundError:
        descriptor["vendor"] = "icet-pipeline"
    return {"descriptor": descriptor, "config": config}
