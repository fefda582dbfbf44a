"""The processes that share one training. Each answers for its own scenes; every number that decides is of all of them.

Gradients are summed by hand after the backward passes: only the adapter's are exchanged, a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Workers(Protocol):
    """`rank` of `size` processes."""

    rank: int
    size: int

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, the same bits in each."""

    def everyone(self, items: Sequence[T]) -> list[T]:
        """What every process has, in the order of ranks."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def everyone(self, items: Sequence[T]) -> list[T]:
        return list(items)


def sum_gradients(workers: Workers, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Gradients of all processes, in each; where one had nothing to do, zero."""
    import torch

    if workers.size == 1:
        return
    some = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
    summed = workers.total(flat)
    for parameter, part in zip(some, torch.split(summed, [p.numel() for p in some]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
