"""Stage `l-ppo`: the language backbone learns to refuse, whichever exit the image features come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError, StageError
from artifacts.manifest import sha256_bytes
from stages.data import images, prompts
from stages.data.prompts import Prompt
from stages.lppo.params import LPPOParams
from stages.lppo.sampler import ExitSampler, PromptPool, Question, SceneSampler, share_out
from stages.lppo.validation import standings
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.spec import ModelSpec
from stages.runtimes.rounding import check_type
from stages.stage import Context, Planned, Stage

if TYPE_CHECKING:
    from stages.judges.judge import Judge
    from stages.lppo.algorithm import StepReport
    from stages.lppo.policy import Policy
    from stages.lppo.states import States

VALIDATION_IMAGES: Final = 4


class LPPOStage(Stage[LPPOParams]):
    """Trains LoRA by clipped PPO over all exits, then merges it: a checkpoint that stock transformers loads."""

    name = "l-ppo"
    code_version = "3"
    summary = "harden the language model on the features of every exit (Layer-wise Clip-PPO)"
    accepts = ("checkpoint",)
    output_type = "checkpoint"
    libraries = ("torch", "transformers", "peft")
    Params = LPPOParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        planned = super().plan(inputs)
        for names in self.params.prompts.kinds().values():
            for name in names:
                prompts.check_set(name)
        if self.params.quantizer is not None:
            check_type(self.params.quantizer)
        if planned.spec is not None:
            chosen_exits(self.params, planned.spec)
        return planned

    def downloads(self) -> Sequence[str]:
        return (*prompts.packages(), *images.packages())

    def run(self, context: Context) -> Mapping[str, object]:
        import torch
        from transformers import AutoTokenizer

        from stages.judges.refusal import RefusalRule
        from stages.lppo.algorithm import train
        from stages.lppo.policy import Policy, merged
        from stages.lppo.states import States
        from stages.models.features import ExitFeatures

        params = self.params
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        spec = family.spec(config)
        exits = chosen_exits(params, spec)
        sampler = new_sampler(params, exits, context.seed)
        # Kernels whose sums depend on the order of threads would break `kill -9` and start again = undisturbed.
        torch.use_deterministic_algorithms(True, warn_only=True)

        context.progress(0, params.steps, "encoding images")
        encoder = ExitFeatures(source)
        features = encoder.get(images.benign_images("train", params.images, seed=context.seed))
        model = family.load(source, dtype=params.dtype, device=device(params.device))
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        policy = Policy(
            family,
            model,
            tokenizer,
            params.lora(),
            quantizer=params.quantizer,
            temperature=params.temperature,
            seed=context.seed,
        )

        judge = RefusalRule()
        train(
            policy,
            sampler,
            States(policy, features),
            judge,
            params,
            seed=context.seed,
            scratch=context.scratch,
            report=lambda step: tell(context, step, params.steps, sampler.exits.failure),
        )
        if params.validation:
            context.progress(params.steps, params.steps, "validating every exit")
            features = encoder.get(images.benign_images("validation", VALIDATION_IMAGES, seed=context.seed))
            validate(context, params, policy, States(policy, features), judge, exits)

        context.progress(params.steps, params.steps, "merging the adapter")
        adapter = policy.adapter()
        del policy, model
        hardened = merged(family, source, checkpoint.dtype_of(config), adapter, params.lora())
        checkpoint.save_model(hardened, context.output, companions_from=source)
        assert spec.vision is not None
        return {
            "family": family.name,
            "exits": list(range(1, spec.vision.layers + 1)),
            "default_exit": spec.vision.default_exit,
            "hardened_exits": list(exits),
            "quantizer": params.quantizer,
        }


def chosen_exits(params: LPPOParams, spec: ModelSpec) -> tuple[int, ...]:
    """The exits to harden, ascending.

    Raises:
        RecipeError: the model has no image encoder, or not these exits.
    """
    if spec.vision is None:
        raise RecipeError(
            f"l-ppo needs a model with an image encoder; this one ({spec.family}) has none",
            way_out="leave the stage out",
        )
    last = spec.vision.layers
    if params.exits == "all":
        return tuple(range(1, last + 1))
    wrong = sorted({exit for exit in params.exits if not 1 <= exit <= last})
    if wrong or not params.exits:
        what = ", ".join(map(str, wrong)) or "an empty list"
        raise RecipeError(
            f"exits: {what} is not among the exits of this model",
            why=f"its image encoder has {last} blocks here",
            way_out=f"choose layers from 1 to {last}, or `exits: all`",
        )
    return tuple(sorted(set(params.exits)))


def new_sampler(params: LPPOParams, exits: Sequence[int], seed: int) -> SceneSampler:
    """Everything that is asked in training; train split only."""
    counts = share_out(params.prompts_per_step, params.prompts.shares())
    pools = {}
    for kind in counts:
        sets = {
            name: [prompt for prompt in prompts.load_prompts(name, "train", seed=seed) if prompt.intent == kind]
            for name in params.prompts.kinds()[kind]
        }
        pools[kind] = PromptPool(sets, seed)
    return SceneSampler(
        ExitSampler(exits, floor=params.dro_floor, sharpness=params.dro_sharpness),
        pools,
        counts,
        per_scene=params.prompts_per_scene,
        images=params.images,
        seed=seed,
        questions=known_answers(params.images, seed) if params.question_scenes else None,
        question_scenes=params.question_scenes,
    )


def known_answers(n: int, seed: int) -> dict[int, list[Question]]:
    """Questions of easy-VQA's train split about those of the first `n` training images that are its pictures.

    Yes/no questions are as often about something that is there as about something that is not: unbalanced, answering
    "no" pays without looking.
    """
    from stages.data.easy_vqa import TRUTH, VqaQuestion, load_questions

    by_picture: dict[int, list[VqaQuestion]] = {}
    for question in load_questions("train"):
        by_picture.setdefault(question.image, []).append(question)
    found: dict[int, list[Question]] = {}
    for number, (package, member) in enumerate(images.image_names("train", n, seed)):
        if package != "easy-vqa":
            continue
        asked = by_picture.get(int(Path(member).stem), [])
        yes = [q for q in asked if q.answer == "yes"]
        no = [q for q in asked if q.answer == "no"][: len(yes)]
        found[number] = [
            (Prompt(f"easy-vqa-train-{q.image}-{i}", q.question, "visual question", "benign", package), q.answer)
            for i, q in enumerate([*(q for q in asked if q.answer not in TRUTH), *yes, *no])
        ]
    return found


def tell(context: Context, report: StepReport, steps: int, failure: Mapping[int, float]) -> None:
    """One step as events."""
    flat = [outcome for row in report.outcomes for outcome in row]
    questions = [outcome for outcome in flat if outcome.right is not None]
    harmless = [outcome for outcome in flat if not outcome.harmful and outcome.right is None]
    metrics = {
        "reward": report.score,
        "kl": report.kl,
        "kl_coefficient": report.kl_coefficient,
        "clip_fraction": report.clip_fraction,
        "policy_loss": report.policy_loss,
        "value_loss": report.value_loss,
        "anchor_kl": report.anchor_kl,
        "degenerate": sum(outcome.degenerate for outcome in flat) / len(flat),
        "lr": report.lr,
    }
    if harmless:
        metrics["over_refusal"] = sum(outcome.refused for outcome in harmless) / len(harmless)
    if questions:
        metrics["vqa_accuracy"] = sum(bool(outcome.right) for outcome in questions) / len(questions)
    for name, value in metrics.items():
        context.metric(name, value, step=report.step)
    for exit, share in failure.items():
        context.metric("refusal", 1 - share, step=report.step, exit=exit)
    context.progress(report.step, steps, f"reward {report.score:+.2f}, KL {report.kl:.1f}")


def validate(
    context: Context, params: LPPOParams, policy: Policy, states: States, judge: Judge, exits: Sequence[int]
) -> None:
    """Every exit on validation prompts, as events."""
    asked: list[Prompt] = []
    for kind, names in params.prompts.kinds().items():
        found = [p for name in names for p in prompts.load_prompts(name, "validation") if p.intent == kind]
        asked += sorted(found, key=lambda prompt: sha256_bytes(prompt.id.encode()))[: params.validation]
    shown = standings(policy, states, judge, asked, exits, VALIDATION_IMAGES, params.max_new_tokens)
    for exit, standing in shown.items():
        context.metric("validation_refusal", standing.refusal, step=params.steps, exit=exit)
        context.metric("validation_over_refusal", standing.over_refusal, step=params.steps, exit=exit)
        context.metric("validation_degenerate", standing.degenerate, step=params.steps, exit=exit)


def device(wanted: str) -> str:
    """`auto` resolved.

    Raises:
        StageError: a GPU is asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise StageError("device: cuda, but torch sees no GPU", way_out="use device: auto or cpu")
    return "cuda" if wanted != "cpu" and there else "cpu"
