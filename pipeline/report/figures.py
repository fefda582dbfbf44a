"""The report's figures: which rows become which chart, with its caption and the table behind it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from markupsafe import Markup

from artifacts.measures import Measure
from pipeline.device import show_bytes
from pipeline.report.charts import (
    Bar,
    Dot,
    LineChart,
    Point,
    Series,
    Zone,
    budget_chart,
    dot_chart,
    legend_strip,
    line_chart,
)
from pipeline.report.dag import Box, stage_graph
from pipeline.report.model import Report, StageRow, Subject
from pipeline.report.numbers import (
    Stat,
    average,
    figure,
    per_exit,
    percent,
    plain,
    rows_of,
    seconds,
    show,
    stat,
    titled,
    words_of,
)
from stages.verify.bands import BANDS

WIDE: Final = 1040.0  # pixels; what a wide page gives a figure
NARROW: Final = 350.0  # what a phone gives it
HALF: Final = 470.0  # two beside each other

_NOT_PER_EXIT: Final = ("asr", "fidelity_cosine_mean")  # the one is drawn on its own, the other says the same again
_LOWER_IS_WORSE: Final = ("vqa_accuracy", "fidelity_cosine")


class Code(str):
    """A cell to be read letter by letter, such as a digest."""

    code = True


Cell = str | Stat


@dataclass(frozen=True)
class Table:
    """Rows of cells; those equal to one of `good` or `bad` are marked so."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    good: frozenset[str] = frozenset()
    bad: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A drawing for wide pages, perhaps another for narrow ones, and the numbers behind it."""

    wide: Markup
    narrow: Markup | None = None
    title: str = ""
    caption: str = ""
    table: Table | None = field(default=None)


def slots(report: Report) -> dict[str, str]:
    """Measured artifact -> its colour, dash and marker in every chart."""
    found: dict[str, str] = {}
    extra = 1
    for subject in reversed(report.subjects):
        if subject.kind in found.values():
            extra = min(extra + 1, 4)
            found[subject.artifact] = f"shipped-{extra}"
        else:
            found[subject.artifact] = subject.kind
    return found


def asr_chart(report: Report) -> LineChart | None:
    """The attack success rate of every model at every exit."""
    return _exit_chart(report, "asr", "Attack success rate at every exit", (0.0, 1.0), _asr_limit(report))


def asr_figure(report: Report) -> Figure | None:
    chart = asr_chart(report)
    if chart is None:
        return None
    return Figure(
        wide=line_chart(chart, WIDE, 400),
        narrow=line_chart(chart, NARROW, 340),
        table=_exit_table(report, "asr"),
    )


def exit_figures(report: Report) -> list[Figure]:
    """Every other measure that was taken at more than one exit."""
    names = dict.fromkeys(
        row.measure for row in report.measures if row.exit is not None and row.measure not in _NOT_PER_EXIT
    )
    found = []
    for name in names:
        unit = next(row.unit for row in report.measures if row.measure == name)
        paired = name.startswith(("flips", "mcnemar"))
        most = max((len(per_exit(rows_of(report, subject, name))) for subject in report.subjects), default=0)
        if paired or most < 2:
            continue
        span = _span([row for row in report.measures if row.measure == name], unit)
        chart = _exit_chart(report, name, titled(words_of(name)), span, None, legend=False)
        if chart is not None:
            found.append(
                Figure(
                    wide=line_chart(chart, HALF, 270),
                    title=chart.title,
                    caption=_caption(report, name),
                    table=_exit_table(report, name),
                )
            )
    return found


def _span(rows: Iterable[Measure], unit: str) -> tuple[float, float] | None:
    """The y axis: shares from 0 to just above the largest, changes of them from below the smallest; cosines up to 1,
    never so near that noise is drawn."""
    values = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    if unit == "cosine":
        low = min([0.9999, *values])
        return low - (1.0 - low) * 0.08, 1.0
    if unit == "fraction" and min(values, default=0.0) < 0:
        return math.floor(10 * min(values)) / 10, max(0.0, math.ceil(10 * max(values)) / 10)
    if unit == "fraction":
        return 0.0, min(1.0, math.ceil(max(values, default=1.0) * 10 + 0.2) / 10)
    return None


def legend_figure(report: Report) -> Figure | None:
    """The models' colours, dashes and markers, for a row of charts that share them."""
    slot = slots(report)
    keys = [Series(subject.label, slot[subject.artifact], ()) for subject in report.subjects]
    if not keys:
        return None
    return Figure(wide=legend_strip(keys, WIDE), narrow=legend_strip(keys, NARROW))


