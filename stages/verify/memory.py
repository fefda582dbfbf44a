"""Memory of what ships: what the shapes predict, and the peak that a process of its own shows.

The measured peak differs by some tens of kilobytes between runs. It is rounded up to whole steps of 2 MiB, so that the
same files give the same verdict, and a gate errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from artifacts.errors import SourceError, StageError
from artifacts.measures import Measure
from stages.runtimes.gguf_parts import mmproj_file, model_file
from stages.runtimes.llamacpp_library import CacheType, cache_type_of
from stages.runtimes.memory import STEP
from stages.verify.scores import Answers

_CONTEXT: Final = 2048  # tokens, where the recipe names no device


def memory_rows(one: Answers, device: Mapping[str, int], *, measure: bool) -> list[Measure]:
    """`memory_predicted` and `memory_measured` in bytes, of one conversation that fills the device's context.

    Only a GGUF's memory is known; rows of what transformers runs have no value.
    """
    context, kept = device.get("context", _CONTEXT), cache_type_of(device)
    return [_predicted(one, context, kept), _measured(one, context, kept, measure=measure)]


def _predicted(one: Answers, context: int, kept: CacheType) -> Measure:
    from stages.runtimes.prediction import predict_files

    def row(value: float | None, note: str) -> Measure:
        return one.row("memory_predicted", value, unit="bytes", note=note)

    if one.subject.runtime != "llamacpp":
        return row(None, "memory is predicted for GGUF files only")
    model, mmproj = _files(one)
    try:
        plan = predict_files(model, mmproj, context, cache_type=kept)
    except (SourceError, StageError) as error:
        return row(None, f"the shapes of the GGUF cannot be read: {error}")
    return row(float(plan.total), f"context of {context} tokens{_kept(kept)}; from the files' shapes and types")


def _measured(one: Answers, context: int, kept: CacheType, *, measure: bool) -> Measure:
    from stages.runtimes.memory import measure_memory

    def row(value: float | None, note: str) -> Measure:
        return one.row("memory_measured", value, unit="bytes", note=note)

    if not measure:
        return row(None, "measure_memory is off")
    if one.subject.runtime != "llamacpp":
        return row(None, "memory is measured of GGUF files only")
    model, mmproj = _files(one)
    try:
        peak = measure_memory(model, mmproj, context, cache_type=kept)
    except StageError as error:
        return row(None, str(error))
    steps = f"rounded up to {STEP >> 20} MiB"
    return row(float(-(-peak // STEP) * STEP), f"peak of a process that fills {context} tokens{_kept(kept)}; {steps}")


def _kept(type: CacheType) -> str:
    return "" if type == "F16" else f", keys and values in {type}"


def _files(one: Answers) -> tuple[Path, Path | None]:
    """The language model, and the image encoder where there is one."""
    folder = one.subject.artifact.path
    return model_file(folder), mmproj_file(folder)
