"""What each group of tensors costs in each type: measured in one type, computed for the others.

- KL: each group alone is rounded to one type by libggml, and the KL of next-token distributions is measured, on
  ordinary text and on the tokens of refusals (`sensitivity`). KL grows with the square of the change, so for other
  types it is scaled by the error that each leaves in the weights, columns weighed by the importance matrix;
- how the log-odds of refusals move, those of first tokens and of the others: gradient times change, for every type by
  itself, since that has a sign.

Only calibration articles and training prompts are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from artifacts.disk import write_atomically
from artifacts.errors import StageError
from artifacts.manifest import canonical_json
from stages.quantize.sensitivity import Divergence
from stages.quantize.types import EMBEDDING, OUTPUT
from stages.quantize.workbench import Workbench
from stages.runtimes.rounding import NEED_IMATRIX, TYPES, row_type

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
"""Of matrices, by GGUF name, in ggml's order: the row length comes first."""

_ALIGNED: Final = 32  # bytes
_BELOW, _ABOVE = 2.0, 4.5  # bits a weight
ANCHOR: Final = "Q4_0"  # what KL is measured in: quick to round to, and every row of 32 numbers allows it
_NOTED: Final = "sensitivity.json"
_PARTS: Final = (
    ("attn_q", "attn_k"),
    ("attn_qkv",),
    ("attn_v",),
    ("attn_output",),
    ("ffn_gate", "ffn_up"),
    ("ffn_down",),
)


@dataclass(frozen=True)
class Group:
    """Tensors that get one type. `first`: the first block with one of them; None: it is the embeddings or the head."""

    name: str
    tensors: tuple[str, ...]
    first: int | None


@dataclass(frozen=True)
class Option:
    """A group in one type."""

    type: str
    nbytes: int  # in the file
    cost: Divergence
    moves: tuple[float, ...] = ()  # of refusals' log-odds, by kind


def groups_of(shapes: Shapes, blocks: int) -> list[Group]:
    """The groups of a model with these matrices; `blocks` neighbouring ones share theirs."""
    found: list[Group] = []
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1)
    for first in range(0, depth, blocks):
        inside = range(first, min(first + blocks, depth))
        for parts in _PARTS:
            names = [f"blk.{block}.{part}.weight" for block in inside for part in parts]
            if present := tuple(name for name in names if name in shapes):
                found.append(Group(f"blk.{first}.{'+'.join(parts)}", present, first))
    found += [Group(name, (name,), None) for name in (EMBEDDING, OUTPUT) if name in shapes]
    return found


def candidates(width: int, *, imatrix: bool) -> list[str]:
    """Types that rows of that length allow, without any fallback."""
    return [type for type in TYPES if row_type(type, width) == type and (imatrix or type not in NEED_IMATRIX)]


def least_bytes(shapes: Shapes, groups: Sequence[Group], *, imatrix: bool, range: Range | None = None) -> int:
    """What the groups take at least."""
    return sum(
        min(_bytes(type, group, shapes) for type in _possible(group, shapes, imatrix=imatrix, range=range or Range()))
        for group in groups
    )


@dataclass(frozen=True)
class Range:
    """Bits a weight of the types that are worth a look."""

    least: float = 0.0
    most: float = 32.0

    def holds(self, type: str) -> bool:
        return self.least <= _bits(type) <= self.most


def range_of(shapes: Shapes, groups: Sequence[Group], limit: int, *, imatrix: bool) -> Range:
    """Not far below, nor far above what there is room for on average."""
    weights = sum(int(np.prod(shapes[name])) for group in groups for name in group.tensors)
    mean = 8 * limit / weights
    found = Range(mean - _BELOW, mean + _ABOVE)
    return found if least_bytes(shapes, groups, imatrix=imatrix, range=found) <= limit else Range()


