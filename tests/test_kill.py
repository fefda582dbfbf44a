"""Runs in processes of their own, killed at random moments and continued."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import toy

_RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import toy
from artifacts.store import Store
from pipeline.console import make_console
from pipeline.executors.local import LocalExecutor
from pipeline.runner import run
root = Path({root!r})
graph = toy.chain_graph(steps=8, seconds=0.04, note=Path({note!r}))
result = run(graph, runs=root / "runs", store=Store(root / "store"), executor=LocalExecutor(),
             listeners=(make_console(plain=True),))
(root / "digests.json").write_text(json.dumps({{name: made.digest for name, made in result.artifacts.items()}}))
raise SystemExit(result.exit_code)
"""


def start(root: Path) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    # The note is a parameter and so part of the keys: one path for every root.
    code = _RUN.format(tests=str(Path(toy.__file__).parent), root=str(root), note=str(root.parent / "steps.txt"))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(root: Path) -> dict[str, str]:
    process = start(root)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    digests: dict[str, str] = json.loads((root / "digests.json").read_text())
    return digests


def steps_done(root: Path) -> int:
    return len((root.parent / "steps.txt").read_text().split())


def test_a_run_killed_at_random_moments_ends_with_the_artifacts_of_an_undisturbed_one(tmp_path: Path) -> None:
    began = time.monotonic()
    expected = finish(tmp_path / "undisturbed")
    length = time.monotonic() - began
    moments = random.Random(2)
    for attempt in range(2):
        root = tmp_path / f"killed-{attempt}"
        for _ in range(2):
            process = start(root)
            try:
                process.wait(moments.uniform(0.1, 0.9) * length)
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        assert finish(root) == expected
        assert list((root / "store" / "scratch").iterdir()) == []
        # A record of a few bytes may have been half written; `pipeline gc` takes it away. No output is left.
        assert [path for path in (root / "store" / "tmp").iterdir() if not path.name.startswith("write-")] == []


def test_a_killed_stage_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "root"
    process = start(root)
    while not (tmp_path / "steps.txt").exists() or steps_done(root) < 4:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(root)
    assert 8 + 3 + 8 <= steps_done(root) <= 8 + 3 + 8 + 1  # at most the step in which it was killed is done twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly_and_says_how_to_continue(tmp_path: Path, number: signal.Signals) -> None:
    root = tmp_path / "root"
    process = start(root)
    while not (tmp_path / "steps.txt").exists():
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "run again to continue" in said and "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert set(finish(root)) == {"source", "left", "right", "join"}
