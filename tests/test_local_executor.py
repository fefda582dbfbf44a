from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import toy

from artifacts.errors import SourceError, StageError
from pipeline.events import StageLog, StageMemory, StageMetric, StageProgress
from pipeline.executors.base import Job, StageEvent, StoppedError
from pipeline.executors.local import LocalExecutor
from pipeline.keys import canonical_params
from stages.stage import Stage, StageParams


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    made = LocalExecutor()
    yield made
    made.close()


def job(tmp_path: Path, stage: Stage[StageParams]) -> Job:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    return Job(
        stage_id="it",
        key="ab" * 32,
        stage_class=f"{type(stage).__module__}:{type(stage).__qualname__}",
        params=canonical_params(stage),
        inputs={},
        output=output,
        scratch=scratch,
        guard=tmp_path / "guard",
        log=tmp_path / "logs" / "it.log",
        seed=7,
        device={"memory": 123, "context": 9},
    )


def trouble(tmp_path: Path, kind: str, cls: type[toy.Trouble] = toy.Trouble) -> Job:
    return job(tmp_path, toy.stage(cls, kind=kind))


def ignore(event: StageEvent) -> None:
    return None


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def wait_for(path: Path, seconds: float = 20) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def test_a_stage_runs_in_another_process_and_what_it_says_arrives_in_order(
    tmp_path: Path, executor: LocalExecutor
) -> None:
    heard: list[StageEvent] = []
    outcome = executor.execute(job(tmp_path, toy.stage(toy.Chain, steps=3)), heard.append, threading.Event())
    assert outcome.metadata == {"steps": 3}
    assert outcome.peak_rss > 10 << 20
    metrics = [event for event in heard if isinstance(event, StageMetric)]
    assert [(event.name, event.step, event.exit) for event in metrics] == [("value", step, 3) for step in (1, 2, 3)]
    progress = [event for event in heard if isinstance(event, StageProgress)]
    assert (progress[-1].done, progress[-1].total, progress[-1].note) == (3, 3, "step 3")
    assert (tmp_path / "output" / "chain.txt").is_file()
    assert not (tmp_path / "guard").exists()


def test_what_a_stage_prints_is_in_its_log(tmp_path: Path, executor: LocalExecutor) -> None:
    executor.execute(job(tmp_path, toy.stage(toy.Text)), ignore, threading.Event())
    assert "to the log" in (tmp_path / "logs" / "it.log").read_text()


def test_an_error_meant_for_users_crosses_the_border_whole(tmp_path: Path, executor: LocalExecutor) -> None:
    with pytest.raises(SourceError) as caught:
        executor.execute(trouble(tmp_path, "pipeline-error"), ignore, threading.Event())
    error = caught.value
    assert (error.what, error.where, error.why, error.way_out) == (
        "the wheel is damaged",
        "a.whl",
        "digest",
        "fetch it again",
    )


def test_any_other_exception_becomes_a_stage_error_that_names_the_log(tmp_path: Path, executor: LocalExecutor) -> None:
    with pytest.raises(StageError, match="ValueError: seven is not a colour") as caught:
        executor.execute(trouble(tmp_path, "exception"), ignore, threading.Event())
    assert "it.log" in str(caught.value) and "toy.py" in str(caught.value)
    assert "Traceback" in (tmp_path / "logs" / "it.log").read_text()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kill", "killed by SIGKILL"),
        ("segfault", "killed by SIGSEGV"),
        ("illegal", "killed by SIGILL.*\n.*this processor refuses.*\n.*pipeline doctor"),
        ("exit", "ended without a result"),
        ("no-json", "is not JSON"),
        ("device", "reads_device = True"),
    ],
)
def test_every_unhappy_end_is_told_in_words(tmp_path: Path, executor: LocalExecutor, kind: str, words: str) -> None:
    with pytest.raises(StageError, match=words):
        executor.execute(trouble(tmp_path, kind), ignore, threading.Event())


def test_a_stage_that_declares_it_sees_the_device(tmp_path: Path, executor: LocalExecutor) -> None:
    outcome = executor.execute(trouble(tmp_path, "device", toy.DeviceReader), ignore, threading.Event())
    assert outcome.metadata == {"memory": 123}


def test_a_metric_that_is_no_number_is_logged_and_ends_nothing(tmp_path: Path, executor: LocalExecutor) -> None:
    heard: list[StageEvent] = []
    executor.execute(trouble(tmp_path, "nan"), heard.append, threading.Event())
    assert any(isinstance(event, StageLog) and "loss is nan at step 1" in event.message for event in heard)


def test_the_peak_memory_of_a_stage_is_measured(tmp_path: Path, executor: LocalExecutor) -> None:
    heard: list[StageEvent] = []
    outcome = executor.execute(trouble(tmp_path, "memory"), heard.append, threading.Event())
    assert 200 << 20 < outcome.peak_rss < 600 << 20
    assert any(isinstance(event, StageMemory) for event in heard)


def test_stopping_ends_the_stage_and_its_children(tmp_path: Path, executor: LocalExecutor) -> None:
    stop = threading.Event()
    pids: list[int] = []

    def stop_when_started() -> None:
        pids.extend(map(int, wait_for(tmp_path / "scratch" / "pids").split()))
        stop.set()

    thread = threading.Thread(target=stop_when_started)
    thread.start()
    with pytest.raises(StoppedError):
        executor.execute(trouble(tmp_path, "family"), ignore, stop)
    thread.join()
    assert len(pids) == 2 and gone(pids)


def test_a_stage_and_its_children_die_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(trouble(tmp_path, "family").model_dump_json())
    code = (
        "import sys, threading; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pipeline.executors.base import Job; from pipeline.executors.local import LocalExecutor\n"
        f"job = Job.model_validate_json(Path({str(tmp_path / 'job.json')!r}).read_text())\n"
        "LocalExecutor().execute(job, lambda event: None, threading.Event())\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", code])
    pids = list(map(int, wait_for(tmp_path / "scratch" / "pids").split()))
    assert all(alive(pid) for pid in pids)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert gone(pids)
