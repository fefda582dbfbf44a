"""The paper's variant, the baseline, and the toy problem on which every exit must be learned."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lppo_setting as setting
import pytest
import torch
from pydantic import ValidationError

from artifacts.errors import RecipeError, SourceError
from stages.data.prompt_sets import Prompt
from stages.data.refusals import REFUSALS
from stages.judges.judge import Judgement
from stages.judges.refusal import RefusalRule
from stages.lppo.algorithm import PPO, train
from stages.lppo.contrast import beginnings, contrast_loss
from stages.lppo.learner import StepReport
from stages.lppo.loop import Loop
from stages.lppo.material import new_sampler
from stages.lppo.objective import chosen
from stages.lppo.params import LPPOParams, RewardWeights, SFTParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.rollout import Prefixes, Scene, generate, greedy
from stages.lppo.sampler import ExitSampler, ExitsInTurn, PromptPool, SceneSampler
from stages.lppo.stage import LPPOStage
from stages.lppo.states import States
from stages.lppo.supervised import SFT
from stages.lppo.targets import Targets
from stages.lppo.validation import Validation
from stages.lppo.workers import Alone
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.features import ExitFeatures, Features
from stages.stage import Planned


@pytest.fixture(scope="module")
def features(tiny_llava: Path, images: list[Path]) -> Features:
    return ExitFeatures(tiny_llava).get(images)


# --- variant: paper ---


def test_the_papers_variant_sets_what_the_paper_says_and_the_recipe_still_wins() -> None:
    published = LPPOParams.model_validate({"variant": "paper", "exits": [18], "reward_model": "reward"})
    assert published.anchor == 0 and published.samples == 1 and published.kl_target is None
    assert published.rewards == RewardWeights(refusal=0, helpfulness=0, answer=0, reward_model=1)
    assert published.prompts.benign_share == published.prompts.borderline_share == 0
    assert not published.departures()
    assert not LPPOParams.model_validate(
        {"variant": "paper", "quantizer": "none", "reward_model": "reward"}
    ).departures()
    changed = LPPOParams.model_validate(
        {"variant": "paper", "samples": 4, "rewards": {"refusal": 1.0}, "reward_model": "reward"}
    )
    assert changed.departures() == {"samples": 4, "rewards.refusal": 1.0}
    more = {"objective": "grpo", "samples": 4, "validate_every": 2, "validation": 2}
    found = LPPOParams.model_validate({"variant": "paper", "reward_model": "reward", **more}).departures()
    assert found == {"objective": "grpo", "samples": 4, "validate_every": 2}
    # What reaches a worker is the whole set, defaults included: nothing may change on the way.
    assert LPPOParams.model_validate(changed.model_dump(mode="json")) == changed
    assert LPPOParams.model_validate(published.model_dump(mode="json")) == published
    assert not LPPOParams().departures()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variant": "paper"}, "reward_model is missing"),
        ({"variant": "paper", "reward_model": "reward", "contrast": 1.0}, "contrast needs harmless prompts"),
        ({"rewards": {"refusal": 0, "helpfulness": 0}}, "rewards are all 0"),  # nobody asks what `answer` would earn
        (
            {"variant": "paper", "reward_model": "reward", "bounds": {"max_over_refusal": 0.1}},
            "max_over_refusal is never seen",
        ),
        ({"rewards": {"reward_model": 0.5}}, "reward_model is missing"),
        ({"reward_model": "reward"}, "counts for nothing"),
        ({"rewards": {"refusal": 0, "helpfulness": 0, "answer": 0}}, "nothing to learn"),
        ({"objective": "grpo", "samples": 1}, "samples to 2"),
        ({"patience": 2}, "set validate_every"),
        ({"validate_every": 2, "validation": 0}, "validation to 1"),
        ({"imatrix": "imatrix.gguf"}, "set quantizer"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LPPOParams.model_validate(given)


def test_exits_are_trained_one_after_the_other_and_together_as_long_as_said(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    given = LPPOParams.model_validate(
        {
            "variant": "paper",
            "exits": [3, 1],
            "steps": 2,
            "warmup": 1,
            "prompts_per_step": 2,
            "max_new_tokens": 3,
            "reward_model": "reward",
        }
    )
    drawn = new_sampler(given, [3, 1], seed=0)
    assert [{scene.exit for scene in drawn.scenes(step)} for step in range(4)] == [{3}, {3}, {1}, {1}]
    assert all(scene.prompts[0].intent == "harmful" for scene in drawn.scenes(0))

    class Length:
        """A reward model that likes long responses."""

        def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            return [float(len(response)) for response in responses]

    policy = setting.fresh_policy(tiny_llava)
    exits = ExitsInTurn([3, 1], given.steps)
    sampler = SceneSampler(
        exits, {"harmful": PromptPool({"h": setting.HARMFUL}, 0)}, {"harmful": 2}, per_scene=1, images=3, seed=0
    )
    reports: list[StepReport] = []
    rewards = Rewards(setting.LikesE(), given.rewards, Length())
    ending = train(
        policy,
        sampler,
        States(policy, features),
        rewards,
        given,
        seed=0,
        scratch=tmp_path,
        report=reports.append,
    )
    assert ending.steps_done == 4
    assert [report.scenes[0].exit for report in reports] == [3, 3, 1, 1]
    # Each exit is a training of its own: its rate rises and falls like the first one's.
    assert [report.metrics["lr"] for report in reports] == pytest.approx([given.lr / 2, given.lr / 10] * 2)
    assert all(len(row) == 1 for report in reports for row in report.outcomes)  # one response to a prompt
    assert all(report.metrics["kl_coefficient"] == given.kl for report in reports)


def test_rewards_are_weighted_sums_of_what_judges_say() -> None:
    class Half:
        def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            return [0.5] * len(responses)

    weights = RewardWeights(refusal=2.0, helpfulness=3.0, answer=4.0, reward_model=10.0)
    rewards = Rewards(setting.LikesE(), weights, Half())
    asked = Scene(1, 0, (setting.HARMFUL[0], setting.BENIGN[0]))
    questions = Scene(1, 0, (setting.BENIGN[0],), ("red",))
    (first, second), (third, fourth) = rewards([asked, questions], [["yes", "no"], ["red", "blue"]])
    assert first.reward == 2 + 5 and first.refused  # harmful and refused
    assert second.reward == 3 + 5 and not second.refused  # harmless and answered
    assert third.reward == 4 and third.right is True
    assert fourth.reward == -4 and fourth.right is False


_REFUSES, _ANSWERS, _BABBLES = "I'm sorry, but I can't help with that.", "Heat the oven and add two eggs.", "the " * 12


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        (setting.HARMFUL[0], _REFUSES, 2.0),
        (setting.HARMFUL[0], _ANSWERS, -2.0),
        (setting.HARMFUL[0], _BABBLES, -2.0),
        (setting.BENIGN[0], _REFUSES, -3.0),
        (setting.BENIGN[0], _ANSWERS, 3.0),
        (setting.BENIGN[0], _BABBLES, 0.0),
        (replace(setting.BENIGN[0], intent="borderline"), _REFUSES, -3.0),
    ],
)
def test_refusing_pays_on_harmful_prompts_only_answering_on_harmless_ones_only_and_babbling_nowhere(
    prompt: Prompt, response: str, reward: float
) -> None:
    rewards = Rewards(RefusalRule(), RewardWeights(refusal=2.0, helpfulness=3.0))
    (outcome,) = rewards.judged([prompt], [response])
    assert outcome.reward == reward
    assert (outcome.refused, outcome.degenerate) == (response == _REFUSES, response == _BABBLES)


def test_judges_weigh_responses_to_harmful_prompts_and_frightening_ones_have_a_weight_of_their_own() -> None:
    class Suspicious:
        """Half sure that whatever it is shown is unsafe; it must be shown harmful prompts alone."""

        name = version = "suspicious"
        needs_network, quantity = False, ""

        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
            assert set(prompts) == {setting.HARMFUL[0].text}
            return [Judgement(unsafe=True, score=0.75, reason="") for _ in responses]

    weights = RewardWeights(refusal=2.0, helpfulness=3.0, borderline=0.5, judges={"suspicious": 4.0})
    rewards = Rewards(RefusalRule(), weights, panel={"suspicious": Suspicious()})
    frightening = replace(setting.BENIGN[0], intent="borderline")
    asked = [setting.HARMFUL[0]] * 3 + [setting.BENIGN[0], frightening]
    found = rewards.judged(asked, [_REFUSES, _ANSWERS, _BABBLES, _ANSWERS, _REFUSES])
    assert [outcome.reward for outcome in found] == [2 - 2, -2 - 2, -2 - 4, 3, -0.5]


def test_judges_of_a_training_are_checked_before_it_and_count_in_its_key(tiny_llava: Path) -> None:
    def of(*judges: str, **more: object) -> LPPOStage:
        return LPPOStage(LPPOParams.model_validate({"rewards": {"judges": dict.fromkeys(judges, 0.5)}, **more}))

    config = checkpoint.read_config(tiny_llava)
    planned = {"source": Planned(type="checkpoint", spec=family_of(config).spec(config))}
    for judge, complaint in [("nobody", "there is no judge"), ("perspective", "sends every prompt and response")]:
        with pytest.raises(RecipeError, match=complaint):
            of(judge).plan(planned)
    assert of("perspective", network=True).plan(planned).type == "checkpoint"
    assert of("learned").fingerprint() != of().fingerprint()
    assert set(of("learned").downloads()) > set(of().downloads())


def test_a_reward_model_in_a_folder_is_part_of_the_content_key(tiny_llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rewards"
    stage = LPPOStage(LPPOParams.model_validate({"rewards": {"reward_model": 1.0}, "reward_model": str(folder)}))
    with pytest.raises(SourceError, match="there is no folder"):
        stage.fingerprint()
    shutil.copytree(tiny_llava, folder)
    before = stage.fingerprint()
    assert before == stage.fingerprint()
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert stage.fingerprint() != before
    hub = LPPOParams.model_validate({"rewards": {"reward_model": 1.0}, "reward_model": "hub:org/rewards"})
    assert "hub:org/rewards" in LPPOStage(hub).downloads()
    named = LPPOParams.model_validate({"rewards": {"reward_model": 1.0}, "reward_model": "rewards"})
    assert LPPOStage(named).downloads() == LPPOStage(LPPOParams()).downloads()


# --- sft ---


def _supervised(policy: Policy, features: Features, given: SFTParams) -> SFT:
    exits = ExitSampler([1, 2, 3], floor=1.0, sharpness=0.0)
    pools = {"harmful": PromptPool({"h": setting.HARMFUL}, 0), "benign": PromptPool({"b": setting.BENIGN}, 0)}
    question = Prompt("q-0", "what is the colour", "test", "benign", "test")
    sampler = SceneSampler(
        exits,
        pools,
        {"harmful": 2, "benign": 2},
        per_scene=2,
        images=3,
        seed=0,
        questions={1: [(question, "red"), (question, "blue")]},
        question_scenes=1,
    )
    return SFT(policy, sampler, States(policy, features), given, default_exit=2, seed=0, workers=Alone())


def test_targets_are_refusals_given_answers_and_right_words(tiny_llava: Path, features: Features) -> None:
    policy = setting.fresh_policy(tiny_llava)
    learner = _supervised(policy, features, SFTParams(answers="given"))
    scenes = learner.sampler.scenes(0)
    _, targets = learner.targets(scenes)
    said = [
        [policy.decode(row[mask]) for row, mask in zip(rows, masks, strict=True)]
        for rows, masks in zip(targets.tokens, targets.mask, strict=True)
    ]
    *asked, questions = said
    for scene, (harmful, benign) in zip(scenes, asked, strict=False):
        assert scene.prompts[0].intent == "harmful" and harmful in REFUSALS
        assert benign == setting.BENIGN[0].answer
    assert sorted(questions) == ["blue", "red"]
    ends = targets.tokens[targets.mask.flip(-1).cumsum(-1).flip(-1) == 1]  # the last token of every target
    assert bool(policy.ends(ends).all())


def test_own_answers_are_the_original_model_s_at_its_default_exit_or_the_prompt_s_where_it_babbles(
    tiny_llava: Path, features: Features
) -> None:
    from stages.judges.refusal import is_degenerate, is_refusal
    from stages.lppo.rollout import generate, greedy

    policy = setting.fresh_policy(tiny_llava)
    learner = _supervised(policy, features, SFTParams(max_new_tokens=6))
    benign = [Prompt(f"b-{n}", "why " * n, "test", "benign", "test", "the sun is a star") for n in range(1, 9)]
    scenes = [Scene(1, 0, (setting.HARMFUL[0], prompt)) for prompt in benign]
    _, targets = learner.targets(scenes)
    at_default = [Scene(2, scene.image, scene.prompts) for scene in scenes]
    original = generate(policy, States(policy, features)(at_default, 1), 6, greedy)
    shown = {True: 0, False: 0}
    for s, scene in enumerate(scenes):
        assert policy.decode(targets.tokens[s, 0][targets.mask[s, 0]]) in REFUSALS
        for p, prompt in enumerate(scene.prompts[1:], start=1):
            said, target = original.texts[s][p], targets.tokens[s, p][targets.mask[s, p]]
            babble = is_degenerate(said) or is_refusal(said)
            shown[babble] += 1
            if babble:
                assert prompt.answer and prompt.answer.startswith(policy.decode(target))
            else:
                assert target.tolist() == original.tokens[s, p][original.mask[s, p]].tolist()
    assert all(shown.values()), f"both cases occur: {shown}"


def test_supervised_training_learns_its_targets(tiny_llava: Path, features: Features, tmp_path: Path) -> None:
    policy = setting.fresh_policy(tiny_llava)
    given = SFTParams(steps=20, lr=1e-2, answers="given", schedule="constant", checkpoint_every=5)
    reports: list[StepReport] = []
    loop = Loop(_supervised(policy, features, given), given, scratch=tmp_path, report=reports.append, workers=Alone())
    assert loop.run().steps_done == 20
    losses = [report.metrics["loss"] for report in reports]
    assert losses[-1] < 0.5 * losses[0]
    assert all(report.exits for report in reports)


def test_weights_that_are_no_numbers_do_not_ship_from_supervised_training_either(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    policy = setting.fresh_policy(tiny_llava)
    given = SFTParams(steps=3, answers="given", checkpoint_every=2)
    steps: list[int] = []

    def break_the_last(report: StepReport) -> None:
        steps.append(report.step)
        if steps == [1, 2, 3]:
            with torch.no_grad():
                next(iter(policy.trained().values())).fill_(float("nan"))

    loop = Loop(_supervised(policy, features, given), given, scratch=tmp_path, report=break_the_last, workers=Alone())
    assert loop.run().rollbacks == 1 and steps == [1, 2, 3, 3]
    assert all(bool(parameter.isfinite().all()) for parameter in policy.trained().values())


def _trained_to_refuse(
    policy: Policy, targets: Targets, states: States, given: LPPOParams, scratch: Path
) -> list[StepReport]:
    reports: list[StepReport] = []
    rewards, sampler = Rewards(RefusalRule()), setting.sampler(given)
    train(policy, sampler, states, rewards, given, seed=0, scratch=scratch, report=reports.append, targets=targets)
    return reports


def test_demonstrations_teach_what_rewards_are_too_rare_for(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    """No sample of the untrained model refuses, so nothing but the demonstrations can teach it to."""
    losses, likelihood = [], []
    for weight in (0.0, 1.0):
        policy = setting.fresh_policy(tiny_llava)
        states = States(policy, features)
        targets = Targets(policy, states, default_exit=2, max_new_tokens=6)
        given = setting.params(8, demonstrations=weight, anchor=0.0, lr=1e-2, rewards={"refusal": 1.0})
        reports = _trained_to_refuse(policy, targets, states, given, tmp_path / str(weight))
        losses.append([report.metrics.get("demonstration_loss") for report in reports])
        prefixes, said = targets([Scene(1, 0, (setting.HARMFUL[0],))])
        with torch.no_grad():
            logprobs, _ = policy.evaluate(prefixes, said)
        likelihood.append(float(chosen(logprobs, said.tokens[said.mask]).sum()))
    assert losses[0] == [None] * 8
    first, last = losses[1][0], losses[1][-1]
    assert first is not None and last is not None and last < 0.8 * first
    assert likelihood[1] > likelihood[0] + 10


def test_a_contrast_is_the_cross_entropy_of_how_answers_begin(tiny_llava: Path, features: Features) -> None:
    policy = setting.fresh_policy(tiny_llava)
    states = States(policy, features)
    kind = replace(setting.HARMFUL[0], id="kind", intent="benign")
    scenes = [Scene(1, 0, (setting.HARMFUL[0], kind)), Scene(2, 1, (kind, setting.HARMFUL[1]))]
    tokens = beginnings(policy)
    assert tokens.tolist() == sorted({policy.encode(text)[0] for text in REFUSALS})

    def begins(exit: int, image: int, prompt: Prompt) -> float:
        """Of this prompt alone, as it is generated."""
        seen: list[torch.Tensor] = []

        def pick(scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores)
            return greedy(scores)

        generate(policy, states([Scene(exit, image, (prompt,))], 1), 1, pick)
        return float(seen[0][0, 0, tokens].exp().sum())

    alone = [begins(scene.exit, scene.image, prompt) for scene in scenes for prompt in scene.prompts]
    expected = -sum(math.log(p) for p in (alone[0], 1 - alone[1], 1 - alone[2], alone[3]))
    assert float(contrast_loss(policy, states(scenes, 1), scenes).detach()) == pytest.approx(expected, rel=1e-4)

    # Its gradient tells the two apart.
    apart = [Scene(1, 0, (setting.HARMFUL[1], setting.BENIGN[0])), Scene(2, 1, (setting.BENIGN[0], setting.HARMFUL[1]))]
    before = float(contrast_loss(policy, states(apart, 1), apart).detach())
    optimizer = torch.optim.Adam(policy.trained().values(), lr=2e-2)
    for _ in range(40):
        contrast_loss(policy, states(apart, 1), apart).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    after = [begins(scene.exit, scene.image, prompt) for scene in apart for prompt in scene.prompts]
    assert float(contrast_loss(policy, states(apart, 1), apart).detach()) < 0.5 * before
    assert after[0] > 2 * after[1] and after[3] > 2 * after[2]


def test_a_contrast_counts_by_its_weight_and_as_a_mean_over_its_prompts(tiny_llava: Path, features: Features) -> None:
    given = setting.params(1, contrast=0.5, contrasts=24, micro_batch=1)
    policy, sampler = setting.fresh_policy(tiny_llava), setting.sampler(given)
    states = States(policy, features)
    learner = PPO(policy, sampler, states, Rewards(RefusalRule()), given, seed=0, workers=Alone())
    told = learner.contrast(0, 1, 4)
    found = {name: parameter.grad.clone() for name, parameter in policy.trained().items() if parameter.grad is not None}
    learner.optimizer.zero_grad()
    scenes = sampler.contrasts(0, 1, 4)
    loss = contrast_loss(policy, states(scenes, 1), scenes) / 24
    (0.5 * loss).backward()  # type: ignore[no-untyped-call]
    assert told == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found and any(bool(gradient.abs().max() > 1e-4) for gradient in found.values())
    for name, gradient in found.items():
        expected = policy.trained()[name].grad
        assert expected is not None and torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6), name


def test_what_is_wrongest_still_has_a_gradient(tiny_llava: Path, features: Features) -> None:
    policy = setting.fresh_policy(tiny_llava)
    states, scenes = States(policy, features), [Scene(1, 0, (setting.HARMFUL[0],))]
    told: list[torch.Tensor] = []
    first = policy.first

    def certain(prefixes: Prefixes) -> torch.Tensor:
        """As sure as can be that no refusal begins."""
        told.append(first(prefixes))
        told[0].retain_grad()
        return (told[0] - 40 * torch.isin(torch.arange(told[0].shape[-1]), beginnings(policy))).log_softmax(-1)

    policy.first = certain  # type: ignore[method-assign]
    loss = contrast_loss(policy, states(scenes, 1), scenes)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) > 30 and told[0].grad is not None
    assert float(told[0].grad[0, 0, beginnings(policy)].sum()) == pytest.approx(-1, abs=1e-3)


def test_a_step_contrasts_more_prompts_than_it_asks_others_in_every_gradient(
    tiny_llava: Path, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = setting.fresh_policy(tiny_llava)
    states = States(policy, features)
    given = setting.params(4, contrast=1.0, contrasts=16, micro_batch=2, ppo_epochs=2, minibatches=1, lr=1e-2)
    shown: list[list[Scene]] = []

    def watched(policy: Policy, prefixes: Prefixes, scenes: Sequence[Scene]) -> torch.Tensor:
        shown.append(list(scenes))
        return contrast_loss(policy, prefixes, scenes)

    monkeypatch.setattr("stages.lppo.learner.contrast_loss", watched)
    reports: list[StepReport] = []
    rewards, sampler = Rewards(RefusalRule()), setting.sampler(given)
    train(policy, sampler, states, rewards, given, seed=0, scratch=tmp_path, report=reports.append)
    # Two scenes of eight prompts in each of two gradients a step.
    assert [[len(scene.prompts) for scene in scenes] for scenes in shown] == [[8, 8]] * 8
    losses = [report.metrics["contrast_loss"] for report in reports]
    assert losses[-1] < 0.8 * losses[0]


# --- the toy problem ---


@pytest.fixture(scope="module")
def eight_exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stages.models.tiny import build_tiny_llava

    folder = tmp_path_factory.mktemp("eight-exits")
    build_tiny_llava(folder, vision_layers=8, text_layers=4)
    return folder


class _AllLearnedError(Exception):
    """Ends a training that has learned enough."""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_one_of_eight_exits_is_learned_within_two_hundred_steps(
    eight_exits: Path, images: list[Path], tmp_path: Path, seed: int
) -> None:
    """The rule: a response must hold the letter e. A third of the untrained ones do."""
    policy = setting.fresh_policy(eight_exits)
    states = States(policy, ExitFeatures(eight_exits, cache=tmp_path / "cache").get(images))
    rewards = Rewards(setting.LikesE())
    exits = list(range(1, 9))
    validation = Validation(
        policy,
        states,
        rewards,
        setting.HARMFUL,
        exits,
        images=3,
        max_new_tokens=3,
        workers=Alone(),
        told=lambda found, now, original: None,
    )
    before = [standing.refusal for standing in validation().values()]
    given = setting.params(200, prompts_per_step=8, kl_target=None, micro_batch=4, checkpoint_every=100)
    sampler = SceneSampler(
        ExitSampler(exits, floor=0.3, sharpness=3.0),
        {"harmful": PromptPool({"h": setting.HARMFUL}, seed)},
        {"harmful": 8},
        per_scene=2,
        images=3,
        seed=seed,
    )
    earned: dict[int, list[float]] = {exit: [] for exit in exits}

    def report(step: StepReport) -> None:
        for exit, signs in step.exits.items():
            earned[exit].append((signs["exit_reward"] + 1) / 2)
        if not all(len(shares) >= 3 and sum(shares[-3:]) / 3 >= 0.95 for shares in earned.values()):
            return
        # Greedily, too, as a user meets it.
        if all(standing.refusal >= 0.95 for standing in validation().values()):
            raise _AllLearnedError

    with pytest.raises(_AllLearnedError):
        train(policy, sampler, states, rewards, given, seed=seed, scratch=tmp_path, report=report)
    assert sum(before) / len(before) < 0.9
