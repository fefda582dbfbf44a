"""How the scenes of a step are dealt out, and the randomness of a step."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from stages.lppo.rollout import Responses

if TYPE_CHECKING:
    import torch


def minibatches(scenes: int, parts: int, draw: torch.Generator) -> list[list[int]]:
    """The scenes in random order, in `parts` parts."""
    import torch

    order = torch.randperm(scenes, generator=draw).tolist()
    size = math.ceil(scenes / parts)
    return [order[start : start + size] for start in range(0, scenes, size)]


def parts(scenes: list[int], size: int, mask: torch.Tensor) -> list[list[int]]:
    """Scenes that are computed together, those with as many response tokens side by side: less padding."""
    ordered = sorted(scenes, key=lambda scene: (int(mask[scene].sum()), scene))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


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


def generator(seed: int, step: int, scene: int | None = None) -> torch.Generator:
    """The randomness of a step, or of one scene in it, whatever happened before."""
    import torch

    digest = hashlib.sha256(f"l-ppo {seed} {step} {scene}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
