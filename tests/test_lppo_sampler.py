"""Which exits and prompts a step of L-PPO draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import StageError
from stages.data.prompt_sets import Prompt
from stages.lppo.sampler import ExitSampler, ExitsInTurn, PromptPool, SceneSampler, share_out


def _prompts(kind: str, n: int) -> list[Prompt]:
    return [
        Prompt(f"{kind}-{i}", f"{kind} {i}", kind, "harmful" if kind == "bad" else "benign", "test") for i in range(n)
    ]


def _sampler(seed: int = 0, helpings: int = 1) -> SceneSampler:
    pools = {
        "harmful": PromptPool({"bad": _prompts("bad", 10)}, seed),
        "benign": PromptPool({"good": _prompts("good", 7)}, seed),
    }
    exits = ExitSampler(range(1, 10), floor=0.3, sharpness=3.0)
    return SceneSampler(exits, pools, {"harmful": 4, "benign": 4}, per_scene=2, images=5, seed=seed, helpings=helpings)


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


def test_exits_of_one_step_differ_while_there_are_enough() -> None:
    sampler = ExitSampler([1, 2, 3], floor=0.5, sharpness=3.0)
    drawn = sampler.draw(np.random.default_rng(0), 5, 0)
    assert sorted(drawn[:3]) == [1, 2, 3] and len(drawn) == 5


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    first, second = _sampler(), _sampler()
    for step in (0, 1, 2):
        first.scenes(step)
    assert first.scenes(17) == second.scenes(17)
    assert first.scenes(17) != first.scenes(18)
    assert first.scenes(17) != _sampler(seed=1).scenes(17)


def test_further_sets_of_a_step_ask_other_prompts_before_any_comes_twice() -> None:
    sampler = _sampler(helpings=2)
    asked = [sampler.scenes(step, helping) for step, helping in ((0, 0), (0, 1), (1, 0))]
    bad = [{p.id for scene in scenes for p in scene.prompts if p.intent == "harmful"} for scenes in asked]
    assert len(bad[0]) == len(bad[1]) == 4 and not bad[0] & bad[1]
    assert len(bad[2] - bad[0] - bad[1]) == 2  # ten there are, so the third set takes two of them again
    assert asked[0] == _sampler().scenes(0) and asked[1] == _sampler().scenes(1)


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


def test_of_exits_in_turn_only_those_that_had_their_turn_are_covered() -> None:
    together = ExitSampler([1, 5, 9], floor=0.3, sharpness=3.0)
    assert together.covered(1) == (1, 5, 9) and together.covered(0) == ()
    turns = ExitsInTurn([1, 5, 9], each=4)
    assert [turns.covered(steps) for steps in (0, 1, 4, 5, 12)] == [(), (1,), (1,), (1, 5), (1, 5, 9)]