def measure(
    bench: Workbench,
    scratch: Path,
    shapes: Shapes,
    groups: Sequence[Group],
    range: Range,
    tell: Callable[[float], None],
) -> dict[Group, list[Option]]:
    """What each group costs in each type of `range` that its rows allow.

    A group that was measured before a crash is not measured again: what is known lies in the scratch folder.

    Raises:
        StageError: the model is not built as decoders are.
    """
    if unknown := [name for group in groups for name in group.tensors if name not in bench.weights]:
        raise StageError(f"{unknown[0]} is no layer of its own in this model", way_out="name a type instead of auto")
    noted = _noted(scratch)
    gradients: list[dict[str, torch.Tensor]] | None = None
    found: dict[Group, list[Option]] = {}
    for done, group in enumerate(groups):
        known = all(bench.columns(name) is not None for name in group.tensors)
        possible = _possible(group, shapes, imatrix=known, range=range)
        note = noted.get(group.name)
        if note is None or not {ANCHOR, *possible} <= note.errors.keys():
            gradients = _gradients(bench, groups) if gradients is None else gradients
            note = noted[group.name] = _measured(bench, group, {ANCHOR, *possible}, gradients)
            _note(scratch, noted)
        scale = {type: note.errors[type] / max(note.errors[ANCHOR], 1e-30) for type in possible}
        found[group] = [
            Option(
                type,
                _bytes(type, group, shapes),
                Divergence(note.kl[0] * scale[type], note.kl[1] * scale[type]),
                tuple(note.moves[type]),
            )
            for type in possible
        ]
        tell((done + 1) / len(groups))
    return found


@dataclass(frozen=True)
class _Note:
    """What was measured of a group."""

    kl: Sequence[float]  # in the anchor: of text, of refusals
    errors: Mapping[str, float]  # by type: squared change of the weights, columns weighed
    moves: Mapping[str, Sequence[float]]  # by type: of refusals' log-odds, by kind


def _gradients(bench: Workbench, groups: Sequence[Group]) -> list[dict[str, torch.Tensor]]:
    """Of each of the log-odds, by tensor."""
    names = [name for group in groups for name in group.tensors]
    found = bench.probe("train").gradients([bench.weights[name] for name in names])
    return [dict(zip(names, kind, strict=True)) for kind in found]


def _measured(
    bench: Workbench, group: Group, types: set[str], gradients: Sequence[Mapping[str, torch.Tensor]]
) -> _Note:
    errors, moves = dict.fromkeys(types, 0.0), {type: [0.0] * len(gradients) for type in types}
    anchored: dict[str, torch.Tensor] = {}
    for name in group.tensors:
        exact = bench.weights[name].detach().float()
        columns = bench.columns(name)
        for type in sorted(types):
            value = bench.rounded(name, type)
            if type == ANCHOR:
                anchored[name] = value
            change = value.to(exact.device) - exact
            errors[type] += _weighed(change, columns)
            for kind, gradient in enumerate(gradients):
                moves[type][kind] += float((gradient[name].float() * change).sum())
    with bench.holding(anchored):
        kl = bench.probe("train").divergence(group.first)
    return _Note((kl.text, kl.refusal), errors, moves)


def _weighed(change: torch.Tensor, columns: NDArray[np.float32] | None) -> float:
    """Squared, summed over the matrix."""
    import torch

    squares = change.double().square().sum(0)
    return float(squares.sum() if columns is None else squares @ torch.from_numpy(columns).to(squares))


def _possible(group: Group, shapes: Shapes, *, imatrix: bool, range: Range) -> list[str]:
    weighed = imatrix and group.first is not None  # importance matrices hold nothing of embeddings and head
    widths = {shapes[name][0] for name in group.tensors}
    lists = [candidates(width, imatrix=weighed) for width in widths]
    found = [type for type in lists[0] if all(type in others for others in lists[1:])]
    return [type for type in found if range.holds(type)] or found or ["F16"]


def _bits(type: str) -> float:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return 8 * int(size) / int(block)


def bytes_in(type: str, shape: tuple[int, ...]) -> int:
    """Of a tensor of that shape."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return int(np.prod(shape)) // int(block) * int(size)


def _bytes(type: str, group: Group, shapes: Shapes) -> int:
    return sum(padded(bytes_in(type, shapes[name])) for name in group.tensors)


def padded(nbytes: int) -> int:
    """What a tensor takes in the file."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _noted(scratch: Path) -> dict[str, _Note]:
    try:
        noted = json.loads((scratch / _NOTED).read_bytes())
        return {name: _Note(**note) for name, note in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _note(scratch: Path, noted: Mapping[str, _Note]) -> None:
    write_atomically(scratch / _NOTED, canonical_json({name: asdict(note) for name, note in noted.items()}), scratch)
