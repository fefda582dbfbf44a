from __future__ import annotations

import io
import json

import pytest

from pipeline.console import Console, JsonConsole, LiveConsole, PlainConsole, make_console, progress_line
from pipeline.events import (
    EVENT,
    Event,
    GateChecked,
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def story() -> list[Event]:
    error = {"kind": "StageError", "what": "it broke", "where": "here", "why": "so", "way_out": "mend it"}
    progress = [
        StageProgress(time=1001.0 + n, stage="harden", done=10 + n, total=100, note=f"step {n}") for n in range(31)
    ]
    stages = {"harden": [], "gguf": ["harden"]}
    return [
        RunStarted(time=1000.0, run="r-1", recipe="r", recipe_path="r.yaml", stages=stages, uses={"harden": "l-ppo"}),
        StageStarted(time=1001.0, stage="harden", key="k" * 64, attempt=2),
        StageMetric(time=1001.5, stage="harden", name="reward", value=0.25, step=1, exit=6),
        StageMemory(time=1001.6, stage="harden", rss=1 << 30, peak=3 << 30),
        *progress,
        StageLog(time=1032.0, stage="harden", message="a [bracketed] word"),
        StageFinished(time=1033.0, stage="harden", digest="d" * 64, cached=False, seconds=32.0, peak_rss=3 << 30),
        StageStarted(time=1033.0, stage="gguf", key="k" * 64),
        StageFailed(time=1034.0, stage="gguf", error=error, log="logs/gguf.log"),
        GateChecked(time=1035.0, name="max_asr", limit=0.1, value=None, passed=False, reason="not measured"),
        RunFinished(time=1036.0, status="failed", seconds=36.0, report="runs/r-1/report.html"),
    ]


def tell(console: Console) -> None:
    for event in story():
        console.handle(event)
    console.close()


def test_plain_text_is_one_line_an_event_with_progress_at_most_every_ten_seconds() -> None:
    out = io.StringIO()
    tell(PlainConsole(out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "[0:00] run r-1: 2 stages"
    assert lines[1] == "[0:01] harden: started, attempt 2"
    progress = [line for line in lines if "step" in line]
    assert len(progress) == 3
    # A tenth was done before; 10 steps in 10 seconds leave 80 seconds for the other 80.
    assert progress[0] == "[0:11] harden: 20%, step 10, 1:20 left, reward[6] 0.25"
    assert "[0:33] harden: done in 0:32, peak 3.00 GiB, artifact dddddddddddd" in lines
    assert [line.partition("] ")[2] for line in lines[-8:]] == [
        "gguf: FAILED: it broke",
        "  where: here",
        "  why: so",
        "  fix: mend it",
        "  log: logs/gguf.log",
        "gate max_asr: FAILED (not measured)",
        "failed; what was finished is kept: run again to continue (0:36)",
        "report: runs/r-1/report.html",
    ]


def test_json_lines_are_the_events() -> None:
    out = io.StringIO()
    tell(JsonConsole(out))
    assert [EVENT.validate_python(json.loads(line)) for line in out.getvalue().splitlines()] == story()


def test_the_live_view_shows_every_stage_and_its_figures() -> None:
    out = Terminal()
    tell(make_console(stream=out))
    text = out.getvalue()
    for word in ("harden", "gguf", "reward[6] 0.25", "3.00 GiB", "a [bracketed] word", "FAILED: it broke", "0:32"):
        assert word in text, word


def test_the_console_fits_where_it_is_shown() -> None:
    assert isinstance(make_console(stream=io.StringIO()), PlainConsole)
    assert isinstance(make_console(stream=Terminal()), LiveConsole)
    assert isinstance(make_console(plain=True, stream=Terminal()), PlainConsole)
    assert isinstance(make_console(json=True, stream=Terminal()), JsonConsole)


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    tell(PlainConsole(Gone()))


@pytest.mark.parametrize(
    ("stream", "quiet", "shown"), [(Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)]
)
def test_a_progress_line_is_for_terminals(stream: io.StringIO, quiet: bool, shown: bool) -> None:
    with progress_line(quiet=quiet, stream=stream) as report:
        report("a.whl", 50, 100)
    assert ("50% a.whl" in stream.getvalue()) == shown
