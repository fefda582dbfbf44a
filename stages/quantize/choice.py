"""One type for each group of tensors, the least lost in a given number of bytes: integer programming (HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from artifacts.errors import StageError
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence

_ALIGNED: Final = 32  # bytes
_SECONDS: Final = 120.0  # for the solver; what it has by then is near enough
_GAP: Final = 1e-3  # of the least sum of costs


@dataclass(frozen=True)
class Weighing:
    """What a nat of KL counts, on ordinary text and on refusals."""

    text: float
    refusal: float

    def cost(self, loss: Divergence) -> float:
        return loss.text * self.text + loss.refusal * self.refusal


def nothing_fits(least: int, limit: int) -> StageError:
    return StageError(
        f"no choice of types fits: the tensors may take {max(limit, 0)} bytes",
        why=f"the smallest types come to {least}",
        way_out=f"raise the target, or the device's memory, by {least - limit} bytes, leave out layers, or start from "
        "a smaller model",
    )


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Which option of each group: the least sum of costs whose bytes are within the limit.

    Args:
        costs, sizes: by group, of each of its options; sizes in bytes.

    Raises:
        StageError: nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    least = sum(map(min, sizes))
    if least > limit:
        raise nothing_fits(least, limit)
    flat = np.array([cost for few in costs for cost in few])
    owner = [place for place, few in enumerate(costs) for _ in few]
    bytes_of = [[size // _ALIGNED for few in sizes for size in few]]
    found = milp(
        flat / max(float(np.abs(flat).max()), 1e-30) * 1e3,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_matrix((np.ones(len(flat)), (owner, range(len(flat))))), 1, 1),
            LinearConstraint(csr_matrix(bytes_of, dtype=float), -np.inf, limit // _ALIGNED),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise StageError("the solver found no choice of types", why=str(found.message), way_out="change the target")
    start, chosen = 0, []
    for few in costs:
        chosen.append(int(np.argmax(found.x[start : start + len(few)])))
        start += len(few)
    return chosen


@dataclass(frozen=True)
class Choice:
    """What was chosen: types by tensor.

    Attributes:
        expected: the KL that the sum over groups promises; None: not all of them were looked at in these types.
    """

    types: Mapping[str, str]
    groups: Mapping[str, str]
    expected: Divergence | None


def choose(options: Mapping[Group, Sequence[Option]], limit: int, weighing: Weighing) -> Choice:
    """The types of all tensors in the groups, as if what groups lose added up.

    Raises:
        StageError: nothing fits.
    """
    few = list(options.values())
    costs = [[weighing.cost(option.cost) for option in some] for some in few]
    places = solve(costs, [[option.nbytes for option in some] for some in few], limit)
    picked = {group: some[place] for (group, some), place in zip(options.items(), places, strict=True)}
    return Choice(
        {name: option.type for group, option in picked.items() for name in group.tensors},
        {group.name: option.type for group, option in picked.items()},
        Divergence(
            sum(option.cost.text for option in picked.values()), sum(option.cost.refusal for option in picked.values())
        ),
    )
