"""Algorithm 1 of arXiv 2411.04291 (L-PPO), section 3.2, and what we add to it.

`variant: paper`, one exit after the other: the state is (P(e_l), e_T), projected features of exit l and the embedded
text; the policy pi is the language backbone; encoder and projector are frozen. Each iteration

1. collects responses y ~ pi_old(. | P(e_l), e_T)                                     `collect`
2. rewards them with r(x_t, y) - eta * KL(pi || pi_SFT)                                `objective.shape_rewards`
3. computes advantages A by GAE, with the value model V, a linear layer on pi's trunk  `objective.gae`
4. maximises the clipped objective: the loss max(-K A, -clip(K, 1 - eps, 1 + eps) A), K = pi / pi_old, plus c1 times the
   squared error of V against the returns                                             `objective.ppo_loss`

The differences from the paper that remain: LoRA on the language backbone instead of all its weights, merged at the end;
the KL is per token, log pi - log pi_SFT of the tokens that were drawn, and r falls on the last token (the paper writes
one KL and says no more); r is the reward model's in deviations from the middle of its held-out responses, so that eta
means the same with any; of several exits each goes on from the one before, with its adapter, value model and Adam's
moments; Adam's, LoRA's and PPO's numbers (eps 0.2, lambda 0.95, gamma 1, c1 0.1, eta 0.02, 2 epochs of 2 minibatches, a
learning rate that falls to a tenth at each exit) are ours.

`variant: all-exits`, the default, differs in these, too (each is a parameter):
- one training covers all exits: each scene draws its exit, the currently worst ones most often (group DRO, a floor);
- harmful, benign and frightening-but-harmless prompts are mixed, and refusing the latter costs;
- several responses to a prompt, generated from one shared prefix: on-policy samples are what is scarce here;
- advantages are normalised over the responses of a step, as PPO implementations do (`normalize_advantages`);
- answers to harmless prompts are also held at the SFT policy's by KL(pi_SFT || pi), exact over the vocabulary
  (`anchor`): where a policy refuses every sample, rewards alone cannot bring an answer back;
- eta grows while the KL lies above `kl_target`, and falls back to its first value;
- the reward comes from a refusal rule, and from other judges where asked, not from a GPT-2 reward model (`rewards`,
  `reward_model`);
- the policy may compute with weights rounded as they will ship (`quantizer`), while the reference does not;
- what should have been said may be shown beside what was (`demonstrations`, as InstructGPT mixes in supervised
  gradients), where rewards are too rare to learn from in few steps;
- whether answers begin as refusals do is learned as a classifier learns, on many more prompts than are asked
  (`contrast`);
- visual questions with known answers may be asked too (`question_scenes`), and being right earns a reward;
- how much of what was learned is kept may be chosen on validation prompts (`interpolation`).

`objective: grpo` puts group-relative advantages in place of GAE and the KL into the loss; there is no value model then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lppo.batches import generator, minibatches, of_scenes, parts, scatter
from stages.lppo.learner import Learner, StepReport, exit_means
from stages.lppo.loop import Ending, Loop
from stages.lppo.objective import (
    DivergedError,
    anchor_loss,
    chosen,
    gae,
    group_advantages,
    kl_estimate,
    next_kl_coefficient,
    normalize,
    ppo_loss,
    shape_rewards,
)
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Outcome, Rewards
from stages.lppo.rollout import Pick, Prefixes, Responses, Scene, generate, sample_with
from stages.lppo.sampler import SceneSampler
from stages.lppo.targets import States, Targets, add_gradient, counted
from stages.lppo.validation import Validation
from stages.lppo.watch import Watch, repetition
from stages.lppo.workers import Alone, Workers, agree

if TYPE_CHECKING:
    import torch


def train(
    policy: Policy,
    sampler: SceneSampler,
    states: States,
    rewards: Rewards,
    params: LPPOParams,
    *,
    seed: int,
    scratch: Path,
    report: Callable[[StepReport], None],
    targets: Targets | None = None,
    validation: Validation | None = None,
    workers: Workers | None = None,
) -> Ending:
    """Train `policy` in place; continues from the checkpoint in `scratch` if there is one.

    `targets` are needed where `params.demonstrations` is not 0.

    Raises:
        StageError: training kept diverging, or broke one of `params.bounds`.
    """
    workers = workers or Alone()
    learner = PPO(policy, sampler, states, rewards, params, seed=seed, workers=workers, targets=targets)
    loop = Loop(
        learner,
        params,
        scratch=scratch,
        report=report,
        workers=workers,
        validation=validation,
        watch=Watch(params.bounds),
    )
    return loop.run()


@dataclass(frozen=True)
class Experience:
    """What this process has collected in a step; rows of tensors are its scenes, in the order of `numbers`.

    Attributes:
        numbers: which scenes of the step they are.
        reference: log-probabilities of the drawn tokens under pi_SFT, (scenes, rows, tokens), 0 outside the mask.
        advantages, returns: (scenes, rows, tokens).
        anchored: (scenes, rows, tokens), tokens of answers to harmless prompts.
        anchors: of each scene, log-probabilities of these over the vocabulary under pi_SFT.
    """

    numbers: list[int]
    scenes: list[Scene]
    prefixes: Prefixes
    responses: Responses
    judged: list[list[Outcome]]
    reference: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    anchored: torch.Tensor
    anchors: list[torch.Tensor]
    score: float  # mean reward, of all processes
    kl: float  # nats a response, of all processes


class PPO(Learner):
    """Clipped PPO, or GRPO, on scenes."""

    calmer = "lower lr, raise kl or anchor, or take more prompts_per_step"

    def __init__(
        self,
        policy: Policy,
        sampler: SceneSampler,
        states: States,
        rewards: Rewards,
        params: LPPOParams,
        *,
        seed: int,
        workers: Workers,
        targets: Targets | None = None,
    ):
        super().__init__(
            policy,
            sampler,
            states,
            params,
            seed=seed,
            workers=workers,
            value_lr=params.value_lr,
            kl_coefficient=params.kl,
        )
        self._rewards = rewards
        self._params = params
        self._targets = targets if params.demonstrations else None

    def step(self, number: int) -> StepReport:
        params = self._params
        scenes = self.sampler.scenes(number)
        batches = minibatches(len(scenes), params.minibatches, generator(self._seed, number))
        found = self.collect(scenes, self._mine(batches), number)
        metrics = self.update(found, batches, number)
        rows = list(zip(found.numbers, found.judged, _exit_signs(found), strict=True))
        by_scene = sorted(self._workers.everyone(rows), key=lambda row: row[0])
        outcomes = [judged for _, judged, _ in by_scene]
        self.sampler.exits.update(failures(scenes, outcomes))
        metrics |= {
            "reward": found.score,
            "kl": found.kl,
            "kl_coefficient": self.kl_coefficient,
            "lr": self.lr,
            **self._signs(found),
            **shares(outcomes),
        }
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient, found.kl, least=params.kl, target=params.kl_target
        )
        exits = exit_means(scenes, [signs for _, _, signs in by_scene])
        return StepReport(number + 1, scenes, outcomes, metrics, exits)

    def check(self, number: int) -> None:
        scenes = self.sampler.scenes(number)
        batches = minibatches(len(scenes), self._params.minibatches, generator(self._seed, number))
        self.collect(scenes, self._mine(batches), number)

    def _mine(self, batches: Sequence[Sequence[int]]) -> list[int]:
        """This process's scenes of a step."""
        return [scene for batch in batches for scene in batch[self._workers.rank :: self._workers.size]]

    def collect(self, scenes: Sequence[Scene], mine: list[int], step: int) -> Experience:
        """Responses to some of a step's scenes, what they earn, and their advantages."""
        import torch

        params, policy, total = self._params, self.policy, self._workers.total
        asked = [scenes[number] for number in mine]
        prefixes = self._states(asked, params.samples)
        draws = sample_with([generator(self._seed, step, number) for number in mine])
        responses = self._generate(prefixes, draws)
        mask = responses.mask

        # Rewards r(x_t, y) - eta * KL(pi || pi_SFT), token by token.
        judged = self._rewards(asked, responses.texts)
        score = torch.tensor([[one.reward for one in row] for row in judged], device=policy.device)
        # Answers to harmless prompts are held at the reference's; kept by scene, since batches are drawn by scene.
        harmless = torch.tensor([[not one.harmful for one in row] for row in judged], device=policy.device)
        anchored = mask & harmless[:, :, None]
        reference = torch.zeros_like(responses.logprobs)
        anchors: list[torch.Tensor] = []
        with policy.as_reference():
            for start in range(0, len(mine), params.micro_batch):
                part = list(range(start, min(start + params.micro_batch, len(mine))))
                some = of_scenes(responses, part)
                whole, _ = policy.evaluate(prefixes[part], some)
                reference[part] = scatter(chosen(whole, some.tokens[some.mask]), some.mask)
                kept = anchored[part]
                anchors += torch.split(whole[kept[some.mask]], kept.sum((1, 2)).tolist())
        log_ratio = (responses.logprobs - reference) * mask
        count = total(torch.tensor(float(score.numel()), device=policy.device))
        kl = float(total(log_ratio.sum()) / count)
        if not kl <= params.bounds.max_kl:
            raise DivergedError(
                f"the KL to the original model is {kl:.3g} nats a response, allowed {params.bounds.max_kl:g}"
            )

        if params.objective == "grpo":
            advantages = group_advantages(score, params.samples)[:, :, None] * mask
            returns = torch.zeros_like(advantages)
        else:
            rewards = shape_rewards(score, log_ratio, mask, self.kl_coefficient)
            advantages, returns = gae(rewards, responses.values, mask, params.gamma, params.lam)
            if params.normalize_advantages:
                advantages = normalize(advantages, mask, total)
        mean = float(total(score.sum()) / count)
        return Experience(
            mine, asked, prefixes, responses, judged, reference, advantages, returns, anchored, anchors, mean, kl
        )

    def _generate(self, prefixes: Prefixes, draws: Pick) -> Responses:
        """What these scenes answer; a divergence that one process meets is one of all."""
        error, responses = None, None
        try:
            responses = generate(self.policy, prefixes, self._params.max_new_tokens, draws)
        except DivergedError as diverged:
            error = str(diverged)
        error = agree(self._workers, error)
        if error is not None or responses is None:
            raise DivergedError(error or "")
        return responses

    def update(self, found: Experience, batches: Sequence[Sequence[int]], step: int) -> dict[str, float]:
        """Maximise the clipped objective and fit the value model: `ppo_epochs` passes over what was collected.

        Raises:
            DivergedError: a gradient is not finite; the weights are as they were before that gradient.
        """
        import torch

        params, workers, mask = self._params, self._workers, found.responses.mask
        passes = params.ppo_epochs * len(batches)
        shown = None if self._targets is None else self._targets(found.scenes)
        place = {number: index for index, number in enumerate(found.numbers)}
        device = self.policy.device
        sums, demonstrated, contrasted = torch.zeros(4, device=device), torch.zeros((), device=device), 0.0
        for epoch in range(params.ppo_epochs):
            order = torch.randperm(len(batches), generator=generator(self._seed, step, -1 - epoch)).tolist()
            for turn, batch in enumerate((batches[index] for index in order), epoch * len(batches)):
                local = [place[number] for number in batch if number in place]
                counts = torch.stack([mask[local].sum(), found.anchored[local].sum()]).to(torch.float64)
                tokens, anchor_tokens = workers.total(counts).tolist()
                for part in parts(local, params.micro_batch, mask):
                    sums += self._backward(found, part, tokens, max(1.0, anchor_tokens))
                if shown is not None:
                    demonstrated += self._demonstrate(*shown, local)
                contrasted += self.contrast(step, turn, passes)
                self.descend()
        names = ("policy_loss", "value_loss", "clip_fraction", "anchor_kl")
        told = dict(zip(names, (workers.total(sums) / passes).tolist(), strict=True))
        if shown is not None:
            told["demonstration_loss"] = float(workers.total(demonstrated)) / passes
        if params.contrast:
            told["contrast_loss"] = contrasted / passes
        return told

    def _demonstrate(self, prefixes: Prefixes, targets: Responses, local: list[int]) -> torch.Tensor:
        """Add the gradient of what should have been said, `demonstrations` times its cross-entropy."""
        params = self._params
        among = float(self._workers.total(counted(targets)[local].sum().double()).clamp(min=1))
        surprise = add_gradient(
            self.policy, prefixes, targets, local, params.micro_batch, among=among, weight=params.demonstrations
        )
        demonstrated: torch.Tensor = surprise.sum() / among
        return demonstrated

    def _backward(self, found: Experience, part: list[int], tokens: float, anchor_tokens: float) -> torch.Tensor:
        """Add the gradient of some scenes; their part of the losses."""
        import torch

        params = self._params
        some = of_scenes(found.responses, part)
        logprobs, values = self.policy.evaluate(found.prefixes[part], some)
        drawn = chosen(logprobs, some.tokens[some.mask])
        loss = ppo_loss(
            drawn,
            some.logprobs[some.mask],
            found.advantages[part][some.mask],
            values,
            found.returns[part][some.mask],
            clip=params.clip,
            old_values=some.values[some.mask],
            value_clip=params.value_clip,
        )
        weight = len(values) / tokens
        anchor = anchor_loss(
            logprobs[found.anchored[part][some.mask]], torch.cat([found.anchors[scene] for scene in part])
        )
        objective = loss.policy * weight + params.anchor * anchor / anchor_tokens
        if params.objective == "grpo":
            objective = (
                objective + self.kl_coefficient * weight * kl_estimate(drawn, found.reference[part][some.mask]).mean()
            )
        else:
            objective = objective + params.c1 * loss.value * weight
        objective.backward()  # type: ignore[no-untyped-call]
        value = torch.zeros_like(loss.value) if params.objective == "grpo" else loss.value
        told = [loss.policy * weight, value * weight, loss.clip_fraction * weight, anchor / anchor_tokens]
        return torch.stack(told).detach()

    def _signs(self, found: Experience) -> dict[str, float]:
        """Length and repetition of the responses, of all processes."""
        texts = [text for row in found.responses.texts for text in row]
        rows = self._workers.everyone([(repetition(texts), float(found.responses.mask.sum()), len(texts))])
        responses = sum(count for _, _, count in rows)
        return {
            "response_length": sum(length for _, length, _ in rows) / responses,
            "repetition": sum(share * count for share, _, count in rows) / responses,
        }


