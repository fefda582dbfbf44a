"""Intervals and paired tests: against closed forms, and properties that must hold for any data."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint

from stages.judges.statistics import (
    average_over_exits,
    change_over_exits,
    detectable_change,
    holm,
    kappa,
    mcnemar,
    mean,
    prompts_for,
    resolvable,
    smallest_limit,
    wilson,
)
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
    assert (found.low, found.high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-9)
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


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.randoms())
def test_holm_is_that_of_statsmodels_in_any_order(p_values: list[float], random: Random) -> None:
    expected = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(expected))
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[place] for place in order]) == pytest.approx([expected[place] for place in order])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_that_of_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    table = np.zeros((2, 2))
    for before, after in pairs:
        table[int(before), int(after)] += 1
    found = mcnemar([b for b, _ in pairs], [a for _, a in pairs])
    assert found.p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60), st.randoms())
def test_kappa_is_that_of_statsmodels_with_an_interval_around_it(
    pairs: list[tuple[bool, bool]], random: Random
) -> None:
    table = np.zeros((2, 2))
    for first, second in pairs:
        table[int(first), int(second)] += 1
    found = kappa([a for a, _ in pairs], [b for _, b in pairs], 0)
    if len(set(pairs)) == 1 and pairs[0][0] == pairs[0][1]:
        assert found is None  # both always say the one thing
        return
    assert found is not None and found.low <= found.value <= found.high
    assert found.value == pytest.approx(cohens_kappa(table).kappa)
    random.shuffle(pairs)
    assert kappa([a for a, _ in pairs], [b for _, b in pairs], 0) == found


@settings(deadline=None, max_examples=20)
@given(st.integers(8, 40), st.integers(1, 5), st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.integers(0, 99))
def test_a_change_has_the_interval_of_scipys_paired_bootstrap(
    n: int, exits: int, p: float, q: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    before = (generator.random((n, exits)) < p).astype(float)
    after = (generator.random((n, exits)) < q).astype(float)
    found = change_over_exits(before, after, seed)
    assert found.value == pytest.approx((after - before).mean())
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    differences = (after - before).mean(axis=1)
    if differences.min() < differences.max():
        theirs = scipy.stats.bootstrap(
            (differences,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        # Two estimates of the same quantiles: as far apart as resampling error and the grid of a small sample allow.
        near = 0.25 * (theirs.high - theirs.low) + 2 / (n * exits)
        assert abs(found.low - theirs.low) <= near and abs(found.high - theirs.high) <= near
    order = generator.permutation(n)
    assert change_over_exits(before[order], after[order], seed) == found
    back = change_over_exits(after, before, seed)
    assert back.value == pytest.approx(-found.value)


def test_no_change_at_all_still_has_an_interval() -> None:
    found = change_over_exits(np.ones((20, 3)), np.ones((20, 3)), 0)
    assert found.value == 0 and found.high == pytest.approx(wilson(0, 20).high) == pytest.approx(-found.low)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 24))
def test_a_detectable_change_is_found_with_its_power_and_a_smaller_one_is_not(n: int, tests: int) -> None:
    found = detectable_change(n, tests)
    alpha = 0.05 / tests

    def power(rate: float) -> float:
        rejected = [flips for flips in range(n + 1) if statsmodels_p(flips) <= alpha]
        return float(sum(scipy.stats.binom.pmf(flips, n, rate) for flips in rejected))

    if found is None:
        assert power(1.0) == 0
        return
    assert power(found) == pytest.approx(0.8, abs=1e-6)
    assert power(0.9 * found) < 0.8


def statsmodels_p(flips: int) -> float:
    """Of so many flips, all one way."""
    return float(statsmodels_mcnemar(np.array([[0, flips], [0, 0]]), exact=True).pvalue) if flips else 1.0


@settings(deadline=None, max_examples=30)
@given(st.integers(10, 400), st.floats(0.01, 1.0))
def test_what_an_interval_resolves_is_what_statsmodels_solves_for(n: int, deviation: float) -> None:
    half = 1.959963984540054 * deviation / n**0.5
    found = resolvable(0.1 - half, 0.1 + half)
    effect = NormalIndPower(ddof=0).solve_power(nobs1=n, alpha=0.05, power=0.8, ratio=0)
    assert found == pytest.approx(effect * deviation, rel=1e-4)


@given(st.floats(0.005, 0.9))
def test_so_many_prompts_show_a_limit_and_one_fewer_does_not(limit: float) -> None:
    n = prompts_for(limit)
    assert smallest_limit(n) <= limit
    assert n == 1 or smallest_limit(n - 1) > limit


def test_no_number_of_prompts_shows_that_nothing_ever_happens() -> None:
    with pytest.raises(ValueError, match="no number of prompts"):
        prompts_for(0.0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_a_mean_score_lies_in_its_interval(values: list[float]) -> None:
    found = mean(np.array(values), 0)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.value <= found.high <= max(values) + 1e-9
    assert found == mean(np.array(values[::-1]), 0)


def test_responses_to_one_prompt_are_one_observation_of_scores_and_of_agreement() -> None:
    """Said three times over, the same data are no surer."""
    scores = np.random.default_rng(0).normal(size=20)
    once, thrice = mean(scores, 0), mean(np.repeat(scores[:, None], 3, axis=1), 0)
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))
    assert (once.n, thrice.n) == (20, 60)
    first, second = (np.random.default_rng(seed).random(20) < 0.5 for seed in (1, 2))
    alone, repeated = kappa(first, second, 0), kappa(*(np.repeat(x[:, None], 3, axis=1) for x in (first, second)), 0)
    assert alone is not None and repeated is not None
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
    shuffled = kappa(first[::-1], second[::-1], 0)
    assert shuffled == alone
