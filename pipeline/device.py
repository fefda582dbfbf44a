"""Device profiles and the memory budget: what fits is decided before any work starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from artifacts.errors import StageError
from pipeline.yaml_source import plain, read_yaml

if TYPE_CHECKING:
    from stages.models.spec import ModelSpec

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

    Without `spec.quantization` the types are chosen while the recipe runs; then the smallest there are must fit.
    """
    from stages.runtimes.prediction import least_memory, predict_memory

    chosen = spec.quantization is None

    def need(spec: ModelSpec, context: int) -> int:
        return (least_memory if chosen else predict_memory)(spec, context, cache_type=budget.kv_cache).total

    try:
        needed = need(spec, budget.context)
        if needed <= budget.memory:
            return None
        fewer = {} if chosen else {kind: need(replace(spec, quantization=kind), budget.context) for kind in KINDS}
    except StageError:
        return None  # no llama.cpp here: `plan` says so
    what = f"{'no choice of types fits' if chosen else f'{spec.quantization} does not fit'} the device '{budget.name}'"
    why = (
        f"{'with the smallest that the shapes allow ' if chosen else ''}it needs {show_bytes(needed)} at a context of "
        f"{budget.context} tokens, the device allows {show_bytes(budget.memory)}"
    )
    fitting = [kind for kind in fewer if fewer[kind] <= budget.memory]
    if fitting:
        best = max(fitting, key=lambda kind: fewer[kind])
        return what, why, f"the largest type that fits is {best} ({show_bytes(fewer[best])}); or choose a larger device"
    if chosen:
        return what, why, _smaller(spec, budget, "the smallest types", need)
    kind = min(fewer, key=lambda kind: fewer[kind])
    return what, why, _smaller(replace(spec, quantization=kind), budget, kind, need)


def _smaller(spec: ModelSpec, budget: Device, types: str, need: Callable[[ModelSpec, int], int]) -> str:
    """What to change where no type fits, each change with its figure, and what all of them come to.

    Args:
        spec: with the smallest types, which are called `types`.
    """
    smallest, context, changes = need(spec, budget.context), budget.context, [types]

    def shown(size: int) -> str:
        return f"{show_bytes(size)}{' and fits' if size <= budget.memory else ''}"

    hints = [
        f"no type fits: {types} need {show_bytes(smallest)}"
        if spec.quantization is None
        else f"no type fits: the smallest, {types}, needs {show_bytes(smallest)}"
    ]
    shortest = _shortest_context(spec)
    if shortest < context:
        hints.append(f"with context: {shortest} it needs {shown(need(spec, shortest))}")
        changes.append(f"context: {shortest}")
        context = shortest
    least = spec
    if spec.vision is not None and spec.vision.default_exit > 1:
        least = spec.with_exit(1)
        exit = f"exit 1 instead of {spec.vision.default_exit}"
        hints.append(f"leaving the image encoder at {exit}, {shown(need(least, budget.context))}")
        changes.append("exit 1")
    reached = need(least, context)
    if len(changes) > 1:
        hints.append(f"the least that can be reached, with {', '.join(changes)}, is {shown(reached)}")
    if reached > budget.memory:
        hints.append("start from a smaller model")
    larger = next((name for name in device_names() if device(name).memory >= smallest), None)
    held = f"the smallest device that holds {types} is '{larger}'" if larger else f"no shipped device holds {types}"
    hints.append(held)
    return "; ".join(hints)


def _shortest_context(spec: ModelSpec) -> int:
    """Tokens that hold an image, a question and an answer, rounded as llama.cpp rounds."""
    image = spec.vision.image_tokens if spec.vision is not None else 0
    return -(-(image + _TALK) // _CELLS) * _CELLS


_TALK: Final = 128  # tokens of a short question and its answer
_CELLS: Final = 256  # llama.cpp rounds a context up to multiples of this
# Largest first; what a budget is searched over: none of them needs an importance matrix.
KINDS: Final = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
