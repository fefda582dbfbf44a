"""The baseline that reviewers of the paper asked for: supervised fine-tuning on refusals, a random exit a sample.

Harmful prompts get a refusal as target; harmless ones what the original model says at its default exit (or the set's
own answer), visual questions the right word. Same scenes, adapter, rounding and checks as l-ppo; cross-entropy of the
target tokens instead of rewards.
"""

from __future__ import annotations

from stages.lppo.batches import generator, minibatches
from stages.lppo.learner import Learner, StepReport, exit_means
from stages.lppo.params import SFTParams
from stages.lppo.policy import Policy
from stages.lppo.sampler import SceneSampler
from stages.lppo.targets import States, Targets, add_gradient, counted
from stages.lppo.workers import Workers


class SFT(Learner):
    """Cross-entropy on targets."""

    def __init__(
        self,
        policy: Policy,
        sampler: SceneSampler,
        states: States,
        params: SFTParams,
        *,
        default_exit: int,
        seed: int,
        workers: Workers,
    ):
        super().__init__(policy, sampler, states, params, seed=seed, workers=workers)
        self.targets = Targets(
            policy,
            states,
            default_exit=default_exit,
            max_new_tokens=params.max_new_tokens,
            answers=params.answers,
        )
        self._params = params

    def step(self, number: int) -> StepReport:
        import torch

        params, workers = self._params, self._workers
        scenes = self.sampler.scenes(number)
        (batch,) = minibatches(len(scenes), 1, generator(self._seed, number))
        mine = batch[workers.rank :: workers.size]
        prefixes, targets = self.targets([scenes[scene] for scene in mine])
        rows = counted(targets)
        among = max(1.0, float(workers.total(rows.sum().to(torch.float64))))
        first: torch.Tensor | None = None
        contrasted = 0.0
        for epoch in range(params.epochs):
            surprise = add_gradient(
                self.policy, prefixes, targets, list(range(len(mine))), params.micro_batch, among=among
            )
            first = surprise if first is None else first
            contrasted += self.contrast(number, epoch, params.epochs)
            self.descend()
        assert first is not None
        means = (first / rows.clamp(min=1)).tolist()
        by_scene = sorted(workers.everyone(list(zip(mine, means, strict=True))))
        exits = exit_means(scenes, [{"exit_loss": mean} for _, mean in by_scene])
        metrics = {"loss": float(workers.total(first.sum())) / among, "lr": self.lr}
        if params.contrast:
            metrics["contrast_loss"] = contrasted / params.epochs
        return StepReport(number + 1, scenes, [], metrics, exits)
