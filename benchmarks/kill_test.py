"""Kill a recipe's run with SIGKILL at random moments, continue it, and compare its artifacts with an undisturbed run.

    python benchmarks/kill_test.py recipes/smoke.yaml --runs 20 --seed 0

Every run has a store of its own; downloaded wheels are shared. Writes benchmarks/results/kill_test.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from artifacts.home import cache_dir
from pipeline.events import RunFinished, StageFinished, StageStarted, read_events

RESULTS = Path(__file__).parent / "results" / "kill_test.json"


@dataclass
class Killed:
    """One run that was killed, and what became of it."""

    moment: float  # seconds after the start
    during: str  # the stage that was at work, "" for none
    finished_before: int  # stages that were done by then
    seconds_to_finish: float  # of the run that continued it
    status: str
    same_digests: bool


def start(recipe: str, home: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """`pipeline run` in a process of its own, with `home` as its PIPELINE_HOME."""
    home.mkdir(exist_ok=True)
    wheels = cache_dir() / "wheels"
    if wheels.is_dir() and not (home / "wheels").exists():
        (home / "wheels").symlink_to(wheels)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run", recipe, "--plain"]
    command += ["--runs-dir", str(home / "runs"), *(word for item in settings for word in ("--set", item))]
    with (home / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "PIPELINE_HOME": str(home)},
            start_new_session=True,
        )


def newest(home: Path) -> Path | None:
    """The folder of the newest run."""
    found = sorted((home / "runs").glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def outcome(home: Path) -> tuple[str, dict[str, str]]:
    """Status and artifact digests of the newest run."""
    folder = newest(home)
    events = read_events(folder) if folder is not None else []
    status = next((event.status for event in reversed(events) if isinstance(event, RunFinished)), "interrupted")
    return status, {event.stage: event.digest for event in events if isinstance(event, StageFinished)}


def kill_once(recipe: str, home: Path, moment: float, expected: dict[str, str], settings: list[str]) -> Killed:
    """One fresh run, killed after `moment` seconds and then continued."""
    process = start(recipe, home, settings)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    folder = newest(home)
    events = read_events(folder) if folder is not None else []
    done = {event.stage for event in events if isinstance(event, StageFinished)}
    begun = [event.stage for event in events if isinstance(event, StageStarted) and event.stage not in done]
    began = time.monotonic()
    start(recipe, home, settings).wait()
    status, digests = outcome(home)
    return Killed(
        moment=round(moment, 2),
        during=begun[-1] if begun else "",
        finished_before=len(done),
        seconds_to_finish=round(time.monotonic() - began, 1),
        status=status,
        same_digests=digests == expected,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="override, as for `pipeline run`")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill-test-", ignore_cleanup_errors=True) as folder:
        undisturbed = Path(folder) / "undisturbed"
        began = time.monotonic()
        start(arguments.recipe, undisturbed, arguments.settings).wait()
        length = time.monotonic() - began
        status, expected = outcome(undisturbed)
        print(f"undisturbed: {status} in {length:.1f} s, {len(expected)} artifacts")
        if status not in ("passed", "gate_failed"):
            print((undisturbed / "output.txt").read_text())
            return 1
        results: list[Killed] = []
        for number in range(arguments.runs):
            home = Path(folder) / f"run-{number}"
            killed = kill_once(arguments.recipe, home, moments.uniform(0, length), expected, arguments.settings)
            results.append(killed)
            write(arguments, length, expected, results)
            verdict = "same digests" if killed.same_digests else "DIFFERENT DIGESTS"
            print(
                f"{number + 1:3}: killed after {killed.moment:6.2f} s during {killed.during or 'no stage':10}, "
                f"{killed.finished_before} stages done; continued in {killed.seconds_to_finish} s: {verdict}",
                flush=True,
            )
            subprocess.run(["chmod", "-R", "u+w", str(home)], check=False)  # stored objects are read-only
    same = sum(result.same_digests for result in results)
    print(f"{same} of {len(results)} with the digests of the undisturbed run")
    return 0 if same == len(results) else 1


def write(arguments: argparse.Namespace, length: float, expected: dict[str, str], results: list[Killed]) -> None:
    """Everything so far, after every run, so that stopping loses nothing."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "command": f"python benchmarks/kill_test.py {arguments.recipe} --runs {arguments.runs} --seed {arguments.seed}",
        "recipe": Path(arguments.recipe).name,
        "settings": arguments.settings,
        "seed": arguments.seed,
        "cores": os.cpu_count(),
        "runs": len(results),
        "same_digests": sum(result.same_digests for result in results),
        "undisturbed_seconds": round(length, 1),
        "artifacts": expected,
        "killed": [asdict(result) for result in results],
    }
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
