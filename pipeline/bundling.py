"""A run becomes bundles: the shipped files with every paper that a user needs beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Final

from artifacts.artifact import Artifact
from artifacts.attestation import Material
from artifacts.bundle import ARTIFACT, UNVERIFIED, VERDICT, Bundle, BundleFile, write_bundle
from artifacts.bundle_bom import BOM_NAME, bill_of_materials
from artifacts.card import EXIT_MAP, Card, Gate, Step, model_card, notice, spdx
from artifacts.card_run import MODELFILE, Runnable, modelfile, run_guide
from artifacts.manifest import MANIFEST_NAME
from artifacts.measures import MEASURES_NAME, Measure
from artifacts.registry.manifest import MEDIA_DOC, MEDIA_WEIGHT_CONFIG, MEDIA_WEIGHTS
from pipeline.graph import Graph
from pipeline.recipe import SOURCE_ID
from pipeline.report.model import Report
from stages.data import hub, package
from stages.models.licence import licence_of

CHAT_TEMPLATE: Final = "chat_template.jinja"
MEMORY_NAME: Final = "memory.json"
_WEIGHTS: Final = (".gguf", ".safetensors")
_DEMO_LICENCE: Final = "apache-2.0"  # docs/NOTICE.md
_DEMO_BASES: Final = {"demo:smol-llava": ("HuggingFaceTB/SmolLM2-135M-Instruct", "facebook/dinov2-small")}
_FACTS: Final = (
    "default_exit_before", "default_exit", "removed_parameters", "method", "layers_before", "layers", "objective",
    "hardened_exits", "steps", "quantizer", "type", "bits", "group_size", "bits_per_weight", "mmproj_type",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    graph: Graph
    recipe: Path  # the recipe as it was run
    artifacts: Mapping[str, Artifact]  # recipe stage id -> artifact
    report: Report  # without what differs between two runs that made the same files
    versions: Mapping[str, str]  # Python, platform and libraries of the run itself


def bundle_of(
    run: Run,
    id: str,
    folder: Path,
    *,
    unverified: bool,
    link: bool = False,
    attest: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Write the bundle of the shipped stage `id` into `folder`; `link` and `attest` as for `write_bundle`.

    Raises:
        StoreError: a file of it is missing or is not the one that was verified.
    """
    artifact = run.artifacts[id]
    card = _card(run, id, unverified=unverified)
    files = [*_model_files(artifact), *_papers(run, id, card), *_proof(run, id)]
    verdicts = verdicts_of(run, id)
    annotations = {
        "org.opencontainers.image.title": run.graph.name,
        "org.opencontainers.image.description": run.report.headline,
        "org.opencontainers.image.licenses": spdx(card.licence),
        ARTIFACT: artifact.digest,
        **({VERDICT: ",".join(verdict.digest for verdict in verdicts.values())} if verdicts else {}),
        **({UNVERIFIED: "true"} if unverified else {}),
    }
    return write_bundle(folder, files, _config(run, id, card), annotations, link=link, attest=attest)


def verdicts_of(run: Run, id: str) -> dict[str, Artifact]:
    """Stage id -> verdict, of those that are about the shipped stage `id`."""
    nodes = [node for node in run.graph.verdicts if id in run.graph.verified(node)]
    return {node.id: run.artifacts[node.id] for node in nodes if node.id in run.artifacts}


def _model_files(artifact: Artifact) -> list[BundleFile]:
    # The language model first: runners take the first weights that they find.
    entries = sorted(artifact.manifest.files, key=lambda entry: (_order(entry.path), entry.path))
    return [
        BundleFile(
            entry.path,
            artifact.path / entry.path,
            MEDIA_WEIGHTS if entry.path.endswith(_WEIGHTS) else MEDIA_WEIGHT_CONFIG,
            _role(entry.path),
            sha256=entry.sha256,
        )
        for entry in entries
    ]


def _papers(run: Run, id: str, card: Card) -> list[BundleFile]:
    from pipeline.report.drawings import asr_curve_svg

    artifact = run.artifacts[id]
    found = [BundleFile(MANIFEST_NAME, artifact.path / MANIFEST_NAME, MEDIA_WEIGHT_CONFIG, "manifest")]
    template = _chat_template(artifact)
    if template and not any(entry.path == CHAT_TEMPLATE for entry in artifact.manifest.files):
        found.append(BundleFile(CHAT_TEMPLATE, template.encode(), MEDIA_WEIGHT_CONFIG, "chat-template"))
    what = _runnable(run, artifact, card, template)
    if card.has_exit_map:
        found.append(BundleFile(EXIT_MAP, asr_curve_svg(run.report).encode(), MEDIA_DOC, "exit-map"))
    licence = _licence_text(run, card)
    if licence:
        found.append(BundleFile("LICENSE", licence, MEDIA_DOC, "licence"))
    weights = {entry.path: entry.sha256 for entry in artifact.manifest.files}
    texts = {
        "README.md": (model_card(card).encode(), "card"),
        "NOTICE.md": (notice(card).encode(), "notice"),
        "RUN.md": (run_guide(what).encode(), "guide"),
        MEMORY_NAME: (_memory(run, card), "memory"),
        BOM_NAME: (bill_of_materials(card, artifact.digest, weights), "bom"),
    }
    if what.model:
        texts[MODELFILE] = (modelfile(what).encode(), "guide")
    found += [BundleFile(name, content, MEDIA_DOC, role) for name, (content, role) in texts.items()]
    return found


