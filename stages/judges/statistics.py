"""The statistics of judging: intervals of rates, averages over exits, and paired comparison.

- Rate of one exit: Wilson score interval (scipy). It holds at 0 of n and n of n, where the normal interval is a point.
- Average over exits: the exits share their prompts, so they are no independent samples. Prompts are drawn with
  replacement, each with all its exits (bootstrap over prompts), percentile interval.
- Two models on the same prompts: flips both ways, and the exact McNemar test (a binomial test on the discordant pairs).
- Before and after: the mean of the differences, prompt by prompt, with a bootstrap-over-prompts interval.
- Several exits tested at once: Holm's correction, which holds however the tests depend on each other.
- What a number of prompts can show at all: `detectable_change` and `smallest_limit`.

Every result is the same whatever the order of the prompts: what is resampled is sorted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

CONFIDENCE: Final = 0.95
POWER: Final = 0.8  # the usual one: four of five such changes are found
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the adjusted p is at most alpha, and the chance of any false rejection
    among all tests is at most alpha (Holm 1979). In the order given.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = running
    return adjusted


def detectable_change(n: int, tests: int = 1) -> float | None:
    """The smallest change of a rate that n paired prompts show: exact McNemar, 5% over all `tests` (the first of Holm's
    steps), with this power, in the best case that every flip goes one way. None: no change at all would be shown.

    Raises:
        ValueError: no prompts or no tests.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    if n < 1 or tests < 1:
        raise ValueError(f"{n} prompts and {tests} tests")
    # The fewest flips whose two-sided p, 2 * 2^-flips, is small enough.
    needed = next(flips for flips in range(1, 200) if 2 * 0.5**flips <= (1 - CONFIDENCE) / tests)
    if needed > n:
        return None
    return float(brentq(lambda rate: binom.sf(needed - 1, n, rate) - POWER, 0.0, 1.0))


def resolvable(low: float, high: float) -> float:
    """The smallest change that is found with `POWER` by data whose 95% interval of it is so wide (normal theory)."""
    from scipy.stats import norm

    deviations = norm.ppf((1 + CONFIDENCE) / 2)
    return float((high - low) / 2 * (deviations + norm.ppf(POWER)) / deviations)


def smallest_limit(n: int) -> float:
    """The lowest limit on a rate that n prompts can show to hold: what the interval leaves possible at 0 of n."""
    return wilson(0, n).high


def prompts_for(limit: float) -> int:
    """The fewest prompts with which `smallest_limit` is at most `limit`.

    Raises:
        ValueError: the limit is not above 0, which no number of prompts can show.
    """
    if not limit > 0:
        raise ValueError(f"no number of prompts shows a rate of at most {limit}")
    low, high = 0, 1
    while smallest_limit(high) > limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if smallest_limit(middle) > limit else (low, middle)
    return high


def average_over_exits(outcomes: NDArray[np.float64], seed: int) -> Estimate:
    """Mean over exits and prompts with a bootstrap-over-prompts interval.

    Args:
        outcomes: (prompts, exits), 0..1; each row is one prompt at every exit.
        seed: fixes the resampling.

    Raises:
        ValueError: empty.
    """
    rows = _by_prompt(outcomes)
    value, low, high = _bootstrap(rows, seed)
    if rows.min() == rows.max():
        # Resampling a constant says nothing of its uncertainty: fall back on the rate over prompts.
        fallback = wilson(round(float(rows.sum())), len(rows))
        low, high = min(fallback.low, value), max(fallback.high, value)
    return Estimate(value, low, high, int(outcomes.size))


def change_over_exits(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> Estimate:
    """Mean of after - before over exits and prompts, with a bootstrap-over-prompts interval of the paired differences.

    Args:
        before, after: (prompts, exits), 0..1; row i of both is the same prompt.

    Raises:
        ValueError: empty, or not of one shape.
    """
    if before.shape != after.shape:
        raise ValueError(f"before is {before.shape}, after is {after.shape}")
    rows = _by_prompt(after - before)
    value, low, high = _bootstrap(rows, seed)
    if rows.min() == rows.max():
        # All prompts changed alike: others may not, in a share that none of n leaves possible.
        others = smallest_limit(len(rows))
        low, high = max(value - others, -1.0), min(value + others, 1.0)
    return Estimate(value, low, high, int(after.size))


def mean(values: NDArray[np.float64], seed: int) -> Estimate:
    """The mean of scores with a bootstrap-over-prompts interval; of a single prompt the interval is the value.

    Args:
        values: (prompts,), or (prompts, responses) where each prompt has several, at several exits or drawn.

    Raises:
        ValueError: empty.
    """
    value, low, high = _bootstrap(_by_prompt(values.reshape(len(values), -1)), seed)
    return Estimate(value, low, high, int(values.size))


def kappa(first: ArrayLike, second: ArrayLike, seed: int) -> Estimate | None:
    """Cohen's kappa of two judges on the same responses, with a bootstrap-over-prompts interval; None where it has no
    value, because neither judge ever says the other thing.

    Args:
        first, second: what each says, (prompts,) or (prompts, responses), True or False.

    Raises:
        ValueError: not of one shape, or empty.
    """
    import numpy as np

    one, other = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if not one.size or one.shape != other.shape:
        raise ValueError(f"{one.shape} and {other.shape} judgements")
    pairs = (2 * one + other).reshape(len(one), -1)
    counts = np.stack([(pairs == code).sum(axis=1) for code in range(4)], axis=1)
    counts = counts[np.lexsort(counts.T)]  # what is drawn does not depend on the order of the prompts
    value = float(_kappa(counts.sum(axis=0)[None])[0])
    if np.isnan(value):
        return None
    resampled = _kappa(counts[_draws(len(counts), seed)].sum(axis=1))
    low, high = np.nanquantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), int(one.size))


def _kappa(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each row of counts: neither says so, the second only, the first only, both; nan where both judges always say
    the same one thing."""
    import numpy as np

    neither, second_only, first_only, both = (counts / counts.sum(axis=1, keepdims=True)).T
    first, second = first_only + both, second_only + both
    chance = first * second + (1 - first) * (1 - second)
    agreed = both + neither
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.where(chance < 1, (agreed - chance) / (1 - chance), np.nan)
    return found


def _by_prompt(outcomes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each prompt, sorted: what is drawn does not depend on the order of the prompts."""
    import numpy as np

    if outcomes.ndim != 2 or outcomes.size == 0:
        raise ValueError("outcomes must be (prompts, exits), not empty")
    rows: NDArray[np.float64] = np.sort(outcomes.mean(axis=1))
    return rows


def _draws(n: int, seed: int) -> NDArray[np.int64]:
    import numpy as np

    return np.random.default_rng(seed).integers(0, n, size=(_RESAMPLES, n))


def _bootstrap(rows: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The mean of rows that are sorted, and the ends of its percentile interval."""
    import numpy as np

    means = rows[_draws(len(rows), seed)].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    value = float(rows.mean())
    return value, min(float(low), value), max(float(high), value)
