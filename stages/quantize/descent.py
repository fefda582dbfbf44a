"""From a choice of types to better ones of the same size, along the gradient where all weights are rounded.

What groups lose alone does not add up to what they lose together (refusals lose several times the sum), so from a
choice that is measured as a whole, what another type of a group would change is reckoned to second order:

    gradient . (W_other - W_now)  +  caution * (what the group loses alone, in the other type and in the one it has)

The gradient, of both KLs on training material at the rounded weights, holds what all other groups do; the second term
is the curvature of the group's own change. One type a group is chosen by integer programming again, and measured. What
loses less is the next step's start; else less caution or more is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stages.quantize.choice import Choice, Weighing, solve
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence
from stages.quantize.types import FLOATS
from stages.quantize.workbench import Workbench

if TYPE_CHECKING:
    import torch

_STEPS: Final = 8
_CAUTIONS: Final = (1.0, 2.0, 4.0, 0.5, 0.25)  # as they are tried


@dataclass(frozen=True)
class Goal:
    """The sum of squares of both losses, in shares of what another file loses: the larger share counts more.

    Attributes:
        reference: what that file loses. refusal_weight: what refusals count beside ordinary text.
    """

    reference: Divergence
    refusal_weight: float

    def loss(self, found: Divergence) -> float:
        return self.slope(found).cost(found) / 2

    def slope(self, found: Divergence) -> Weighing:
        """What a nat more of either adds to the loss, from there."""
        text, refusal = max(self.reference.text, 1e-9), max(self.reference.refusal, 1e-9)
        return Weighing(2 * found.text / text**2, 2 * self.refusal_weight * found.refusal / refusal**2)

    def shares(self) -> Weighing:
        """What a nat of either is of what the other file loses."""
        return Weighing(1 / max(self.reference.text, 1e-9), self.refusal_weight / max(self.reference.refusal, 1e-9))


@dataclass(frozen=True)
class Descent:
    """Args:
    options: of each group. size: bytes that a group takes in these types.
    """

    bench: Workbench
    options: Mapping[Group, Sequence[Option]]
    size: Callable[[Group, Mapping[str, str]], int]
    goal: Goal

    def steps(self, start: Choice, limit: int, tell: Callable[[float], None]) -> list[Choice]:
        """The start, and choices of at most `limit` bytes, each losing less on training material than the last."""
        found, known = [start], [start.types]
        now = self.bench.together(start.types, "train")
        for step in range(_STEPS):
            slopes = self._slopes(found[-1], now)
            for caution in _CAUTIONS:
                tell((step + _CAUTIONS.index(caution) / len(_CAUTIONS)) / _STEPS)
                tried = self._tried(found[-1], slopes, now, caution, limit)
                if tried.types in known:
                    continue
                known.append(tried.types)
                measured = self.bench.together(tried.types, "train")
                if self.goal.loss(measured) < self.goal.loss(now):
                    found.append(tried)
                    now = measured
                    break
            else:
                return found
        return found

    def _slopes(self, choice: Choice, now: Divergence) -> dict[Group, list[float]]:
        """What each option adds to the goal's loss, to first order, in the place of what the group has."""
        weighing = self.goal.slope(now)
        gradients = self.bench.gradients(choice.types, weighing.text, weighing.refusal)
        found = {}
        for group, options in self.options.items():
            sums = [0.0] * len(options)
            for name in group.tensors:
                gradient, has = gradients[name].float(), self._values(name, choice.types[name])
                for place, option in enumerate(options):
                    if option.type != choice.types[name]:
                        change = self._values(name, option.type) - has
                        sums[place] += float((gradient * change.to(gradient)).sum())
            found[group] = sums
        return found

    def _values(self, name: str, type: str) -> torch.Tensor:
        return self.bench.weights[name].detach().float().cpu() if type in FLOATS else self.bench.rounded(name, type)

    def _tried(
        self, choice: Choice, slopes: Mapping[Group, Sequence[float]], now: Divergence, caution: float, limit: int
    ) -> Choice:
        weighing = self.goal.slope(now)
        costs, sizes = [], []
        for group, options in self.options.items():
            own = self._own(group, options, choice, weighing)
            costs.append(
                [0.0]  # as it is
                + [
                    slope + caution * (weighing.cost(option.cost) + own)
                    for option, slope in zip(options, slopes[group], strict=True)
                ]
            )
            sizes.append([self.size(group, choice.types), *(option.nbytes for option in options)])
        types, groups = dict(choice.types), dict(choice.groups)
        for (group, options), place in zip(self.options.items(), solve(costs, sizes, limit), strict=True):
            if place:
                types |= dict.fromkeys(group.tensors, options[place - 1].type)
                groups[group.name] = options[place - 1].type
        return Choice(types, groups, expected=None)

    @staticmethod
    def _own(group: Group, options: Sequence[Option], choice: Choice, weighing: Weighing) -> float:
        """What the group loses alone in the types that it has; those that were not looked at count nothing."""
        costs = {option.type: weighing.cost(option.cost) for option in options}
        return sum(costs.get(choice.types[name], 0.0) for name in group.tensors) / len(group.tensors)
