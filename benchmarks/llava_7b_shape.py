"""LLaVA-1.5-7B's exact shapes with random weights through early-exit, prune and gguf: time and memory of every stage.

    python benchmarks/llava_7b_shape.py                       # 7.06 B parameters; 45 GB of disk while it runs
    python benchmarks/llava_7b_shape.py --divide 8            # every width an eighth: about 140 M parameters, a minute

bf16 weights are streamed to disk as llava-hf names them; then exit 18 of 24, without four of 32 decoder blocks, Q4_K_M,
and one answer about an image. A checkpoint is deleted when the next one is whole, unless --keep. Each stage is a
process of its own. Two peaks are reported: `anonymous`, memory that is the process's own, and `resident`, which also
counts pages of mapped files that the system may take back at any time. Writes benchmarks/results/llava_7b_shape.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest

if TYPE_CHECKING:
    from transformers import LlavaConfig

RESULTS: Final = Path(__file__).parent / "results" / "llava_7b_shape.json"
FULL: Final = 7_063_427_072  # parameters of the undivided shapes
DISK: Final = 45e9  # bytes that these need
LIMIT: Final = 6 * 2**30  # bytes, of a stage's peak
EXIT: Final = 18
DROPPED: Final = (20, 21, 22, 23)
SHARD: Final = 5 * 10**9  # bytes of a weight file, as on the hub
PIECE: Final = 1 << 22  # numbers made at once
STEPS: Final = ("make", "early-exit", "prune", "gguf", "answer")


@dataclass
class Peak:
    """Of one step, or of one part of it that the stage announced."""

    seconds: float = 0.0
    anonymous: int = 0  # bytes
    resident: int = 0  # bytes


@dataclass
class Step:
    name: str
    whole: Peak = field(default_factory=Peak)
    parts: dict[str, Peak] = field(default_factory=dict)
    output_bytes: int = 0
    ended_well: bool = False


def config_of(divide: int) -> LlavaConfig:
    """LLaVA-1.5-7B's config.json; every width divided, numbers of blocks and widths of heads as they are."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024 // divide,
            intermediate_size=4096 // divide,
            num_hidden_layers=24,
            num_attention_heads=16 // divide,
            image_size=336,
            patch_size=14,
            projection_dim=768 // divide,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096 // divide,
            intermediate_size=11008 // divide,
            num_hidden_layers=32,
            num_attention_heads=32 // divide,
            num_key_value_heads=32 // divide,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )


def shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """llava-hf's names -> shapes; nothing is allocated."""
    import torch
    from transformers import LlavaForConditionalGeneration

    old = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    found = {}
    for name, weight in model.named_parameters():
        before = next(prefix for prefix in old if name.startswith(prefix))
        found[old[before] + name.removeprefix(before)] = tuple(weight.shape)
    return found


def make(folder: Path, divide: int) -> None:
    """Write the checkpoint; a few tens of megabytes in memory, whatever its size."""
    from stages.models.tiny import build_tiny_llava

    with tempfile.TemporaryDirectory() as tiny:
        build_tiny_llava(Path(tiny), tower="clip")
        for path in Path(tiny).iterdir():
            if path.suffix in (".json", ".model", ".jinja") and path.name != "config.json":
                shutil.copyfile(path, folder / path.name)
    config = config_of(divide)
    config.save_pretrained(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    noise = np.random.default_rng(0).standard_normal(2 * PIECE, dtype=np.float32)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        write_shard(folder / name, tensors, noise)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], noise: np.ndarray) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(len(text))
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            norm = len(shape) == 1 and name.endswith("weight") and "class" not in name
            scale = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
            left = int(np.prod(shape))
            while left:
                count = min(left, PIECE)
                begin = int(random.integers(0, PIECE))
                values = np.ones(count, np.float32) if norm else noise[begin : begin + count] * np.float32(scale)
                out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count


