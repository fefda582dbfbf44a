"""Reward hacking is watched: what a policy does instead of learning is told, and stops training at a stated bound.

Refusing everything, babbling, repeating itself and falling silent all may pay while no one looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from artifacts.errors import StageError
from stages.lppo.params import Bounds

_STEPS: Final = 3  # a single step has too few responses to stop for
_WORDS: Final = 3


class Watch:
    """Keeps the last steps' signs."""

    def __init__(self, bounds: Bounds):
        most = {
            "over_refusal": bounds.max_over_refusal,
            "degenerate": bounds.max_degenerate,
            "repetition": bounds.max_repetition,
        }
        self._most = {name: limit for name, limit in most.items() if limit is not None}
        self._least = {} if bounds.min_length is None else {"response_length": bounds.min_length}
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=_STEPS) for name in (*self._most, *self._least)}

    @property
    def seen(self) -> dict[str, list[float]]:
        """The last steps' signs, copied: what a checkpoint keeps."""
        return {name: list(values) for name, values in self._seen.items()}

    def restore(self, seen: Mapping[str, Sequence[float]]) -> None:
        """Undo `seen`."""
        for name, values in self._seen.items():
            values.clear()
            values.extend(seen.get(name, ()))

    def see(self, step: int, signs: Mapping[str, float]) -> None:
        """Take in a step's signs.

        Raises:
            StageError: a bound is broken by the mean of three steps.
        """
        for name, seen in self._seen.items():
            if name not in signs:
                continue
            seen.append(signs[name])
            mean = sum(seen) / len(seen)
            if len(seen) < _STEPS:
                continue
            if mean > self._most.get(name, mean) or mean < self._least.get(name, mean):
                limit = self._most.get(name, self._least.get(name))
                sign = "max" if name in self._most else "min"
                raise StageError(
                    f"training stopped after step {step}: {name.replace('_', ' ')} is {mean:.2f}, the bound {limit:g}",
                    why="the policy earns its reward in a way that no one wants (mean of three steps)",
                    way_out=f"raise helpfulness, anchor or kl, or lower lr; or change bounds.{sign}_"
                    f"{name.removeprefix('response_')}",
                )


def repetition(texts: Sequence[str]) -> float:
    """Share of three-word sequences that their own text has said before; 0 where there are none."""
    repeated = total = 0
    for text in texts:
        words = text.lower().split()
        found = list(zip(*(words[i:] for i in range(_WORDS)), strict=False))
        total += len(found)
        repeated += len(found) - len(set(found))
    return repeated / total if total else 0.0
