"""How fast what ships is: a process of its own loads it, reads a prompt and answers, in the runtime that it ships with.

- `load_seconds`: until it can be asked, about an image too if it sees any; modules are loaded before, and the files lie
  in the system's cache;
- `prompt_speed`: tokens of a prompt of text read in a second, up to the first token of the answer;
- `generation_speed`: tokens of one answer in a second, behind the first.

Each is the median of three, rounded to three digits. Times are the machine's, with all else that it does: those of one
verification compare with each other and with no others. One answer at a time; the runtime for llama.cpp decodes at
least two rows (`llamacpp_library`), so a program that decodes one is a little faster.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.artifact import Artifact
from artifacts.errors import StageError
from artifacts.measures import Measure
from stages.runtimes.alone import run_alone
from stages.verify.asking import Subject, open_runtime
from stages.verify.scores import Answers

if TYPE_CHECKING:
    from stages.runtimes.runtime import Runtime

_REPEATED: Final = 3
_SENTENCE: Final = "The river runs past the mill, under the old bridge and on to the sea. "
_SENTENCES: Final = 24  # about 400 tokens
_STORY: Final = "Tell me a long story about a river."
_GENERATED: Final = 32  # tokens, at most
_UNITS: Final = {"load_seconds": "s", "prompt_speed": "tokens/s", "generation_speed": "tokens/s"}


def speed_rows(one: Answers) -> list[Measure]:
    """`load_seconds`, `prompt_speed` and `generation_speed` of one artifact."""
    folder = one.subject.artifact.path
    try:
        said = run_alone(
            "stages.verify.speed",
            [str(folder)],
            measures="speed",
            where=folder,
            way_out="free memory, or leave measure_speed out",
        )
    except StageError as error:
        return [one.row(name, None, unit=unit, note=str(error)) for name, unit in _UNITS.items()]
    found = json.loads(said)
    return [
        one.row(name, float(f"{found[name]:.3g}"), unit=unit, n=_REPEATED, note=f"{found['threads']} threads, median")
        for name, unit in _UNITS.items()
    ]


def _measured(folder: Path) -> dict[str, float]:
    from stages.machine import cores

    subject = Subject("", Artifact.open(folder), "quantized", gated=True)
    _loaded(subject).close()  # loads modules, and the files into the system's cache
    loads, reads, answers = [], [], []
    for _ in range(_REPEATED):
        started = time.perf_counter()
        with _loaded(subject) as runtime:
            loads.append(time.perf_counter() - started)
            _seconds(runtime, _STORY, 2)  # the first answer of a process also reserves memory
            prompt = _SENTENCE * _SENTENCES
            taken, _ = _seconds(runtime, prompt, 1)
            reads.append(len(runtime.tokens(prompt)) / taken)
            first, _ = _seconds(runtime, _STORY, 1)
            whole, tokens = _seconds(runtime, _STORY, _GENERATED + 1)
            if tokens < 2:
                raise StageError("the model ends its answer at once: there is nothing to measure", where=str(folder))
            answers.append((tokens - 1) / max(whole - first, 1e-9))
    medians = (statistics.median(values) for values in (loads, reads, answers))
    return dict(zip(_UNITS, medians, strict=True)) | {"threads": cores()}


def _loaded(subject: Subject) -> Runtime:
    """With the image encoder, which transformers loads at once and our runtime for llama.cpp with the first image."""
    from stages.runtimes.llamacpp import LlamaCppRuntime

    runtime = open_runtime(subject)
    if isinstance(runtime, LlamaCppRuntime):
        runtime.load_encoder()
    return runtime


def _seconds(runtime: Runtime, prompt: str, tokens: int) -> tuple[float, int]:
    """What an answer of so many tokens takes, and how many there were."""
    from stages.runtimes.runtime import Request

    started = time.perf_counter()
    response = runtime.generate([Request(prompt, max_new_tokens=tokens)])[0]
    return time.perf_counter() - started, len(response.tokens)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measured(Path(sys.argv[1]))) + "\n")
