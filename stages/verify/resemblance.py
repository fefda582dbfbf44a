"""Prompts that say nearly the same in other words, told by MiniLM: for sets of the user's own, which nobody divided.

Our own sets are divided by their wording (`stages.data.prompts`), which costs nothing at run time; a set from elsewhere
may ask the same in quite other words, so here the distance is that of sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stages.data.prompt_sets import SETS, Prompt
from stages.data.prompts import SPLITS, load_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.judges.embedder import Embedder

SAME: Final = 0.90  # cosine; above it two prompts of one set count as one
LIKE: Final = 0.85  # cosine; above it a prompt counts as known from training
_LONG: Final = 600  # characters; the embedder reads about 1,000 and weighs them all
_END: Final = 200  # characters
_AT_ONCE: Final = 64  # prompts embedded together


def distinct(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """The prompts in their order, without those that nearly say what an earlier one said beside the same picture.

    Of a long one its end must say the same, too: attacks share a template and differ in the request behind it.

    Raises:
        SourceError: the embedder's wheel cannot be read.
    """
    import numpy as np

    kept: dict[Path | None, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}  # picture -> wholes, ends
    for start in range(0, len(prompts), _AT_ONCE):
        block = prompts[start : start + _AT_ONCE]
        wholes = _embedder().embed([prompt.text for prompt in block])
        ends = wholes.copy()
        if long := [place for place, prompt in enumerate(block) if len(prompt.text) > _LONG]:
            ends[long] = _embedder().embed([block[place].text[-_END:] for place in long])
        for prompt, whole, end in zip(block, wholes, ends, strict=True):
            before = kept.get(prompt.image)
            if before is not None and float(np.minimum(before[0] @ whole, before[1] @ end).max()) >= SAME:
                continue
            same = before or (np.zeros((0, len(whole)), np.float32), np.zeros((0, len(end)), np.float32))
            kept[prompt.image] = np.vstack([same[0], whole]), np.vstack([same[1], end])
            yield prompt


def trained_on(texts: Sequence[str]) -> dict[int, Prompt]:
    """Which of these texts nearly say what a prompt of our training or validation sides says: index -> that prompt.

    Raises:
        SourceError: a wheel cannot be read.
    """
    import numpy as np

    if not texts:
        return {}
    known, vectors = _known()
    cosine = _embedder().embed(texts) @ vectors.T
    nearest = cosine.argmax(axis=1)
    return {int(row): known[int(nearest[row])] for row in np.flatnonzero(cosine.max(axis=1) >= LIKE)}


@cache
def _known() -> tuple[list[Prompt], NDArray[np.float32]]:
    """All that may have been trained on, and its embeddings (prompts, 384)."""
    sides = [split for split in SPLITS if split != "test"]
    prompts = [prompt for name in SETS for side in sides for prompt in load_prompts(name, side)]
    return prompts, _embedder().embed([prompt.text for prompt in prompts])


@cache
def _embedder() -> Embedder:
    from stages.judges.embedder import Embedder

    return Embedder()