def _caption(report: Report, measure: str) -> str:
    said = []
    for subject in report.subjects:
        rows = rows_of(report, subject, measure)
        whole = average(rows)
        if whole is None:
            continue
        told = f"{subject.label}: {figure(whole)} {'in all' if whole.unit == 'prompts' else 'on average'}"
        if measure in _LOWER_IS_WORSE:
            lowest = min(per_exit(rows), key=lambda row: row.value or 0.0, default=None)
            if lowest is not None and lowest.value is not None:
                told += f", lowest {show(lowest.value, lowest.unit, measure)} at exit {lowest.exit}"
        said.append(told)
    return "; ".join(said) + "." if said else ""


def _asr_limit(report: Report) -> tuple[float, str] | None:
    for gate in report.gates:
        if gate.name == "max_asr" and isinstance(gate.limit, int | float):
            return float(gate.limit), f"gate: average at most {percent(float(gate.limit))}"
    return None


def _exit_chart(
    report: Report,
    measure: str,
    title: str,
    span: tuple[float, float] | None,
    limit: tuple[float, str] | None,
    legend: bool = True,
) -> LineChart | None:
    slot = slots(report)
    series = []
    for subject in report.subjects:
        rows = per_exit(rows_of(report, subject, measure))
        if rows:
            series.append(
                Series(
                    label=subject.label,
                    slot=slot[subject.artifact],
                    points=[_point(row, subject) for row in rows],
                    default=_default(subject, rows),
                    ribbon=legend or subject.kind == "shipped",  # in a small chart four ribbons are mud
                )
            )
    if not series:
        return None
    unit = next(row.unit for row in report.measures if row.measure == measure)

    def label(value: float) -> str:
        return f"{100 * value:z.0f}%" if unit == "fraction" else plain(value, 7)

    return LineChart(
        title=title,
        description="; ".join(
            f"{one.label}: " + ", ".join(f"exit {point.x:.0f} {label(point.y)}" for point in one.points)
            for one in series
        ),
        series=series,
        x_label="exit (encoder layers run)",
        y_label="",
        show=label,
        y_range=span,
        zones=zones(report),
        limit=limit,
        legend=legend,
    )


def _default(subject: Subject, rows: Sequence[Measure]) -> float | None:
    there = any(row.exit == subject.default_exit for row in rows)
    return float(subject.default_exit) if there and subject.default_exit is not None else None


def _point(row: Measure, subject: Subject) -> Point:
    assert row.exit is not None and row.value is not None
    default = ", its default exit" if row.exit == subject.default_exit else ""
    return Point(row.exit, row.value, row.low, row.high, f"{subject.label}, exit {row.exit}{default}: {figure(row)}")


def zones(report: Report) -> list[Zone]:
    """Early, middle and late exits: thirds of the source's tower, as the notes of the rows about bands list them."""
    spans: dict[str, list[int]] = {}
    for row in report.measures:
        if row.exit is None and row.band in BANDS:
            _, named, exits = row.note.rpartition("exits ")  # a judge's name before it may have numbers too
            spans.setdefault(row.band, []).extend(map(int, re.findall(r"\d+", exits if named else "")))
    return [Zone(band, min(exits), max(exits)) for band, exits in spans.items() if exits]


def _exit_table(report: Report, measure: str) -> Table:
    subjects = [subject for subject in report.subjects if per_exit(rows_of(report, subject, measure))]
    by_exit = {
        subject.artifact: {row.exit: row for row in rows_of(report, subject, measure) if row.exit is not None}
        for subject in subjects
    }
    exits = sorted({exit for rows in by_exit.values() for exit in rows if exit is not None})
    return Table(
        ["exit", *(subject.label for subject in subjects)],
        [[str(exit), *(stat(by_exit[one.artifact].get(exit)) for one in subjects)] for exit in exits],
    )


