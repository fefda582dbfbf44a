"""What a GGUF costs here, beside llama.cpp's own script and quantizer: time and peak memory on the same checkpoint.

    python benchmarks/convert.py                  # the demo, and a random model of 0.6 B parameters
    python benchmarks/convert.py --checkpoint FOLDER --name NAME

Ours: one process that converts and quantizes as the gguf stage does. Theirs: `convert-hf-to-gguf` (llama.cpp's script),
then `llama-quantize` if it is on PATH, else the quantizer of llama-cpp-python called with its defaults. Each side runs
in fresh processes, in turns; whether the files hold the same tensors, byte for byte, is said. Time is wall time and,
since that depends on what else the machine does, processor time; memory is the largest resident set of any of a side's
processes.
The random one has Llama 3.2 1B's widths, half of its blocks and the demo's tokenizer, in bfloat16 as models are
published. Writes benchmarks/results/convert.json; other models' rows in it stay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from artifacts.manifest import sha256_bytes
from stages.machine import cores
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.smol_llava import assemble
from stages.quantize.gptq_checkpoint import write_language_model
from stages.quantize.types import TYPES
from stages.runtimes.gguf_header import read_header

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
params = lib.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
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
    stock, threads = shutil.which("llama-quantize"), str(cores())
    by_library = [sys.executable, "-c", QUANTIZE, str(floats), str(model), str(TYPES[type]), threads]
    second = run([stock, str(floats), str(model), type, threads] if stock else by_library)
    return Cost(first.wall + second.wall, first.processor + second.processor, max(first.memory, second.memory)), model


def tensors(path: Path) -> dict[str, tuple[str, str]]:
    """Type and digest of every tensor."""
    found = {}
    with path.open("rb") as file:
        for name, tensor in read_header(path).tensors.items():
            file.seek(tensor.offset)
            found[name] = (tensor.type, sha256_bytes(file.read(tensor.nbytes)))
    return found


def apart(make: Callable[..., object], *arguments: Path) -> None:
    """Make something in a process of its own: the kernel counts a parent's peak as that of its children, too."""
    maker = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"{make.__name__} failed")


def random_model(folder: Path, tokenizer_of: Path) -> None:
    """Llama 3.2 1B's widths with half of its blocks: 0.59 B parameters, bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of, local_files_only=True)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    tokenizer.save_pretrained(folder)


def language_model(checkpoint_folder: Path, folder: Path) -> None:
    """The script takes no LLaVA: both sides get the language model alone."""
    family = family_of(checkpoint.read_config(checkpoint_folder))
    write_language_model(family, family.load(checkpoint_folder), folder, checkpoint_folder)


def compared(text: Path, type: str, repeat: int, work: Path) -> dict[str, object]:
    """Both sides in turns; medians."""
    costs: dict[str, list[Cost]] = {"ours": [], "theirs": []}
    made: dict[str, dict[str, tuple[str, str]]] = {}
    for _ in range(repeat):
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
    met = ratios["wall_s"] <= 1 and ratios["peak_bytes"] <= 1
    same = made["ours"] == made["theirs"]
    return {"type": type, "repeat": repeat, **middle, "ours_to_theirs": ratios, "aim_met": met, "same_tensors": same}


def write(model: dict[str, object]) -> None:
    """Put one model's rows into the results."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if RESULTS.exists() else []
    models = [one for one in known if one["model"] != model["model"]] + [model]
    summary = {
        "command": "python benchmarks/convert.py",
        "aim": "at most 1.0 times the time and the peak memory of llama.cpp's own script and quantizer",
        "quantizer": "llama-quantize" if shutil.which("llama-quantize") else "llama_model_quantize, its defaults",
        "versions": {name: version(name) for name in ("convert-hf-to-gguf", "llama-cpp-python", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "models": sorted(models, key=lambda one: str(one["model"])),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint of a known family, instead of both")
    parser.add_argument("--name", help="what the results call it")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--note", default="", help="what to know of the machine meanwhile")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if given.checkpoint is not None:
            folders = {given.name or given.checkpoint.name: given.checkpoint}
        else:
            demo, random = work / "demo", work / "random"
            apart(assemble, demo)
            apart(random_model, random, demo)
            folders = {"demo:smol-llava, its language model": demo, "random, Llama 3.2 1B's widths, 8 blocks": random}
        for title, folder in folders.items():
            text = folder
            if "vision_config" in checkpoint.read_config(folder):
                text = work / "text"
                apart(language_model, folder, text)
            rows = []
            for type in given.types:
                rows.append(compared(text, type, given.repeat, work))
                print(title, rows[-1], flush=True)
            size = sum(path.stat().st_size for path in checkpoint.weight_files(text))
            write({"model": title, "checkpoint_bytes": size, "note": given.note, "rows": rows})
            shutil.rmtree(work / "text", ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
