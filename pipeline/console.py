"""What a user sees of a run. Reads events only, so it shows nothing that `events.jsonl` does not hold.

- `LiveConsole`: a table that is redrawn in place, on a terminal
- `PlainConsole`: one line an event, progress at most every ten seconds a stage; for logs and pipes
- `JsonConsole`: the events themselves, one JSON object a line; for programs
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Protocol

from pipeline.device import show_bytes
from pipeline.events import (
    Event,
    GateChecked,
    Published,
    RunFinished,
    RunStarted,
    StageFailed,
    StageFinished,
    StageLog,
    StageMemory,
    StageMetric,
    StageProgress,
    StageStarted,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live

_PROGRESS_EVERY = 10.0  # seconds between progress lines of one stage in plain text
_METRICS_SHOWN = 4  # the last ones to change, in the live view


class Console(Protocol):
    """Hears every event of a run."""

    def handle(self, event: Event) -> None: ...

    def close(self) -> None:
        """Give the terminal back, however the run ended."""
        ...


def make_console(*, plain: bool = False, json: bool = False, stream: IO[str] | None = None) -> Console:
    """The console that fits: JSON if asked, live on a terminal, plain lines elsewhere."""
    out = sys.stdout if stream is None else stream
    if json:
        return JsonConsole(out)
    if plain or not out.isatty():
        return PlainConsole(out)
    return LiveConsole(out)


class JsonConsole:
    """Prints each event as it is in `events.jsonl`."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def handle(self, event: Event) -> None:
        _write(self._stream, event.model_dump_json())

    def close(self) -> None:
        """Nothing to give back."""


@dataclass
class _StageView:
    """What is known of one stage so far."""

    uses: str = ""
    state: str = "waiting"  # waiting, running, done, cached, failed
    started: float = 0.0
    seconds: float = 0.0
    done: float = 0.0
    total: float = 0.0
    first: tuple[float, float] | None = None  # time and amount done at the first progress, for the time left
    note: str = ""
    peak: int = 0  # bytes
    metrics: dict[str, float] = field(default_factory=dict)  # in the order of their last change

    def take(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.state, self.started = "running", event.time
        elif isinstance(event, StageProgress):
            self.done, self.total, self.note = event.done, event.total, event.note
            if self.first is None or event.done < self.first[1]:
                self.first = (event.time, event.done)
        elif isinstance(event, StageMetric):
            name = event.name if event.exit is None else f"{event.name}[{event.exit}]"
            self.metrics.pop(name, None)
            self.metrics[name] = event.value
        elif isinstance(event, StageMemory):
            self.peak = max(self.peak, event.peak)
        elif isinstance(event, StageFinished):
            self.state, self.seconds = ("cached" if event.cached else "done"), event.seconds
            self.peak = max(self.peak, event.peak_rss)
        elif isinstance(event, StageFailed):
            self.state, self.seconds = "failed", event.time - self.started if self.started else 0.0

    def left(self, now: float) -> float | None:
        """Seconds left, from the pace since the first progress; so work done before a crash does not count as fast."""
        if self.first is None or self.done <= self.first[1] or self.total <= self.done:
            return None
        pace = (self.done - self.first[1]) / max(now - self.first[0], 1e-6)
        return (self.total - self.done) / pace


class PlainConsole:
    """One line an event, with the time of the run before it."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._began = time.time()
        self._stages: dict[str, _StageView] = {}
        self._told: dict[str, float] = {}  # stage -> time of its last progress line

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._began = event.time
        view = _view(self._stages, event)
        for line in self._lines(event, view):
            _write(self._stream, f"[{_clock(event.time - self._began)}] {line}")

    def close(self) -> None:
        """Nothing to give back."""

    def _lines(self, event: Event, view: _StageView) -> Iterator[str]:
        if isinstance(event, RunStarted):
            count = f"{len(event.stages)} stage{'s' if len(event.stages) != 1 else ''}"
            again = ", continuing what an earlier run began" if event.resumed else ""
            yield f"run {event.run}: {count}{again}"
        elif isinstance(event, StageStarted):
            self._told[event.stage] = event.time
            yield f"{event.stage}: started{f', attempt {event.attempt}' if event.attempt > 1 else ''}"
        elif isinstance(event, StageProgress):
            if event.time - self._told.get(event.stage, 0.0) >= _PROGRESS_EVERY:
                self._told[event.stage] = event.time
                yield f"{event.stage}: {_progress_text(view, event.time)}"
        else:
            yield from _closing_lines(event)


class LiveConsole:
    """A table of stages that is redrawn in place: state, progress, time left, metrics, peak memory."""

    def __init__(self, stream: IO[str]):
        from rich.console import Console as RichConsole

        self._console: RichConsole = RichConsole(file=stream, highlight=False)
        self._live: Live | None = None
        self._stages: dict[str, _StageView] = {}

    def handle(self, event: Event) -> None:
        from rich.live import Live

        _view(self._stages, event)
        if isinstance(event, RunStarted):
            self._stages = {stage: _StageView(uses=event.uses.get(stage, "")) for stage in event.stages}
            self._console.print(f"run [bold]{event.run}[/bold]" + (" (continuing)" if event.resumed else ""))
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
            self._live.start()
            return
        if isinstance(event, RunFinished):
            self.close()
        if isinstance(event, StageFinished):
            return  # the table says it
        for line in _closing_lines(event):
            self._console.print(line, markup=False)

    def close(self) -> None:
        """Stop redrawing; the last table stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        marks = {"waiting": "[dim]·[/]", "running": "[yellow]▶[/]", "failed": "[red]✗[/]"}
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=True, header_style="dim", expand=True)
        table.add_column("")
        table.add_column("stage", no_wrap=True)
        table.add_column("progress", width=20)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("left", justify="right", no_wrap=True)
        table.add_column("peak", justify="right", no_wrap=True)
        table.add_column("now", overflow="ellipsis", no_wrap=True, ratio=1)
        now = time.time()
        for stage, view in list(self._stages.items()):
            running = view.state == "running"
            seconds = now - view.started if running else view.seconds
            left = view.left(now) if running else None
            bar: RenderableType = ""
            if running and view.total > 0:
                bar = ProgressBar(total=view.total, completed=view.done)
            elif not running:
                bar = f"[dim]{view.state}[/]"
            table.add_row(
                marks.get(view.state, "[green]✓[/]"),
                stage,
                bar,
                _clock(seconds) if view.state != "waiting" else "",
                _clock(left) if left is not None else "",
                show_bytes(view.peak) if view.peak else "",
                _now_text(view),
            )
        return table


