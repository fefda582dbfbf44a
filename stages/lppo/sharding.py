"""Frozen weights in parts, one in each process (FSDP2, `torch.distributed.fsdp.fully_shard`).

Each decoder block's weights are put together while it computes and let go again. What is trained, embeddings, head and
projector are whole in every process: they are small, and gradients, checkpoints and merging stay as they are.

A pass of the trunk then takes all processes, but they do not need equally many: one ends its answers sooner, or has an
exit less to validate. So a pass is announced, and whoever is done, that is, waits to exchange numbers, passes a single
token through the trunk until all others are done, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar, cast
from weakref import WeakMethod

from artifacts.errors import StageError
from stages.lppo.workers import Accelerated, Alone, Workers
from stages.resources import Team

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

T = TypeVar("T")

_DONE, _PASS, _PASS_AND_BACK = 0, 1, 2
CROSSING: Final = ("mllama",)
"""Families whose trunk leaves blocks out where there is no image beside, as in the passes above."""


class Shards(Accelerated):
    """Workers that hold parts of one policy's weights.

    Attributes:
        parameters, here: of the sharded weights, in all and in this process.
    """

    parameters = 0
    here = 0

    def __init__(self, team: Team, device: str):
        super().__init__(team, device)
        self._device = device
        self._token: WeakMethod[Callable[[bool], None]] | None = None

    def split(self, model: PreTrainedModel, trunk: PeftModel, token: Callable[[bool], None]) -> None:
        """Shard the decoder blocks of `trunk`, which is in `model`, and put everything on this process's device.

        Args:
            token: a method that passes one token through the trunk, and its gradient back if asked to.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        base = cast("PreTrainedModel", trunk.get_base_model())
        blocks = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
        if not blocks:
            raise StageError(
                f"the decoder blocks of {type(base).__name__} are not known, so its weights cannot be sharded",
                way_out="leave sharding out of resources",
            )
        mesh = init_device_mesh(self._device.partition(":")[0], (self.size,))
        trained = {parameter for parameter in trunk.parameters() if parameter.requires_grad}
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=trained)
        parts = [parameter for parameter in trunk.parameters() if isinstance(parameter, DTensor)]
        # The root has nothing of its own; it makes blocks fetch ahead, and let go of their weights.
        whole = {parameter for parameter in trunk.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(base, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        model.to(self._device)
        self.parameters = sum(part.numel() for part in parts)
        self.here = sum(part.to_local().numel() for part in parts)
        self._token = WeakMethod(token)  # the policy may go before these do

    def begin(self, gradient: bool) -> None:
        """Announce a pass of the trunk; with `gradient`, one whose gradient will be passed back before the next."""
        mine = _PASS_AND_BACK if gradient else _PASS
        agreed = self._announce(mine)
        if agreed != mine:
            raise StageError("processes that share weights do not do the same", why=f"{mine} here, {agreed} elsewhere")

    def total(self, value: torch.Tensor) -> torch.Tensor:
        self._finish()
        return super().total(value)

    def everyone(self, items: Sequence[T]) -> list[T]:
        self._finish()
        return super().everyone(items)

    def meet(self) -> None:
        self._finish()
        super().meet()

    def _finish(self) -> None:
        """Keep the others company until they are done."""
        token = None if self._token is None else self._token()
        while token is not None and (kind := self._announce(_DONE)) != _DONE:
            token(kind == _PASS_AND_BACK)

    def _announce(self, kind: int) -> int:
        import torch

        value = torch.tensor(kind, device=self._device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value)


def workers_of(team: Team, device: str) -> Workers:
    """How this process works with the others, if there are any."""
    if team.size == 1:
        return Alone()
    return Shards(team, device) if team.sharding == "fsdp" else Accelerated(team, device)
