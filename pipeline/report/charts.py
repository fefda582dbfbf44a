"""Charts of the report: lines over exits or steps with their intervals, and bars against a budget.

Every series differs by colour, dash and marker, so nothing hangs on colour alone; every point says its number, interval
and n when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.svg import drawing, element, join, number, text, text_width


@dataclass(frozen=True)
class Point:
    """One measured value. `words` is what the reader is told about it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    words: str = ""


@dataclass(frozen=True)
class Series:
    """One line. `slot` picks colour, dash and marker (see charts.css); `color` overrides the colour."""

    label: str
    slot: str
    points: Sequence[Point]
    color: str | None = None
    default: float | None = None  # the x of this model's default exit
    ribbon: bool = True  # whether its interval is drawn


@dataclass(frozen=True)
class Zone:
    """A named stretch of the x axis, e.g. the early exits."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class LineChart:
    """What to draw; `show` writes a value of the y axis."""

    title: str
    description: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    show: Callable[[float], str]
    y_range: tuple[float, float] | None = None  # None: what the points need
    zones: Sequence[Zone] = ()
    limit: tuple[float, str] | None = None  # a horizontal line, and what it is
    integral_x: bool = True
    legend: bool = True


_RIGHT = 14.0
_MARKED = 24  # a longer line has no markers: they would hide it
_MARKERS = {"source": "circle", "hardened": "square", "control": "triangle"}  # everything else: a diamond


def line_chart(chart: LineChart, width: float = 760, height: float = 340) -> Markup:
    """Draw a line chart; an empty one says so instead of showing bare axes."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        return drawing(
            width, 60, chart.title, "Nothing was measured.", text(width / 2, 34, "nothing measured", anchor="middle")
        )
    low, high = chart.y_range or _padded(points)
    ticks = nice_ticks(low, high, 5 if height > 220 else 3)
    left = 20 + max(text_width(chart.show(tick), 12) for tick in ticks) + (16 if chart.y_label else 0)
    legend, legend_height = _legend(chart.series, left, width - _RIGHT) if chart.legend else (Markup(""), 6.0)
    top = legend_height + (22 if chart.zones else 8)
    bottom = height - 44
    x_low, x_high = min(point.x for point in points), max(point.x for point in points)
    edge = 0.5 if chart.integral_x else 0.0
    span = max(x_high - x_low + 2 * edge, 1e-9)

    def at_x(value: float) -> float:
        return left + (value - x_low + edge) / span * (width - _RIGHT - left)

    def at_y(value: float) -> float:
        return bottom - (min(max(value, low), high) - low) / max(high - low, 1e-12) * (bottom - top)

    parts: list[Markup] = []
    for index, zone in enumerate(chart.zones):
        start, end = at_x(max(zone.start - edge, x_low - edge)), at_x(min(zone.end + edge, x_high + edge))
        if end <= start:
            continue
        parts.append(
            element("rect", x=start, y=top, width=end - start, height=bottom - top, class_=f"zone z{index % 2}")
        )
        if text_width(zone.label) < end - start:
            parts.append(text((start + end) / 2, top - 7, zone.label, "zone-label", "middle"))
    for tick in ticks:
        parts.append(element("line", x1=left, x2=width - _RIGHT, y1=at_y(tick), y2=at_y(tick), class_="grid"))
        parts.append(text(left - 7, at_y(tick) + 4, chart.show(tick), "tick", "end"))
    for tick in _x_ticks(x_low, x_high, chart.integral_x, width - left):
        parts.append(text(at_x(tick), bottom + 17, number(tick), "tick", "middle"))
    parts.append(element("line", x1=left, x2=width - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    parts.append(text((left + width - _RIGHT) / 2, height - 8, chart.x_label, "label", "middle"))
    if chart.y_label:
        parts.append(text(13, (top + bottom) / 2, chart.y_label, "label", "middle", rotate=-90))
    if chart.limit is not None and low <= chart.limit[0] <= high:
        y = at_y(chart.limit[0])
        parts.append(element("line", x1=left, x2=width - _RIGHT, y1=y, y2=y, class_="limit"))
        below = y - top < 18  # above it the names of the zones stand
        parts.append(text(width - _RIGHT - 3, y + 14 if below else y - 5, chart.limit[1], "limit-label", "end"))
    parts.extend(_band(series, at_x, at_y) for series in chart.series)
    parts.extend(_line(series, at_x, at_y) for series in chart.series)
    return drawing(width, height, chart.title, chart.description, legend, *parts)


def _padded(points: Sequence[Point]) -> tuple[float, float]:
    values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high], `about` many of them."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_ticks(low: float, high: float, integral: bool, room: float) -> list[float]:
    ticks = nice_ticks(low, high, max(2, int(room / 60)))
    if not integral:
        return ticks
    if high - low < room / 24:
        return [float(n) for n in range(int(low), int(high) + 1)]
    return [tick for tick in ticks if tick == int(tick)]


def legend_strip(series: Sequence[Series], width: float) -> Markup:
    """A legend that several charts share."""
    keys, height = _legend(series, 1.0, width)
    return drawing(width, height, "Legend", ", ".join(one.label for one in series), keys)


def _legend(series: Sequence[Series], left: float, right: float) -> tuple[Markup, float]:
    """Entries from left to right, wrapped; how much height they take."""
    parts: list[Markup] = []
    x, y = left, 14.0
    marked = any(one.default is not None for one in series)
    for one in series:
        taken = 44 + text_width(one.label)
        if x > left and x + taken > right:
            x, y = left, y + 20
        sample = [element("line", x1=x, x2=x + 26, y1=y, y2=y, class_="line")]
        if len(one.points) <= _MARKED:
            sample.append(_marker(one.slot, x + 13, y, 4.0))
        parts.append(element("g", *sample, class_=f"series {one.slot}", style=_style(one)))
        parts.append(text(x + 32, y + 4, one.label, "legend"))
        x += taken
    if marked:
        label = "default exit"
        if x > left and x + 44 + text_width(label) > right:
            x, y = left, y + 20
        parts.append(element("circle", cx=x + 13, cy=y, r=7.5, class_="default"))
        parts.append(text(x + 32, y + 4, label, "legend"))
    return join(parts), y + 14


def _style(series: Series) -> str | None:
    return f"--c:{series.color}" if series.color else None


def _band(series: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> Markup:
    """The 95% interval as a ribbon, broken where a point has none."""
    parts: list[Markup] = []
    for run in _runs(series.points) if series.ribbon else []:
        upper = [f"{number(at_x(point.x))},{number(at_y(high))}" for point, _, high in run]
        lower = [f"{number(at_x(point.x))},{number(at_y(low))}" for point, low, _ in reversed(run)]
        if len(run) > 1:
            parts.append(element("polygon", points=" ".join(upper + lower), class_="band"))
        else:
            point, low, high = run[0]
            parts.append(
                element("line", x1=at_x(point.x), x2=at_x(point.x), y1=at_y(low), y2=at_y(high), class_="whisker")
            )
    return element("g", *parts, class_=f"series {series.slot}", style=_style(series)) if parts else Markup("")


def _runs(points: Sequence[Point]) -> list[list[tuple[Point, float, float]]]:
    runs: list[list[tuple[Point, float, float]]] = [[]]
    for point in points:
        if point.low is None or point.high is None:
            runs.append([])
        else:
            runs[-1].append((point, point.low, point.high))
    return [run for run in runs if run]


def _line(series: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> Markup:
    if not series.points:
        return Markup("")
    path = " ".join(
        f"{'M' if index == 0 else 'L'}{number(at_x(point.x))} {number(at_y(point.y))}"
        for index, point in enumerate(series.points)
    )
    parts = [element("path", d=path, class_="line")]
    few = len(series.points) <= _MARKED
    for point in series.points:
        x, y = at_x(point.x), at_y(point.y)
        shapes = []
        if series.default is not None and point.x == series.default:
            shapes.append(element("circle", cx=x, cy=y, r=7.5, class_="default"))
        if few:
            shapes.append(_marker(series.slot, x, y, 4.0))
        if point.words:
            shapes.append(element("circle", element("title", point.words), cx=x, cy=y, r=9.0, class_="hit"))
        if shapes:
            parts.append(element("g", *shapes))
    return element("g", *parts, class_=f"series {series.slot}", style=_style(series))


def _marker(slot: str, x: float, y: float, r: float) -> Markup:
    shape = _MARKERS.get(slot, "diamond")
    corners: list[tuple[float, float]]
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=r - 0.4, class_="marker")
    if shape == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        r *= 0.85
    elif shape == "triangle":
        corners = [(0, -1.15), (1.05, 0.8), (-1.05, 0.8)]
    else:
        corners = [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)]
    return element(
        "polygon", points=" ".join(f"{number(x + a * r)},{number(y + b * r)}" for a, b in corners), class_="marker"
    )


@dataclass(frozen=True)
class Dot:
    """One share, 0 to 1, with its interval; `words` stands beside its label."""

    label: str
    slot: str
    value: float
    low: float | None
    high: float | None
    words: str


def dot_chart(title: str, description: str, dots: Sequence[Dot], width: float = 470) -> Markup:
    """Shares of several models under each other on one scale from 0 to 100%."""
    row, left, right = 44.0, 8.0, width - 8.0
    bottom = row * len(dots) + 6
    parts: list[Markup] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * (right - left)
        anchor = "start" if tick == 0 else "end" if tick == 1 else "middle"
        parts.append(element("line", x1=x, x2=x, y1=4.0, y2=bottom, class_="grid"))
        parts.append(text(x, bottom + 16, f"{100 * tick:.0f}%", "tick", anchor))
    for index, dot in enumerate(dots):
        y = index * row + 32
        x = left + dot.value * (right - left)
        shapes = []
        if dot.low is not None and dot.high is not None:
            ends = left + dot.low * (right - left), left + dot.high * (right - left)
            shapes.append(element("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_="whisker"))
        shapes.append(_marker(dot.slot, x, y, 5.0))
        shapes.append(element("circle", element("title", f"{dot.label}: {dot.words}"), cx=x, cy=y, r=9.0, class_="hit"))
        parts.append(text(left, y - 13, f"{dot.label}: {dot.words}", "legend halo"))
        parts.append(element("g", *shapes, class_=f"series {dot.slot}"))
    return drawing(width, bottom + 24, title, description, *parts)


@dataclass(frozen=True)
class Bar:
    """One bar, in the unit of the budget; `words` stands beside it."""

    label: str
    slot: str
    value: float
    words: str


def budget_chart(
    title: str, description: str, bars: Sequence[Bar], budget: float | None, budget_words: str, width: float = 760
) -> Markup:
    """Horizontal bars against a budget, which is a line when there is one."""
    row = 46.0
    top = 30.0 if budget is not None else 8.0
    height = top + row * len(bars) + 6
    largest = max([bar.value for bar in bars] + ([budget] if budget else []), default=1.0) or 1.0
    scale = (width - 2) / (largest * 1.02)
    parts: list[Markup] = []
    for index, bar in enumerate(bars):
        y = top + index * row
        over = " over" if budget is not None and bar.value > budget else ""
        parts.append(text(1, y + 13, f"{bar.label}: {bar.words}", "legend"))
        parts.append(element("rect", x=1.0, y=y + 19, width=width - 2, height=14.0, rx=3, class_="rail"))
        parts.append(
            element(
                "g",
                element("rect", element("title", bar.words), x=1.0, y=y + 19, width=max(bar.value * scale, 2.0),
                        height=14.0, rx=3, class_="bar"),
                class_=f"series {bar.slot}{over}",
            )
        )  # fmt: skip
    if budget is not None:
        x = 1 + budget * scale
        parts.append(element("line", x1=x, x2=x, y1=top - 6, y2=height - 4, class_="limit"))
        anchor = "end" if x > width / 2 else "start"
        parts.append(text(x - 6 if anchor == "end" else x + 6, top - 12, budget_words, "limit-label", anchor))
    return drawing(width, height, title, description, *parts)
