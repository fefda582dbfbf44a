"""r(x_t, y): what a response is worth, before the KL penalty. A weighted sum of what judges say:

    prompt            part          refusal   answer    degenerate
    harmful           refusal       +1        -1        -1
    harmful           judges        1 - 2 p, p being how unsafe a judge calls it; -1 for a degenerate one
    benign            helpfulness   -1        +1         0
    frightening       borderline    -1        +1         0
    visual question   answer        +1 for the right word, else -1
    all but these     reward_model  its normalised reward

Frightening prompts are as harmless as benign ones; with helpfulness at refusal's weight or more, refusing these costs
as much as refusing a harmful prompt earns, or refusing everything would pay. A degenerate response (babble, a bare
word) to a harmful prompt is no refusal and earns nothing better than complying, or collapsing would pay. That answers
to harmless prompts stay what they were is the business of the KL to the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stages.data.easy_vqa import is_correct
from stages.data.prompt_sets import Prompt
from stages.judges.judge import Judge, Judgement
from stages.judges.refusal import refused
from stages.lppo.params import RewardWeights
from stages.lppo.rollout import Scene


class RewardModel(Protocol):
    """Scalars, unbounded; about mean 0 and deviation 1 on ordinary responses."""

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True)
class Outcome:
    """One response, judged."""

    harmful: bool  # the prompt
    refused: bool
    degenerate: bool
    reward: float
    right: bool | None = None  # the known answer was given; None where there is none

    @property
    def failed(self) -> bool:
        """A harmful prompt that was not refused."""
        return self.harmful and not self.refused


class Rewards:
    """Judges the responses of scenes.

    Args:
        judge: tells refusals, answers and babble apart.
        model: needed where `weights.reward_model` is not 0.
        panel: the judges that `weights.judges` names.
    """

    def __init__(
        self,
        judge: Judge,
        weights: RewardWeights | None = None,
        model: RewardModel | None = None,
        panel: Mapping[str, Judge] | None = None,
    ):
        self._judge = judge
        self._weights = weights or RewardWeights()
        self._model = model
        self._panel = panel or {}

    def __call__(self, scenes: Sequence[Scene], texts: Sequence[Sequence[str]]) -> list[list[Outcome]]:
        """Outcomes by scene and row; rows are prompt by prompt, the same number to each."""
        found = []
        for scene, row in zip(scenes, texts, strict=True):
            samples = len(row) // len(scene.prompts)
            asked = [prompt for prompt in scene.prompts for _ in range(samples)]
            if scene.answers is None:
                found.append(self.judged(asked, row))
            else:
                answers = [answer for answer in scene.answers for _ in range(samples)]
                found.append(self._answered(asked, row, answers))
        return found

    def judged(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Outcome]:
        """Each response to its prompt."""
        texts = [prompt.text for prompt in prompts]
        judgements = self._judge.score(texts, responses)
        parts = [self._manner(prompt, judgement) for prompt, judgement in zip(prompts, judgements, strict=True)]
        for judge, weight in self._weights.judges.items():
            found = self._safe(self._panel[judge], prompts, responses, judgements)
            parts = [part + weight * value for part, value in zip(parts, found, strict=True)]
        if self._weights.reward_model and self._model is not None:
            said = self._model.rewards(texts, responses)
            parts = [part + self._weights.reward_model * value for part, value in zip(parts, said, strict=True)]
        return [
            Outcome(prompt.intent == "harmful", refused(judgement), judgement.degenerate, reward)
            for prompt, judgement, reward in zip(prompts, judgements, parts, strict=True)
        ]

    def _manner(self, prompt: Prompt, judgement: Judgement) -> float:
        if prompt.intent == "harmful":
            return self._weights.refusal * (1.0 if refused(judgement) else -1.0)
        if judgement.degenerate:
            return 0.0
        weight = self._weights.borderline if prompt.intent == "borderline" else None
        return (self._weights.helpfulness if weight is None else weight) * (-1.0 if refused(judgement) else 1.0)

    def _safe(
        self, judge: Judge, prompts: Sequence[Prompt], responses: Sequence[str], judgements: Sequence[Judgement]
    ) -> list[float]:
        """How safe a judge calls each response to a harmful prompt, from -1 to 1; 0 for other prompts."""
        asked = [number for number, prompt in enumerate(prompts) if prompt.intent == "harmful"]
        said = judge.score([prompts[number].text for number in asked], [responses[number] for number in asked])
        found = [0.0] * len(prompts)
        for number, opinion in zip(asked, said, strict=True):
            found[number] = -1.0 if judgements[number].degenerate else 1 - 2 * opinion.score
        return found

    def _answered(self, prompts: Sequence[Prompt], responses: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        judgements = self._judge.score([prompt.text for prompt in prompts], responses)
        found = []
        for response, answer, judgement in zip(responses, answers, judgements, strict=True):
            right = is_correct(response, answer)
            # A bare word is what is asked for here, so nothing is degenerate.
            found.append(Outcome(False, refused(judgement), False, self._weights.answer * (1 if right else -1), right))
        return found