def _proof(run: Run, id: str) -> list[BundleFile]:
    proof = run.report.model_dump_json(indent=1) + "\n"
    found = [
        BundleFile("recipe.yaml", run.recipe, MEDIA_DOC, "recipe"),
        BundleFile("report.json", proof.encode(), MEDIA_DOC, "report"),
    ]
    for name, verdict in verdicts_of(run, id).items():
        for file in (MANIFEST_NAME, MEASURES_NAME):
            found.append(BundleFile(f"verdict/{name}/{file}", verdict.path / file, MEDIA_DOC, "verdict"))
    return found


def _card(run: Run, id: str, *, unverified: bool) -> Card:
    artifact, report = run.artifacts[id], run.report
    spec = run.graph.node(id).planned.spec
    source = str(run.graph.recipe.source.get("model", ""))
    subject = next((one for one in report.subjects if one.artifact == id), None)
    rows = [row for row in report.measures if row.artifact == id]
    rated = [row.n for row in rows if row.measure in ("asr", "over_refusal") and row.exit is not None and row.n]
    verdict = next(iter(verdicts_of(run, id).values()), None)
    exits = subject.exits if subject is not None else ()
    return Card(
        name=run.graph.name,
        type=artifact.type,
        quantization=str(artifact.metadata.get("type") or (spec.quantization if spec else "") or ""),
        sees_images=bool(exits) or any("mmproj" in entry.path for entry in artifact.manifest.files),
        base_models=base_models(source),
        source=source or "a local model",
        licence=_licence(run, source),
        headline=report.headline,
        steps=tuple(_steps(run, id)),
        gates=tuple(Gate(gate.name, gate.limit, gate.value, gate.passed, gate.reason) for gate in report.gates),
        exits=exits,
        default_exit=subject.default_exit if subject is not None else None,
        device=str(report.device.get("name", "")),
        context=int(report.device.get("context", 2048)),
        memory_predicted=_bytes(rows, "memory_predicted"),
        memory_measured=_bytes(rows, "memory_measured"),
        prompts=min(rated, default=None),
        judge=str(verdict.metadata.get("judge", "")) if verdict is not None else "",
        unverified=unverified,
        has_exit_map=any(row.measure == "asr" and row.exit is not None for row in report.measures),
        tools=tools(run, id),
    )


def _bytes(rows: list[Measure], measure: str) -> int | None:
    known = [int(row.value) for row in rows if row.measure == measure and row.value is not None]
    return max(known, default=None)


def lineage(run: Run, id: str) -> list[str]:
    """The stages from the source to `id`, in the order of the graph."""
    wanted, found = {id}, []
    for node in reversed(run.graph.nodes):
        if node.id in wanted and node.id in run.artifacts:
            wanted.update(node.inputs)
            found.append(node.id)
    return found[::-1]


def _steps(run: Run, id: str) -> list[Step]:
    found = []
    for stage in lineage(run, id):
        if stage == SOURCE_ID:
            continue
        metadata = run.artifacts[stage].metadata
        facts = {key.replace("_", " "): _words(metadata[key]) for key in _FACTS if metadata.get(key) is not None}
        found.append(Step(stage, run.graph.node(stage).uses, facts))
    return found


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)


def tools(run: Run, id: str) -> dict[str, str]:
    """Distribution -> version, of all that had a part in what ships."""
    found = {"icet-pipeline": _own_version()}
    for stage in lineage(run, id):
        found.update(run.artifacts[stage].manifest.provenance.libraries)
    return found


def materials(run: Run, id: str) -> list[Material]:
    """What the stages that stand behind `id`, and those that verified it, read from elsewhere."""
    read: dict[tuple[str, str], list[str]] = {}
    for stage in (*lineage(run, id), *verdicts_of(run, id)):
        for reference in run.graph.node(stage).stage.downloads():
            kind, _, _ = reference.partition(":")
            if kind == "package":
                source = package.parse(reference)
                place = f"pkg:pypi/{source.name}@{source.pin.version}", f"sha256:{source.pin.sha256}"
            else:
                place = f"pkg:huggingface/{reference.removeprefix('hub:').partition('!')[0]}", _commit(reference)
            read.setdefault(place, []).append(reference.partition("!")[2])
    found = []
    for (uri, digest), names in sorted(read.items()):
        algorithm, _, value = digest.partition(":")
        found.append(Material(uri, {algorithm: value} if value else {}, sorted(filter(None, set(names)))))
    return found


