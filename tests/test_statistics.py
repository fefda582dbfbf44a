"""Intervals and paired tests: against closed forms, and properties that must hold for any data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats  # noqa: F401 - imported here, or the first example would exceed its deadline
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.judges.statistics import average_over_exits, mcnemar, wilson
from stages.verify.bands import BANDS, band_of, exits_of


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_rate_and_is_the_textbook_formula(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    found = wilson(k, n)
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
    assert found.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)
    mirrored = wilson(n - k, n)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)
    assert found.high - found.low > 0


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_what_is_no_rate_is_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        wilson(k, n)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_the_exact_binomial_on_the_flips(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    found, back = mcnemar(before, after), mcnemar(after, before)
    flips = found.to_unsafe + found.to_safe
    few = min(found.to_unsafe, found.to_safe)
    tail = sum(math.comb(flips, i) for i in range(few + 1)) / 2**flips
    assert found.p == pytest.approx(min(1.0, 2 * tail) if flips else 1.0)
    assert (back.to_unsafe, back.to_safe) == (found.to_safe, found.to_unsafe)
    assert back.p == pytest.approx(found.p)
    assert sum(after) - sum(before) == found.to_unsafe - found.to_safe


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3), st.floats(0, 1))
def test_average_over_exits_holds_the_mean_and_repeats_under_its_seed(n: int, exits: int, seed: int, p: float) -> None:
    outcomes = (np.random.default_rng(seed).random((n, exits)) < p).astype(float)
    found = average_over_exits(outcomes, seed)
    assert found == average_over_exits(outcomes, seed)
    assert found.value == pytest.approx(outcomes.mean())
    assert -1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    assert found.high > found.low
    assert found.n == n * exits


def test_exits_that_answer_alike_do_not_narrow_the_interval() -> None:
    """Ten exits with the same answers are one observation a prompt, not ten."""
    one = (np.arange(40) % 4 == 0).astype(float)[:, None]
    ten = np.repeat(one, 10, axis=1)
    a, b = average_over_exits(one, 0), average_over_exits(ten, 0)
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    exact = wilson(10, 40)
    assert a.high - a.low == pytest.approx(exact.high - exact.low, abs=0.05)


def test_averaging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        average_over_exits(np.zeros((0, 3)), 0)


@given(st.integers(3, 60))
def test_bands_are_thirds_in_order_and_every_exit_has_one(layers: int) -> None:
    bands = [band_of(exit, layers) for exit in range(1, layers + 1)]
    assert sorted(bands, key=BANDS.index) == bands
    counts = [bands.count(band) for band in BANDS]
    assert sum(counts) == layers and max(counts) - min(counts) <= 1
    assert [exit for band in BANDS for exit in exits_of(band, range(1, layers + 1), layers)] == list(
        range(1, layers + 1)
    )


def test_bands_of_llava_are_those_of_the_paper() -> None:
    assert exits_of("early", range(1, 25), 24) == tuple(range(1, 9))
    assert exits_of("middle", range(1, 25), 24) == tuple(range(9, 17))
    assert exits_of("late", range(1, 25), 24) == tuple(range(17, 25))
    with pytest.raises(ValueError, match=r"not in 1\.\.24"):
        band_of(0, 24)
