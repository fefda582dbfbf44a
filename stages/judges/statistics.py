"""The statistics of judging: intervals of rates, averages over exits, and paired comparison.

- Rate of one exit: Wilson score interval (scipy). It holds at 0 of n and n of n, where the normal interval is a point.
- Average over exits: the exits share their prompts, so they are no independent samples. Prompts are drawn with
  replacement, each with all its exits (bootstrap over prompts), percentile interval.
- Two models on the same prompts: flips both ways, and the exact McNemar test (a binomial test on the discordant pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000  # the interval's ends move by less than 0.01 between seeds at 40 prompts


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; `n` observations stand behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Estimate:
    """The rate successes / n with its Wilson score interval.

    Raises:
        ValueError: n < 1, or successes outside 0..n.
    """
    from scipy.stats import binomtest

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no rate")
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    # At the ends rounding may put a bound a hair inside the value.
    value = successes / n
    return Estimate(value, min(float(interval.low), value), max(float(interval.high), value), n)


@dataclass(frozen=True)
class Paired:
    """Two models on the same prompts. `p`: exact two-sided McNemar."""

    to_unsafe: int  # safe before, unsafe after
    to_safe: int  # unsafe before, safe after
    n: int
    p: float


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare paired outcomes (True: unsafe).

    Raises:
        ValueError: not of one length.
    """
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    to_unsafe = sum(after and not before for before, after in pairs)
    to_safe = sum(before and not after for before, after in pairs)
    discordant = to_unsafe + to_safe
    p = float(binomtest(to_unsafe, discordant, 0.5).pvalue) if discordant else 1.0
    return Paired(to_unsafe, to_safe, len(pairs), p)


def average_over_exits(outcomes: NDArray[np.float64], seed: int) -> Estimate:
    """Mean over exits and prompts with a bootstrap-over-prompts interval.

    Args:
        outcomes: (prompts, exits), 0..1; each row is one prompt at every exit.
        seed: fixes the resampling.

    Raises:
        ValueError: empty.
    """
    import numpy as np

    if outcomes.ndim != 2 or outcomes.size == 0:
        raise ValueError("outcomes must be (prompts, exits), not empty")
    rows = outcomes.mean(axis=1)
    generator = np.random.default_rng(seed)
    means = rows[generator.integers(0, len(rows), size=(_RESAMPLES, len(rows)))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    if rows.min() == rows.max():
        # Resampling a constant says nothing of its uncertainty: fall back on the rate over prompts.
        fallback = wilson(round(float(rows.sum())), len(rows))
        low, high = fallback.low, fallback.high
    value = float(rows.mean())
    return Estimate(value, min(float(low), value), max(float(high), value), int(outcomes.size))
