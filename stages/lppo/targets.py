"""What should be said: refusals after harmful prompts, the original model's own answers after harmless ones.

Where the original model refuses a harmless prompt there is nothing of its own to show; the prompt set's answer, if it
has one, stands in, so that training may end with fewer needless refusals than it began with.

Targets of the baseline `sft`, and of the demonstrations that l-ppo may mix in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from artifacts.manifest import sha256_bytes
from stages.data.refusals import REFUSALS
from stages.judges.refusal import is_degenerate, is_refusal
from stages.lppo.batches import of_scenes, parts
from stages.lppo.objective import chosen
from stages.lppo.policy import Policy
from stages.lppo.rollout import Prefixes, Responses, Scene, generate, greedy

if TYPE_CHECKING:
    import torch

    from stages.data.prompt_sets import Prompt

States = Callable[[Sequence[Scene], int], Prefixes]
"""Scenes and the number of responses to a prompt -> (e_T, P(e_l)), packed."""


class Targets:
    """Makes them.

    Args:
        answers: to harmless prompts; "own": what the original model says at its default exit, greedily, or the prompt's
            where it refuses or babbles; "given": the prompt's, where it has one, else its own.
    """

    def __init__(
        self,
        policy: Policy,
        states: States,
        *,
        default_exit: int,
        max_new_tokens: int,
        answers: Literal["own", "given"] = "own",
    ):
        self._policy = policy
        self._states = states
        self._default_exit = default_exit
        self._max_new_tokens = max_new_tokens
        self._answers = answers

    def __call__(self, scenes: Sequence[Scene]) -> tuple[Prefixes, Responses]:
        """The states of some scenes, and what should be said: one target a prompt."""
        import torch

        prefixes = self._states(scenes, 1)
        own = self._own_answers(scenes)
        rows: list[list[list[int]]] = []
        for s, scene in enumerate(scenes):
            words = scene.answers or (None,) * len(scene.prompts)
            asked = enumerate(zip(scene.prompts, words, strict=True))
            rows.append([self._target(prompt, word, own.get((s, p), [])) for p, (prompt, word) in asked])
        width = max(1, max(len(target) for row in rows for target in row))
        shape = (len(scenes), prefixes.row_segment.shape[1], width)
        tokens = torch.zeros(shape, dtype=torch.long, device=self._policy.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self._policy.device)
        for s, row in enumerate(rows):
            for r, target in enumerate(row):
                tokens[s, r, : len(target)] = torch.tensor(target, dtype=torch.long)
                mask[s, r, : len(target)] = True
        nothing = torch.zeros(shape, device=self._policy.device)
        return prefixes, Responses(tokens, mask, nothing, nothing, [[""] * shape[1]] * len(scenes), mask.any(-1))

    def _own_answers(self, scenes: Sequence[Scene]) -> dict[tuple[int, int], list[int]]:
        """What the original model says at its default exit, as tokens, by scene and prompt where that is the target.

        Nothing where it refuses or babbles.
        """
        needed = [
            (s, p)
            for s, scene in enumerate(scenes)
            for p, prompt in enumerate(scene.prompts)
            if prompt.intent != "harmful"
            and scene.answers is None
            and not (self._answers == "given" and prompt.answer is not None)
        ]
        if not needed:
            return {}
        asked = [Scene(self._default_exit, scenes[s].image, (scenes[s].prompts[p],)) for s, p in needed]
        with self._policy.as_reference():
            said = generate(self._policy, self._states(asked, 1), self._max_new_tokens, greedy)
        found = {}
        for place, (text,), tokens, mask in zip(needed, said.texts, said.tokens, said.mask, strict=True):
            found[place] = [] if is_refusal(text) or is_degenerate(text) else tokens[0][mask[0]].tolist()
        return found

    def _target(self, prompt: Prompt, word: str | None, own: list[int]) -> list[int]:
        if prompt.intent == "harmful":
            chosen_refusal = int(sha256_bytes(prompt.id.encode())[:8], 16) % len(REFUSALS)
            return self._ended(REFUSALS[chosen_refusal])
        if word is not None:
            return self._ended(word)
        if own or prompt.answer is None:
            return own
        return self._ended(prompt.answer)[: self._max_new_tokens]

    def _ended(self, text: str) -> list[int]:
        return [*self._policy.encode(text), self._policy.end_of_turn]


def counted(targets: Responses) -> torch.Tensor:
    """How many targets each scene has that hold anything: (scenes,), int64."""
    return targets.mask.any(-1).sum(-1)


def add_gradient(
    policy: Policy,
    prefixes: Prefixes,
    targets: Responses,
    scenes: list[int],
    micro_batch: int,
    *,
    among: float,
    weight: float = 1.0,
) -> torch.Tensor:
    """Add the gradient of `weight` times the cross-entropy of some scenes' targets, divided by `among`.

    A target's cross-entropy is the mean over its tokens, so that the one right word about a picture counts as much as a
    sentence does.

    Returns: the targets' cross-entropy summed by scene, (all scenes,), 0 for those that are not in `scenes`.
    """
    import torch

    found = torch.zeros(len(targets.mask), device=policy.device)
    for part in parts(scenes, micro_batch, targets.mask):
        some = of_scenes(targets, part)
        if not bool(some.mask.any()):
            continue
        logprobs, _ = policy.evaluate(prefixes[part], some)
        owner, row, _ = some.mask.nonzero(as_tuple=True)
        surprise = -chosen(logprobs, some.tokens[some.mask]) / some.mask.sum(-1)[owner, row]
        (weight * (surprise.sum() / among)).backward()  # type: ignore[no-untyped-call]
        found[part] = torch.zeros(len(part), device=policy.device).index_add(0, owner, surprise.detach())
    return found
