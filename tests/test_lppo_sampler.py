"""Which exits and prompts a step of L-PPO draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import StageError
from stages.data.prompt_sets import Prompt
from stages.lppo.sampler import ExitSampler, ExitsInTurn, PromptPool, SceneSampler, share_out


def _prompts(kind: str, n: int) -> list[Prompt]:
    return [
        Prompt(f"{kind}-{i}", f"{kind} {i}", kind, "harmful" if kind == "bad" else "benign", "test") for i in range(n)
    ]


def _sampler(seed: int = 0) -> SceneSampler:
    pools = {
        "harmful": PromptPool({"bad": _prompts("bad", 10)}, seed),
        "benign": PromptPool({"good": _prompts("good", 7)}, seed),
    }
    exits = ExitSampler(range(1, 10), floor=0.3, sharpness=3.0)
    contrasted = {"harmful": 8, "benign": 8}
    return SceneSampler(
        exits, pools, {"harmful": 4, "benign": 4}, per_scene=2, images=5, seed=seed, contrasted=contrasted
    )


def test_the_worst_exit_is_drawn_most_and_none_is_left_out() -> None:
    sampler = ExitSampler([1, 2, 3, 4], floor=0.4, sharpness=4.0)
    for _ in range(20):
        sampler.update({1: [False] * 4, 2: [False] * 4, 3: [True] * 4, 4: [True, False]})
    share = sampler.probabilities()
    assert share.sum() == pytest.approx(1)
    assert share.argmax() == 2 and share[3] > share[0]
    assert share.min() >= 0.4 / 4


def test_shares_and_failures_are_those_worked_out_by_hand() -> None:
    # exp(sharpness * failure) = 4^failure.
    sampler = ExitSampler([1, 2], floor=0.4, sharpness=math.log(4), memory=0.5)
    assert sampler.probabilities().tolist() == pytest.approx([0.5, 0.5])
    sampler.update({1: [False, False], 2: []})
    # Exit 1: 0.5 * 1 + 0.5 * 0; exit 2 was not asked. 0.4 / 2 + 0.6 * (2, 4) / 6.
    assert sampler.failure == pytest.approx({1: 0.5, 2: 1.0})
    assert sampler.probabilities().tolist() == pytest.approx([0.4, 0.6])
    sampler.update({1: [False], 2: [True, False, False, False]})
    assert sampler.failure == pytest.approx({1: 0.25, 2: 0.5 * 1 + 0.5 * 0.25})
    assert sampler.probabilities()[1] == pytest.approx(0.2 + 0.6 * 4**0.625 / (4**0.625 + 4**0.25))


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_every_exit_of_a_step_gets_its_share_to_a_whole_scene(n: int, failures: list[float], seed: int) -> None:
    sampler = ExitSampler(range(1, len(failures) + 1), floor=0.3, sharpness=3.0)
    sampler.failure = dict(enumerate(failures, start=1))
    drawn = sampler.draw(np.random.default_rng(seed), n, 0)
    assert len(drawn) == n and set(drawn) <= set(sampler.exits)
    for exit, share in zip(sampler.exits, sampler.probabilities(), strict=True):
        assert abs(drawn.count(exit) - n * share) < 1 + 1e-9


def test_exits_that_fail_alike_differ_while_there_are_enough() -> None:
    sampler = ExitSampler(range(1, 10), floor=0.3, sharpness=3.0)
    orders = {tuple(sampler.draw(np.random.default_rng(seed), 8, 0)) for seed in range(50)}
    assert all(len(set(drawn)) == 8 for drawn in orders)
    assert {drawn[0] for drawn in orders} == set(range(1, 10))


def test_over_many_steps_an_exit_is_drawn_as_its_share_says() -> None:
    sampler = ExitSampler(range(1, 10), floor=0.3, sharpness=3.0)
    sampler.failure = dict.fromkeys(range(1, 10), 0.1) | {4: 0.9}
    rng = np.random.default_rng(0)
    drawn = [exit for step in range(2000) for exit in sampler.draw(rng, 8, step)]
    # 0.3 / 9 + 0.7 * e^2.7 / (e^2.7 + 8 e^0.3)
    assert sampler.probabilities()[3] == pytest.approx(0.439, abs=0.001)
    assert drawn.count(4) / len(drawn) == pytest.approx(0.439, abs=0.005)
    assert drawn.count(9) / len(drawn) == pytest.approx(sampler.probabilities()[8], abs=0.005)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    first, second = _sampler(), _sampler()
    for step in (0, 1, 2):
        first.scenes(step)
    assert first.scenes(17) == second.scenes(17)
    assert first.scenes(17) != first.scenes(18)
    assert first.scenes(17) != _sampler(seed=1).scenes(17)


def test_contrasts_take_their_sets_in_turn_and_are_the_same_whenever_asked_for() -> None:
    sampler = _sampler()
    shown = [sampler.contrasts(step, turn, 2) for step in (0, 1) for turn in (0, 1)]
    for scenes in shown:
        assert [len(scene.prompts) for scene in scenes] == [8, 8] and scenes[0].exit != scenes[1].exit
        for scene in scenes:
            assert sum(prompt.intent == "harmful" for prompt in scene.prompts) == 4
    bad = [[p.id for scene in scenes for p in scene.prompts if p.intent == "harmful"] for scenes in shown]
    assert len(set(bad[0])) == 8 and len(set(bad[0] + bad[1])) == 10  # ten there are
    assert sampler.contrasts(0, 1, 2) == shown[1] == _sampler().contrasts(0, 1, 2)


def test_every_scene_holds_harmful_and_harmless_prompts_side_by_side() -> None:
    for scene in _sampler().scenes(3):
        assert [prompt.intent for prompt in scene.prompts] == ["harmful", "benign"]


def test_a_pool_takes_its_sets_in_turn_and_repeats_no_prompt_within_a_pass() -> None:
    pool = PromptPool({"a": _prompts("a", 5), "b": _prompts("b", 3)}, seed=0)
    drawn = [pool[k] for k in range(10)]
    assert [prompt.category for prompt in drawn] == ["a", "b"] * 5
    assert len({prompt.id for prompt in drawn[0:10:2]}) == 5
    assert len({prompt.id for prompt in drawn[1:7:2]}) == 3


def test_an_empty_set_of_prompts_is_refused() -> None:
    with pytest.raises(StageError, match="no training prompts"):
        PromptPool({"a": []}, seed=0)


@given(st.integers(3, 64), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_shares_are_kept_in_whole_prompts(total: int, a: float, b: float, c: float) -> None:
    parts = share_out(total, {"a": a, "b": b, "c": c, "none": 0.0})
    assert sum(parts.values()) == total and "none" not in parts
    assert all(part >= 1 for part in parts.values())
    if min(total * share / (a + b + c) for share in (a, b, c)) >= 1:
        assert all(abs(parts[name] - total * share / (a + b + c)) < 1 for name, share in (("a", a), ("b", b), ("c", c)))


def test_only_exits_that_had_their_turn_are_covered() -> None:
    rng = np.random.default_rng(0)
    few = ExitSampler(range(1, 10), floor=0.3, sharpness=3.0)
    drawn = [few.draw(rng, 2, step) for step in range(3)]
    assert few.covered(0) == ()
    for steps in (1, 2, 3):
        assert set(few.covered(steps)) == {exit for some in drawn[:steps] for exit in some}
    turns = ExitsInTurn([1, 5, 9], each=4)
    for step in range(12):
        turns.draw(rng, 2, step)
    assert [turns.covered(steps) for steps in (0, 1, 4, 5, 12)] == [(), (1,), (1,), (1, 5), (1, 5, 9)]


def test_what_is_contrasted_is_drawn_apart_from_what_is_asked() -> None:
    pools = {"harmful": PromptPool({"bad": _prompts("bad", 40)}, 0)}
    sampler = SceneSampler(
        ExitSampler(range(1, 10), floor=0.3, sharpness=3.0),
        pools,
        {"harmful": 8},
        per_scene=2,
        images=16,
        seed=0,
        contrasted={"harmful": 32},
    )
    alike = [
        [(scene.exit, scene.image) for scene in sampler.scenes(step)]
        == [(scene.exit, scene.image) for scene in sampler.contrasts(step, 0, 1)]
        for step in range(5)
    ]
    assert not any(alike)