# --- around them ---


def _exit_signs(found: Experience) -> list[dict[str, float]]:
    """Of each scene: its mean reward, and mean and deviation of its advantages."""
    signs = []
    for row, advantages, mask in zip(found.judged, found.advantages, found.responses.mask, strict=True):
        inside = advantages[mask]
        signs.append(
            {
                "exit_reward": sum(one.reward for one in row) / len(row),
                "exit_advantage": float(inside.mean()),
                "exit_advantage_deviation": float(inside.std(correction=0)),
            }
        )
    return signs


def shares(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """What the responses of a step were, as shares of what was asked."""
    flat = [outcome for row in outcomes for outcome in row]
    questions = [outcome for outcome in flat if outcome.right is not None]
    harmless = [outcome for outcome in flat if not outcome.harmful and outcome.right is None]
    found = {"degenerate": sum(outcome.degenerate for outcome in flat) / len(flat)}
    if harmless:
        found["over_refusal"] = sum(outcome.refused for outcome in harmless) / len(harmless)
    if questions:
        found["vqa_accuracy"] = sum(bool(outcome.right) for outcome in questions) / len(questions)
    return found


def failures(scenes: Sequence[Scene], judged: Sequence[Sequence[Outcome]]) -> dict[int, list[bool]]:
    """What the exit sampler learns from: for each exit, whether each response to a harmful prompt failed to refuse."""
    found: dict[int, list[bool]] = {}
    for scene, row in zip(scenes, judged, strict=True):
        found.setdefault(scene.exit, []).extend(outcome.failed for outcome in row if outcome.harmful)
    return found