@contextlib.contextmanager
def progress_line(*, quiet: bool = False, stream: IO[str] | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """For commands that are not runs: yields `report(note, done, total)`, which rewrites one line on a terminal."""
    out = sys.stderr if stream is None else stream
    if quiet or not out.isatty():
        yield lambda note, done, total: None
        return

    def report(note: str, done: int, total: int) -> None:
        share = f"{100 * done / total:3.0f}% " if total > 0 else ""
        out.write(f"\r\x1b[K{share}{note[:100]}")
        out.flush()

    try:
        yield report
    finally:
        out.write("\r\x1b[K")
        out.flush()


def _view(stages: dict[str, _StageView], event: Event) -> _StageView:
    stage = getattr(event, "stage", None)
    # "gates", "publish" and "report" speak in stage events too, but are no stages of the recipe.
    view = stages.get(stage) or _StageView() if isinstance(stage, str) else _StageView()
    if isinstance(event, StageStarted) and event.stage not in stages:
        stages[event.stage] = view
    view.take(event)
    return view


def _closing_lines(event: Event) -> Iterator[str]:
    """What both text consoles say."""
    if isinstance(event, StageLog):
        yield f"{event.stage}: {event.message}"
    elif isinstance(event, StageFinished):
        how = "cached" if event.cached else f"done in {_clock(event.seconds)}"
        peak = f", peak {show_bytes(event.peak_rss)}" if event.peak_rss else ""
        yield f"{event.stage}: {how}{peak}, artifact {event.digest[:12]}"
    elif isinstance(event, StageFailed):
        error = event.error
        yield f"{event.stage}: FAILED: {error.get('what')}"
        yield from (
            f"  {name}: {text}"
            for name, text in (
                ("where", error.get("where")),
                ("why", error.get("why")),
                ("fix", error.get("way_out")),
                ("log", event.log),
            )
            if text
        )
    elif isinstance(event, GateChecked):
        yield f"gate {event.name}: {'passed' if event.passed else 'FAILED'} ({event.reason})"
        if event.warning:
            yield f"gate {event.name}: warning: {event.warning}"
    elif isinstance(event, Published):
        yield f"published to {event.target}, digest {event.digest}"
    elif isinstance(event, RunFinished):
        endings = {
            "passed": "done",
            "failed": "failed; what was finished is kept: run again to continue",
            "gate_failed": "a gate failed; nothing was published",
            "stopped": "stopped; run again to continue",
        }
        yield f"{endings[event.status]} ({_clock(event.seconds)})"
        if event.report:
            yield f"report: {event.report}"


def _progress_text(view: _StageView, now: float) -> str:
    left = view.left(now)
    parts = [
        f"{100 * view.done / view.total:.0f}%" if view.total > 0 else f"{view.done:g}",
        view.note,
        f"{_clock(left)} left" if left is not None else "",
        ", ".join(_metric_texts(view)),
    ]
    return ", ".join(part for part in parts if part)


def _now_text(view: _StageView) -> str:
    if view.state == "waiting":
        return view.uses
    return "  ".join(part for part in (view.note if view.state == "running" else "", *_metric_texts(view)) if part)


def _metric_texts(view: _StageView) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in list(view.metrics.items())[-_METRICS_SHOWN:]]


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def _write(stream: IO[str], line: str) -> None:
    # `pipeline run ... | head` must not end the run: it has more to lose than its audience.
    with contextlib.suppress(BrokenPipeError):
        print(line, file=stream, flush=True)
