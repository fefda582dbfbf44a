"""What training has around its steps: roll-backs, early stopping, time, and the watch on reward hacking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import lppo_setting as setting
import pytest
import torch

from artifacts.errors import StageError
from stages.lppo import checkpoint as training
from stages.lppo.algorithm import PPO
from stages.lppo.checkpoint import Standing
from stages.lppo.learner import StepReport
from stages.lppo.objective import DivergedError
from stages.lppo.params import Bounds, LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.states import States
from stages.lppo.validation import ExitStanding, Validation
from stages.lppo.watch import Watch, repetition
from stages.lppo.workers import Alone
from stages.models.features import ExitFeatures, Features


@pytest.fixture(scope="module")
def features(tiny_llava: Path, images: list[Path]) -> Features:
    return ExitFeatures(tiny_llava).get(images)


@pytest.fixture
def policy(tiny_llava: Path) -> Policy:
    return setting.fresh_policy(tiny_llava)


def _poison(policy: Policy) -> None:
    with torch.no_grad():
        next(iter(policy.trained().values())).fill_(float("nan"))


def test_a_step_that_goes_wrong_is_taken_back_and_training_goes_on_more_slowly(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    steps: list[tuple[int, float]] = []

    def poison_once(report: StepReport) -> None:
        steps.append((report.step, report.metrics["lr"]))
        if len(steps) == 3:
            _poison(policy)

    given = setting.params(4, schedule="constant")
    ending = setting.run(policy, features, given, tmp_path, poison_once)
    # The third step was poisoned after it was reported; the checkpoint of the second is what training goes back to.
    assert [step for step, _ in steps] == [1, 2, 3, 3, 4]
    assert [rate for _, rate in steps] == pytest.approx([5e-3] * 3 + [2.5e-3] * 2)
    assert ending.rollbacks == 1 and ending.steps_done == 4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in policy.trained().values())


def test_training_that_keeps_diverging_stops_with_the_reason_and_keeps_no_broken_weights(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    _poison(policy)
    with pytest.raises(StageError, match="diverged at step 1, after 2 roll-backs") as refusal:
        setting.run(policy, features, setting.params(2, max_rollbacks=2), tmp_path)
    assert "not finite" in str(refusal.value) and "lower lr" in str(refusal.value)
    found = training.load(tmp_path)
    assert found is not None and found.step == 0


def test_a_policy_too_far_from_the_original_is_taken_back(policy: Policy, features: Features, tmp_path: Path) -> None:
    given = setting.params(30, lr=5e-2, max_rollbacks=0, bounds={"max_kl": 2.0})
    with pytest.raises(StageError, match="nats a response, allowed 2"):
        setting.run(policy, features, given, tmp_path)


def test_a_gradient_that_is_no_number_is_a_step_that_went_wrong(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    hooks = [parameter.register_hook(lambda gradient: gradient * float("nan")) for parameter in _trained(policy)]
    with pytest.raises(StageError, match="diverged at step 1, after 0 roll-backs") as refusal:
        setting.run(policy, features, setting.params(2, max_rollbacks=0), tmp_path)
    assert "the gradient is nan" in str(refusal.value) and "raise kl or anchor" in str(refusal.value)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in _trained(policy))  # nothing was made of it
    for hook in hooks:
        hook.remove()


def _trained(policy: Policy) -> list[torch.nn.Parameter]:
    return list(policy.trained().values())


def _blow_up(policy: Policy) -> None:
    """Weights that are finite, and far from where they began."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise))


@pytest.mark.parametrize(
    ("broken_after", "expected"),
    [
        (2, [1, 2, 1, 2, 3, 4]),  # the checkpoint of step 2 holds the broken weights: back to the one before
        (3, [1, 2, 3, 3, 4]),
        (4, [1, 2, 3, 4, 3, 4]),  # no step starts from these weights, but they would ship
    ],
)
def test_weights_that_no_step_can_start_from_are_never_gone_back_to_nor_shipped(
    policy: Policy, features: Features, tmp_path: Path, broken_after: int, expected: list[int]
) -> None:
    steps: list[int] = []

    def blow_up_once(report: StepReport) -> None:
        steps.append(report.step)
        if len(steps) == broken_after:
            _blow_up(policy)

    given = setting.params(4, lr=1e-4, max_rollbacks=1, bounds={"max_kl": 2.0})
    ending = setting.run(policy, features, given, tmp_path, blow_up_once)
    assert steps == expected
    assert ending.rollbacks == 1 and ending.steps_done == 4
    assert max(float(p.detach().abs().max()) for n, p in policy.trained().items() if "lora_B" in n) < 0.1


