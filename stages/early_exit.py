"""Stage `early-exit`: the image encoder keeps its first blocks; features leave after the last one kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import Field

from artifacts.errors import RecipeError
from stages.data import images
from stages.models import checkpoint, realign
from stages.models.family import families, family_of
from stages.models.shards import LeftOut
from stages.models.truncation import cut_files
from stages.stage import Context, Planned, Stage, StageParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.models.family import Family

_HELD_OUT: Final = 12  # images that the fit is judged on


class EarlyExitParams(StageParams):
    layer: int = Field(description="how many encoder blocks to keep; the exit (ICET-l) is after the last of them")
    realign: bool = Field(
        default=False,
        description="fold into the projector the affine map from this exit's features to those it was trained on, by "
        "least squares on unlabelled images; costs nothing at run time",
    )
    realign_images: int = Field(default=300, ge=1, description="benign images of the train split to fit it on")


class EarlyExitStage(Stage[EarlyExitParams]):
    """Cuts the tower to `layer` blocks and saves a checkpoint that stock transformers loads."""

    name = "early-exit"
    summary = "keep the first blocks of the image encoder and leave it there"
    accepts = ("checkpoint",)
    code_version = "2"
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
        if self.params.realign:
            family = next((family for family in families() if family.name == planned.spec.family), None)
            if family is not None and not family.realigns:
                raise RecipeError(
                    f"the projector of {family.name} cannot be realigned",
                    why="an affine map can be folded into a linear layer that takes the encoder's features only",
                    way_out="leave realign out",
                )
        return Planned(type=self.output_type, spec=planned.spec.with_exit(self.params.layer))

    def downloads(self) -> Sequence[str]:
        return images.packages() if self.params.realign else ()

    def run(self, context: Context) -> Mapping[str, object]:
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        vision = family.spec(config).vision
        if vision is None:
            raise RecipeError("early-exit needs a model with an image encoder", where=context.stage_id)
        _check(self.params.layer, vision.layers)

        cut = None if self.params.realign else family.disk_cut(config, self.params.layer)
        if cut is not None:  # nothing is computed: the model need not be in memory
            context.progress(0, 1, "copying")
            left_out = cut_files(source, context.output, cut)
            context.progress(1, 1)
            return self._told(family, left_out)

        context.progress(0, 3, "loading")
        model = family.load(source, dtype=checkpoint.dtype_of(config))
        before = dict(model.named_parameters())
        realigned: dict[str, float] = {}
        affine = None
        if self.params.realign and self.params.layer < vision.default_exit:
            affine, realigned = self._fit(context, family, model, source, vision.default_exit)
        context.progress(1, 3, "cutting")
        family.truncate(model, self.params.layer)
        if affine is not None:
            realign.fold(affine, family.projector_input(model))
        kept = dict(model.named_parameters())
        removed = {name: weight for name, weight in before.items() if name not in kept}
        context.progress(2, 3, "saving")
        checkpoint.save_model(model, context.output, companions_from=source)
        context.progress(3, 3)
        left_out = LeftOut(len(removed), sum(weight.numel() for weight in removed.values()))
        return {**self._told(family, left_out), **realigned}

    def _told(self, family: Family, left_out: LeftOut) -> dict[str, object]:
        return {
            "family": family.name,
            "exits": list(range(1, self.params.layer + 1)),
            "default_exit": self.params.layer,
            "removed_tensors": left_out.tensors,
            "removed_parameters": left_out.parameters,
        }

    def _fit(
        self, context: Context, family: Family, model: PreTrainedModel, source: Path, wanted: int
    ) -> tuple[realign.Affine, dict[str, float]]:
        """The map from this exit to `wanted`, and how much of held-out features it explains."""
        import torch

        from stages.models.features import open_image

        config = checkpoint.read_config(source)

        def pairs(paths: Sequence[Path]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for path in paths:
                inputs = family.image_inputs(source, open_image(path))
                with torch.inference_mode():
                    states = family.hidden_states(model, inputs).float().cpu().numpy()
                early, late = (family.exit_features(config, states, exit) for exit in (self.params.layer, wanted))
                yield torch.from_numpy(early), torch.from_numpy(late)

        n = self.params.realign_images
        fit: realign.AffineFit | None = None
        for done, (early, late) in enumerate(pairs(images.benign_images("train", n, seed=context.seed))):
            context.progress(done / n, 3, "realigning")
            fit = fit or realign.AffineFit(early.shape[-1])
            fit.add(early, late)
        assert fit is not None
        affine = fit.solve()
        held_out = list(pairs(images.benign_images("validation", _HELD_OUT, seed=context.seed)))
        early, late = (torch.cat([pair[side] for pair in held_out]) for side in (0, 1))
        shares = {
            "explained_before": realign.explained(early, late),
            "explained_after": realign.explained(affine(early), late),
        }
        for name, value in shares.items():
            context.metric(name, value)
        return affine, shares


def _check(layer: int, layers: int) -> None:
    if not 1 <= layer <= layers:
        raise RecipeError(
            f"layer {layer} is not an exit of this model",
            why=f"its image encoder has {layers} blocks",
            way_out=f"choose a layer from 1 to {layers}",
        )
