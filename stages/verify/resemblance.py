"""Prompts that say nearly the same in other words, told by MiniLM: for sets of the user's own, which nobody divided.

Our own sets are divided by their wording (`stages.data.prompts`), which costs nothing at run time; a set from elsewhere
may ask the same in quite other words, so here the distance is that of sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

from stages.data.prompt_sets import SETS, Prompt
from stages.data.prompts import SPLITS, load_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.judges.embedder import Embedder

SAME: Final = 0.90  # cosine; above it two prompts of one set count as one
LIKE: Final = 0.85  # cosine; above it a prompt counts as known from training
_AT_ONCE: Final = 64  # prompts embedded together


def distinct(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """The prompts in their order, without those that nearly say what an earlier one said.

    Raises:
        SourceError: the embedder's wheel cannot be read.
    """
    import numpy as np

    kept = np.zeros((0, 0), dtype=np.float32)
    for start in range(0, len(prompts), _AT_ONCE):
        block = prompts[start : start + _AT_ONCE]
        for prompt, vector in zip(block, _embedder().embed([prompt.text for prompt in block]), strict=True):
            if not len(kept) or float((kept @ vector).max()) < SAME:
                kept = np.vstack([kept, vector]) if len(kept) else vector[None]
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
