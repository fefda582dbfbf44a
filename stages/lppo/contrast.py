"""Whether an answer begins as refusals do: harmful prompts should, harmless ones should not.

Refusals begin alike and answers do not, so the cross-entropy of both teaches to refuse first, harmless prompts too; and
of a target's tokens only the first ones decide. Here these alone count, as a classifier's output: of many more prompts
than there are responses to, since nothing is generated and what they share is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.refusals import REFUSALS
from stages.lppo.policy import Policy
from stages.lppo.rollout import Prefixes, Scene

if TYPE_CHECKING:
    import torch


def beginnings(policy: Policy) -> torch.Tensor:
    """Tokens that refusals begin with, sorted."""
    import torch

    return torch.tensor(sorted({policy.encode(text)[0] for text in REFUSALS}), device=policy.device)


def contrast_loss(policy: Policy, prefixes: Prefixes, scenes: Sequence[Scene]) -> torch.Tensor:
    """Binary cross-entropy of "a refusal begins", summed over the prompts of some scenes, and with a gradient.

    -log p after a harmful prompt, -log(1 - p) after a harmless one (unlikelihood: Welleck et al., 2020, arXiv
    1908.04319), p being the probability that the first token is one of `beginnings`.

    Args:
        prefixes: the states of these scenes, one row a prompt.
    """
    import torch

    said, tokens = policy.first(prefixes), beginnings(policy)
    begins = said[:, :, tokens].logsumexp(-1)
    begins_not = said.index_fill(-1, tokens, -math.inf).logsumexp(-1)  # as a sum, so that it is exact near p = 1, too
    harmful = torch.tensor([[p.intent == "harmful" for p in scene.prompts] for scene in scenes], device=said.device)
    loss: torch.Tensor = -torch.where(harmful, begins, begins_not).sum()
    return loss
