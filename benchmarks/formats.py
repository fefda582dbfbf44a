"""The same weights in several file formats: the table of `recipes/formats.yaml`, kept as figures.

    PYTHONPATH=.venv/gptq python benchmarks/formats.py

Runs the recipe (about 25 minutes on two quiet cores; what is in the store is reused) and writes the rows that its
report shows to benchmarks/results/formats.json. `--run runs/ID` takes a run that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from pipeline.commands.load import load_graph
from pipeline.console import make_console
from pipeline.report.build import build_report
from pipeline.runner import run_graph

RESULTS = Path(__file__).parent / "results" / "formats.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run that is done")
    parser.add_argument("--note", default="", help="what to know of the machine meanwhile")
    given = parser.parse_args()
    folder = given.run
    if folder is None:
        result = run_graph(load_graph("formats"), Path("runs"), make_console(plain=True, json=False), 1)
        if result.exit_code:
            return result.exit_code
        folder = result.folder
    report = build_report(folder)
    wanted = {row.artifact for row in report.formats}
    names = ("kl_text", "kl_refusal", "perplexity", "vqa_accuracy", "asr", "over_refusal")
    intervals = [
        row.model_dump(include={"artifact", "measure", "exit", "band", "value", "low", "high", "n"})
        for row in report.measures
        if row.artifact in wanted and row.measure in names
    ]
    source = [row for row in report.measures if row.role == "source" and row.measure in ("asr", "vqa_accuracy")]
    summary = {
        "command": "PYTHONPATH=.venv/gptq python benchmarks/formats.py",
        "recipe": "recipes/formats.yaml",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": given.note,
        "versions": {name: version(name) for name in ("torch", "transformers", "llama-cpp-python", "gptqmodel")},
        "formats": [row.model_dump() for row in report.formats],
        "source": [
            row.model_dump(include={"measure", "exit", "band", "value", "low", "high", "n"})
            for row in source
            if row.exit is not None or row.band == "average"
        ],
        "intervals": intervals,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
