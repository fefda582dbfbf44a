"""Memory of what ships: what the shapes predict, and the peak that a process of its own shows.

The measured peak differs by some tens of kilobytes between runs. It is rounded up to whole steps of 8 MiB, so that the
same files give the same verdict, and a gate errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from artifacts.errors import StageError
from artifacts.measures import Measure
from stages.models.memory import predict_memory
from stages.models.spec import ModelSpec, TextSpec, VisionSpec
from stages.runtimes.gguf_header import Header, read_header, read_vision_header
from stages.runtimes.llamacpp import MMPROJ_NAME, MODEL_NAME
from stages.verify.scores import Answers

_CONTEXT: Final = 2048  # tokens, where the recipe names no device
_STEP: Final = 8 * 2**20  # bytes


def memory_rows(one: Answers, device: Mapping[str, int], *, measure: bool) -> list[Measure]:
    """`memory_predicted` and `memory_measured` in bytes, of one conversation that fills the device's context.

    Only a GGUF's memory is known; rows of what transformers runs have no value.
    """
    context = device.get("context", _CONTEXT)
    return [_predicted(one, context), _measured(one, context, measure=measure)]


def _predicted(one: Answers, context: int) -> Measure:
    def row(value: float | None, note: str) -> Measure:
        return one.row("memory_predicted", value, unit="bytes", note=note)

    if one.subject.runtime != "llamacpp":
        return row(None, "memory is predicted for GGUF files only")
    folder = one.subject.artifact.path
    try:
        spec = spec_of(folder)
        sizes = ((folder / MODEL_NAME).stat().st_size, _size(folder / MMPROJ_NAME))
        plan = predict_memory(spec, "F16", context, file_sizes=sizes)
    except (StageError, ValueError, KeyError) as error:
        return row(None, f"the shapes of the GGUF cannot be read: {error}")
    return row(float(plan.total), f"context of {context} tokens; from the files' sizes and shapes")


def _measured(one: Answers, context: int, *, measure: bool) -> Measure:
    from stages.runtimes.memory import measure_memory

    def row(value: float | None, note: str) -> Measure:
        return one.row("memory_measured", value, unit="bytes", note=note)

    if not measure:
        return row(None, "measure_memory is off")
    if one.subject.runtime != "llamacpp":
        return row(None, "memory is measured of GGUF files only")
    folder = one.subject.artifact.path
    mmproj = folder / MMPROJ_NAME
    try:
        peak = measure_memory(folder / MODEL_NAME, mmproj if mmproj.exists() else None, context)
    except StageError as error:
        return row(None, str(error))
    steps = f"rounded up to {_STEP >> 20} MiB"
    return row(float(-(-peak // _STEP) * _STEP), f"peak of a process that fills {context} tokens; {steps}")


def spec_of(folder: Path) -> ModelSpec:
    """The shapes of a GGUF and its mmproj, from the files themselves.

    Raises:
        SourceError: a file cannot be read. KeyError: a shape is not recorded.
    """
    header = read_header(folder / MODEL_NAME)
    architecture = header.architecture

    def number(key: str) -> int:
        return _number(header, f"{architecture}.{key}")

    heads = number("attention.head_count")
    text = TextSpec(
        layers=number("block_count"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_dim=header.tensors["blk.0.attn_q.weight"].shape[-1] // heads,
        vocab_size=max(header.tensors["token_embd.weight"].shape),
        tied_embeddings="output.weight" not in header.tensors,
    )
    if not (folder / MMPROJ_NAME).exists():
        return ModelSpec(family=architecture, text=text)
    seen = read_vision_header(folder / MMPROJ_NAME)
    vision = VisionSpec(
        layers=seen.blocks,
        hidden_size=_number(seen.header, "clip.vision.embedding_length"),
        intermediate_size=_number(seen.header, "clip.vision.feed_forward_length"),
        heads=_number(seen.header, "clip.vision.attention.head_count"),
        image_size=seen.image_size,
        patch_size=seen.patch_size,
        default_exit=seen.default_exit,
    )
    return ModelSpec(family=architecture, text=text, vision=vision)


def _number(header: Header, key: str) -> int:
    """A number of the header; the largest where there is one a layer."""
    value = header.fields[key]
    return max(cast("list[int]", value)) if isinstance(value, list | tuple) else int(cast("int", value))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
