"""What a GGUF costs here, beside llama.cpp's own script and quantizer: time and peak memory on the same checkpoint.

    python benchmarks/convert.py

Ours: one process that converts and quantizes as the gguf stage does. Theirs: `convert-hf-to-gguf` (llama.cpp's script),
then `llama-quantize` if it is on PATH, else the quantizer of llama-cpp-python called with its defaults. Each side runs
in fresh processes, in turns; whether the files hold the same tensors, byte for byte, is said. Time is wall time and,
since that depends on what else the machine does, processor time; memory is the largest resident set of any of a side's
processes.
Writes benchmarks/results/convert.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from artifacts.manifest import sha256_bytes
from stages.models import checkpoint
from stages.models.family import family_of
from stages.quantize.gptq_checkpoint import write_language_model
from stages.runtimes.gguf_header import read_header
from stages.runtimes.llamacpp_library import threads

RESULTS = Path(__file__).parent / "results" / "convert.json"

OURS = """
import sys
from pathlib import Path
from stages.quantize.convert import convert_language_model, quantize_model
folder, work, type = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
convert_language_model(folder, work / "f16.gguf", work / "links", name="model", metadata={})
quantize_model(work / "f16.gguf", work / "model.gguf", type)
"""
QUANTIZE = """
import os, sys
import llama_cpp.llama_cpp as lib
from stages.quantize.types import TYPES
params = lib.llama_model_quantize_default_params()
params.ftype, params.nthread = TYPES[sys.argv[3]], int(sys.argv[4])
sys.exit(lib.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), params))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of the wall and of processors; bytes."""

    wall: float
    processor: float
    memory: int


def run(command: Sequence[str | os.PathLike[str]]) -> Cost:
    """What a process costs.

    Raises:
        RuntimeError: it failed.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(said.decode()[-2000:])
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def ours(folder: Path, work: Path, type: str) -> tuple[Cost, Path]:
    return run([sys.executable, "-c", OURS, folder, work, type]), work / "model.gguf"


def theirs(folder: Path, work: Path, type: str) -> tuple[Cost, Path]:
    script = Path(sys.executable).with_name("convert-hf-to-gguf")
    floats, model = work / "f16.gguf", work / "model.gguf"
    first = run([script, folder, "--outfile", floats, "--outtype", "f16"])
    stock, cores = shutil.which("llama-quantize"), str(threads())
    second = run(
        [stock, floats, model, type, cores] if stock else [sys.executable, "-c", QUANTIZE, floats, model, type, cores]
    )
    return Cost(first.wall + second.wall, first.processor + second.processor, max(first.memory, second.memory)), model


def tensors(path: Path) -> dict[str, tuple[str, str]]:
    """Type and digest of every tensor."""
    found = {}
    with path.open("rb") as file:
        for name, tensor in read_header(path).tensors.items():
            file.seek(tensor.offset)
            found[name] = (tensor.type, sha256_bytes(file.read(tensor.nbytes)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint of a known family")
    parser.add_argument("--name", default="demo:smol-llava", help="what the results call it")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M"])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as name:
        work, text = Path(name), Path(name) / "text"
        # The script takes no LLaVA: both sides get the language model alone.
        family = family_of(checkpoint.read_config(given.checkpoint))
        write_language_model(family, family.load(given.checkpoint), text, given.checkpoint)
        parameters = sum(path.stat().st_size for path in checkpoint.weight_files(text))
        for type in given.types:
            costs: dict[str, list[Cost]] = {"ours": [], "theirs": []}
            made: dict[str, dict[str, tuple[str, str]]] = {}
            for _ in range(given.repeat):
                for side, do in (("ours", ours), ("theirs", theirs)):
                    place = work / side
                    place.mkdir()
                    cost, model = do(text, place, type)
                    costs[side].append(cost)
                    made[side] = tensors(model)
                    shutil.rmtree(place)
            middle = {
                side: {
                    "wall_s": round(statistics.median(cost.wall for cost in found), 2),
                    "processor_s": round(statistics.median(cost.processor for cost in found), 2),
                    "peak_bytes": int(statistics.median(cost.memory for cost in found)),
                }
                for side, found in costs.items()
            }
            ratios = {key: round(middle["ours"][key] / middle["theirs"][key], 3) for key in middle["ours"]}
            same = made["ours"] == made["theirs"]
            rows.append(
                {"type": type, "repeat": given.repeat, **middle, "ours_to_theirs": ratios, "same_tensors": same}
            )
            print(rows[-1], flush=True)
    summary = {
        "command": "python benchmarks/convert.py --checkpoint FOLDER",
        "model": given.name,
        "checkpoint_bytes": parameters,
        "aim": "at most 1.0 times the time and the peak memory of llama.cpp's own script and quantizer",
        "quantizer": "llama-quantize" if shutil.which("llama-quantize") else "llama_model_quantize, its defaults",
        "versions": {name: version(name) for name in ("convert-hf-to-gguf", "llama-cpp-python", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
