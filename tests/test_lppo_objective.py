"""The equations of L-PPO against numbers worked out by hand and against a naive reading of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lppo.objective import (
    anchor_loss,
    gae,
    group_advantages,
    kl_estimate,
    next_kl_coefficient,
    normalize,
    ppo_loss,
    rate,
    shape_rewards,
)


def test_advantages_and_returns_are_those_worked_out_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.2, 0.4]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    # delta: 0.9*0.2-0.5 = -0.32; 0.9*0.4-0.2 = 0.16; 1-0.4 = 0.6; A_t = delta_t + 0.45 * A_(t+1)
    expected = torch.tensor([[-0.32 + 0.45 * (0.16 + 0.45 * 0.6), 0.16 + 0.45 * 0.6, 0.6]])
    assert torch.allclose(advantages, expected)
    assert torch.allclose(returns, expected + values)


def test_padding_after_a_response_changes_nothing() -> None:
    rewards, values = torch.tensor([[0.1, 1.0, 7.0]]), torch.tensor([[0.3, 0.2, 9.0]])
    mask = torch.tensor([[True, True, False]])
    padded, _ = gae(rewards, values, mask, 1.0, 0.95)
    alone, _ = gae(rewards[:, :2], values[:, :2], mask[:, :2], 1.0, 0.95)
    assert torch.allclose(padded[:, :2], alone)
    assert padded[0, 2] == 0


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0.5, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_advantages_agree_with_the_sum_that_defines_them(rewards: list[float], gamma: float, lam: float) -> None:
    values = [math.sin(3 * r + i) for i, r in enumerate(rewards)]
    deltas = [r + gamma * [*values, 0.0][i + 1] - values[i] for i, r in enumerate(rewards)]
    naive = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    found, _ = gae(torch.tensor([rewards]), torch.tensor([values]), mask, gamma, lam)
    assert torch.allclose(found[0], torch.tensor(naive, dtype=torch.float32), atol=1e-4)


def test_with_lambda_and_gamma_one_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.7, -0.1, 3.0]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert torch.allclose(returns, torch.tensor([[3.0, 2.0, 4.0]]))


def test_the_loss_is_the_larger_of_plain_and_clipped() -> None:
    old = torch.zeros(4)
    new = torch.tensor([1.5, 1.5, 0.5, 1.1]).log()
    advantages = torch.tensor([1.0, -1.0, -1.0, 2.0])
    loss = ppo_loss(new, old, advantages, torch.tensor([1.0, 0, 0, 0]), torch.tensor([3.0, 0, 0, 0]), clip=0.2)
    # ratio 1.5, A>0: clipped to 1.2; ratio 1.5, A<0: not clipped; ratio 0.5, A<0: held at 0.8; inside: plain
    assert loss.policy.item() == pytest.approx((-1.2 + 1.5 + 0.8 - 2.2) / 4)
    assert loss.value.item() == pytest.approx(4.0 / 4)
    assert loss.clip_fraction.item() == pytest.approx(3 / 4)


def test_a_clipped_value_gains_nothing_by_moving_further() -> None:
    nothing = torch.zeros(3)
    values, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    loss = ppo_loss(nothing, nothing, nothing, values, returns, clip=0.2, old_values=old, value_clip=0.2)
    # Held at 0.2: 0.64 against 0; inside: 0.81 both; held at -0.2: 1.44, but the plain error of 4 is larger.
    assert loss.value.item() == pytest.approx((0.64 + 0.81 + 4.0) / 3)


def test_group_advantages_compare_the_responses_to_one_prompt_only() -> None:
    found = group_advantages(torch.tensor([[1.0, -1.0, 5.0, 5.0], [0.0, 2.0, 1.0, 3.0]]), 2)
    half = 1 / (2**0.5 + 1e-4)
    assert torch.allclose(found, torch.tensor([[half, -half, 0.0, 0.0], [-half, half, -half, half]]), atol=1e-5)


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=6), st.lists(st.floats(-4, 4), min_size=3, max_size=6))
def test_the_kl_estimate_is_unbiased_and_never_negative(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    policy, reference = (torch.tensor(x[:n], dtype=torch.float64).log_softmax(0) for x in (a, b))
    estimate = kl_estimate(policy, reference)
    assert estimate.min() >= -1e-12
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimate).sum().item() == pytest.approx(exact.item(), abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)]
)
def test_the_rate_falls_to_a_tenth(schedule: str, middle: float, last: float) -> None:
    assert [rate(through, schedule) for through in (0, 0.5, 1)] == pytest.approx([1, middle, last])


def test_beyond_the_clip_nothing_pulls_further() -> None:
    new = torch.tensor([1.5]).log().requires_grad_()
    loss = ppo_loss(new, torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(1), clip=0.2)
    loss.policy.backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None and new.grad.item() == 0


def test_the_score_falls_on_the_last_token_and_the_kl_on_every_one() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    log_ratio = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, -1.0]])
    rewards = shape_rewards(torch.tensor([1.0, -1.0]), log_ratio, mask, eta=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, -0.2 + 1.0, 0.0], [0.0, 0.0, 0.1 - 1.0]]))


def test_normalized_advantages_have_mean_zero_and_deviation_one_over_real_tokens() -> None:
    mask = torch.tensor([[True, True, True, False]])
    found = normalize(torch.tensor([[1.0, 5.0, 3.0, 99.0]]), mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert found[0, 3] == 0


def test_the_kl_coefficient_grows_above_the_target_and_returns_to_the_recipes() -> None:
    eta = 0.02
    for _ in range(5):
        eta = next_kl_coefficient(eta, kl=30.0, least=0.02, target=10.0)
    assert eta == pytest.approx(0.02 * 1.1**5)
    for _ in range(20):
        eta = next_kl_coefficient(eta, kl=1.0, least=0.02, target=10.0)
    assert eta == 0.02
    assert next_kl_coefficient(0.05, 99.0, least=0.02, target=None) == 0.05


def test_the_anchor_pulls_back_what_the_policy_has_stopped_saying() -> None:
    reference = torch.tensor([[0.7, 0.2, 0.1]]).log()
    logits = torch.tensor([[-9.0, 0.0, 5.0]], requires_grad=True)
    loss = anchor_loss(logits.log_softmax(-1), reference)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad[0, 0].item() == pytest.approx(-0.7, abs=1e-3)
    assert anchor_loss(reference, reference).item() == pytest.approx(0, abs=1e-6)
