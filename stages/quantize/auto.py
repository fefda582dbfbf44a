"""`type: auto`: for each group of tensors the type that loses least, all together in a given number of bytes.

1. Groups: in each block (or some blocks together) queries and keys, values, the attention's output, gate and up, down;
   the embeddings, and the head where it is not the same matrix.
2. What each costs in each type, in KL of next-token distributions (`options`).
3. One type a group by integer programming (HiGHS): the least sum of KL whose tensors fit, to the byte. KL of groups
   that are rounded together is close to the sum, as long as all of it is small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from artifacts.errors import StageError
from stages.models.spec import VisionSpec
from stages.quantize.options import (
    AutoParams,
    Group,
    Option,
    Shapes,
    bytes_in,
    floor_of,
    groups_of,
    least_bytes,
    measure,
    padded,
)
from stages.quantize.sensitivity import Divergence
from stages.quantize.types import ALIASES, FLOATS, TYPES, Exact
from stages.runtimes.gguf_header import Header, read_header
from stages.runtimes.imatrix import Importance
from stages.stage import Context

AUTO: Final = "AUTO"
_ALIGNED: Final = 32  # bytes
_RESERVE: Final = 4096  # bytes, for the keys that the quantizer adds to the metadata
_ATTEMPTS: Final = 5


@dataclass(frozen=True)
class Choice:
    """What was chosen: types by tensor, and the KL that it should come to."""

    types: Mapping[str, str]
    groups: Mapping[str, str]
    expected: Divergence

    def recorded(self) -> dict[str, object]:
        """For the manifest."""
        return {
            "groups": dict(self.groups),
            "expected_kl_text": float(f"{self.expected.text:.4g}"),
            "expected_kl_refusal": float(f"{self.expected.refusal:.4g}"),
        }


def automatic(
    context: Context,
    folder: Path,
    floats: Path,
    importance: Importance | None,
    params: AutoParams,
    target: int | None,
    vision: VisionSpec | None,
    progress: Callable[[float], None],
) -> Choice:
    """The types for the checkpoint in `folder`, whose float GGUF is `floats`.

    Args:
        target: bytes that the file may have; None: as many as the device has room for, beside all else.

    Raises:
        StageError: nothing fits, or the model is not built as decoders are.
    """
    header = read_header(floats)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if len(tensor.shape) > 1}
    groups = groups_of(shapes, params.blocks)
    blocks = [name for group in groups if group.first is not None for name in group.tensors]
    weighed = importance is not None and all(name in importance for name in blocks)
    budget = None if target is not None else _Budget(context, floats, vision)
    limit = room(header, groups, target) if target is not None else _first_limit(budget, shapes, groups)
    least = least_bytes(shapes, groups, imatrix=weighed)
    if least > limit:
        raise _nothing_fits(least, limit)
    floor = floor_of(shapes, groups, limit, imatrix=weighed)
    options = measure(context, folder, shapes, importance, params, floor, progress)
    for _ in range(_ATTEMPTS):
        choice = choose(options, limit, params.refusal_weight)
        excess = 0 if budget is None else budget.excess(choice.types, shapes)
        if excess <= 0:
            return choice
        limit -= excess
    raise StageError("no choice of types fits the device", way_out="name a target in bytes, or a larger device")


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
        from stages.runtimes.mixture import outline_of

        self._memory, self._tokens = context.device.get("memory"), context.device.get("context", 2048)
        if self._memory is None:
            raise StageError(
                "type: auto needs to know how large the file may be",
                why="the recipe names no device, and the stage no target",
                way_out="add `target: 90MB` to the stage, or `device: laptop-4gb` to the recipe",
            )
        self._outline, self._vision = outline_of(floats), vision

    def excess(self, types: Mapping[str, str], shapes: Shapes) -> int:
        """Bytes that a model with these types takes too much; negative: that are left."""
        from stages.runtimes.prediction import predict_outline

        assert self._memory is not None
        every = {name: types.get(name, "F16") for name in shapes}
        return predict_outline(self._outline, every, self._tokens, vision=self._vision).total - self._memory


def _first_limit(budget: _Budget | None, shapes: Shapes, groups: Sequence[Group]) -> int:
    """What the groups may take if all else is as beside a model in Q8_0."""
    assert budget is not None
    types = {name: "Q8_0" if shapes[name][0] % _ALIGNED == 0 else "F16" for group in groups for name in group.tensors}
    taken = sum(padded(bytes_in(type, shapes[name])) for name, type in types.items())
    return taken - budget.excess(types, shapes)


def _nothing_fits(least: int, limit: int) -> StageError:
    return StageError(
        f"no choice of types fits: the tensors may take {max(limit, 0)} bytes",
        why=f"the smallest types come to {least}",
        way_out=f"raise the target by {least - limit} bytes, leave out layers, or start from a smaller model",
    )


def room(floats: Header, groups: Sequence[Group], target: int) -> int:
    """Bytes that the groups' tensors may take in a file of `target` bytes, which holds all else of the float file."""
    chosen = {name for group in groups for name in group.tensors}
    own = sum(padded(tensor.nbytes) for name, tensor in floats.tensors.items() if name in chosen)
    return target - (floats.path.stat().st_size - own) - _RESERVE


def solve(options: Sequence[Sequence[Option]], limit: int, refusal_weight: float) -> list[int]:
    """Which option of each group: the least sum of costs whose bytes are within the limit. Exact.

    Raises:
        StageError: nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    least = sum(min(option.nbytes for option in few) for few in options)
    if least > limit:
        raise _nothing_fits(least, limit)
    flat = [option for few in options for option in few]
    owner = [place for place, few in enumerate(options) for _ in few]
    costs = np.array([option.cost.text + refusal_weight * option.cost.refusal for option in flat])
    one_each = csr_matrix((np.ones(len(flat)), (owner, range(len(flat)))))
    blocks = np.array([option.nbytes // _ALIGNED for option in flat], dtype=float)
    found = milp(
        costs / max(float(costs.max()), 1e-30) * 1e3,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_matrix(blocks), -np.inf, limit // _ALIGNED),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise StageError("the solver found no choice of types", why=str(found.message), way_out="change the target")
    start, chosen = 0, []
    for few in options:
        chosen.append(int(np.argmax(found.x[start : start + len(few)])))
        start += len(few)
    return chosen


def choose(options: Mapping[Group, Sequence[Option]], limit: int, refusal_weight: float) -> Choice:
    """The types of all tensors in the groups.

    Raises:
        StageError: nothing fits.
    """
    few = list(options.values())
    picked = [one[place] for one, place in zip(few, solve(few, limit, refusal_weight), strict=True)]
    pairs = list(zip(options, picked, strict=True))
    return Choice(
        {name: option.type for group, option in pairs for name in group.tensors},
        {group.name: option.type for group, option in pairs},
        Divergence(sum(option.cost.text for option in picked), sum(option.cost.refusal for option in picked)),
    )