def whole_figures(report: Report) -> list[Figure]:
    """Shares that are one number a model, such as VQA accuracy at the default exit: a dot with its interval each.

    Changes are left out: they may be negative, and the scale begins at 0.
    """
    slot = slots(report)
    drawn = {row.measure for row in report.measures if row.exit is not None}
    found = []
    for name in dict.fromkeys(row.measure for row in report.measures if row.unit == "fraction"):
        exits = {row.exit for row in report.measures if row.measure == name and row.value is not None}
        per_model = [len(rows_of(report, subject, name)) for subject in report.subjects]
        if max(per_model, default=0) != 1 or name.startswith("asr") or name.endswith("_change"):
            continue
        if name in drawn and len(exits) > len(per_model):
            continue
        dots = []
        for subject in report.subjects:
            for row in rows_of(report, subject, name):
                if row.value is not None:
                    place = f", exit {row.exit}" if row.exit is not None else ""
                    dots.append(
                        Dot(
                            f"{subject.label}{place}", slot[subject.artifact], row.value, row.low, row.high, figure(row)
                        )
                    )
        if dots:
            title = titled(words_of(name))
            told = "; ".join(f"{dot.label}: {dot.words}" for dot in dots)
            found.append(Figure(wide=dot_chart(title, told, dots, HALF), title=title))
    return found


def memory_figure(report: Report) -> Figure | None:
    """Predicted and measured peak of what ships, against the device's budget."""
    slot = slots(report)
    bars: list[Bar] = []
    several = sum(subject.kind == "shipped" for subject in report.subjects) > 1
    for subject in report.subjects:
        for measure, name in (("memory_predicted", "Predicted"), ("memory_measured", "Measured peak")):
            row = average(rows_of(report, subject, measure))
            if row is not None and row.value is not None and subject.kind in ("shipped", "control"):
                label = f"{subject.label}, {name.lower()}" if several or subject.kind == "control" else name
                bars.append(Bar(label, slot[subject.artifact], row.value, show_bytes(row.value)))
    if not bars:
        return None
    memory = report.device.get("memory")
    budget = float(memory) if isinstance(memory, int) else None
    words = f"budget {show_bytes(budget)} ({report.device.get('name')})" if budget is not None else ""
    told = "; ".join(f"{bar.label} {bar.words}" for bar in bars)
    measured = [bar for bar in bars if "easured" in bar.label]
    caption = ""
    if budget is not None and measured:
        worst = max(bar.value for bar in measured)
        caption = f"The measured peak takes {percent(worst / budget)} of the budget"
        caption += f" at {report.device['context']:,} tokens of context." if "context" in report.device else "."
    return Figure(
        wide=budget_chart("Memory against the budget", told, bars, budget, words, WIDE),
        narrow=budget_chart("Memory against the budget", told, bars, budget, words, NARROW),
        caption=caption,
    )


_STATE_WORDS: Final[Mapping[str, str]] = {
    "done": "done",
    "cached": "reused",
    "failed": "failed",
    "running": "not finished",
    "waiting": "not started",
}


def dag_figure(report: Report) -> Figure:
    """The stages with their times; what is no stage of the recipe (gates, publishing) is left out."""
    stages = [stage for stage in report.stages if stage.uses]
    boxes = [
        Box(
            id=stage.id,
            needs=stage.needs,
            title=stage.id,
            subtitle=stage.uses,
            note=_note(stage),
            state=stage.status,
            words=f"{stage.id} ({stage.uses}): {_note(stage)}, artifact {stage.digest[:12] or 'none'}",
        )
        for stage in stages
    ]
    rows = [
        [
            stage.id,
            stage.uses,
            _STATE_WORDS[stage.status],
            seconds(stage.seconds),
            show_bytes(stage.peak_rss) if stage.peak_rss else "",
            Code(stage.digest[:12]),
        ]
        for stage in stages
    ]
    table = Table(["stage", "uses", "state", "time", "peak memory", "artifact"], rows, bad=frozenset({"failed"}))
    return Figure(wide=stage_graph(boxes, WIDE), narrow=stage_graph(boxes, NARROW), table=table)


def _note(stage: StageRow) -> str:
    if stage.status == "done":
        memory = f", {show_bytes(stage.peak_rss)}" if stage.peak_rss else ""
        return f"{seconds(stage.seconds)}{memory}"
    if stage.status == "running" and stage.progress:
        return f"not finished, {100 * stage.progress:.0f}%"
    return _STATE_WORDS[stage.status]
