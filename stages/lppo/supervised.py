"""The baseline that reviewers of the paper asked for: supervised fine-tuning on refusals, a random exit a sample.

Harmful prompts get a refusal as target; harmless ones what the original model says at its default exit (or the set's
own answer), visual questions the right word. Same scenes, adapter, rounding and checks as l-ppo; cross-entropy of the
target tokens instead of rewards.
"""

from __future__ import annotations

import math

from stages.lppo.algorithm import new_optimizer
from stages.lppo.batches import generator, minibatches, of_scenes, parts
from stages.lppo.loop import Learner, StepReport
from stages.lppo.objective import DivergedError
from stages.lppo.params import SFTParams
from stages.lppo.policy import Policy
from stages.lppo.sampler import SceneSampler
from stages.lppo.targets import States, Targets, cross_entropy
from stages.lppo.workers import Workers, sum_gradients


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
        self.policy = policy
        self.sampler = sampler
        self.kl_coefficient = 0.0
        self.targets = Targets(
            policy,
            states,
            default_exit=default_exit,
            max_new_tokens=params.max_new_tokens,
            answers=params.answers,
        )
        self._params = params
        self._seed = seed
        self._workers = workers
        self.optimizer = new_optimizer(policy, params)

    def step(self, number: int) -> StepReport:
        import torch

        params, workers, policy = self._params, self._workers, self.policy
        scenes = self.sampler.scenes(number)
        (batch,) = minibatches(len(scenes), 1, generator(self._seed, number))
        mine = batch[workers.rank :: workers.size]
        prefixes, targets = self.targets([scenes[scene] for scene in mine])
        mask = targets.mask
        tokens = float(workers.total(mask.sum().to(torch.float64)))
        loss, by_scene = torch.zeros((), device=policy.device), torch.zeros(len(mine), device=policy.device)
        for epoch in range(params.epochs):
            for part in parts(list(range(len(mine))), params.micro_batch, mask):
                some = of_scenes(targets, part)
                if not bool(some.mask.any()):
                    continue
                surprise = cross_entropy(policy, prefixes[part], some)
                (surprise.sum() / max(1.0, tokens)).backward()  # type: ignore[no-untyped-call]
                if epoch == 0:
                    loss = loss + surprise.sum().detach() / max(1.0, tokens)
                    owner, _, _ = some.mask.nonzero(as_tuple=True)
                    by_scene[part] = torch.zeros(len(part), device=policy.device).index_add(0, owner, surprise.detach())
            parameters = policy.trained().values()
            sum_gradients(workers, parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, params.max_grad_norm))
            if not math.isfinite(norm):
                raise DivergedError(f"the gradient is {norm}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        means = (by_scene / mask.sum((1, 2)).clamp(min=1)).tolist()
        rows = sorted(workers.everyone(list(zip(mine, means, strict=True))))
        exits: dict[int, dict[str, float]] = {}
        for place, mean in rows:
            exits.setdefault(scenes[place].exit, {})["exit_loss"] = mean
        metrics = {"loss": float(workers.total(loss)), "lr": float(self.optimizer.param_groups[0]["lr"])}
        return StepReport(number + 1, scenes, [], metrics, exits)
