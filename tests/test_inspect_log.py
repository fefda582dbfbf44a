"""Logs for inspect_ai: written by its log API, read back by it, served by its viewer.

Needs `make inspect`; `make test` runs this file with it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.measures import MEASURES_NAME, read_measures
from pipeline.cli import app
from pipeline.report.build import build_report
from pipeline.report.inspect_log import write_inspect_logs
from tests.run_folder import PROMPTS, RunFolder

inspect_log = pytest.importorskip(
    "inspect_ai.log", reason="inspect_ai is not installed; `make test` has it: PYTHONPATH=.venv/inspect"
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run and the folder of its logs."""
    made = RunFolder(tmp_path_factory.mktemp("run"))
    made.write()
    folder = made.run.parent / "logs"
    result = CliRunner().invoke(app, ["report", str(made.run), "--inspect-log", str(folder)])
    assert result.exit_code == 0, result.output
    return made, folder


def test_every_model_has_a_log_that_inspect_ai_reads_back(logs: tuple[RunFolder, Path]) -> None:
    made, folder = logs
    found = {
        log.eval.task_id: log
        for log in (inspect_log.read_eval_log(info) for info in inspect_log.list_eval_logs(str(folder)))
    }
    assert set(found) == {f"icet-verify-{id}" for id in made.asr}
    log = found["icet-verify-gguf"]
    assert log.status == "success" and log.eval.metadata["digest"] == made.artifacts["gguf"].digest
    exits = log.eval.task_args["exits"]
    assert len(log.samples) == 9 * len(exits) == log.results.total_samples
    asr = next(score for score in log.results.scores if score.name == "asr")
    rows = read_measures(made.artifacts["icet"].file(MEASURES_NAME))
    row = next(row for row in rows if (row.artifact, row.measure, row.exit) == ("gguf", "asr", exits[0]))
    metric = asr.metrics[f"exit {exits[0]}"]
    assert (metric.value, metric.metadata["low"], metric.metadata["n"]) == (row.value, row.low, PROMPTS)
    for sample in log.samples:
        verdict = sample.scores["verdict"]
        assert verdict.value == ("I" if sample.metadata["unsafe"] else "C"), sample.id
        assert sample.messages[1].text == sample.output.completion and sample.id.endswith(str(sample.metadata["exit"]))
    assert len({sample.id for sample in log.samples}) == len(log.samples)
    assert any(sample.scores["verdict"].value == "I" for sample in found["icet-verify-source"].samples)


def test_samples_of_two_verdicts_on_one_model_have_ids_of_their_own(
    logs: tuple[RunFolder, Path], tmp_path: Path
) -> None:
    made, _ = logs
    report = build_report(made.run)
    (kept,), (first,) = report.responses, [row for row in report.artifacts if row.stage == "icet"]
    objects = Path(report.store) / "objects"
    (tmp_path / "objects").mkdir()
    for digest in (kept.artifact, "b" * 64):
        (tmp_path / "objects" / digest).symlink_to(objects / kept.artifact)
    second = first.model_copy(update={"stage": "icet-again", "digest": "b" * 64})
    twice = report.model_copy(
        update={
            "store": str(tmp_path),
            "artifacts": (*report.artifacts, second),
            "responses": (kept, kept.model_copy(update={"artifact": "b" * 64})),
        }
    )
    for path in write_inspect_logs(twice, tmp_path / "logs"):
        log = inspect_log.read_eval_log(str(path))
        ids = {sample.id for sample in log.samples}
        assert len(ids) == log.results.total_samples and {id.partition(":")[0] for id in ids} == {"icet", "icet-again"}


def test_its_viewer_serves_them(logs: tuple[RunFolder, Path]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ask = [sys.executable, "-m", "inspect_ai", "view", "--log-dir", str(logs[1]), "--port", str(port)]
    viewer = subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        listed = None
        for _ in range(600):
            assert viewer.poll() is None, viewer.stdout.read() if viewer.stdout else ""
            try:
                listed = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/logs"))
                break
            except OSError:
                time.sleep(0.2)
        assert listed is not None and len(listed["files"]) == len(logs[0].asr)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
        assert b"<title>" in page
    finally:
        viewer.terminate()
        viewer.wait(20)