class Announced:
    """The stage's progress, as lines that the parent process reads."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        if note:
            print(note, flush=True)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


def run_stage(uses: str, source: Path, target: Path, params: Mapping[str, object]) -> None:
    from stages.stage import Context, stage_class

    cls = stage_class(uses)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="scratch-") as scratch:
        context = Context(uses, {"source": Artifact.open(source)}, target, Path(scratch), 0, Announced())
        metadata = cls(cls.Params.model_validate(params)).run(context)
    finish(target, cls.output_type, metadata)


def finish(folder: Path, type: str, metadata: Mapping[str, object]) -> None:
    print("hashing the files", flush=True)
    Manifest.of_folder(folder, type, metadata).write(folder)


def answer(folder: Path) -> None:
    from PIL import Image

    from stages.runtimes.llamacpp import LlamaCppRuntime
    from stages.runtimes.runtime import Request

    image = folder.parent / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)).save(image)
    print("loading", flush=True)
    with LlamaCppRuntime(folder, parallel=1, context=1024) as runtime:
        assert runtime.default_exit == EXIT
        print("answering", flush=True)
        (response,) = runtime.generate([Request("What is this?", image=image, max_new_tokens=8)])
        assert response.tokens


def act(step: str, root: Path, divide: int) -> None:
    """One step, in a process of its own."""
    actions: dict[str, Callable[[], None]] = {
        "make": lambda: make(root / "make", divide),
        "early-exit": lambda: run_stage("early-exit", root / "make", root / "early-exit", {"layer": EXIT}),
        "prune": lambda: run_stage("prune", root / "early-exit", root / "prune", {"layers": list(DROPPED)}),
        "gguf": lambda: run_stage("gguf", root / "prune", root / "gguf", {"type": "Q4_K_M"}),
        "answer": lambda: answer(root / "gguf"),
    }
    (root / step).mkdir(exist_ok=True)
    actions[step]()
    if step == "make":
        finish(root / step, "checkpoint", {"model": "random:llava-1.5-7b-shape"})


def watch(step: str, root: Path, divide: int) -> Step:
    """Run a step and look at its memory twenty times a second."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(root), "--divide", str(divide)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert process.stdout is not None
    found = Step(step)
    current = ["starting"]
    reader = threading.Thread(target=follow, args=(process.stdout, current))
    reader.start()
    began = last = time.monotonic()
    while process.poll() is None:
        anonymous, resident = memory_of(process.pid)
        now = time.monotonic()
        for peak in (found.whole, found.parts.setdefault(current[0], Peak())):
            peak.seconds += now - last
            peak.anonymous = max(peak.anonymous, anonymous)
            peak.resident = max(peak.resident, resident)
        last = now
        time.sleep(0.05)
    reader.join()
    found.whole.seconds = time.monotonic() - began
    found.ended_well = process.returncode == 0
    found.output_bytes = sum(path.stat().st_size for path in (root / step).rglob("*") if path.is_file())
    return found


def follow(lines: IO[str], current: list[str]) -> None:
    for line in lines:
        current[0] = line.strip() or current[0]


def memory_of(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process; zeros when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def run(root: Path, divide: int, keep: bool) -> Iterator[Step]:
    previous: str | None = None
    for step in STEPS:
        done = watch(step, root, divide)
        yield done
        if not done.ended_well:
            return
        if previous is not None and step != "answer" and not keep:
            shutil.rmtree(root / previous)
        previous = step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if left out")
    parser.add_argument("--divide", type=int, default=1, choices=[1, 2, 4, 8, 16], help="divide every width")
    parser.add_argument("--keep", action="store_true", help="keep every checkpoint")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        act(arguments.step, arguments.folder, arguments.divide)
        return 0
    parameters = sum(int(np.prod(shape)) for shape in shapes(config_of(arguments.divide)).values())
    with tempfile.TemporaryDirectory(prefix="llava-7b-", dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        need, free = DISK * parameters / FULL + 2e8, shutil.disk_usage(root).free
        if free < need:
            print(f"{root} has {free / 1e9:.0f} GB free, {need / 1e9:.0f} GB are needed; give another --folder")
            return 2
        print(f"{parameters / 1e9:.3f} B parameters, in {root}", flush=True)
        steps = []
        for step in run(root, arguments.divide, arguments.keep):
            steps.append(step)
            for name, peak in [(step.name, step.whole), *((f"  {part}", peak) for part, peak in step.parts.items())]:
                anonymous, resident = (f"{size / 2**30:6.2f} GiB" for size in (peak.anonymous, peak.resident))
                print(f"{name:44} {peak.seconds:8.1f} s  {anonymous} anonymous  {resident} resident", flush=True)
    well = len(steps) == len(STEPS) and all(step.ended_well for step in steps)
    highest = max(step.whole.resident for step in steps if step.name != "make")
    print(f"highest peak of a stage: {highest / 2**30:.2f} GiB resident, limit {LIMIT / 2**30:.0f} GiB")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "divide": arguments.divide,
        "parameters": parameters,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ended_well": well,
        "highest_resident_bytes": highest,
        "steps": [asdict(step) for step in steps],
    }
    divided = RESULTS.with_stem(f"{RESULTS.stem}_divided_by_{arguments.divide}")
    (RESULTS if arguments.divide == 1 else divided).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0 if well and highest <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
