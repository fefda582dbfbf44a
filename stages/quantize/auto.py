"""`type: auto`: for each group of tensors the type that loses least, all together in a given number of bytes.

1. Groups: in each block (or some blocks together) queries and keys, values, the attention's output, gate and up, down;
   the embeddings, and the head where it is not the same matrix.
2. What each costs in each type, in KL and in how it moves refusals (`options`).
3. One type a group by integer programming (`choice`).
4. All of it is rounded together and measured. What the single groups did not show of the refusals' moves is a constant
   of the next round; after a few, the choice that does best on validation material is taken.
5. llama.cpp's own type of that size is measured on the same; where no choice does better both on text and on refusals,
   its types are taken. So a file is never worse than stock's as far as was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from artifacts.errors import StageError
from stages.models.spec import VisionSpec
from stages.quantize.choice import Choice, Weighing, choose, nothing_fits
from stages.quantize.known import matrix_digest, note_costs
from stages.quantize.options import (
    Group,
    Option,
    Range,
    Shapes,
    bytes_in,
    candidates,
    groups_of,
    least_bytes,
    measure,
    padded,
    range_of,
)
from stages.quantize.sensitivity import Divergence
from stages.quantize.types import EMBEDDING, FLOATS, OUTPUT, TYPES, Exact
from stages.quantize.workbench import AutoParams, Together, Workbench
from stages.runtimes.gguf_header import Header, read_header
from stages.runtimes.hollow import Tensor
from stages.runtimes.imatrix import Importance
from stages.runtimes.llamacpp_library import cache_type_of
from stages.runtimes.mixture import ALIASES, NEED_IMATRIX, Outline, outline_of, tensor_types
from stages.stage import Context

AUTO: Final = "AUTO"
_ALIGNED: Final = 32  # bytes
RESERVE: Final = 4096  # bytes, for the keys that the quantizer adds to the metadata
_ATTEMPTS: Final = 5
_ROUNDS: Final = 4
_MEASURING: Final = 0.8  # of the time, about
# What a choice is held against: llama.cpp's mixtures that people use.
_STOCK: Final = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K"),
    *("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
)


@dataclass(frozen=True)
class Chosen:
    """The types that the file gets, what they were measured to lose, and what llama.cpp's own type of that size does.

    `stock` "": none is small enough. Both are measured on validation material, all weights rounded together.
    """

    choice: Choice
    measured: Divergence
    stock: str = ""
    stock_measured: Divergence | None = None
    is_stock: bool = False
    left_free: int = 0  # bytes of the device's memory, since predictions err

    def recorded(self) -> dict[str, object]:
        """For the manifest."""
        found: dict[str, object] = {
            "groups": dict(self.choice.groups),
            **_figures("measured", self.measured),
        }
        if self.choice.expected is not None:
            found |= _figures("expected", self.choice.expected)
        if self.left_free:
            found["left_free"] = self.left_free
        if self.stock_measured is not None:
            found |= {"stock": self.stock, "is_stock": self.is_stock, **_figures("stock", self.stock_measured)}
        return found


def _figures(name: str, found: Divergence) -> dict[str, float]:
    return {f"{name}_kl_text": float(f"{found.text:.4g}"), f"{name}_kl_refusal": float(f"{found.refusal:.4g}")}


def automatic(
    context: Context,
    folder: Path,
    floats: Path,
    importance: Importance | None,
    params: AutoParams,
    target: int | None,
    vision: VisionSpec | None,
    progress: Callable[[float], None],
) -> Chosen:
    """The types for the checkpoint in `folder`, whose float GGUF is `floats`.

    Args:
        target: bytes that the file may have; None: as many as the device has room for (`prediction.room_in`),
            beside all else.

    Raises:
        StageError: nothing fits, or the model is not built as decoders are.
    """
    header = read_header(floats)
    shapes = header.matrices
    groups = groups_of(shapes, params.blocks)
    blocks = [name for group in groups if group.first is not None for name in group.tensors]
    weighed = importance is not None and all(name in importance for name in blocks)
    budget = None if target is not None else _Budget(context, floats, vision)
    limit = room(header, groups, target) if target is not None else _first_limit(budget, shapes, groups)
    copies = budget.copies if budget is not None else {}
    kinds = range_of(shapes, groups, limit, imatrix=weighed)
    if _least(shapes, groups, copies, kinds, imatrix=weighed) > limit:
        kinds = Range()
    least = _least(shapes, groups, copies, kinds, imatrix=weighed)
    if least > limit:
        raise nothing_fits(least, limit)
    bench = Workbench(context, folder, importance, params)
    options = measure(bench, context.scratch, shapes, groups, kinds, lambda done: progress(_MEASURING * done))
    note_costs(context.input("checkpoint").digest, options, matrix_digest(importance))
    options = {group: [_kept(option, group, copies) for option in few] for group, few in options.items()}
    search = Search(bench, options, shapes, outline_of(floats), importance, params.refusal_weight, copies)
    for attempt in range(_ATTEMPTS):
        progress(_MEASURING + (1 - _MEASURING) * attempt / _ATTEMPTS)
        chosen = search.best(limit)
        if budget is None:
            return chosen
        excess = budget.excess(chosen.choice.types, shapes)
        if excess <= 0:
            return replace(chosen, left_free=budget.left_free)
        limit -= excess
    raise StageError("no choice of types fits the device", way_out="name a target in bytes, or a larger device")


@dataclass
class Search:
    """The best types in so many bytes, by what was measured of single groups and of all together."""

    bench: Workbench
    options: Mapping[Group, Sequence[Option]]
    shapes: Shapes
    outline: Outline
    importance: Importance | None
    refusal_weight: float
    copies: Mapping[str, int] = field(default_factory=dict)  # bytes that the embeddings take again, by their type
    _stock: dict[str, Choice] = field(default_factory=dict)

    def best(self, limit: int, stock: str | None = None) -> Chosen:
        """Args:
            limit: bytes of the groups' tensors, with what `copies` says.
            stock: llama.cpp's type to be held against; None: the largest that fits.

        Raises:
            StageError: nothing fits.
        """
        stock = stock or self._largest_stock(limit)
        theirs = self._stock_choice(stock) if stock else None
        found = self._rounds(limit, theirs)
        judged = [(choice, self.bench.together(choice.types, "validation").kl) for choice in found]
        if stock is None or theirs is None:
            choice, measured = min(judged, key=lambda pair: _worst(pair[1], judged[0][1]))
            return Chosen(choice, measured)
        reference = self.bench.together(theirs.types, "validation").kl
        choice, measured = min(judged, key=lambda pair: _worst(pair[1], reference))
        if _worst(measured, reference) >= 1:
            return Chosen(theirs, reference, stock, reference, is_stock=True)
        return Chosen(choice, measured, stock, reference)

    def _rounds(self, limit: int, theirs: Choice | None) -> list[Choice]:
        """Choices, each with what was learned of the one before."""
        origin = self.bench.together({}, "train").log_odds
        weighing = Weighing(self.refusal_weight)
        if theirs is not None:
            weighing = self._weighed_by(self.bench.together(theirs.types, "train"), origin)
        found: list[Choice] = []
        for _ in range(_ROUNDS):
            choice = choose(self.options, limit, weighing)
            if any(choice.types == before.types for before in found):
                break
            found.append(choice)
            now = self.bench.together(choice.types, "train")
            if theirs is None and len(found) == 1:
                weighing = self._weighed_by(now, origin)
            pairs = zip(now.log_odds, origin, choice.moves, strict=True)
            already = tuple(odds - before - promised for odds, before, promised in pairs)
            weighing = Weighing(weighing.refusal_weight, weighing.text, weighing.refusal, weighing.moved, already)
        return found

    def _weighed_by(self, reference: Together, origin: Sequence[float]) -> Weighing:
        """In shares of what that file loses."""
        moved = tuple(max(abs(odds - before), 0.1) for odds, before in zip(reference.log_odds, origin, strict=True))
        kl = reference.kl
        return Weighing(self.refusal_weight, max(kl.text, 1e-9), max(kl.refusal, 1e-9), moved, (0.0,) * len(moved))

    def _largest_stock(self, limit: int) -> str | None:
        sizes = {type: self._bytes(self._stock_choice(type)) for type in _STOCK if self._possible(type)}
        return max((type for type in sizes if sizes[type] <= limit), key=lambda type: sizes[type], default=None)

    def _possible(self, type: str) -> bool:
        return self.importance is not None or type not in NEED_IMATRIX

    def _stock_choice(self, type: str) -> Choice:
        if type not in self._stock:
            every = tensor_types(self.outline, type, importance=self.importance)
            types = {name: every[name] for group in self.options for name in group.tensors}
            groups = {
                group.name: "/".join(dict.fromkeys(types[name] for name in group.tensors)) for group in self.options
            }
            self._stock[type] = Choice(types, groups, expected=None)
        return self._stock[type]

    def _bytes(self, choice: Choice) -> int:
        once = sum(padded(bytes_in(type, self.shapes[name])) for name, type in choice.types.items())
        return once + self.copies.get(choice.types.get(EMBEDDING, ""), 0)


def _worst(found: Divergence, reference: Divergence) -> float:
    """The larger of both losses, in shares of the reference's."""
    pairs = ((found.text, reference.text), (found.refusal, reference.refusal))
    return max(ours / theirs for ours, theirs in pairs if theirs > 0) if any(pair[1] > 0 for pair in pairs) else 1.0


