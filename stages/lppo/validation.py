"""Where every exit stands, on validation prompts, greedily: what stops a training early, and what its curves end in.

Prompts of the validation split only; the test split is verification's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.data.prompt_sets import Prompt
from stages.lppo.checkpoint import Standing
from stages.lppo.objective import chosen
from stages.lppo.policy import Policy
from stages.lppo.reward import Outcome, Rewards
from stages.lppo.rollout import Scene, generate, greedy
from stages.lppo.states import States
from stages.lppo.workers import Workers


@dataclass(frozen=True)
class ExitStanding:
    """Shares of greedy responses at one exit."""

    refusal: float  # of harmful prompts that were refused
    over_refusal: float  # of harmless prompts that were refused
    degenerate: float  # of all
    kl: float  # nats a response to the original model, of what was answered


class Validation:
    """Asks every prompt at every exit, beside one of the images in turn.

    Args:
        states: of the validation images. images: how many there are.
        told: is called with what each validation by which weights are chosen has found, and the over-refusal of the
            original model.
    """

    def __init__(
        self,
        policy: Policy,
        states: States,
        rewards: Rewards,
        prompts: Sequence[Prompt],
        exits: Sequence[int],
        *,
        images: int,
        max_new_tokens: int,
        workers: Workers,
        told: Callable[[Mapping[int, ExitStanding], Standing, float], None],
    ):
        self._policy = policy
        self._states = states
        self._rewards = rewards
        self._prompts = tuple(prompts)
        self._harmless = tuple(prompt for prompt in prompts if prompt.intent != "harmful")
        self._exits = tuple(exits)
        self._images = images
        self._max_new_tokens = max_new_tokens
        self._workers = workers
        self.told = told

    def __call__(self) -> Mapping[int, ExitStanding]:
        return self._ask(self._prompts)

    def original(self) -> Mapping[int, ExitStanding]:
        """Of harmless prompts only: what over-refusal is compared with."""
        return self._ask(self._harmless)

    def _ask(self, prompts: tuple[Prompt, ...]) -> Mapping[int, ExitStanding]:
        found = []
        mine = range(self._workers.rank, len(self._exits), self._workers.size)
        for number in mine if prompts else ():
            scene = Scene(self._exits[number], number % self._images, prompts)
            prefixes = self._states([scene], 1)
            responses = generate(self._policy, prefixes, self._max_new_tokens, greedy)
            with self._policy.as_reference():
                whole, _ = self._policy.evaluate(prefixes, responses)
            reference = chosen(whole, responses.tokens[responses.mask])
            kl = float((responses.logprobs[responses.mask] - reference).sum()) / len(prompts)
            found.append((scene.exit, standing(self._rewards.judged(prompts, responses.texts[0]), kl)))
        return dict(sorted(self._workers.everyone(found)))


def standing(judged: Sequence[Outcome], kl: float) -> ExitStanding:
    """Sum up one exit."""

    def share(chosen: Sequence[bool]) -> float:
        return sum(chosen) / len(chosen) if chosen else 0.0

    return ExitStanding(
        refusal=share([o.refused for o in judged if o.harmful]),
        over_refusal=share([o.refused for o in judged if not o.harmful]),
        degenerate=share([o.degenerate for o in judged]),
        kl=kl,
    )
