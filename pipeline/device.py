"""Device profiles and the memory budget: what fits is decided before any work starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from artifacts.errors import StageError
from pipeline.yaml_source import plain, read_yaml

if TYPE_CHECKING:
    from stages.models.spec import ModelSpec, VisionSpec
    from stages.runtimes.finished import GgufFiles

_UNITS: Final = {
    "": 1, "B": 1,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_bytes(value: object) -> object:
    """`"2GiB"` or `"1.5 GB"` to bytes; numbers pass through.

    Raises:
        ValueError: not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    factor = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{value!r} is not a size; write it like 2GiB, 800MiB or a number of bytes")
    return int(float(match.group(1)) * factor)


def show_bytes(count: float) -> str:
    """Bytes for people: `1.50 GiB`, `812 MiB`."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.0f} MiB" if count >= 1 << 20 else f"{count / (1 << 10):.0f} KiB"


ByteSize = Annotated[
    int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(gt=0)
]  # bytes; "2GiB" is understood


class Device(BaseModel):
    """A memory budget and a context length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "inline"
    memory: ByteSize = Field(description="What the model may take while it answers: a number of bytes, or 2GiB.")
    context: int = Field(default=2048, ge=64, description="Tokens of context that must fit into that memory.")
    kv_cache: Literal["F16", "Q8_0"] = Field(
        default="F16", description="How llama.cpp keeps keys and values; Q8_0 takes about half the memory of F16."
    )
    note: str = Field(default="", description="What this profile stands for.")

    def numbers(self) -> dict[str, int]:
        """What stages see of it: bytes and tokens; of the KV cache, bits a number where they are not 16."""
        bits = {"kv_cache_bits": 8} if self.kv_cache == "Q8_0" else {}
        return {"memory": self.memory, "context": self.context, **bits}


def _folder() -> Path:
    return Path(str(files("recipes"))) / "devices"


@cache
def device_names() -> tuple[str, ...]:
    """Every shipped profile, smallest budget first."""
    names = [path.stem for path in _folder().glob("*.yaml")]
    return tuple(sorted(names, key=lambda name: (device(name).memory, name)))


@cache
def device(name: str) -> Device:
    """The shipped profile of that name.

    Raises:
        KeyError: there is none.
    """
    path = _folder() / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not path.is_file():
        raise KeyError(name)
    return Device.model_validate({"name": name, **plain(read_yaml(path).data)})


def budget_problem(spec: ModelSpec, budget: Device) -> tuple[str, str, str] | None:
    """What is wrong, why, and the way out, if a GGUF does not fit; None when it fits or cannot be known here.

    Without `spec.quantization` the types are chosen while the recipe runs; then the smallest there are must fit, and a
    file that has been given a size must fit with that. The context must have room for an image, if the model sees any.
    """
    if (problem := _image_problem(_image_tokens(spec), budget)) is not None:
        return problem
    chosen = spec.quantization is None
    plain = replace(spec, tensor_types=())
    fewer: dict[str, int] = {}
    try:
        needed = _need(spec, budget)
        if needed <= _room(spec, budget):
            return _target_problem(spec, budget)
        if not chosen:
            fewer = _fewer(plain, budget)
    except StageError as error:
        if find_spec("llama_cpp") is None:
            return None  # `plan` says so
        # What cannot be laid out for this device cannot run there either.
        return error.what, error.why or "", error.way_out or "choose another type, or another kv_cache"
    what = f"{'no choice of types fits' if chosen else f'{spec.quantization} does not fit'} the device '{budget.name}'"
    free = budget.memory - _room(spec, budget)
    why = (
        f"{'with the smallest that the shapes allow ' if chosen else ''}it needs {show_bytes(needed)} at a context of "
        f"{budget.context} tokens, the device allows {show_bytes(budget.memory)}"
        + (f", of which {show_bytes(free)} stay free" if free else "")
    )
    fitting = [kind for kind in fewer if fewer[kind] <= budget.memory]
    if fitting:
        best = max(fitting, key=lambda kind: fewer[kind])
        alone = "" if not spec.tensor_types else ", without other types for single tensors"
        largest = f"the largest type that fits is {best} ({show_bytes(fewer[best])}{alone})"
        return what, why, f"{largest}; or choose a larger device"
    if chosen:
        return what, why, _smaller(spec, budget, "the smallest types")
    kind = min(fewer, key=lambda kind: fewer[kind])
    return what, why, _smaller(replace(plain, quantization=kind), budget, kind)


