"""One type for each group of tensors, the least lost in a given number of bytes: integer programming (HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from artifacts.errors import StageError
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_ALIGNED: Final = 32  # bytes
_SECONDS: Final = 120.0  # for the solver; what it has by then is near enough
_GAP: Final = 1e-3  # of the least cost


@dataclass(frozen=True)
class Weighing:
    """What a loss counts: in shares of what another file loses, refusals as a whole `refusal_weight` times.

    Attributes:
        text, refusal: KL that counts as 1. moved: of refusals' log-odds, what counts as 1, by kind.
        already: how far those are moved by what single groups do not show, by kind.
    """

    refusal_weight: float = 1.0
    text: float = 1.0
    refusal: float = 1.0
    moved: tuple[float, ...] = ()
    already: tuple[float, ...] = ()

    def cost(self, option: Option) -> float:
        return option.cost.text / self.text + self.refusal_weight * option.cost.refusal / self.refusal


def nothing_fits(least: int, limit: int) -> StageError:
    return StageError(
        f"no choice of types fits: the tensors may take {max(limit, 0)} bytes",
        why=f"the smallest types come to {least}",
        way_out=f"raise the target, or the device's memory, by {least - limit} bytes, leave out layers, or start from "
        "a smaller model",
    )


def solve(options: Sequence[Sequence[Option]], limit: int, weighing: Weighing) -> list[int]:
    """Which option of each group: the least sum of costs whose bytes are within the limit.

    To the costs of the options comes, for each kind of refusal, how far the moves of all options together take its
    log-odds from where they were, to whichever side: one more variable, at least as large as both signs of the sum.

    Raises:
        StageError: nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack

    least = sum(min(option.nbytes for option in few) for few in options)
    if least > limit:
        raise nothing_fits(least, limit)
    flat = [option for few in options for option in few]
    owner = [place for place, few in enumerate(options) for _ in few]
    kinds = len(weighing.moved)
    costs = np.array(
        [weighing.cost(option) for option in flat]
        + [weighing.refusal_weight / (kinds * max(moved, 1e-9)) for moved in weighing.moved]
    )

    def alone(rows: csr_matrix) -> csr_matrix:
        """Constraints of the options, none of which is about the variables for moves."""
        return hstack([rows, csr_matrix((rows.shape[0], kinds))]).tocsr()

    constraints = [
        LinearConstraint(alone(csr_matrix((np.ones(len(flat)), (owner, range(len(flat)))))), 1, 1),
        LinearConstraint(
            alone(csr_matrix([[option.nbytes // _ALIGNED for option in flat]], dtype=float)), -np.inf, limit // _ALIGNED
        ),
    ]
    for kind, before in enumerate(weighing.already):
        moves, taken = [option.moves[kind] for option in flat], [float(other == kind) for other in range(kinds)]
        constraints.append(LinearConstraint(np.array([*moves, *(-one for one in taken)]), -np.inf, -before))
        constraints.append(LinearConstraint(np.array([*moves, *taken]), -before, np.inf))
    found = milp(
        costs / max(float(costs[: len(flat)].max()), 1e-30) * 1e3,
        integrality=np.array([1] * len(flat) + [0] * kinds),
        bounds=Bounds(0, np.array([1.0] * len(flat) + [np.inf] * kinds)),
        constraints=constraints,
        options={"mip_rel_gap": _GAP if kinds else 0.0, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise StageError("the solver found no choice of types", why=str(found.message), way_out="change the target")
    start, chosen = 0, []
    for few in options:
        chosen.append(int(np.argmax(found.x[start : start + len(few)])))
        start += len(few)
    return chosen


@dataclass(frozen=True)
class Choice:
    """What was chosen: types by tensor.

    Attributes:
        expected: the KL that the sum over groups promises; None: not all of them were looked at in these types.
        moves: of refusals' log-odds, by kind, as far as the groups promise.
    """

    types: Mapping[str, str]
    groups: Mapping[str, str]
    expected: Divergence | None
    moves: tuple[float, ...] = ()


def choose(options: Mapping[Group, Sequence[Option]], limit: int, weighing: Weighing) -> Choice:
    """The types of all tensors in the groups.

    Raises:
        StageError: nothing fits.
    """
    few = list(options.values())
    picked = [one[place] for one, place in zip(few, solve(few, limit, weighing), strict=True)]
    pairs = list(zip(options, picked, strict=True))
    return Choice(
        {name: option.type for group, option in pairs for name in group.tensors},
        {group.name: option.type for group, option in pairs},
        Divergence(sum(option.cost.text for option in picked), sum(option.cost.refusal for option in picked)),
        tuple(sum(option.moves[kind] for option in picked) for kind in range(len(picked[0].moves))),
    )
