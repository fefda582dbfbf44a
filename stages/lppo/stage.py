"""Stage `l-ppo`: the language backbone learns to refuse, whichever exit the image features come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError
from stages.judges import registry
from stages.judges.refusal import RefusalRule
from stages.lppo.hardening import Hardening, Setting, tell
from stages.lppo.params import LPPOParams
from stages.resources import device_of
from stages.stage import Context, Planned

if TYPE_CHECKING:
    from stages.lppo.loop import Ending
    from stages.lppo.reward import Rewards


class LPPOStage(Hardening[LPPOParams]):
    name = "l-ppo"
    code_version = "13"
    summary = "harden the language model on the features of every exit (Layer-wise Clip-PPO)"
    Params = LPPOParams

    def references(self) -> Mapping[str, str]:
        model = self.params.reward_model
        named = {"reward_model": model} if model is not None and not _is_model_id(model) else {}
        return {**super().references(), **named}

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        planned = super().plan(inputs)
        if judges := tuple(self.params.rewards.judges):
            registry.check_judges(judges, network=self.params.network)
        id = self.references().get("reward_model")
        if id is not None and id in inputs and inputs[id].type != "reward-model":
            raise RecipeError(
                f"reward_model: the stage '{id}' makes an artifact of type {inputs[id].type!r}",
                why="rewards come from a sequence classifier",
                way_out="name a stage that uses reward-model, or hub:ID",
            )
        return planned

    def fingerprint(self) -> str:
        from stages.judges.reward_model import source_digest

        model = self.params.reward_model
        parts = [super().fingerprint(), registry.fingerprint(tuple(self.params.rewards.judges))]
        if model is not None and _is_model_id(model):
            parts.append(source_digest(model))
        return " ".join(filter(None, parts))

    def downloads(self) -> Sequence[str]:
        from stages.judges.reward_model import remote

        model = self.params.reward_model
        named = remote(model) if model is not None and _is_model_id(model) else ""
        judges = registry.downloads(tuple(self.params.rewards.judges))
        return tuple(dict.fromkeys((*super().downloads(), *judges, *([named] if named else []))))

    def _rewards(self, context: Context) -> Rewards:
        """What a response earns, with the models that this takes."""
        from stages.judges.reward_model import RewardModel, locate
        from stages.lppo.reward import Rewards

        params = self.params
        model = None
        if params.reward_model is not None:
            found = context.inputs.get(params.reward_model)
            folder = locate(params.reward_model) if found is None else found.path
            model = RewardModel(folder, device=device_of(params.device, context.team))
        panel = {judge: registry.open_judge(judge) for judge in params.rewards.judges}
        return Rewards(RefusalRule(), params.rewards, model, panel)

    def train(self, context: Context, setting: Setting) -> Ending:
        from stages.lppo.algorithm import train
        from stages.lppo.targets import Targets

        return train(
            setting.policy,
            setting.sampler,
            setting.states,
            self._rewards(context),
            self.params,
            seed=context.seed,
            scratch=context.scratch,
            report=lambda step: tell(context, step, setting.sampler.exits.failure),
            targets=Targets(
                setting.policy,
                setting.states,
                default_exit=setting.default_exit,
                max_new_tokens=self.params.max_new_tokens,
            ),
            validation=setting.validation,
            workers=setting.workers,
        )

    def run(self, context: Context) -> Mapping[str, object]:
        params = self.params
        told: dict[str, object] = {
            "variant": params.variant,
            "objective": params.objective,
            "demonstrations": params.demonstrations,
        }
        if departures := params.departures():
            context.log(f"variant: paper, but not as published: {', '.join(sorted(departures))}")
            told["departures"] = departures
        return {**super().run(context), **told}


def _is_model_id(text: str) -> bool:
    """Whether it is a model (`hub:...`, a path) rather than a stage of the recipe."""
    return ":" in text or "/" in text