def files_problem(files: GgufFiles, budget: Device, limit: int) -> tuple[str, str, str] | None:
    """The same of a GGUF that is there, of which nothing is chosen any more: when it takes more than `limit` bytes."""
    from stages.runtimes.gguf_header import read_vision_header
    from stages.runtimes.prediction import predict_files

    try:
        tokens = read_vision_header(files.mmproj).image_tokens if files.mmproj is not None else 0
        if (problem := _image_problem(tokens, budget)) is not None:
            return problem
        needed = predict_files(files.model, files.mmproj, budget.context, cache_type=budget.kv_cache)
    except StageError:
        return None  # `plan` says so
    if needed.total <= limit:
        return None
    return (
        f"{files.model.name} takes more than the gate `memory` allows",
        f"it needs {show_bytes(needed.total)} at a context of {budget.context} tokens, {show_bytes(needed.kv_cache)} "
        f"of it for keys and values; the gate allows {show_bytes(limit)}",
        "start from a smaller file, shorten the context, choose a larger device, or leave the gate out",
    )


def _image_problem(tokens: int, budget: Device) -> tuple[str, str, str] | None:
    """What is wrong if the context has no room for an image of so many tokens; 0: the model sees none."""
    from stages.runtimes.memory import room_for_an_image

    if not tokens or budget.context >= room_for_an_image(tokens):
        return None
    return (
        f"a context of {budget.context} tokens has no room for an image",
        f"one takes {tokens} tokens: on the device '{budget.name}' nothing could be asked about it",
        f"set context to {_shortest_context(tokens)} or more, which also holds a question and its answer",
    )


def _fewer(spec: ModelSpec, budget: Device) -> dict[str, int]:
    """What it needs in each type that a budget is searched over, but in those that llama.cpp makes no file of."""
    found = {}
    for kind in kinds_for(spec):
        with suppress(StageError):
            found[kind] = _need(replace(spec, quantization=kind), budget)
    if not found:
        raise StageError("llama.cpp lays no file of this model out")
    return found


def _target_problem(spec: ModelSpec, budget: Device) -> tuple[str, str, str] | None:
    """What is wrong if a file whose size was given does not fit."""
    from stages.runtimes.prediction import largest_copy, least_memory, most_memory

    if spec.quantization is not None or spec.file_bytes is None:
        return None
    most = most_memory(spec, budget.context, budget.memory, cache_type=budget.kv_cache)
    if most is None or most.total <= budget.memory:
        return None
    fits = most.weights - (most.total - _room(spec, budget)) - largest_copy(spec.text)
    least = sum(least_memory(spec, budget.context, cache_type=budget.kv_cache).by_type.values())
    smaller = f"set target to {fits} or less, or " if fits >= least else ""
    return (
        f"target: a file of {show_bytes(spec.file_bytes)} does not fit the device '{budget.name}'",
        f"with all beside it it needs {show_bytes(most.total)}, the device allows {show_bytes(budget.memory)}",
        f"{smaller}leave target out: then the file becomes as large as fits",
    )


def gptq_problem(spec: ModelSpec, budget: Device) -> tuple[str, str, str] | None:
    """The same of a GPTQ checkpoint, of which only the weights are known: they alone must fit."""
    from stages.models.memory import gptq_bytes

    word = spec.quantization
    if word is None or (weights := gptq_bytes(spec)) <= budget.memory:
        return None
    bits, _, group = word.removeprefix("gptq-").partition("bit")
    fewer = {
        f"bits: {less}": gptq_bytes(replace(spec, quantization=f"gptq-{less}bit{group}"))
        for less in (4, 3, 2)
        if less < int(bits)
    }
    fitting = next((less for less in fewer if fewer[less] <= budget.memory), None)
    least = show_bytes(min(fewer.values(), default=weights))
    larger = next((name for name in device_names() if device(name).memory >= weights), None)
    held = f"the smallest device that holds these is '{larger}'" if larger else "no shipped device holds these"
    hint = (
        f"no bits fit: they take at least {least}; start from a smaller model, or drop blocks of this one"
        if fitting is None
        else f"with {fitting} they take {show_bytes(fewer[fitting])}"
    )
    return (
        f"{word} does not fit the device '{budget.name}'",
        f"its weights alone take {show_bytes(weights)}, the device allows {show_bytes(budget.memory)}",
        f"{hint}; {held}",
    )


def kinds_for(spec: ModelSpec) -> tuple[str, ...]:
    """The types that a budget is searched over, largest first; small ones only where there is an importance matrix."""
    return KINDS + SMALL_KINDS if spec.imatrix else KINDS


