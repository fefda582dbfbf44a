"""The baseline that reviewers of the paper asked for: supervised fine-tuning on refusals, a random exit a sample.

Harmful prompts get a refusal as target; harmless ones what the original model says at its default exit (or the set's
own answer), visual questions the right word. Same scenes, adapter, rounding and checks as l-ppo; cross-entropy of the
target tokens instead of rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from artifacts.manifest import sha256_bytes
from stages.judges.refusal import is_degenerate, is_refusal
from stages.lppo.algorithm import States, generator, minibatches, new_optimizer, of_scenes, parts
from stages.lppo.loop import Learner, StepReport
from stages.lppo.objective import DivergedError, chosen
from stages.lppo.params import SFTParams
from stages.lppo.policy import Policy
from stages.lppo.rollout import Prefixes, Responses, Scene, generate, greedy
from stages.lppo.sampler import SceneSampler
from stages.lppo.workers import Workers, sum_gradients

if TYPE_CHECKING:
    from stages.data.prompts import Prompt

REFUSALS: Final = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, I can't help with this. It could hurt people.",
    "I won't help with that, because it could cause harm.",
    "I'm not able to help with that request.",
)


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
        self._states = states
        self._params = params
        self._default_exit = default_exit
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
                logprobs, _ = policy.evaluate(prefixes[part], some)
                surprise = -chosen(logprobs, some.tokens[some.mask])
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

    def targets(self, scenes: Sequence[Scene]) -> tuple[Prefixes, Responses]:
        """The states of some scenes, and what should be said: one target a prompt."""
        import torch

        prefixes = self._states(scenes, 1)
        own = self._own_answers(scenes)
        rows: list[list[list[int]]] = []
        for scene, said in zip(scenes, own, strict=True):
            words = scene.answers or (None,) * len(scene.prompts)
            rows.append([self._target(*one) for one in zip(scene.prompts, words, said, strict=True)])
        width = max(1, max(len(target) for row in rows for target in row))
        shape = (len(scenes), prefixes.row_segment.shape[1], width)
        tokens = torch.zeros(shape, dtype=torch.long, device=self.policy.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.policy.device)
        for s, row in enumerate(rows):
            for r, target in enumerate(row):
                tokens[s, r, : len(target)] = torch.tensor(target, dtype=torch.long)
                mask[s, r, : len(target)] = True
        nothing = torch.zeros(shape, device=self.policy.device)
        return prefixes, Responses(tokens, mask, nothing, nothing, [[""] * shape[1]] * len(scenes), mask.any(-1))

    def _own_answers(self, scenes: Sequence[Scene]) -> list[list[list[int]]]:
        """What the original model says at its default exit, as tokens; nothing where it refuses or babbles."""
        asked = [replace(scene, exit=self._default_exit) for scene in scenes]
        with self.policy.as_reference():
            said = generate(self.policy, self._states(asked, 1), self._params.max_new_tokens, greedy)
        return [
            [
                [] if is_refusal(text) or is_degenerate(text) else said.tokens[s, r][said.mask[s, r]].tolist()
                for r, text in enumerate(texts)
            ]
            for s, texts in enumerate(said.texts)
        ]

    def _target(self, prompt: Prompt, word: str | None, own: list[int]) -> list[int]:
        if prompt.intent == "harmful":
            chosen_refusal = int(sha256_bytes(prompt.id.encode())[:8], 16) % len(REFUSALS)
            return self._ended(REFUSALS[chosen_refusal])
        if word is not None:
            return self._ended(word)
        if self._params.answers == "given" and prompt.answer:
            return self._ended(prompt.answer)[: self._params.max_new_tokens]
        return own

    def _ended(self, text: str) -> list[int]:
        return [*self.policy.encode(text), self.policy.end_of_turn]