def exact_of(choice: Choice, shapes: Shapes) -> Exact:
    """What llama.cpp is told: a file type for the metadata, and the type of every tensor."""
    weights: Counter[str] = Counter()
    for name, type in choice.types.items():
        if type not in FLOATS:
            weights[type] += int(np.prod(shapes[name]))
    named = (ALIASES.get(type, type) for type, _ in weights.most_common())
    return Exact(next((name for name in named if name in TYPES), "Q8_0"), choice.types)


class _Budget:
    """What a device has room for."""

    def __init__(self, context: Context, floats: Path, vision: VisionSpec | None) -> None:
        from stages.runtimes.prediction import room_in

        memory, self._tokens = context.device.get("memory"), context.device.get("context", 2048)
        if memory is None:
            raise StageError(
                "type: auto needs to know how large the file may be",
                why="the recipe names no device, and the stage no target",
                way_out="add `target: 90MB` to the stage, or `device: laptop-4gb` to the recipe",
            )
        self._room = room_in(memory)
        self.left_free = memory - self._room
        self._outline, self._vision = outline_of(floats), vision
        self._cache_type = cache_type_of(context.device)
        self.copies = _copies(self._outline.shapes)

    def excess(self, types: Mapping[str, str], shapes: Shapes) -> int:
        """Bytes that a model with these types takes too much; negative: that are left."""
        from stages.runtimes.prediction import predict_outline

        every = {name: types.get(name, "F16") for name in shapes}
        plan = predict_outline(self._outline, every, self._tokens, vision=self._vision, cache_type=self._cache_type)
        return plan.total - self._room