def _commit(reference: str) -> str:
    """`gitCommit:HEX` of what was read from the hub; of what is in its cache no longer, nothing."""
    if "!" in reference:
        commit = hub.DataFile.parse(reference).commit()
    else:
        snapshot = hub.cached(*hub.parse(reference))
        commit = snapshot.name if snapshot is not None else ""
    return f"gitCommit:{commit}"


def _own_version() -> str:
    try:
        return version("icet-pipeline")
    except PackageNotFoundError:
        return "unknown"


def base_models(source: str) -> tuple[str, ...]:
    """The Hugging Face ids of what a recipe's source is made of; none for a folder."""
    if source in _DEMO_BASES:
        return _DEMO_BASES[source]
    name = source.removeprefix("hub:")
    return (name,) if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) else ()


def _licence(run: Run, source: str) -> str:
    """SPDX identifier of the source's licence, read from its card; "other" when nobody says."""
    if source.startswith("demo:"):
        return _DEMO_LICENCE
    made = run.artifacts.get(SOURCE_ID)
    return licence_of(made.path).get("license", "other") if made is not None else "other"


def _licence_text(run: Run, card: Card) -> bytes | None:
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE"):
        text = _source_file(run, name)
        if text:
            return text
    if card.licence != _DEMO_LICENCE:
        return None
    try:
        files = distribution("icet-pipeline").files or []
    except PackageNotFoundError:
        return None
    # This project's is Apache-2.0 too. It lies in the wheel's metadata, or, installed in place, beside the sources.
    own = next((Path(str(file.locate())) for file in files if file.name == "LICENSE"), None)
    return own.read_bytes() if own is not None and own.is_file() else None


def _source_file(run: Run, name: str) -> bytes | None:
    source = run.artifacts.get(SOURCE_ID)
    path = source.path / name if source is not None else None
    return path.read_bytes() if path is not None and path.is_file() else None


def _chat_template(artifact: Artifact) -> str:
    if artifact.type == "gguf":
        from stages.runtimes.gguf_parts import model_file, read_model

        found = read_model(model_file(artifact.path)).fields.get("tokenizer.chat_template", "")
        return found if isinstance(found, str) else ""
    path = artifact.path / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _runnable(run: Run, artifact: Artifact, card: Card, template: str) -> Runnable:
    from stages.data.chat import render
    from stages.runtimes.gguf_parts import model_file

    is_gguf = artifact.type == "gguf"
    prompt = ""
    if is_gguf and template:
        turn = render(template, "{{ .Prompt }}", image=False)
        prompt = turn.before + turn.after
    return Runnable(
        name=re.sub(r"[^a-z0-9._-]", "-", run.graph.name.lower()),
        model=model_file(artifact.path).name if is_gguf else "",
        mmproj="mmproj.gguf" if card.sees_images else "",
        context=card.context,
        template=CHAT_TEMPLATE if template else "",
        prompt=prompt,
        small_cache=_small_cache(run),
    )


def _small_cache(run: Run) -> bool:
    """Whether the device keeps keys and values in Q8_0."""
    return run.report.device.get("kv_cache_bits") == 8


def _memory(run: Run, card: Card) -> bytes:
    plan = {
        "device": card.device,
        "budget": run.report.device.get("memory"),
        "context": card.context,
        **({"kv_cache": "Q8_0"} if _small_cache(run) else {}),
        "predicted": card.memory_predicted,
        "measured": card.memory_measured,
    }
    return json.dumps(plan, indent=1).encode() + b"\n"


def _config(run: Run, id: str, card: Card) -> dict[str, object]:
    """The ModelPack config: what a registry shows of the model (model-spec, docs/config.md). No dates."""
    spec = run.graph.node(id).planned.spec
    config: dict[str, object] = {
        "architecture": "transformer",
        "format": card.type if card.type == "gguf" else "safetensors",
        "capabilities": {"inputTypes": ["text", "image"] if card.sees_images else ["text"], "outputTypes": ["text"]},
    }
    if card.quantization:
        config["quantization"] = card.quantization
    descriptor: dict[str, object] = {"name": run.graph.name, "vendor": f"icet-pipeline {_own_version()}"}
    if spec is not None:
        descriptor["family"] = spec.family
    if card.licence != "other":
        descriptor["licenses"] = [spdx(card.licence)]
    return {"descriptor": descriptor, "config": config}


def _role(path: str) -> str:
    if not path.endswith(_WEIGHTS):
        return "config"
    return "mmproj" if "mmproj" in path else "model"


def _order(path: str) -> int:
    return ("model", "mmproj", "config").index(_role(path))
