"""Where every exit stands, on validation prompts, greedily: what the curves of a training end in.

Prompts of the validation split only; the test split is verification's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.data.prompts import Prompt
from stages.judges.judge import Judge
from stages.lppo.policy import Policy
from stages.lppo.reward import Outcome, outcomes
from stages.lppo.rollout import Scene, generate, greedy
from stages.lppo.states import States


@dataclass(frozen=True)
class ExitStanding:
    """Shares of greedy responses at one exit."""

    refusal: float  # of harmful prompts that were refused
    over_refusal: float  # of harmless prompts that were refused
    degenerate: float  # of all


def standings(
    policy: Policy,
    states: States,
    judge: Judge,
    prompts: Sequence[Prompt],
    exits: Sequence[int],
    images: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[int, ExitStanding]:
    """Ask every prompt at every exit, beside one of `images` images in turn."""
    found = {}
    for number, exit in enumerate(exits):
        if progress is not None:
            progress(number, len(exits))
        scene = Scene(exit, number % images, tuple(prompts))
        responses = generate(policy, states([scene], 1), max_new_tokens, greedy)
        found[exit] = standing(outcomes(judge, scene.prompts, responses.texts[0]))
    return found


def standing(judged: Sequence[Outcome]) -> ExitStanding:
    """Sum up one exit."""

    def share(chosen: Sequence[bool]) -> float:
        return sum(chosen) / len(chosen) if chosen else 0.0

    return ExitStanding(
        refusal=share([o.refused for o in judged if o.harmful]),
        over_refusal=share([o.refused for o in judged if not o.harmful]),
        degenerate=share([o.degenerate for o in judged]),
    )