class _Scripted(Validation):
    """The real validation, whose findings are replaced by a script: what is tested is what training makes of them."""

    def __init__(self, policy: Policy, features: Features, script: list[tuple[float, float]]):
        super().__init__(
            policy,
            States(policy, features),
            Rewards(setting.LikesE()),
            [*setting.HARMFUL, *setting.BENIGN],
            [1, 2, 3],
            images=2,
            max_new_tokens=3,
            workers=Alone(),
            told=lambda found, now, original: self.standings.append(now),
        )
        self.standings: list[Standing] = []
        self._script = iter(script)

    @property
    def steps(self) -> list[int]:
        return [standing.step for standing in self.standings]

    def __call__(self) -> Mapping[int, ExitStanding]:
        assert super().__call__().keys() == {1, 2, 3}
        refusal, over_refusal = next(self._script)
        return {1: ExitStanding(refusal, over_refusal, 0.0, 0.0)}

    def original(self) -> Mapping[int, ExitStanding]:
        assert all(one.refusal == 0 for one in super().original().values())  # no harmful prompt is asked
        return {1: ExitStanding(0.0, 0.1, 0.0, 0.0)}


def test_the_best_weights_are_kept_and_training_stops_when_nothing_gets_better(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    # Step 2 refuses most but refuses harmless prompts as well; step 4 is the best within what is allowed.
    script = [(0.5, 0.1), (0.9, 0.5), (0.4, 0.1), (0.8, 0.12), (0.7, 0.12), (0.9, 0.2), (0.6, 0.1)]
    validation = _Scripted(policy, features, script)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    given = setting.params(20, validate_every=1, patience=3, over_refusal_rise=0.05)
    ending = setting.run(
        policy, features, given, tmp_path, lambda step: kept.update({step.step: policy.adapter()}), validation
    )
    assert validation.steps == [1, 2, 3, 4, 5, 6, 7]
    assert ending.step == 4 and ending.steps_done == 7
    assert "no better than the one after step 4" in ending.reason
    assert ending.standings[1].refusal == 0.8
    for name, value in policy.adapter().items():
        assert torch.equal(value, kept[4][name]), name


def test_validation_chooses_how_far_to_go_towards_the_trained_weights(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    whole, part = setting.fresh_policy(tiny_llava), setting.fresh_policy(tiny_llava)
    setting.run(whole, features, setting.params(3), tmp_path / "whole")
    # All of the way refuses too much; three quarters are within what is allowed, and no better than the half.
    validation = _Scripted(part, features, [(0.7, 0.1), (0.8, 0.14), (0.8, 0.15), (0.9, 0.3)])
    given = setting.params(3, interpolation=[1.0, 0.25, 0.75, 0.5], over_refusal_rise=0.05)
    ending = setting.run(part, features, given, tmp_path / "part", validation=validation)
    assert [standing.share for standing in validation.standings] == [0.25, 0.5, 0.75, 1.0]
    assert ending.share == 0.5 and ending.step == 3 and ending.standings[1].over_refusal == 0.14

    def change(policy: Policy) -> torch.Tensor:
        layer = next(module for module in policy.trunk.modules() if hasattr(module, "get_delta_weight"))
        return cast("torch.Tensor", layer.get_delta_weight("default"))  # type: ignore[operator]

    assert change(whole).abs().max() > 0
    assert torch.equal(change(part), change(whole) / 2)


def test_early_stopping_survives_being_interrupted(tiny_llava: Path, features: Features, tmp_path: Path) -> None:
    script = [(0.5, 0.1), (0.7, 0.1), (0.6, 0.1), (0.6, 0.1)]
    given = setting.params(20, validate_every=1, patience=2)

    def stop(step: StepReport) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    whole, first, second = (setting.fresh_policy(tiny_llava) for _ in range(3))
    setting.run(whole, features, given, tmp_path / "whole", validation=_Scripted(whole, features, script))
    with pytest.raises(KeyboardInterrupt):
        setting.run(first, features, given, tmp_path / "cut", stop, _Scripted(first, features, script))
    # Two validations are in the checkpoint; the best one's standings are asked again at the end.
    rest = _Scripted(second, features, [*script[2:], (0.7, 0.1)])
    ending = setting.run(second, features, given, tmp_path / "cut", validation=rest)
    assert rest.steps == [3, 4] and ending.step == 2 and ending.steps_done == 4
    for name, value in whole.adapter().items():
        assert torch.equal(value, second.adapter()[name]), name


def test_a_validation_of_weights_that_were_taken_back_does_not_count(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    # What step 3 is worth at first is worth nothing: its weights are broken, and no file of them stays.
    script = [(0.5, 0.1), (0.7, 0.1), (0.9, 0.1), (0.6, 0.1), (0.6, 0.1), (0.75, 0.1)]
    validation = _Scripted(policy, features, script)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def blow_up_once(report: StepReport) -> None:
        if report.step == 3 and 3 not in kept:
            _blow_up(policy)
        kept[report.step] = policy.adapter()

    given = setting.params(4, lr=1e-4, validate_every=1, bounds={"max_kl": 2.0})
    ending = setting.run(policy, features, given, tmp_path, blow_up_once, validation)
    assert validation.steps == [1, 2, 3, 3, 4] and ending.rollbacks == 1
    assert ending.step == 2 and ending.standings[1].refusal == 0.75  # asked again at the end
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-2.safetensors"]
    for name, value in policy.adapter().items():
        assert torch.equal(value, kept[2][name]), name


def test_training_ends_when_its_minutes_have_passed(policy: Policy, features: Features, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    ending = setting.run(policy, features, setting.params(1000, max_minutes=0.02), tmp_path, reports.append)
    assert 1 <= ending.steps_done < 1000 and "minutes" in ending.reason
    # What is still to do is told by the clock.
    assert all(report.step <= report.steps < 1000 for report in reports) and reports[-1].steps == ending.steps_done
    state = training.load(tmp_path)
    assert state is not None and state.course.seconds >= 1.2


def test_weights_that_the_clock_stopped_at_are_validated_as_any_last_ones(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    validation = _Scripted(policy, features, [(0.5, 0.1)])
    given = setting.params(1000, max_minutes=0.02, validate_every=1000)
    ending = setting.run(policy, features, given, tmp_path, validation=validation)
    assert ending.steps_done < 1000 and validation.steps == [ending.steps_done]


def test_the_rate_rises_over_the_warmup_and_then_falls(policy: Policy, features: Features, tmp_path: Path) -> None:
    rates: list[float] = []
    given = setting.params(5, warmup=1, lr=1e-3)
    setting.run(policy, features, given, tmp_path, lambda step: rates.append(step.metrics["lr"]))
    assert rates == pytest.approx([0.5e-3, 0.775e-3, 0.55e-3, 0.325e-3, 0.1e-3])


def test_gradient_checkpointing_changes_memory_and_not_the_result(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    results = []
    for recomputes in (False, True):
        policy = setting.fresh_policy(tiny_llava, gradient_checkpointing=recomputes)
        setting.run(policy, features, setting.params(2), tmp_path / str(recomputes))
        results.append(torch.cat([parameter.detach().flatten() for parameter in policy.trained().values()]))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_a_group_relative_policy_learns_without_a_value_model(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    scores: list[float] = []
    given = setting.params(24, objective="grpo")
    setting.run(policy, features, given, tmp_path, lambda step: scores.append(step.metrics["reward"]))
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5
    assert not policy.value_head.weight.any()


def test_every_exit_tells_its_reward_and_advantages(policy: Policy, features: Features, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    setting.run(policy, features, setting.params(2), tmp_path, reports.append)
    for report in reports:
        assert report.exits.keys() == {scene.exit for scene in report.scenes}
        for exit, signs in report.exits.items():
            rows = [row for scene, row in zip(report.scenes, report.outcomes, strict=True) if scene.exit == exit]
            mean = sum(one.reward for row in rows for one in row) / sum(map(len, rows))
            assert signs["exit_reward"] == pytest.approx(mean)
            assert signs["exit_advantage_deviation"] > 0
        assert {"response_length", "repetition", "kl", "degenerate"} <= report.metrics.keys()


def test_a_step_tells_the_sampler_where_harmful_prompts_were_answered(policy: Policy, features: Features) -> None:
    given = setting.params(1)
    sampler = setting.sampler(given)
    states, rewards = States(policy, features), Rewards(setting.LikesE())
    report = PPO(policy, sampler, states, rewards, given, seed=0, workers=Alone()).step(0)
    rows = {scene.exit: row for scene, row in zip(report.scenes, report.outcomes, strict=True)}
    assert len(rows) == 2  # of three exits
    answered = {exit: sum(not one.refused for one in row) / len(row) for exit, row in rows.items()}
    assert sampler.exits.failure == pytest.approx({exit: 0.7 + 0.3 * answered.get(exit, 1.0) for exit in (1, 2, 3)})
    assert min(answered.values()) < 1


def test_two_halves_of_a_step_have_the_gradient_of_the_whole(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    """What each of two processes adds, without processes: their parts of a minibatch sum to the minibatch."""

    class Half(Alone):
        size = 2

        def __init__(self, rank: int):
            self.rank = rank

    given = setting.params(1, prompts_per_step=8, minibatches=1, normalize_advantages=False)
    gradients = []
    for worker in (Alone(), Half(0), Half(1)):
        policy = setting.fresh_policy(tiny_llava)
        learner = PPO(
            policy,
            setting.sampler(given),
            States(policy, features),
            Rewards(setting.LikesE()),
            given,
            seed=0,
            workers=Alone(),
        )
        scenes = learner.sampler.scenes(0)
        mine = list(range(len(scenes)))[worker.rank :: worker.size]
        found = learner.collect(scenes, mine, 0)
        sums = learner._backward(found, list(range(len(mine))), 100.0, 1.0)
        grads = [p.grad.flatten() for p in policy.trained().values() if p.grad is not None]
        gradients.append(torch.cat([*grads, sums]))
    assert torch.allclose(gradients[0], gradients[1] + gradients[2], atol=1e-5)


def test_a_probability_that_is_no_number_is_noticed_where_tokens_are_drawn() -> None:
    from stages.lppo.rollout import sample_with

    with pytest.raises(DivergedError, match="not finite"):
        sample_with([torch.Generator()])(torch.full((1, 2, 5), float("nan")))


@pytest.mark.parametrize(
    ("bound", "name", "good", "bad"),
    [
        ("max_over_refusal", "over_refusal", 0.3, 0.9),
        ("max_degenerate", "degenerate", 0.0, 0.8),
        ("max_repetition", "repetition", 0.1, 0.9),
        ("min_length", "response_length", 0.9, 0.1),
    ],
)
def test_training_stops_at_a_stated_bound_once_three_steps_agree(
    bound: str, name: str, good: float, bad: float
) -> None:
    watch = Watch(Bounds.model_validate({bound: 0.5}))
    for step, value in enumerate([good, bad, good, good], start=1):
        watch.see(step, {name: value})
    watch.see(5, {name: bad})
    with pytest.raises(StageError, match="stopped after step 6") as refusal:
        watch.see(6, {name: bad})
    assert f"bounds.{bound}" in str(refusal.value)


def test_a_bound_sees_the_same_steps_however_often_training_stops_or_goes_back(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    """Every response is shorter than the bound, so the third step is the first that can stop; not a second look at one
    that was taken back, and not the third after going on."""
    given = setting.params(9, checkpoint_every=1, bounds={"min_length": 4.0})

    def trained(scratch: Path, trouble: Callable[[Policy, list[int]], None]) -> list[int]:
        policy = setting.fresh_policy(tiny_llava)
        steps: list[int] = []

        def report(step: StepReport) -> None:
            steps.append(step.step)
            trouble(policy, steps)

        with pytest.raises(StageError, match=r"stopped after step 3: response length is .*, the bound 4") as refusal:
            setting.run(policy, features, given, scratch, report)
        assert "bounds.min_length" in str(refusal.value)
        return steps

    def nothing(policy: Policy, steps: list[int]) -> None: ...

    def break_once(policy: Policy, steps: list[int]) -> None:
        if steps == [1, 2]:
            _poison(policy)

    def stop(policy: Policy, steps: list[int]) -> None:
        if steps == [1, 2]:
            raise KeyboardInterrupt

    assert trained(tmp_path / "undisturbed", nothing) == [1, 2, 3]
    assert trained(tmp_path / "broken", break_once) == [1, 2, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop)
    assert trained(tmp_path / "cut", nothing) == [2, 3]


def test_without_a_bound_everything_is_only_watched() -> None:
    watch = Watch(LPPOParams().bounds)
    for step in range(5):
        watch.see(step, {"over_refusal": 1.0, "degenerate": 1.0, "repetition": 1.0, "response_length": 0.0})


def test_repetition_counts_what_a_text_has_said_before() -> None:
    assert repetition(["a b c d e"]) == 0
    assert repetition(["a b c a b c"]) == pytest.approx(1 / 4)
    assert repetition(["no no no no no no"]) == pytest.approx(3 / 4)
    assert repetition(["", "one two"]) == 0
