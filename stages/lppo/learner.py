"""The contract between a method of training and the loop around it: what it has to do, and what its steps tell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stages.lppo.contrast import contrast_loss
from stages.lppo.objective import DivergedError
from stages.lppo.params import TrainingParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Outcome
from stages.lppo.rollout import Scene
from stages.lppo.sampler import SceneSampler
from stages.lppo.targets import States
from stages.lppo.workers import Workers, sum_gradients

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepReport:
    """What one step has shown.

    Attributes:
        step: counted from 1.
        outcomes: by scene and response; empty where nothing was sampled.
        metrics: of the step. exits: exit -> metrics of its scenes.
        steps: how many there will be, as far as is known; 0: it is not.
    """

    step: int
    scenes: list[Scene]
    outcomes: list[list[Outcome]]
    metrics: Mapping[str, float]
    exits: Mapping[int, Mapping[str, float]]
    steps: int = 0


class Learner(ABC):
    """A method of training: what one step does.

    Args:
        states: of the scenes that `sampler` draws.
        value_lr: learning rate of the value head; 0 where there is nothing to fit.
    """

    calmer: ClassVar[str] = "lower lr, or take more prompts_per_step"
    """What to change where training diverges."""

    def __init__(
        self,
        policy: Policy,
        sampler: SceneSampler,
        states: States,
        params: TrainingParams,
        *,
        seed: int,
        workers: Workers,
        value_lr: float = 0.0,
        kl_coefficient: float = 0.0,
    ):
        self.policy = policy
        self.sampler = sampler
        self.kl_coefficient = kl_coefficient
        self.optimizer = _new_optimizer(policy, params.lr, value_lr)
        self._states = states
        self._contrasting = params.contrast
        self._at_once = params.micro_batch
        self._max_grad_norm = params.max_grad_norm
        self._seed = seed
        self._workers = workers

    def descend(self) -> None:
        """One optimizer step along the gradients of all processes, which are gone then.

        Raises:
            DivergedError: the gradient is not finite; the weights are as they were.
        """
        import torch

        parameters = self.policy.trained().values()
        sum_gradients(self._workers, parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def contrast(self, step: int, turn: int, turns: int) -> float:
        """Add the gradient of how answers begin, on the prompts of one of a step's `turns` gradients.

        Returns: its cross-entropy, the mean over these prompts of all processes; 0 where it counts for nothing.
        """
        import torch

        if not self._contrasting:
            return 0.0
        scenes, workers = self.sampler.contrasts(step, turn, turns), self._workers
        prompts = sum(len(scene.prompts) for scene in scenes)
        mine = scenes[workers.rank :: workers.size]
        found = torch.zeros((), device=self.policy.device)
        for start in range(0, len(mine), self._at_once):
            part = mine[start : start + self._at_once]
            loss = contrast_loss(self.policy, self._states(part, 1), part) / prompts
            (self._contrasting * loss).backward()  # type: ignore[no-untyped-call]
            found += loss.detach()
        return float(workers.total(found))

    @property
    def lr(self) -> float:
        """The adapter's learning rate at present."""
        return float(self.optimizer.param_groups[0]["lr"])

    @abstractmethod
    def step(self, number: int) -> StepReport:
        """One iteration, counted from 0, at the optimizer's present rates.

        Raises:
            DivergedError: something is not finite or too far away; weights may have changed.
        """

    def check(self, number: int) -> None:
        """Look at weights as step `number` would, without training them.

        Raises:
            DivergedError: no step could start from them.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.policy.trained().values()):
            raise DivergedError("a weight is not finite")


def exit_means(scenes: Sequence[Scene], signs: Sequence[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Signs by scene -> their means by exit."""
    grouped: dict[int, dict[str, list[float]]] = {}
    for scene, of_scene in zip(scenes, signs, strict=True):
        for name, value in of_scene.items():
            grouped.setdefault(scene.exit, {}).setdefault(name, []).append(value)
    return {exit: {name: mean(values) for name, values in found.items()} for exit, found in grouped.items()}


def _new_optimizer(policy: Policy, lr: float, value_lr: float) -> torch.optim.Optimizer:
    """Adam; the value head has a rate of its own, since it starts from nothing."""
    import torch

    adapter = [p for name, p in policy.trained().items() if name.startswith("adapter.")]
    groups = [
        {"params": adapter, "lr": lr, "initial_lr": lr},
        {"params": list(policy.value_head.parameters()), "lr": value_lr, "initial_lr": value_lr},
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0