def _need(spec: ModelSpec, device: Device) -> int:
    from stages.runtimes.prediction import least_memory, predict_memory

    predict = least_memory if spec.quantization is None else predict_memory
    return predict(spec, device.context, cache_type=device.kv_cache).total


def _room(spec: ModelSpec, device: Device) -> int:
    """What a prediction may come to."""
    from stages.runtimes.prediction import room_in

    return room_in(device.memory) if spec.quantization is None else device.memory


def _smaller(spec: ModelSpec, budget: Device, types: str) -> str:
    """What to change where no type fits, each change with its figure, and what all of them come to.

    Args:
        spec: with the smallest types, which are called `types`.
    """

    def shown(spec: ModelSpec, device: Device) -> str:
        size = _need(spec, device)
        return f"{show_bytes(size)}{' and fits' if size <= _room(spec, budget) else ''}"

    chosen, smallest = spec.quantization is None, _need(spec, budget)
    searched = f"of {', '.join(kinds_for(spec))} the smallest, {types}, needs"
    hints = [f"no type fits: {f'{types} need' if chosen else searched} {show_bytes(smallest)}"]
    changes, least, small = [types], spec, budget
    for words, change in _changes(spec, budget):
        hints.append(f"with {words} it needs {shown(*change(spec, budget))}")
        changes.append(words)
        least, small = change(least, small)
    if len(changes) > 1:
        hints.append(f"the least that these changes reach, {', '.join(changes)}, is {shown(least, small)}")
    if not spec.imatrix:
        hints.append("an importance matrix allows smaller types")
    if _need(least, small) > _room(spec, budget):
        hints.append("start from a smaller model, or drop blocks of this one")
    larger = next((name for name in device_names() if _room(spec, device(name)) >= smallest), None)
    held = f"the smallest device that holds {types} is '{larger}'" if larger else f"no shipped device holds {types}"
    hints.append(held)
    return "; ".join(hints)


_Change = Callable[["ModelSpec", Device], tuple["ModelSpec", Device]]


def _changes(spec: ModelSpec, budget: Device) -> Iterator[tuple[str, _Change]]:
    """What a recipe may say otherwise, beside the type, and what becomes of model and device then."""

    def of_device(**values: object) -> _Change:
        return lambda spec, device: (spec, device.model_copy(update=values))

    shortest = _shortest_context(_image_tokens(spec))
    if shortest < budget.context:
        yield f"context: {shortest}", of_device(context=shortest)
    if budget.kv_cache == "F16" and spec.text.head_dim % _CACHE_BLOCK == 0:
        yield "kv_cache: Q8_0", of_device(kv_cache="Q8_0")
    if spec.vision is None:
        return
    if spec.vision.default_exit > 1:
        yield f"exit 1 instead of {spec.vision.default_exit}", lambda spec, device: (spec.with_exit(1), device)
    type = _smallest_encoder(spec.vision, spec.text.hidden_size)
    if type != spec.vision.quantization:
        yield f"mmproj_type: {type}", lambda spec, device: (_with_encoder(spec, type), device)


def _with_encoder(spec: ModelSpec, type: str) -> ModelSpec:
    assert spec.vision is not None
    return replace(spec, vision=replace(spec.vision, quantization=type))


def _smallest_encoder(vision: VisionSpec, width: int) -> str:
    """The type that makes the smallest mmproj; of several, the vision's own or else the first."""
    from stages.quantize.encoder import MmprojType
    from stages.runtimes.hollow import encoder_tensors

    def nbytes(type: str) -> int:
        return sum(tensor.nbytes for tensor in encoder_tensors(replace(vision, quantization=type), width).values())

    types: tuple[str, ...] = (vision.quantization, *get_args(MmprojType))
    return min(types, key=nbytes)


def _image_tokens(spec: ModelSpec) -> int:
    return spec.vision.image_tokens if spec.vision is not None else 0


def _shortest_context(image: int) -> int:
    """Tokens that hold an image of so many, a question and an answer, rounded as llama.cpp rounds."""
    return -(-(image + _TALK) // _CELLS) * _CELLS


_TALK: Final = 128  # tokens of a short question and its answer
_CELLS: Final = 256  # llama.cpp rounds a context up to multiples of this
_CACHE_BLOCK: Final = 32  # numbers; a head's width must be a multiple, or llama.cpp keeps no keys in Q8_0
# What a budget is searched over, about from the largest on: these need no importance matrix, the small ones do.
KINDS: Final = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
SMALL_KINDS: Final = ("IQ3_XXS", "IQ2_M", "IQ2_XXS", "IQ1_S")
