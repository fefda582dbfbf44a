"""The guard: what a gate measures on must not be what the model was trained on, nor close to it.

Trained on are the train and validation sides of our own prompt sets, by every stage that names prompt sets in its
parameters (l-ppo, sft, ...) anywhere in an artifact's lineage, which its manifest tells (`artifacts.lineage`), and by
the demo model. Our own sets are divided so that no test prompt resembles them in wording; files of the user's own are
not, so they are held against training by their meaning as well (`stages.verify.resemblance`), and against the texts of
the user's own that something in the lineage was calibrated on. A text that is no longer there tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from artifacts.lineage import calibrated_on, training_of
from stages.data.calibration_texts import holding
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
    """The asks that no training and no calibration of these artifacts has seen, and how many were dropped.

    Raises:
        RecipeError: some have been seen, and `overlap` says to refuse.
    """
    trained = [(id, stages[-1]) for id, artifact in artifacts if (stages := training_of(artifact).stages)]
    left, held = _without_calibration(asks, artifacts, overlap)
    if not trained or not left:
        return left, held
    texts = [ask.text for ask in left]
    seen: dict[int, Prompt] = {}
    for side in _SIDES if split == "test" else _SIDES[:1]:
        seen |= resembling(texts, side, NEARLY)
    foreign = [place for place, ask in enumerate(left) if ask.set not in SETS]
    seen |= {foreign[place]: prompt for place, prompt in trained_on([texts[place] for place in foreign]).items()}
    if seen and overlap == "refuse":
        id, stage = trained[0]
        shown = "; ".join(f"{left[place].id} is like {prompt.id}" for place, prompt in list(seen.items())[:_NAMED])
        raise RecipeError(
            f"{len(seen)} of {len(left)} prompts resemble what '{id}' was trained on by {stage}",
            why=f"{shown}{', ...' if len(seen) > _NAMED else ''}: a gate would measure what was learned by heart",
            way_out="take them out of the file, or say overlap: drop",
        )
    return tuple(ask for place, ask in enumerate(left) if place not in seen), held + len(seen)


def _without_calibration(
    asks: Sequence[Ask], artifacts: Sequence[tuple[str, Artifact]], overlap: Overlap
) -> tuple[tuple[Ask, ...], int]:
    """The same of calibration on texts of the user's own, from which only our own prompts are left out."""
    foreign = [place for place, ask in enumerate(asks) if ask.set not in SETS]
    if not foreign:
        return tuple(asks), 0
    texts = {text: (id, stage) for id, artifact in artifacts for text, stage in calibrated_on(artifact).items()}
    held: set[int] = set()
    for text, (id, stage) in texts.items():
        try:
            found = holding(text, [asks[place].text for place in foreign])
        except SourceError:  # no longer there
            continue
        if found and overlap == "refuse":
            shown = ", ".join(asks[foreign[place]].id for place in sorted(found)[:_NAMED])
            raise RecipeError(
                f"{len(found)} of {len(asks)} prompts stand in the text that '{id}' was calibrated on by {stage}",
                why=f"{shown}{', ...' if len(found) > _NAMED else ''} in {text}: a gate would measure what the "
                "quantizer was shown",
                way_out="take them out of the text or out of the set, or say overlap: drop",
            )
        held |= {foreign[place] for place in found}
    return tuple(ask for place, ask in enumerate(asks) if place not in held), len(held)
