"""Whether what is to be published passed: its gates are checked once more, on the measures that stand behind it.

What a run or a bundle says of its gates counts only where the measures, at the recipe's limits, say the same. A bundle
whose recipe cannot be planned here (its source lies elsewhere, or the stages are not installed) is held to the recipe's
limits all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from artifacts.artifact import Artifact
from artifacts.attestation_check import unsigned_findings
from artifacts.bundle import ARTIFACT, Bundle
from artifacts.errors import GateError, PipelineError
from artifacts.manifest import Manifest
from artifacts.measures import MEASURES_NAME, read_measures
from pipeline.gates import GateResult, check_gates
from pipeline.graph import Graph, build_graph
from pipeline.recipe import Recipe, load_recipe
from pipeline.report.model import GateRow, Report

_UNREADABLE = (OSError, ValueError, KeyError)  # pydantic's errors are ValueErrors


def run_problem(
    graph: Graph, report: Report, artifacts: Mapping[str, Artifact], shipped: Sequence[Artifact]
) -> GateError | None:
    """Why what a run ships is not verified; None when it is."""
    measured = {row.digest for row in report.measures}
    try:
        reasons = _differences(check_gates(graph, artifacts), report.gates)
    except _UNREADABLE as error:
        reasons = [f"the measures cannot be read: {error}"]
    reasons += [f"no verdict is about {one.digest[:12]}" for one in shipped if one.digest not in measured]
    if not report.gates:
        reasons.append("no gate was checked")
    if not reasons:
        return None
    return GateError(
        "nothing is published: what ships is not verified",
        why="; ".join(reasons),
        way_out="run the recipe to its end, with icet-verify and gates; the report shows every measure. "
        "`pipeline publish --allow-unverified` publishes all the same, and marks it",
    )


def bundle_problem(bundle: Bundle) -> GateError | None:
    """Why a bundle is not verified; None when it is. Who signed it is `pipeline check`'s question."""
    if bundle.unverified:
        return GateError(
            "the bundle is marked as unverified", where=str(bundle.folder), way_out="--allow-unverified passes it on"
        )
    reasons = [f"{finding.name}: {finding.reason}" for finding in unsigned_findings(bundle) if not finding.holds]
    try:
        reasons = reasons or _bundle_reasons(bundle)
    except PipelineError as error:
        reasons = [f"its recipe cannot be read: {error.what}"]
    except _UNREADABLE as error:
        reasons = [f"its proof cannot be read: {error}"]
    if not reasons:
        return None
    return GateError(
        "nothing is published: the bundle is not verified",
        where=str(bundle.folder),
        why="; ".join(reasons),
        way_out="publish its run, once it has passed; --allow-unverified passes the bundle on all the same, marked",
    )


def _bundle_reasons(bundle: Bundle) -> list[str]:
    papers = [*bundle.named("recipe"), *bundle.named("report")]
    if len(papers) != 2:
        return ["it has no recipe and report"]
    # Where its maker published it, and with which key, is nobody's matter here.
    recipe = load_recipe(bundle.folder / papers[0], ["publish=null"])
    report = Report.model_validate_json((bundle.folder / papers[1]).read_bytes())
    if not recipe.gates.asked():
        return ["no gate was checked"]
    try:
        graph = build_graph(recipe, within_budget=False)
    except PipelineError:
        return _differences(_as_told(recipe, report), report.gates)
    artifacts = _artifacts(bundle, report, graph)
    verdicts = [artifacts[node.id] for node in graph.verdicts if node.id in artifacts]
    rows = [row for verdict in verdicts for row in read_measures(verdict.file(MEASURES_NAME))]
    own = bundle.manifest.annotations[ARTIFACT]
    if not any(row.digest == own and row.artifact in graph.shipped for row in rows):
        return [f"{own[:12]} is not what the recipe ships"]  # but a control, or what it only compares with
    # Of several bundles of a run each has its own verdicts; a gate's value is that of the worst of all.
    here = replace(graph, nodes=tuple(n for n in graph.nodes if n not in graph.verdicts or n.id in artifacts))
    try:
        results = check_gates(here, artifacts)
    except ImportError:  # what stages need is not installed here
        return _differences(_as_told(recipe, report), report.gates)
    return _differences(results, report.gates, worst=len(here.nodes) < len(graph.nodes))


def _artifacts(bundle: Bundle, report: Report, graph: Graph) -> dict[str, Artifact]:
    """What ships and its verdicts, from the bundle; of the other stages what the report says."""
    own = Artifact.open(bundle.folder)
    found = {
        row.stage: own
        if row.digest == bundle.manifest.annotations[ARTIFACT]
        else Artifact(bundle.folder, Manifest(type=row.type, files=row.files, metadata=row.metadata))
        for row in report.artifacts
    }
    for node in graph.verdicts:
        found.pop(node.id, None)
        folder = bundle.folder / "verdict" / node.id
        if folder.is_dir():
            found[node.id] = Artifact.open(folder)
    return found


def _as_told(recipe: Recipe, report: Report) -> list[GateResult]:
    """The recipe's gates, on the values that the report tells."""
    told = {row.name: row.value for row in report.gates}
    found = []
    for name, asked in recipe.gates.asked().items():
        limit = float(recipe.device.memory if asked == "device" and recipe.device is not None else asked)
        value = told.get(name)
        passed = value is not None and (value >= limit if name.startswith("min_") else value <= limit)
        found.append(GateResult(name, limit, value, passed, f"{value} where the limit is {limit:g}"))
    return found


def _differences(results: Sequence[GateResult], told: Sequence[GateRow], *, worst: bool = False) -> list[str]:
    """Every gate that does not hold, or of which something else is told; `worst`: the value may be another bundle's."""
    rows = {row.name: row for row in told}
    found = []
    for result in results:
        row = rows.get(result.name)
        if row is None:
            found.append(f"{result.name}: no result")
        elif not row.passed or not result.passed:
            found.append(f"{result.name}: {row.reason if not row.passed else result.reason}")
        elif row.limit != result.limit:
            found.append(f"{result.name}: it was held to {row.limit}, the recipe's limit is {result.limit:g}")
        elif row.value != result.value and not worst:
            found.append(f"{result.name}: {row.value} is told, the measures give {result.value}")
    asked = {result.name for result in results}
    return found + [f"{row.name}: {row.reason}" for row in told if not row.passed and row.name not in asked]
