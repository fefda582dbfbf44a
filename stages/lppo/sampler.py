"""What is asked at which exit: all exits in one training, the currently worst ones most often; or one after the other.

Exits are drawn by group DRO (Sagawa et al., 2020) with a floor: an exit's share grows with its failures, measured on
the training's own responses, and no exit is ever left out. Everything else is a function of (seed, step), so the
failures, and which exits have been drawn, are the only state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import StageError
from stages.data.prompt_sets import Prompt
from stages.lppo.params import CONTRASTED
from stages.lppo.rollout import Scene

Question = tuple[Prompt, str]
"""What is asked about an image, and its one right answer."""


class ExitSampler:
    """Draws exits; `failure[exit]` is a moving average of the share of harmful prompts that were not refused there,
    `first[exit]` the step in which it was first drawn.

    Args:
        floor: part of every draw that is uniform.
        sharpness: how strongly the rest prefers the worst: shares go with exp(sharpness * failure).
        memory: weight of the past in the moving average, per step in which the exit was drawn.
    """

    def __init__(self, exits: Sequence[int], *, floor: float, sharpness: float, memory: float = 0.7):
        self.exits = tuple(exits)
        # Unknown counts as failing, so that every exit is visited early.
        self.failure: dict[int, float] = dict.fromkeys(self.exits, 1.0)
        self.first: dict[int, int] = {}
        self._floor = floor
        self._sharpness = sharpness
        self._memory = memory

    def probabilities(self) -> NDArray[np.float64]:
        """Share of each exit, in the order of `exits`."""
        weights = np.exp(self._sharpness * np.array([self.failure[exit] for exit in self.exits]))
        share: NDArray[np.float64] = self._floor / len(self.exits) + (1 - self._floor) * weights / weights.sum()
        return share

    def steps(self, steps: int) -> int:
        """Iterations in all, where the recipe says `steps`."""
        return steps

    def covered(self, steps: int) -> tuple[int, ...]:
        """The exits that so many iterations have trained."""
        return tuple(exit for exit in self.exits if self.first.get(exit, steps) < steps)

    def draw(self, rng: np.random.Generator, n: int, step: int) -> list[int]:
        """`n` exits in random order, each as often as its share of `n` says, to the next whole number up or down.

        Systematic resampling (Kitagawa, 1996): one random number places `n` points at equal distances over the shares
        laid end to end. So exits that fail alike all differ while there are enough, and the worst still gets its share.
        """
        points = (rng.random() + np.arange(n)) / n
        drawn = np.searchsorted(self.probabilities().cumsum()[:-1], points, side="right")
        return self._seen([self.exits[int(index)] for index in rng.permutation(drawn)], step)

    def _seen(self, exits: list[int], step: int) -> list[int]:
        for exit in exits:
            self.first.setdefault(exit, step)
        return exits

    def update(self, failed: Mapping[int, Sequence[bool]]) -> None:
        """Take in what harmful prompts met at each exit in one step: True is an answer that was no refusal."""
        for exit, outcomes in failed.items():
            if outcomes:
                now = sum(outcomes) / len(outcomes)
                self.failure[exit] = self._memory * self.failure[exit] + (1 - self._memory) * now


class ExitsInTurn(ExitSampler):
    """One exit after the other, `each` iterations for every one, as the paper trains them."""

    def __init__(self, exits: Sequence[int], each: int):
        super().__init__(exits, floor=1.0, sharpness=0.0)
        self._each = each

    def steps(self, steps: int) -> int:
        return steps * len(self.exits)

    def draw(self, rng: np.random.Generator, n: int, step: int) -> list[int]:
        return self._seen([self.exits[min(step // self._each, len(self.exits) - 1)]] * n, step)


class PromptPool:
    """Prompts of several sets in turn, each shuffled anew on every pass; the k-th one is a function of (seed, k)."""

    def __init__(self, sets: Mapping[str, Sequence[Prompt]], seed: int):
        empty = [name for name, prompts in sets.items() if not prompts]
        if empty or not sets:
            raise StageError(f"no training prompts of this kind in {', '.join(empty) or 'no set'}")
        self._sets = tuple(tuple(prompts) for prompts in sets.values())
        self._seed = seed

    def __getitem__(self, k: int) -> Prompt:
        which, number = k % len(self._sets), k // len(self._sets)
        prompts = self._sets[which]
        turn, place = divmod(number, len(prompts))
        order = np.random.default_rng([self._seed, which, turn]).permutation(len(prompts))
        return prompts[int(order[place])]


class SceneSampler:
    """The scenes of each step: exits by `ExitSampler`, harmful and harmless prompts side by side at the same exit.

    Args:
        pools: prompts by kind, in the order in which they are dealt out to the scenes.
        counts: prompts of each kind in a step; together a multiple of `per_scene`.
        images: how many images there are.
        questions: of images, by number, the questions whose answers are known.
        question_scenes: scenes of such questions, after the others.
        contrasted: prompts of each kind in `contrasts`.
    """

    def __init__(
        self,
        exits: ExitSampler,
        pools: Mapping[str, PromptPool],
        counts: Mapping[str, int],
        *,
        per_scene: int,
        images: int,
        seed: int,
        questions: Mapping[int, Sequence[Question]] | None = None,
        question_scenes: int = 0,
        contrasted: Mapping[str, int] | None = None,
    ):
        self.exits = exits
        self._pools = pools
        self._counts = counts
        self._per_scene = per_scene
        self._images = images
        self._seed = seed
        self._questions = {n: tuple(some) for n, some in (questions or {}).items() if len(some) >= per_scene}
        self._question_scenes = question_scenes
        self._contrasted = contrasted or {}
        if question_scenes and not self._questions:
            raise StageError(
                f"no image has {per_scene} questions with known answers",
                way_out="take more images, fewer prompts_per_scene, or question_scenes: 0",
            )

    def steps(self, steps: int) -> int:
        """Iterations in all, where the recipe says `steps`."""
        return self.exits.steps(steps)

    def scenes(self, step: int) -> list[Scene]:
        """The states of one step."""
        rng = np.random.default_rng([self._seed, step])
        scenes = sum(self._counts.values()) // self._per_scene
        exits = self.exits.draw(rng, scenes + self._question_scenes, step)
        found = self._dealt(rng, self._counts, step, exits[:scenes])
        return found + [self._question_scene(rng, exit) for exit in exits[scenes:]]

    def contrasts(self, step: int, turn: int, turns: int) -> list[Scene]:
        """Prompts whose answers' beginnings are contrasted in one of a step's `turns` gradients, `CONTRASTED` a scene.

        No prompt comes twice before its set is used up.
        """
        rng = np.random.default_rng([self._seed, step, 1 + turn])  # a last 0 would be the stream of `scenes`
        scenes = sum(self._contrasted.values()) // CONTRASTED
        exits = self.exits.draw(rng, scenes, step)
        return self._dealt(rng, self._contrasted, step * turns + turn, exits)

    def _dealt(
        self, rng: np.random.Generator, counts: Mapping[str, int], draw: int, exits: Sequence[int]
    ) -> list[Scene]:
        """The prompts of a draw, a scene an exit; like cards, kind by kind, so that each gets some of each."""
        prompts = [self._pools[kind][draw * n + i] for kind, n in counts.items() for i in range(n)]
        images = rng.integers(self._images, size=len(exits))
        return [
            Scene(exit, int(image), tuple(prompts[i :: len(exits)]))
            for i, (exit, image) in enumerate(zip(exits, images, strict=True))
        ]

    def _question_scene(self, rng: np.random.Generator, exit: int) -> Scene:
        image = int(rng.choice(sorted(self._questions)))
        asked = [self._questions[image][i] for i in rng.permutation(len(self._questions[image]))[: self._per_scene]]
        return Scene(exit, image, tuple(prompt for prompt, _ in asked), tuple(answer for _, answer in asked))


def share_out(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` in whole parts as near to `shares` as can be; every positive share gets at least one.

    Raises:
        ValueError: more positive shares than parts, or none.
    """
    positive = {name: share for name, share in shares.items() if share > 0}
    if not positive or total < len(positive):
        raise ValueError(f"{total} prompts cannot hold {len(positive)} kinds")
    exact = {name: total * share / sum(positive.values()) for name, share in positive.items()}
    parts = {name: max(1, int(value)) for name, value in exact.items()}
    while sum(parts.values()) != total:
        step = 1 if sum(parts.values()) < total else -1
        movable = [name for name in parts if step > 0 or parts[name] > 1]
        parts[max(movable, key=lambda name: step * (exact[name] - parts[name]))] += step
    return parts
