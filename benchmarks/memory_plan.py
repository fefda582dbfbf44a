"""Predicted against measured memory: the demo, and five models of true shapes from 0.1 to 7 billion parameters.

    python benchmarks/memory_plan.py                      # everything; 12 GiB of memory for LLaVA-1.5-7B in Q8_0
    python benchmarks/memory_plan.py --models demo smollm2-135m

Every row is predicted twice, from shapes alone (what `pipeline plan` shows) and from the files (what the report shows),
and measured once: the peak resident set of a fresh process that reads the weights into its own memory, so that no page
of a mapped file is counted. See `stages/runtimes/memory.py`.

- The demo's files are real. Those of the other models have true shapes, types and vocabularies of true size, and hold
  random bytes up to a gibibyte, zeros above: a value takes as much memory as another.
- Up to 0.2 billion parameters the process does all that `measure_memory` does: it encodes an image, fills the whole
  context and generates. Larger ones stop each batch after two blocks (`benchmarks/sides/shortened.py`): blocks follow
  each other in the same memory. That it comes to the same is measured on the smaller ones (`shortened` in the result).

Writes benchmarks/results/memory_plan.json, adding to what is there. Five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from machine import machine

from stages.models.spec import ModelSpec, TextSpec, VisionSpec
from stages.runtimes.gguf_header import read_header
from stages.runtimes.hollow import encoder_tensors, text_tensors, write_hollow_encoder, write_hollow_model
from stages.runtimes.memory import measure_memory
from stages.runtimes.mixture import outline_of_text
from stages.runtimes.prediction import planned_types, predict_files, predict_memory

if TYPE_CHECKING:
    import gguf

RESULTS: Final = Path(__file__).parent / "results" / "memory_plan.json"
SHORTENED: Final = Path(__file__).parent / "sides" / "shortened.py"
TYPES: Final = ("Q4_0", "Q4_K_M", "Q8_0")
CONTEXTS: Final = (512, 2048)  # tokens
CONTEXTS_OF_LARGE_IMAGES: Final = (1024, 2048)
WHOLE: Final = 0.2e9  # parameters of the largest model whose context is filled token by token
RANDOM: Final = 2**30  # bytes of the largest file that is filled
SPARE: Final = 2 * 2**30  # bytes that must stay free beside the model
AIM: Final = (-0.01, 0.02)  # of predicted / measured - 1


@dataclass(frozen=True)
class Model:
    spec: ModelSpec
    words: str  # "bpe" or "spm"
    types: tuple[str, ...] = TYPES

    @property
    def parameters(self) -> int:
        shapes = outline_of_text(self.spec.text).shapes
        return sum(int(np.prod(shape)) for shape in shapes.values())


def contexts(spec: ModelSpec) -> tuple[int, ...]:
    """Those that hold an image and what is said of it."""
    large = spec.vision is not None and spec.vision.image_tokens > min(CONTEXTS) / 2
    return CONTEXTS_OF_LARGE_IMAGES if large else CONTEXTS


SIGLIP: Final = VisionSpec(27, 1152, 4304, 16, 384, 14, 26, projector_hidden=896)  # so400m-patch14-384
CLIP: Final = VisionSpec(24, 1024, 4096, 16, 336, 14, 23, has_cls=True, projector_hidden=4096)  # L/14-336
MODELS: Final = {
    "smollm2-135m": Model(ModelSpec("llama", TextSpec(30, 576, 1536, 9, 3, 64, 49152, True)), "bpe", (*TYPES, "F16")),
    "llava-qwen2-0.5b": Model(
        ModelSpec("llava-siglip", TextSpec(24, 896, 4864, 14, 2, 64, 151936, True), SIGLIP), "bpe", (*TYPES, "F16")
    ),
    "llama-3.2-1b": Model(ModelSpec("llama", TextSpec(16, 2048, 8192, 32, 8, 64, 128256, True)), "bpe"),
    "llama-3.2-3b": Model(ModelSpec("llama", TextSpec(28, 3072, 8192, 24, 8, 128, 128256, True)), "bpe"),
    "llava-1.5-7b": Model(ModelSpec("llava-1.5", TextSpec(32, 4096, 11008, 32, 32, 128, 32064, False), CLIP), "spm"),
}


@dataclass(frozen=True)
class Row:
    """Bytes, and predictions as fractions of what was measured, less 1."""

    model: str
    type: str
    context: int  # tokens
    image: bool
    measured: int
    from_shapes: float
    from_files: float
    parts: dict[str, int]  # of the prediction from the files
    whole: bool  # the context was filled token by token
    shortened: int | None = None  # the peak of the stopped process less the whole one's


def vocabulary(kind: str, size: int) -> Callable[[gguf.GGUFWriter], None]:
    """A tokenizer of `size` made-up words, as long as real ones."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    space = "Ġ" if kind == "bpe" else "▁"  # how each kind writes it
    words: dict[str, None] = {}
    while len(words) < size:
        lengths = random.integers(2, 12, 4096)
        drawn = letters[random.integers(0, len(letters), (4096, 12))]
        words |= {
            (space if place % 2 else "") + "".join(row[:length]): None
            for place, (length, row) in enumerate(zip(lengths, drawn, strict=True))
        }

    def write(writer: gguf.GGUFWriter) -> None:
        import gguf

        kinds = gguf.TokenType
        if kind == "bpe":
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            # Byte-level encoders write bytes as printable characters.
            printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
            characters = [chr(byte) for byte in [*printable, *range(256, 256 + 256 - len(printable))]]
            rest = list(words)[: size - len(special) - len(characters)]
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("smollm")
            writer.add_token_list([*special, *characters, *rest])
            writer.add_token_types([kinds.CONTROL] * len(special) + [kinds.NORMAL] * (size - len(special)))
            writer.add_token_merges([f"{word[: len(word) // 2]} {word[len(word) // 2 :]}" for word in rest])
        else:
            special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
            writer.add_tokenizer_model("llama")
            writer.add_token_list([*special, *list(words)[: size - len(special)]])
            writer.add_token_scores([0.0] * size)
            writer.add_token_types(
                [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
                + [kinds.NORMAL] * (size - len(special))
            )
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return write


def fill(path: Path) -> None:
    """Random bytes into the hole; norms become 1."""
    random = np.random.default_rng(0)
    with path.open("r+b") as handle:
        for tensor in read_header(path).tensors.values():
            handle.seek(tensor.offset)
            if len(tensor.shape) == 1:
                handle.write(np.ones(tensor.nbytes // 4, np.float32).tobytes())
            else:
                handle.write(random.bytes(tensor.nbytes))


def write_model(folder: Path, model: Model, type: str) -> tuple[Path, Path | None]:
    path, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    outline = outline_of_text(model.spec.text)
    types = planned_types(replace(model.spec, quantization=type))
    words = vocabulary(model.words, model.spec.text.vocab_size)
    write_hollow_model(path, outline, text_tensors(outline, types), words)
    if path.stat().st_size <= RANDOM:
        fill(path)
    if model.spec.vision is None:
        return path, None
    width = model.spec.text.hidden_size
    write_hollow_encoder(mmproj, model.spec.vision, width, encoder_tensors(model.spec.vision, width))
    return path, mmproj


def demo(folder: Path) -> tuple[ModelSpec, Path, Path]:
    """The spec, the F16 file and the mmproj of `demo:smol-llava`."""
    from stages.models.smol_llava import assemble, smol_llava_spec
    from stages.quantize.convert import convert_language_model
    from stages.quantize.mmproj import write_mmproj

    spec = smol_llava_spec()
    assert spec.vision is not None
    assemble(folder / "checkpoint")
    convert_language_model(folder / "checkpoint", folder / "F16.gguf", folder / "scratch", name="demo", metadata={})
    exit = spec.vision.default_exit
    write_mmproj(folder / "checkpoint", folder / "mmproj.gguf", spec.vision, exit, name="demo")
    return spec.with_exit(exit), folder / "F16.gguf", folder / "mmproj.gguf"


def measure_shortened(model: Path, mmproj: Path | None, context: int) -> int:
    """`measure_memory`, but for batches, which are stopped after some operations."""
    command = [sys.executable, str(SHORTENED), str(model), str(mmproj or ""), str(context)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def compare(name: str, spec: ModelSpec, files: tuple[Path, Path | None], context: int, *, whole: bool) -> Row:
    path, mmproj = files
    before, after = predict_memory(spec, context).total, predict_files(path, mmproj, context)
    short = measure_shortened(path, mmproj, context)
    measured = measure_memory(path, mmproj, context) if whole else short
    assert spec.quantization is not None
    return Row(
        model=name,
        type=spec.quantization,
        context=context,
        image=mmproj is not None,
        measured=measured,
        from_shapes=round(before / measured - 1, 5),
        from_files=round(after.total / measured - 1, 5),
        parts={part: getattr(after, part) for part in ("weights", "kv_cache", "compute", "vision", "overhead")},
        whole=whole,
        shortened=short - measured if whole else None,
    )


def available() -> int:
    """Bytes of memory that a new process may take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def run(names: list[str], types: list[str], tell: Callable[[Row], None]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory(prefix="memory-plan-") as place:
            folder = Path(place)
            if name == "demo":
                from stages.quantize.convert import quantize_model

                spec, floats, mmproj = demo(folder)
                for type in types:
                    path = floats if type == "F16" else folder / "model.gguf"
                    if path != floats:
                        quantize_model(floats, path, type)
                    for context in contexts(spec):
                        tell(compare(name, replace(spec, quantization=type), (path, mmproj), context, whole=True))
                continue
            model = MODELS[name]
            for type in (type for type in model.types if type in types):
                spec = replace(model.spec, quantization=type)
                files = write_model(folder, model, type)
                for context in contexts(spec):
                    need = predict_memory(spec, context).total + SPARE
                    if available() < need:
                        print(f"{name} {type}: left out, {need / 2**30:.1f} GiB of free memory are needed", flush=True)
                        continue
                    tell(compare(name, spec, files, context, whole=model.parameters <= WHOLE))


def save(new: list[Row]) -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []
    by_place = {(row.model, row.type, row.context): row for row in (*(Row(**row) for row in kept), *new)}
    names, types = ["demo", *MODELS], [*TYPES, "F16"]
    rows = sorted(by_place.values(), key=lambda row: (names.index(row.model), types.index(row.type), row.context))
    errors = [error for row in rows for error in (row.from_shapes, row.from_files)]
    summary = {
        "command": "python benchmarks/memory_plan.py",
        "versions": {name: version(name) for name in ("llama-cpp-python", "gguf", "numpy")}
        | {"python": platform.python_version()},
        "machine": machine(),
        "aim": "predicted / measured - 1 between -0.01 and 0.02",
        "rows_within_the_aim": sum(AIM[0] <= min(pair) and max(pair) <= AIM[1] for pair in pairs(rows)),
        "rows_in_all": len(rows),
        "most_under": min(errors),
        "most_over": max(errors),
        "shortened": {
            "what": "bytes: peak of a process whose batches are stopped, less the whole one's",
            "lowest": min((row.shortened for row in rows if row.shortened is not None), default=None),
            "highest": max((row.shortened for row in rows if row.shortened is not None), default=None),
        },
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def pairs(rows: list[Row]) -> list[tuple[float, float]]:
    return [(row.from_shapes, row.from_files) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=[*TYPES, "F16"], default=[*TYPES, "F16"])
    parser.add_argument("--models", nargs="+", choices=["demo", *MODELS], default=["demo", *MODELS])
    arguments = parser.parse_args()
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        save(rows)
        print(
            f"{row.model:18} {row.type:7} {row.context:5}  measured {row.measured / 2**20:8.1f} MiB  "
            f"from shapes {row.from_shapes:+.2%}  from files {row.from_files:+.2%}"
            + (f"  shortened {row.shortened / 2**20:+.1f} MiB" if row.shortened is not None else ""),
            flush=True,
        )

    run(arguments.models, arguments.types, tell)
    return 0 if all(AIM[0] <= min(pair) and max(pair) <= AIM[1] for pair in pairs(rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
