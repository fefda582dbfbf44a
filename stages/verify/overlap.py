"""The guard: what a gate measures on must not be what the model was trained on, nor close to it.

Trained on are the train and validation sides of our own prompt sets, by every stage that names prompt sets in its
parameters (l-ppo, sft, ...) anywhere in an artifact's lineage, which its manifest tells (`artifacts.lineage`), and by
the demo model. Our own sets are divided so that no test prompt resembles them in wording; files of the user's own are
not, so they are held against training by their meaning as well (`stages.verify.resemblance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError
from artifacts.lineage import training_of
from stages.data.prompt_sets import SETS, Prompt
from stages.data.prompts import Split, resembling
from stages.verify.questions import Ask
from stages.verify.resemblance import trained_on

Overlap = Literal["refuse", "drop"]
NEARLY: Final = 0.8  # cosine of wordings (`stages.data.prompts`)
_SIDES: Final[tuple[Split, ...]] = ("train", "validation")
_NAMED: Final = 3  # overlaps that a message shows


def without_training_prompts(
    asks: Sequence[Ask], artifacts: Sequence[tuple[str, Artifact]], overlap: Overlap, split: Split = "test"
) -> tuple[tuple[Ask, ...], int]:
    """The asks that no training of these artifacts has seen, and how many were dropped.

    Raises:
        RecipeError: some have been seen, and `overlap` says to refuse.
    """
    trained = [(id, stages[-1]) for id, artifact in artifacts if (stages := training_of(artifact).stages)]
    if not trained or not asks:
        return tuple(asks), 0
    texts = [ask.text for ask in asks]
    seen: dict[int, Prompt] = {}
    for side in _SIDES if split == "test" else _SIDES[:1]:
        seen |= resembling(texts, side, NEARLY)
    foreign = [place for place, ask in enumerate(asks) if ask.set not in SETS]
    seen |= {foreign[place]: prompt for place, prompt in trained_on([texts[place] for place in foreign]).items()}
    if seen and overlap == "refuse":
        id, stage = trained[0]
        shown = "; ".join(f"{asks[place].id} is like {prompt.id}" for place, prompt in list(seen.items())[:_NAMED])
        raise RecipeError(
            f"{len(seen)} of {len(asks)} prompts resemble what '{id}' was trained on by {stage}",
            why=f"{shown}{', ...' if len(seen) > _NAMED else ''}: a gate would measure what was learned by heart",
            way_out="take them out of the file, or say overlap: drop",
        )
    return tuple(ask for place, ask in enumerate(asks) if place not in seen), len(seen)
