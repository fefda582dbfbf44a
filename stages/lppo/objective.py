"""The equations of L-PPO (arXiv 2411.04291, section 3.2): shaped rewards, advantages, the clipped loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_KL_STEP: Final = 0.1  # relative change of eta a step


class DivergedError(ArithmeticError):
    """Something is not finite, or the policy is too far from where it began."""


@dataclass(frozen=True)
class Loss:
    """Means over tokens."""

    policy: torch.Tensor
    value: torch.Tensor
    clip_fraction: torch.Tensor


def ppo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    *,
    clip: float,
    old_values: torch.Tensor | None = None,
    value_clip: float | None = None,
) -> Loss:
    """max(-K*A, -clip(K, 1-eps, 1+eps)*A) with K = pi / pi_old, and (V - R)^2; all inputs (tokens,).

    With `value_clip`, as in PPO's reference code, max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2): a value that
    has moved further than c gains nothing by it.
    """
    import torch

    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
    value = (values - returns).square()
    if value_clip is not None and old_values is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        value = torch.maximum(value, (near - returns).square())
    return Loss(policy, value.mean(), ((ratio - 1).abs() > clip).float().mean().detach())


def group_advantages(score: torch.Tensor, samples: int) -> torch.Tensor:
    """(r - mean) / (deviation + 1e-4) among the responses to one prompt (GRPO: Shao et al., 2024, arXiv 2402.03300).

    Args:
        score: (..., rows), rows prompt by prompt, `samples` to each.
    """
    grouped = score.view(*score.shape[:-1], -1, samples)
    centred = grouped - grouped.mean(-1, keepdim=True)
    return (centred / (grouped.std(-1, keepdim=True) + 1e-4)).view(score.shape)


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1 of tokens that pi drew: unbiased for KL(pi || pi_ref) and never negative.

    The penalty of GRPO, which stands in the loss and not in the reward.
    """
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


def shape_rewards(score: torch.Tensor, log_ratio: torch.Tensor, mask: torch.Tensor, eta: float) -> torch.Tensor:
    """-eta * log(pi / pi_SFT) at every token, plus the score at the last: (..., tokens).

    Args:
        score: (...). log_ratio, mask: (..., tokens); every response has at least one token.
    """
    rewards = -eta * log_ratio * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, score[..., None].to(rewards.dtype))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016); an episode ends with the mask. All (..., tokens).

    Returns: advantages and returns (advantage + value), zero outside the mask.
    """
    import torch

    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[..., 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[-1])):
        inside = mask[..., t].to(rewards.dtype)
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        following = (delta + gamma * lam * following) * inside
        next_value = values[..., t] * inside
        advantages[..., t] = following
    return advantages, (advantages + values) * mask


def chosen(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of (tokens, vocabulary), what each token that was drawn has."""
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def anchor_loss(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(pi_SFT || pi), exact over the vocabulary, summed over tokens; both (tokens, vocabulary) log-probabilities.

    Unlike the sampled penalty it has a gradient where the policy has stopped drawing what the reference would say.
    """
    return (reference.exp() * (reference - logprobs)).sum()


def normalize(
    advantages: torch.Tensor, mask: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the tokens in the mask; of all processes, where `total` sums over them."""
    inside = advantages[mask]
    count = total(inside.new_tensor(float(inside.numel())))
    mean = total(inside.sum()) / count
    variance = total((inside - mean).square().sum()) / (count - 1).clamp(min=1)
    return (advantages - mean) / (variance.sqrt() + 1e-8) * mask


def next_kl_coefficient(eta: float, kl: float, *, least: float, target: float | None) -> float:
    """Grows by a tenth a step while the KL is above its target, else falls back, never below `least`."""
    if target is None:
        return eta
    return max(least, eta * (1 + _KL_STEP if kl > target else 1 - _KL_STEP))


def rate(through: float, schedule: str) -> float:
    """Share of the learning rate when a share `through` of the training has passed: it falls to a tenth, or not."""
    return {
        "linear": 1 - 0.9 * through,
        "cosine": 0.55 + 0.45 * math.cos(math.pi * through),
        "constant": 1.0,
    }[schedule]
