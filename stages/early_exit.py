"""Stage `early-exit`: the image encoder keeps its first blocks; features leave after the last one kept."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from artifacts.errors import RecipeError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.stage import Context, Planned, Stage, StageParams


class EarlyExitParams(StageParams):
    layer: int = Field(description="how many encoder blocks to keep; the exit (ICET-l) is after the last of them")


class EarlyExitStage(Stage[EarlyExitParams]):
    """Cuts the tower to `layer` blocks and saves a checkpoint that stock transformers loads."""

    name = "early-exit"
    summary = "keep the first blocks of the image encoder and leave it there"
    accepts = ("checkpoint",)
    output_type = "checkpoint"
    libraries = ("torch", "transformers")
    Params = EarlyExitParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        planned = super().plan(inputs)
        if planned.spec is None:
            if self.params.layer < 1:
                raise RecipeError(f"layer {self.params.layer} is not an exit", way_out="exits are counted from 1")
            return planned
        vision = planned.spec.vision
        if vision is None:
            raise RecipeError(
                f"early-exit needs a model with an image encoder; this one ({planned.spec.family}) has none",
                way_out="leave the stage out",
            )
        _check(self.params.layer, vision.layers)
        return Planned(type=self.output_type, spec=planned.spec.with_exit(self.params.layer))

    def run(self, context: Context) -> Mapping[str, object]:
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        vision = family.spec(config).vision
        if vision is None:
            raise RecipeError("early-exit needs a model with an image encoder", where=context.stage_id)
        _check(self.params.layer, vision.layers)

        context.progress(0, 3, "loading")
        model = family.load(source, dtype=checkpoint.dtype_of(config))
        before = dict(model.named_parameters())
        context.progress(1, 3, "cutting")
        family.truncate(model, self.params.layer)
        kept = dict(model.named_parameters())
        removed = {name: weight for name, weight in before.items() if name not in kept}
        context.progress(2, 3, "saving")
        checkpoint.save_model(model, context.output, companions_from=source)
        context.progress(3, 3)
        return {
            "family": family.name,
            "exits": list(range(1, self.params.layer + 1)),
            "default_exit": self.params.layer,
            "removed_tensors": len(removed),
            "removed_parameters": sum(weight.numel() for weight in removed.values()),
        }


def _check(layer: int, layers: int) -> None:
    if not 1 <= layer <= layers:
        raise RecipeError(
            f"layer {layer} is not an exit of this model",
            why=f"its image encoder has {layers} blocks",
            way_out=f"choose a layer from 1 to {layers}",
        )
