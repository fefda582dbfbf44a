"""The graph of stages as a drawing: what took what, how long each took, what was reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from pipeline.report.svg import drawing, element, text, text_width

_HEIGHT = 58.0  # of a box
_GAP = 26.0  # between boxes of one rank
_ARROW = 34.0  # between ranks


@dataclass(frozen=True)
class Box:
    """One stage: three short lines, a CSS class for its state, and all there is to say when pointed at."""

    id: str
    needs: Sequence[str]
    title: str
    subtitle: str
    note: str
    state: str
    words: str


def stage_graph(boxes: Sequence[Box], width: float) -> Markup:
    """Left to right if that fits into `width`, else top to bottom. `boxes` come in topological order."""
    if not boxes:
        return Markup("")
    layout = _Layout(boxes)
    box_width = 20 + max(text_width(line, 13) for box in boxes for line in (box.title, box.subtitle, box.note))
    across = layout.depth * box_width + (layout.depth - 1) * _ARROW + 4 <= width
    if across:
        step, lane, thick, thin = box_width + _ARROW, _HEIGHT + _GAP, box_width, _HEIGHT
    else:
        box_width = min(box_width, (width - 4 - (layout.lanes - 1) * 10) / layout.lanes)
        step, lane, thick, thin = _HEIGHT + _ARROW, box_width + 10, _HEIGHT, box_width
    spread = layout.lanes * lane - (lane - thin)
    # A place is (along the arrows, across them): the near side of a box, and its middle.
    place: dict[str, tuple[float, float]] = {}
    for rank, column in enumerate(layout.columns):
        taken = len(column) * lane - (lane - thin)
        for index, name in enumerate(column):
            place[name] = (2 + rank * step, 2 + (spread - taken) / 2 + index * lane + thin / 2)
    length = 4 + (layout.depth - 1) * step + thick
    edges = [_edge([place[name] for name in path], thick, across) for path in layout.paths]
    drawn = []
    for box in boxes:
        along, middle = place[box.id]
        x, y = (along, middle - thin / 2) if across else (middle - thin / 2, along)
        drawn.append(_box(box, x, y, box_width))
    told = "; ".join(f"{box.title} ({box.subtitle}) after {', '.join(box.needs) or 'nothing'}" for box in boxes)
    total = (length, spread + 4) if across else (spread + 4, length)
    return drawing(*total, "Stages of this run", told, *edges, *drawn, class_="dag")


class _Layout:
    """Ranks by the longest way, arrows that say nothing new left out, and a place for each rank that an arrow passes.

    Attributes:
        columns: names in each rank, in order; those of passing arrows are made up.
        paths: the names that each arrow touches, from its start to its end.
    """

    def __init__(self, boxes: Sequence[Box]):
        ranks: dict[str, int] = {}
        before: dict[str, set[str]] = {}  # everything upstream
        for box in boxes:
            needs = [need for need in box.needs if need in ranks]
            ranks[box.id] = 1 + max((ranks[need] for need in needs), default=-1)
            before[box.id] = set(needs).union(*(before[need] for need in needs))
        self.depth = 1 + max(ranks.values())
        self.columns: list[list[str]] = [[] for _ in range(self.depth)]
        self.paths: list[list[str]] = []
        comes_from: dict[str, list[str]] = {box.id: [] for box in boxes}
        for box in boxes:
            self.columns[ranks[box.id]].append(box.id)
            direct = [n for n in box.needs if n in ranks and not any(n in before[m] for m in box.needs if m in ranks)]
            for need in direct:
                path = [need]
                for rank in range(ranks[need] + 1, ranks[box.id]):
                    name = f"{need}>{box.id}@{rank}"
                    self.columns[rank].append(name)
                    comes_from[name] = [path[-1]]
                    path.append(name)
                comes_from[box.id].append(path[-1])
                self.paths.append([*path, box.id])
        self._order(comes_from)
        self.lanes = max(len(column) for column in self.columns)

    def _order(self, comes_from: Mapping[str, Sequence[str]]) -> None:
        """Each rank in the order of what it comes from, so that arrows cross less."""
        height: dict[str, float] = {}
        for column in self.columns:
            column.sort(key=lambda name: _mean([height[other] for other in comes_from[name]]))
            for index, name in enumerate(column):
                height[name] = index - (len(column) - 1) / 2


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _edge(places: Sequence[tuple[float, float]], thick: float, across: bool) -> Markup:
    """From the far side of the first place to the near side of the last, straight through those between."""

    def at(along: float, middle: float) -> str:
        return f"{along:.1f} {middle:.1f}" if across else f"{middle:.1f} {along:.1f}"

    path = ""
    for (start, from_middle), (end, to_middle) in pairwise(places):
        out = start + thick
        last = (end, to_middle) == places[-1]
        tip = end - 5 if last else end
        bend = (out + tip) / 2
        path += f"{'L' if path else 'M'}{at(out, from_middle)}"
        path += f"C{at(bend, from_middle)} {at(bend, to_middle)} {at(tip, to_middle)}"
    along, middle = places[-1]
    corners = [(along, middle), (along - 7, middle - 4), (along - 7, middle + 4)]
    points = " ".join(at(*corner).replace(" ", ",") for corner in corners)
    return element("g", element("path", d=path, class_="edge"), element("polygon", points=points, class_="tip"))


def _box(box: Box, x: float, y: float, width: float) -> Markup:
    return element(
        "g",
        element("title", box.words),
        element("rect", x=x, y=y, width=width, height=_HEIGHT, rx=7, class_="box"),
        element("rect", x=x, y=y + 8, width=4.0, height=_HEIGHT - 16, rx=2, class_="stripe"),
        text(x + 12, y + 19, box.title, "box-title"),
        text(x + 12, y + 34, box.subtitle, "box-sub"),
        text(x + 12, y + 49, box.note, "box-note"),
        class_=f"node {box.state}",
    )
