"""The processes that share one training. Each answers for its own scenes; every number that decides is of all of them.

Gradients are summed by hand after the backward passes: only the adapter's are exchanged, a few megabytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast

from stages.resources import Team

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# A process that ends is noticed at once by whoever started it; this is for one that lives and never comes.
_PATIENCE: Final = timedelta(hours=2)


class Workers(Protocol):
    """`rank` of `size` processes."""

    rank: int
    size: int

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, the same bits in each."""

    def everyone(self, items: Sequence[T]) -> list[T]:
        """What every process has, in the order of ranks."""

    def meet(self) -> None:
        """Wait until all are here: what any of them has written before can be read after it."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def everyone(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def meet(self) -> None: ...


class Accelerated:
    """One of several processes, on top of `accelerate`: gloo between processors, NCCL between GPUs.

    Each element of a sum is added up in one place and handed to all, by either library: the same bits everywhere.

    Args:
        device: of this process, see `stages.resources.device_of`.
    """

    def __init__(self, team: Team, device: str):
        from accelerate import PartialState

        self.rank = team.rank
        self.size = team.size
        if sys.platform == "linux":  # all are on this machine; by default gloo looks its host name up
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._state = PartialState(
            cpu=device == "cpu",
            backend="gloo" if device == "cpu" else "nccl",
            init_method=f"file://{team.meeting}",
            rank=team.rank,
            world_size=team.size,
            timeout=_PATIENCE,
        )

    def total(self, value: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import reduce

        here = value.detach().to(self._state.device)
        return cast("torch.Tensor", reduce(here, "sum")).to(value.device)

    def everyone(self, items: Sequence[T]) -> list[T]:
        from accelerate.utils import gather_object

        return cast("list[T]", gather_object(list(items)))

    def meet(self) -> None:
        self._state.wait_for_everyone()


def agree(workers: Workers, reason: str | None) -> str | None:
    """The first reason that any process has; where one stops, all must, or they would wait for each other."""
    return next(iter(workers.everyone([] if reason is None else [reason])), None)


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
