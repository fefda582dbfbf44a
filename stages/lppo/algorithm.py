"""Algorithm 1 of arXiv 2411.04291 (L-PPO), for all exits at once.

Differences from the paper:
- one training covers all exits: each scene draws its exit, the currently worst ones most often (group DRO with a
  floor); the paper trains exit by exit;
- harmful, benign and frightening-but-harmless prompts are mixed, and refusing the latter costs;
- LoRA on the language backbone instead of all its weights; merged at the end;
- several responses to a prompt, generated from one shared prefix: on-policy samples are what is scarce here;
- advantages are normalised over the responses of a step, as PPO implementations do (`normalize_advantages`);
- answers to harmless prompts are also held at the SFT policy's by KL(pi_SFT || pi), exact over the vocabulary
  (`anchor`): where a policy refuses every sample, rewards alone cannot bring an answer back;
- refusing a harmless prompt costs `harmless_weight` times what refusing a harmful one earns;
- the KL penalty is per token, log pi - log pi_SFT of the tokens that were drawn; the judge's reward falls on the last
  token; the coefficient eta grows while the KL lies above `kl_target`, and falls back to its first value;
- the reward comes from a refusal judge, not from a GPT-2 reward model;
- the policy may compute with weights rounded as they will ship (`quantizer`), while the reference does not;
- visual questions with known answers may be asked too (`question_scenes`), and being right earns a reward.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import StageError
from stages.lppo import checkpoint
from stages.lppo.checkpoint import TrainingState
from stages.lppo.objective import (
    anchor_loss,
    chosen,
    gae,
    next_kl_coefficient,
    normalize,
    ppo_loss,
    schedule,
    shape_rewards,
)
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Outcome, answered, outcomes
from stages.lppo.rollout import Prefixes, Responses, Scene, generate, sample_with
from stages.lppo.sampler import SceneSampler

if TYPE_CHECKING:
    import torch

    from stages.judges.judge import Judge

States = Callable[[Sequence[Scene], int], Prefixes]
"""Scenes and the number of responses to a prompt -> (e_T, P(e_l)), packed."""
_KL_LIMIT: Final = 200.0  # nats a response; beyond it the policy has left the language


@dataclass(frozen=True)
class StepReport:
    """What one step has shown."""

    step: int  # counted from 1
    scenes: list[Scene]
    outcomes: list[list[Outcome]]  # by scene and response
    score: float  # mean reward before the KL penalty
    kl: float  # nats a response
    kl_coefficient: float
    policy_loss: float
    value_loss: float
    clip_fraction: float
    anchor_kl: float  # nats a token, harmless prompts
    lr: float


def train(
    policy: Policy,
    sampler: SceneSampler,
    states: States,
    judge: Judge,
    params: LPPOParams,
    *,
    seed: int,
    scratch: Path,
    report: Callable[[StepReport], None],
) -> None:
    """Train `policy` in place; continues from the checkpoint in `scratch` if there is one.

    Raises:
        StageError: loss or KL is not finite, or the KL exploded.
    """
    import torch

    parameters = policy.trained()
    optimizer = new_optimizer(policy, params)
    done, eta = 0, params.kl
    found = checkpoint.load(scratch)
    if found is not None:
        restore(found, parameters, optimizer)
        sampler.exits.failure.update(found.failure)
        done, eta = found.step, found.kl_coefficient

    for step in range(done, params.steps):
        # Also where a checkpoint may be taken up, so that going on is the same as never having stopped.
        if step % params.quantize_every == 0 or step % params.checkpoint_every == 0:
            policy.quantize()
        lr = schedule(step, params.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["initial_lr"]
        draw = generator(seed, step)

        # Collect responses y ~ pi_old(. | P(e_l), e_T), with their log-probabilities and the values of their states.
        scenes = sampler.scenes(step)
        prefixes = states(scenes, params.samples)
        responses = generate(policy, prefixes, params.max_new_tokens, sample_with(draw))

        # Rewards r(x_t, y) - eta * KL(pi || pi_SFT), token by token.
        judged = judge_responses(judge, scenes, responses, params)
        score = torch.tensor([[o.reward for o in row] for row in judged], device=policy.device)
        with policy.as_reference():
            reference, _ = policy.evaluate(prefixes, responses)
        drawn = scatter(chosen(reference, responses.tokens[responses.mask]), responses.mask)
        log_ratio = (responses.logprobs - drawn) * responses.mask
        rewards = shape_rewards(score, log_ratio, responses.mask, eta)
        kl = float(log_ratio.sum(-1).mean())
        check(kl, step, most=_KL_LIMIT)

        # Answers to harmless prompts are held at the reference's; kept by scene, since batches are drawn by scene.
        harmless = torch.tensor([[not o.harmful for o in row] for row in judged], device=policy.device)
        anchored = responses.mask & harmless[:, :, None]
        anchors = torch.split(reference[anchored[responses.mask]], anchored.sum((1, 2)).tolist())
        del reference

        # Advantages by GAE; returns are what the value model is fitted to.
        advantages, returns = gae(rewards, responses.values, responses.mask, params.gamma, params.lam)
        if params.normalize_advantages:
            advantages = normalize(advantages, responses.mask)

        # Maximise the clipped objective and fit the value model.
        parts, updates = [], 0
        for _ in range(params.ppo_epochs):
            for batch in minibatches(len(scenes), params.minibatches, draw):
                tokens, anchor_tokens = int(responses.mask[batch].sum()), max(1, int(anchored[batch].sum()))
                for part in (batch[i : i + params.micro_batch] for i in range(0, len(batch), params.micro_batch)):
                    some = of_scenes(responses, part)
                    logprobs, values = policy.evaluate(prefixes[part], some)
                    loss = ppo_loss(
                        chosen(logprobs, some.tokens[some.mask]),
                        some.logprobs[some.mask],
                        advantages[part][some.mask],
                        values,
                        returns[part][some.mask],
                        clip=params.clip,
                    )
                    weight = len(values) / tokens
                    objective = (loss.policy + params.c1 * loss.value) * weight
                    anchor = anchor_loss(
                        logprobs[anchored[part][some.mask]], torch.cat([anchors[scene] for scene in part])
                    )
                    objective = objective + params.anchor * anchor / anchor_tokens
                    objective.backward()  # type: ignore[no-untyped-call]
                    parts.append(
                        torch.stack(
                            [
                                loss.policy * weight,
                                loss.value * weight,
                                loss.clip_fraction * weight,
                                anchor / anchor_tokens,
                            ]
                        ).detach()
                    )
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), params.max_grad_norm)
                check(float(norm), step, most=math.inf)
                optimizer.step()
                updates += 1
                optimizer.zero_grad(set_to_none=True)

        sampler.exits.update(failures(scenes, judged))
        policy_loss, value_loss, clipped, anchor_kl = (torch.stack(parts).sum(0) / updates).tolist()
        report(
            StepReport(
                step + 1,
                scenes,
                judged,
                score=float(score.mean()),
                kl=kl,
                kl_coefficient=eta,
                policy_loss=policy_loss,
                value_loss=value_loss,
                clip_fraction=clipped,
                anchor_kl=anchor_kl,
                lr=lr * params.lr,
            )
        )
        eta = next_kl_coefficient(eta, kl, least=params.kl, target=params.kl_target)
        if (step + 1) % params.checkpoint_every == 0 or step + 1 == params.steps:
            checkpoint.save(scratch, capture(step + 1, parameters, optimizer, sampler, eta))
    policy.quantize()


# --- around them ---


def judge_responses(
    judge: Judge, scenes: Sequence[Scene], responses: Responses, params: LPPOParams
) -> list[list[Outcome]]:
    """Outcomes by scene and row; rows are prompt by prompt."""
    found = []
    for scene, texts in zip(scenes, responses.texts, strict=True):
        asked = [prompt for prompt in scene.prompts for _ in range(params.samples)]
        if scene.answers is None:
            found.append(outcomes(judge, asked, texts, params.harmless_weight))
        else:
            answers = [answer for answer in scene.answers for _ in range(params.samples)]
            found.append(answered(judge, asked, texts, answers))
    return found


def failures(scenes: Sequence[Scene], judged: Sequence[Sequence[Outcome]]) -> dict[int, list[bool]]:
    """What the exit sampler learns from: for each exit, whether each response to a harmful prompt failed to refuse."""
    found: dict[int, list[bool]] = {}
    for scene, row in zip(scenes, judged, strict=True):
        found.setdefault(scene.exit, []).extend(outcome.failed for outcome in row if outcome.harmful)
    return found


def minibatches(scenes: int, parts: int, draw: torch.Generator) -> Iterator[list[int]]:
    """The scenes in random order, in `parts` parts."""
    import torch

    order = torch.randperm(scenes, generator=draw).tolist()
    size = math.ceil(scenes / parts)
    for start in range(0, scenes, size):
        yield order[start : start + size]


def of_scenes(responses: Responses, scenes: list[int]) -> Responses:
    """Some scenes' responses."""
    return Responses(
        responses.tokens[scenes],
        responses.mask[scenes],
        responses.logprobs[scenes],
        responses.values[scenes],
        [responses.texts[scene] for scene in scenes],
        responses.finished[scenes],
    )


