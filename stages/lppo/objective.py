"""The equations of L-PPO (arXiv 2411.04291, section 3.2): shaped rewards, advantages, the clipped loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_KL_STEP: Final = 0.1  # relative change of eta a step


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
) -> Loss:
    """max(-K*A, -clip(K, 1-eps, 1+eps)*A) with K = pi / pi_old, and (V - R)^2; all inputs (tokens,)."""
    import torch

    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
    value = (values - returns).square().mean()
    return Loss(policy, value, ((ratio - 1).abs() > clip).float().mean().detach())


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


def normalize(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the tokens in the mask."""
    inside = advantages[mask]
    spread = inside.std() if inside.numel() > 1 else inside.new_zeros(())
    return (advantages - inside.mean()) / (spread + 1e-8) * mask


def next_kl_coefficient(eta: float, kl: float, *, least: float, target: float | None) -> float:
    """Grows by a tenth a step while the KL is above its target, else falls back, never below `least`."""
    if target is None:
        return eta
    return max(least, eta * (1 + _KL_STEP if kl > target else 1 - _KL_STEP))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: falls linearly to a tenth."""
    return 1.0 - 0.9 * step / max(1, steps - 1)
