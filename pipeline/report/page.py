"""`report.html`: one page that needs nothing beside itself.

Everything that comes from a model, a recipe or a file name is escaped by jinja2; the page has no script, and its
Content-Security-Policy would not run one.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from artifacts.measures import Measure
from pipeline.device import show_bytes
from pipeline.report.asked import asked_table
from pipeline.report.assets import asset
from pipeline.report.figures import (
    Cell,
    Code,
    Table,
    asr_figure,
    dag_figure,
    exit_figures,
    legend_figure,
    memory_figure,
    whole_figures,
)
from pipeline.report.formats import format_tables
from pipeline.report.model import ArtifactRow, Report, Subject
from pipeline.report.numbers import (
    Stat,
    at_default,
    average,
    degenerate,
    figure,
    percent,
    rows_of,
    seconds,
    show,
    stat,
    support,
    titled,
    worst,
)
from pipeline.report.paired import paired_tables
from pipeline.report.published import safety_table, utility_table
from pipeline.report.responses import Responses
from pipeline.report.training import curve_figures
from pipeline.report.trainings import trainings_table
from stages.verify.bands import BANDS

if TYPE_CHECKING:
    from pipeline.report.comparison import Comparison, Flip

_HOLDS, _FAILS, _UNMEASURED = "✓ holds", "✗ fails", "✗ not measured"
_STATUS_WORDS: Final = {
    "passed": "passed",
    "failed": "failed",
    "gate_failed": "a gate failed",
    "stopped": "stopped",
    "unfinished": "not finished",
}


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class _Command:
    words: str
    code: str


def render_page(report: Report, responses: Responses | None = None) -> str:
    """The whole page as text."""
    first, mark, rest = _sentence(report.headline)
    main_curves, more_curves = curve_figures(report)
    sections = {
        "errors": [stage for stage in report.stages if stage.error],
        "gates": _gates(report),
        "asr": asr_figure(report),
        "others": [*exit_figures(report), *whole_figures(report)],
        "formats": format_tables(report),
        "memory": memory_figure(report),
        "curves": main_curves,
        "dag": dag_figure(report),
        "artifacts": _artifacts(report),
        "commands": _commands(report),
        "responses": responses,
    }
    names = {
        "errors": ("errors", "What went wrong"),
        "gates": ("gates", "Gates"),
        "asr": ("asr", "Attack success"),
        "others": ("quality", "What it cost"),
        "formats": ("formats", "Formats"),
        "memory": ("memory", "Memory"),
        "curves": ("training", "Training"),
        "dag": ("stages", "Stages"),
        "artifacts": ("artifacts", "Artifacts"),
        "commands": ("run", "Run it"),
        "responses": ("responses", "Answers"),
    }
    template = _environment().from_string(asset("report.html.jinja"))
    return template.render(
        report=report,
        status_word=_STATUS_WORDS[report.status],
        verdict_first=first + mark,
        verdict_rest=rest,
        when=time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(report.started)) if report.started else "",
        took=seconds(report.seconds),
        tiles=_tiles(report),
        bands=_bands(report),
        paired=paired_tables(report),
        published=safety_table(report),
        utility=utility_table(report),
        undone=_undone(responses),
        files=_files(report),
        measures=_measures(report),
        versions=Table(["what", "version"], sorted(report.versions.items())) if report.versions else None,
        judge=_judge(report),
        asked=asked_table(report),
        untold=[s.label for s in report.subjects if s.training is not None and not s.training.complete],
        more_curves=more_curves,
        trainings=trainings_table(report),
        legend=legend_figure(report),
        contents=[names[key] for key, content in sections.items() if content],
        page_css=Markup(asset("page.css")),
        charts_css=Markup(asset("charts.css")),
        **sections,
    )


def _undone(responses: Responses | None) -> Table | None:
    """What quantization undid, the requests alone: what was answered stays folded further down."""
    if responses is None or not responses.undone:
        return None
    return Table(["request", "model", "where"], [[one.prompt, one.model, one.where] for one in responses.undone])


def render_comparison(
    comparison: Comparison,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Callable[[Flip], str],
    hits: Mapping[str, tuple[str, str]],
) -> str:
    """The page of `pipeline compare`."""
    template = _environment().from_string(asset("comparison.html.jinja"))
    return template.render(
        comparison=comparison, heads=heads, rows=rows, words=words, hits=hits, page_css=Markup(asset("page.css"))
    )


def _sentence(headline: str) -> tuple[str, str, str]:
    """What was decided, in bold on the page, and the rest: "Passed" ":" "all 5 gates hold ..."."""
    ends = [place for place in (headline.find(mark) for mark in (":", ";", ".")) if place >= 0]
    cut = min(ends, default=len(headline))
    return headline[:cut], headline[cut : cut + 1], headline[cut + 1 :].lstrip()


@cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _shipped(report: Report) -> list[Subject]:
    return [subject for subject in report.subjects if subject.kind == "shipped"]


def _tiles(report: Report) -> list[_Tile]:
    """The headline numbers of the (worst) shipped model."""
    shipped = _shipped(report)
    if not shipped:
        return []

    def asr_of(subject: Subject) -> float:
        row = average(rows_of(report, subject, "asr"), own=True)
        return row.value if row is not None and row.value is not None else 0.0

    subject = max(shipped, key=asr_of)
    source = next((one for one in report.subjects if one.kind == "source"), None)
    tiles: list[_Tile] = []

    asr = rows_of(report, subject, "asr")
    mean, peak = average(asr, own=True), worst(asr)
    if mean is not None:
        tiles.append(_tile("Attack success, average over exits", mean))
    if peak is not None:
        tiles.append(_tile(f"Attack success at the worst exit, {peak.exit}", peak))
    babble = degenerate(report, subject)
    if babble is not None:
        place = f" at the worst exit, {babble.exit}" if babble.exit is not None else ""
        tiles.append(_tile(f"Babble instead of an answer{place}", babble))
    refusal = average(rows_of(report, subject, "over_refusal"), own=True)
    if refusal is not None:
        tiles.append(_tile("Harmless requests refused", refusal))
    vqa = at_default(rows_of(report, subject, "vqa_accuracy"), subject)
    if vqa is not None:
        before = at_default(rows_of(report, source, "vqa_accuracy"), source) if source is not None else None
        change = ""
        if before is not None and before.value is not None and vqa.value is not None:
            change = f"; {100 * (vqa.value - before.value):+.1f} points against the baseline"
        tile = _tile("VQA accuracy, default exit", vqa)
        tiles.append(_Tile(tile.label, tile.value, tile.detail + change))
    fidelity = worst(rows_of(report, subject, "fidelity_cosine"), highest=False)
    if fidelity is not None:
        tiles.append(_tile(f"Fidelity (cosine), lowest: exit {fidelity.exit}", fidelity))
    memory = average(rows_of(report, subject, "memory_measured"))
    if memory is not None and memory.value is not None:
        budget = report.device.get("memory")
        detail = f"{percent(memory.value / budget)} of {show_bytes(budget)}" if isinstance(budget, int) else "no budget"
        tiles.append(_Tile("Memory, measured peak", show_bytes(memory.value), detail))
    return tiles


def _tile(label: str, row: Measure) -> _Tile:
    if row.value is None:
        return _Tile(label, "–", figure(row))
    return _Tile(label, show(row.value, row.unit, row.measure), support(row) or "no interval")


def _gates(report: Report) -> Table | None:
    if not report.gates:
        return None
    rows = []
    for gate in report.gates:
        measure = {"memory": "memory", "min_fidelity": "fidelity_cosine", "max_kl": "kl_text"}.get(gate.name, "")
        unit = "fraction" if not measure else ""

        def shown(value: float | str, measure: str = measure, unit: str = unit) -> str:
            return value if isinstance(value, str) else show(value, unit, measure)

        outcome = _HOLDS if gate.passed else (_UNMEASURED if gate.value is None else _FAILS)
        rows.append(
            [
                outcome,
                gate.name,
                shown(gate.limit),
                shown(gate.value) if gate.value is not None else "–",
                f"{gate.reason}. {titled(gate.warning)}" if gate.warning else gate.reason,
            ]
        )
    return Table(
        ["", "gate", "limit", "measured", "in words"], rows, frozenset({_HOLDS}), frozenset({_FAILS, _UNMEASURED})
    )


def _bands(report: Report) -> Table | None:
    columns = (*BANDS, "average")
    blind = any(row.measure == "asr_text_only" for row in report.measures)
    rows: list[list[Cell]] = []
    for subject in report.subjects:
        asr = rows_of(report, subject, "asr")
        if not asr:
            continue
        by_band: dict[str | None, Measure] = {row.band: row for row in asr if row.exit is None}
        by_band.setdefault("average", average(asr) or asr[0])
        peak = worst(asr)
        cells = [stat(by_band.get(band)) for band in columns]
        cells.append(stat(peak, f"exit {peak.exit}" if peak is not None else ""))
        if blind:
            cells.append(stat(average(rows_of(report, subject, "asr_text_only"))))
        rows.append([subject.label, *cells])
    return Table(["model", *columns, "worst exit", *(["no image"] if blind else [])], rows) if rows else None


def _judge(report: Report) -> str:
    """Who decided what counts as an answer, as the verdicts name it."""
    found = dict.fromkeys(str(row.metadata["judge"]) for row in report.artifacts if "judge" in row.metadata)
    return ", ".join(found)


def _artifacts(report: Report) -> Table | None:
    rows: list[list[Cell]] = [
        [
            row.stage,
            _type(row),
            show_bytes(row.size) if row.size is not None else "–",
            "ships" if row.shipped else "",
            Code(row.digest),
        ]
        for row in report.artifacts
    ]
    return Table(["stage", "type", "size", "", "digest"], rows) if rows else None


def _type(row: ArtifactRow) -> Cell:
    """With the types that its shapes did not allow, and what it holds instead."""
    words = row.type or "no longer in the store"
    fallbacks = row.metadata.get("fallbacks")
    return Stat(words, "; ".join(map(str, fallbacks))) if isinstance(fallbacks, list) and fallbacks else words


def _files(report: Report) -> Table | None:
    rows = [
        [row.stage, entry.path, show_bytes(entry.size), Code(entry.sha256)]
        for row in report.artifacts
        if row.shipped
        for entry in row.files
    ]
    return Table(["stage", "file", "size", "SHA-256"], rows) if rows else None


def _measures(report: Report) -> Table | None:
    rows = [
        [
            row.artifact,
            row.role,
            row.runtime,
            "" if row.exit is None else str(row.exit),
            row.band or "",
            row.measure,
            "–" if row.value is None else show(row.value, row.unit, row.measure),
            "" if row.low is None else show(row.low, row.unit, row.measure),
            "" if row.high is None else show(row.high, row.unit, row.measure),
            "" if row.n is None else f"{row.n:,}",
            row.note,
        ]
        for row in report.measures
    ]
    head = ["artifact", "role", "runtime", "exit", "band", "measure", "value", "low", "high", "n", "note"]
    return Table(head, rows) if rows else None


def _commands(report: Report) -> list[_Command]:
    """How to use what ships, ready to paste."""
    found: list[_Command] = []
    context = report.device.get("context", 2048)
    for target in report.published:
        place = target.removeprefix("oci-layout:").rpartition("@")[0]
        if target.startswith("oci-layout:") and place:
            found.append(
                _Command(
                    "Take the files out of the published layout (oras), or send it to a registry (skopeo):",
                    f"oras pull --oci-layout {shlex.quote(place)} -o model\n"
                    f"skopeo copy {shlex.quote(f'oci:{place}')} docker://REGISTRY/NAME:TAG",
                )
            )
    for row in report.artifacts:
        if row.shipped and row.type == "gguf":
            found.extend(_llama_commands(report, row, context))
    return found


def _llama_commands(report: Report, row: ArtifactRow, context: object) -> list[_Command]:
    names = [entry.path for entry in row.files if entry.path.endswith(".gguf")]
    projector = next((name for name in names if "mmproj" in name), None)
    model = next((name for name in names if name != projector), None)
    if model is None:
        return []
    folder = Path(report.store) / "objects" / row.digest if report.store else Path()
    flags = f"-m {shlex.quote(str(folder / model))}"
    if projector is not None:
        flags += f" \\\n  --mmproj {shlex.quote(str(folder / projector))}"
    flags += f" \\\n  -c {context}"
    if report.device.get("kv_cache_bits") == 8:
        flags += " -ctk q8_0 -ctv q8_0 -fa on"
    image = "--image photo.png " if projector is not None else ""
    found = [
        _Command(
            f"Ask '{row.stage}' one question, in the same runtime that was measured:",
            f'pipeline chat {row.digest[:12]} {image}--prompt "What is in this picture?"',
        ),
        _Command("Serve it with llama.cpp (OpenAI-compatible API on port 8080):", f"llama-server {flags}"),
    ]
    if projector is not None:
        found.append(
            _Command(
                "Or ask once with llama.cpp's own tool:",
                f'llama-mtmd-cli {flags} --image photo.png -p "What is in this picture?"',
            )
        )
    return found
