"""Which token comes next: the likeliest, or one drawn, by the same few lines in every runtime.

Drawn by Gumbel's trick from a generator of the request's own, so an answer depends on its request and seed and not on
what it is batched with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stages.runtimes.runtime import Request


class Picker:
    """Picks the tokens of one answer, in order."""

    def __init__(self, request: Request):
        self._temperature = request.temperature
        self._generator = np.random.default_rng(request.seed) if request.temperature > 0 else None

    def pick(self, logits: NDArray[np.float32]) -> int:
        """A token from (vocabulary,) logits."""
        if self._generator is None:
            return int(np.argmax(logits))
        noise = self._generator.gumbel(size=logits.shape)
        return int(np.argmax(logits / self._temperature + noise))
