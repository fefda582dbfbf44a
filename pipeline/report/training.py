"""Charts of what training stages reported while they worked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pipeline.report.charts import LineChart, Point, Series, line_chart
from pipeline.report.figures import HALF, Figure
from pipeline.report.model import Curve, Report
from pipeline.report.numbers import percent, plain, titled, words_of

# What L-PPO reports, in the order in which a reader asks for it; other metrics stay folded.
_CURVES_FIRST: Final = ("reward", "refusal", "kl", "over_refusal", "clip_fraction", "value_loss")


def curve_figures(report: Report) -> tuple[list[Figure], list[Figure]]:
    """Charts of what the training stages reported: those that every reader wants, and the rest.

    One chart for each metric; a metric of several exits has a line for each. What was reported once for each exit, at
    the end, is drawn over the exits.
    """
    groups: dict[tuple[str, str], list[Curve]] = {}
    endings: dict[str, dict[str, list[Curve]]] = {}
    for curve in report.curves:
        if len(curve.points) > 1:
            groups.setdefault((curve.stage, curve.name), []).append(curve)
        elif curve.exit is not None and curve.name.startswith("validation_") and curve.name != "validation_kl":
            endings.setdefault(curve.stage, {}).setdefault(curve.name, []).append(curve)
    several = len({stage for stage, _ in groups}) > 1
    main: list[Figure] = []
    rest: list[Figure] = []
    wanted = sorted(groups, key=lambda key: _CURVES_FIRST.index(key[1]) if key[1] in _CURVES_FIRST else 99)
    for stage, name in wanted:
        title = f"{stage}: {words_of(name)}" if several else words_of(name)
        (main if name in _CURVES_FIRST else rest).append(_curve_figure(title, groups[stage, name]))
    for stage, by_name in endings.items():
        main.append(_ending_figure(f"{stage}: validation at the end" if several else "validation at the end", by_name))
    return main, rest


def _ending_figure(title: str, by_name: Mapping[str, Sequence[Curve]]) -> Figure:
    slot = ("shipped", "control", "source", "hardened")
    series = [
        Series(
            label=words_of(name.removeprefix("validation_")),
            slot=slot[index % len(slot)],
            points=[
                Point(curve.exit or 0, value, words=f"exit {curve.exit}: {percent(value)}")
                for curve in sorted(curves, key=lambda curve: curve.exit or 0)
                for _, value in curve.points
            ],
        )
        for index, (name, curves) in enumerate(by_name.items())
    ]
    chart = LineChart(
        title=titled(title),
        description="; ".join(
            f"{one.label}: " + ", ".join(f"exit {point.x:.0f} {percent(point.y)}" for point in one.points)
            for one in series
        ),
        series=series,
        x_label="exit",
        y_label="",
        show=_whole_percent,
        y_range=(0.0, 1.0),
    )
    return Figure(wide=line_chart(chart, HALF, 250), title=chart.title)


def _curve_figure(title: str, curves: Sequence[Curve]) -> Figure:
    curves = sorted(curves, key=lambda curve: (curve.exit is None, curve.exit or 0))
    exits = [curve.exit for curve in curves if curve.exit is not None]
    values = [value for curve in curves for _, value in curve.points]
    share = min(values) >= 0 and max(values) <= 1 and any(w in title for w in ("refus", "fraction", "asr", "rate"))
    shown: Callable[[float], str] = _whole_percent if share else plain
    series = [
        Series(
            label=f"exit {curve.exit}" if curve.exit is not None else ("all exits" if exits else title),
            slot="shipped" if not exits else "curve",
            points=[
                Point(x, y, words=f"{f'exit {curve.exit}, ' if curve.exit is not None else ''}step {x:g}: {shown(y)}")
                for x, y in curve.points
            ],
            color=_ramp(curve.exit, exits) if curve.exit is not None else None,
        )
        for curve in curves
    ]
    last = ", ".join(f"{one.label} {shown(one.points[-1].y)}" for one in series)
    chart = LineChart(
        title=titled(title),
        description=f"At the last step: {last}",
        series=series,
        x_label="step",
        y_label="",
        show=shown,
        y_range=(0.0, min(1.0, math.ceil(max(values) * 10 + 0.2) / 10)) if share else None,
        legend=len(series) > 1,
    )
    return Figure(wide=line_chart(chart, HALF, 230), title=chart.title)


def _whole_percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _ramp(exit: int, exits: Sequence[int]) -> str:
    """From blue (early) over grey to amber (late): lightness stays readable on white and on black."""
    low, high = min(exits), max(exits)
    share = (exit - low) / (high - low) if high > low else 0.5
    start, middle, end = (43, 122, 199), (136, 140, 150), (222, 133, 20)
    one, two, part = (start, middle, share * 2) if share < 0.5 else (middle, end, share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(one, two, strict=True))