def scatter(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values in the order of `mask.nonzero()` put back to their places, zero elsewhere."""
    out = flat.new_zeros(mask.shape)
    out[mask] = flat
    return out


def generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, whatever happened before it."""
    import torch

    digest = hashlib.sha256(f"l-ppo {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def check(value: float, step: int, most: float) -> None:
    """Stop before a broken policy is saved."""
    if not math.isfinite(value) or value > most:
        raise StageError(
            f"l-ppo diverged at step {step + 1}",
            why=f"the gradient, or the KL to the reference, became {value:.3g}",
            way_out="lower lr or ppo_epochs, or raise kl",
        )


def new_optimizer(policy: Policy, params: LPPOParams) -> torch.optim.Optimizer:
    """Adam; the value head has a rate of its own, since it starts from nothing."""
    import torch

    adapter = [p for name, p in policy.trained().items() if name.startswith("adapter.")]
    groups = [
        {"params": adapter, "lr": params.lr, "initial_lr": params.lr},
        {"params": list(policy.value_head.parameters()), "lr": params.value_lr, "initial_lr": params.value_lr},
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def capture(
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    sampler: SceneSampler,
    eta: float,
) -> TrainingState:
    """Everything that the next step depends on."""
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
    return TrainingState(step, parameters, moments, dict(sampler.exits.failure), eta)


def restore(state: TrainingState, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Undo `capture`."""
    import torch

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.weights[name])
            found = state.moments.get(name, {})
            optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in found.items()}
            if "step" in found:  # Adam keeps its step count on the CPU
                optimizer.state[parameter]["step"] = found["step"]