def _copies(shapes: Shapes) -> dict[str, int]:
    """Bytes of the second copy of embeddings that are the head, too, by type."""
    from stages.runtimes.prediction import second_copy

    if OUTPUT in shapes:
        return {}
    table = shapes[EMBEDDING]
    return {type: second_copy(Tensor(table, type)) for type in candidates(table[0], imatrix=False)}


def _kept(option: Option, group: Group, copies: Mapping[str, int]) -> Option:
    """With what it takes in memory, where that is more than in the file."""
    again = copies.get(option.type, 0) if EMBEDDING in group.tensors else 0
    return replace(option, nbytes=option.nbytes + again)


def _least(shapes: Shapes, groups: Sequence[Group], copies: Mapping[str, int], kinds: Range, *, imatrix: bool) -> int:
    """What the groups take at least, with the copy of the embeddings."""
    once = least_bytes(shapes, groups, imatrix=imatrix, range=kinds)
    looked_at = [type for type in copies if kinds.holds(type)] or list(copies)
    if not looked_at:
        return once
    sizes = {type: padded(bytes_in(type, shapes[EMBEDDING])) for type in looked_at}
    return once - min(sizes.values()) + min(size + copies[type] for type, size in sizes.items())


def _first_limit(budget: _Budget | None, shapes: Shapes, groups: Sequence[Group]) -> int:
    """What the groups may take if all else is as beside a model in Q8_0."""
    assert budget is not None
    types = {name: "Q8_0" if shapes[name][0] % _ALIGNED == 0 else "F16" for group in groups for name in group.tensors}
    taken = sum(padded(bytes_in(type, shapes[name])) for name, type in types.items())
    return taken + budget.copies.get(types[EMBEDDING], 0) - budget.excess(types, shapes)


def room(floats: Header, groups: Sequence[Group], target: int) -> int:
    """Bytes that the groups' tensors may take in a file of `target` bytes, which holds all else of the float file."""
    chosen = {name for group in groups for name in group.tensors}
    own = sum(padded(tensor.nbytes) for name, tensor in floats.tensors.items() if name in chosen)
    return target - (floats.path.stat().st_size - own) - RESERVE
