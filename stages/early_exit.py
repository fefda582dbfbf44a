"""Stage `early-exit`: the image encoder keeps its first blocks; features leave after the last one kept.

With `layer: auto` every exit up to the default one answers the same validation questions, and the earliest whose share
of right answers is within the tolerance of the default exit's is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, field_validator, model_validator

from artifacts.errors import RecipeError
from stages.data import easy_vqa, images
from stages.models import checkpoint, realign
from stages.models.family import family_named, family_of
from stages.models.flops import encoder_flops
from stages.models.licence import inherited
from stages.models.shards import LeftOut
from stages.models.truncation import cut_files
from stages.stage import Context, Planned, Stage, StageParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.models.family import Family
    from stages.models.spec import VisionSpec
    from stages.runtimes.utility import Utility

_HELD_OUT: Final = 12  # images that the fit is judged on
_ASKING: Final = 0.95  # of the work of layer: auto

Progress = Callable[[float, str], None]  # share done, note


class EarlyExitParams(StageParams):
    layer: int | Literal["auto"] = Field(
        description="how many encoder blocks to keep; the exit (ICET-l) is after the last of them. auto: the earliest "
        "exit within the tolerance; until it is known, `pipeline plan` counts with the default exit, the most that it "
        "can be"
    )
    tolerance: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="with layer: auto, how far the share of right answers may lie below the default exit's; 0.02 is "
        "two points",
    )
    questions: int = Field(
        default=200,
        ge=20,
        le=966,
        description="with layer: auto, visual questions that every exit is asked: easy-VQA about pictures that nothing "
        "trains on and no gate measures on",
    )
    dtype: checkpoint.DType = Field(default="float32", description="with layer: auto, of the computation")
    realign: bool = Field(
        default=False,
        description="fold into the projector the affine map from this exit's features to those it was trained on, by "
        "least squares on unlabelled images; costs nothing at run time",
    )
    realign_images: int = Field(default=300, ge=1, description="benign images of the train split to fit it on")

    @field_validator("layer", mode="before")
    @classmethod
    def _number_or_auto(cls, layer: object) -> object:
        # pydantic would complain of each of the two types in turn.
        if layer == "auto" or (isinstance(layer, int) and not isinstance(layer, bool)):
            return layer
        raise ValueError(f"layer {layer!r} is no exit; write a number of encoder blocks, or auto")

    @model_validator(mode="after")
    def _auto_alone(self) -> EarlyExitParams:
        # By value: parameters that went through a file name every field.
        fields = type(self).model_fields
        told = [name for name in ("tolerance", "questions", "dtype") if getattr(self, name) != fields[name].default]
        if self.layer != "auto" and told:
            raise ValueError(f"{', '.join(told)} has a meaning with layer: auto only; layer is {self.layer}")
        return self


class EarlyExitStage(Stage[EarlyExitParams]):
    """Cuts the tower to `layer` blocks and saves a checkpoint that stock transformers loads."""

    name = "early-exit"
    summary = "keep the first blocks of the image encoder and leave it there"
    accepts = ("checkpoint",)
    code_version = "5"
    output_type = "checkpoint"
    libraries = ("torch", "transformers")
    Params = EarlyExitParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        planned = super().plan(inputs)
        layer = self.params.layer
        if planned.spec is None:
            if layer != "auto" and layer < 1:
                raise RecipeError(f"layer {layer} is not an exit", way_out="exits are counted from 1")
            return planned
        vision = planned.spec.vision
        if vision is None:
            raise RecipeError(
                f"early-exit needs a model with an image encoder; this one ({planned.spec.family}) has none",
                way_out="leave the stage out",
            )
        exit = vision.default_exit if layer == "auto" else layer
        _check(exit, vision.layers)
        if self.params.realign:
            family = family_named(planned.spec.family)
            if family is not None and not family.realigns:
                raise RecipeError(
                    f"the projector of {family.name} cannot be realigned",
                    why="an affine map can be folded into a linear layer that takes the encoder's features only",
                    way_out="leave realign out",
                )
        # The exit that auto will find is at most the default one: what is planned is an upper bound.
        spec = planned.spec.with_exit(exit, at_most=layer == "auto")
        return Planned(type=self.output_type, spec=spec)

    def downloads(self) -> Sequence[str]:
        wheels = set(images.packages()) if self.params.realign else set()
        return sorted(wheels.union(easy_vqa.SOURCES if self.params.layer == "auto" else ()))

    def run(self, context: Context) -> Mapping[str, object]:
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        vision = family.spec(config).vision
        if vision is None:
            raise RecipeError("early-exit needs a model with an image encoder", where=context.stage_id)
        layer = self.params.layer
        _check(vision.default_exit if layer == "auto" else layer, vision.layers)
        utility: dict[int, Utility] = {}
        begun = 0.0
        if layer == "auto":
            layer, utility = self._chosen(context, source, vision)
            begun = _ASKING

        def progress(done: float, note: str = "") -> None:
            context.progress(begun + (1 - begun) * done, 1, note)

        about = inherited(context.input("checkpoint"))
        told = about | _told(family, vision, layer) | _measured(utility, self.params)

        cut = None if self.params.realign else family.disk_cut(config, layer)
        if cut is not None:  # nothing is computed: the model need not be in memory
            progress(0, "copying")
            left_out = cut_files(source, context.output, cut)
            progress(1)
            return told | _removed(left_out)

        progress(0, "loading")
        model = family.load(source, dtype=checkpoint.dtype_of(config))
        before = dict(model.named_parameters())
        realigned: dict[str, float] = {}
        affine = None
        if self.params.realign and layer < vision.default_exit:
            affine, realigned = self._fit(context, family, model, source, layer, vision.default_exit, progress)
        progress(0.4, "cutting")
        family.truncate(model, layer)
        if affine is not None:
            realign.fold(affine, family.projector_input(model))
        kept = dict(model.named_parameters())
        removed = {name: weight for name, weight in before.items() if name not in kept}
        progress(0.7, "saving")
        checkpoint.save_model(model, context.output, companions_from=source)
        progress(1)
        left_out = LeftOut(len(removed), sum(weight.numel() for weight in removed.values()))
        return told | _removed(left_out) | realigned

    def _chosen(self, context: Context, source: Path, vision: VisionSpec) -> tuple[int, dict[int, Utility]]:
        """The earliest exit within the tolerance, and what every exit up to the default one is worth."""
        from stages.runtimes.utility import earliest_within, validation_utility

        default = vision.default_exit
        utility = validation_utility(
            source,
            range(1, default + 1),
            self.params.questions,
            size=vision.image_size,
            seed=context.seed,
            scratch=context.scratch,
            dtype=self.params.dtype,
            told=lambda done, total: context.progress(
                _ASKING * done / total, 1, f"asking at exit {done + 1} of {total}"
            ),
        )
        for exit, measured in utility.items():
            context.metric("validation_utility", measured.share, exit=exit)
        layer = earliest_within(utility, default, self.params.tolerance)
        shares = f"{utility[layer].share:.1%} right, {utility[default].share:.1%} at the default exit {default}"
        context.log(f"exit {layer}: {shares}")
        return layer, utility

    def _fit(
        self,
        context: Context,
        family: Family,
        model: PreTrainedModel,
        source: Path,
        layer: int,
        wanted: int,
        progress: Progress,
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
                early, late = (family.exit_features(config, states, exit) for exit in (layer, wanted))
                yield torch.from_numpy(early), torch.from_numpy(late)

        n = self.params.realign_images
        fit: realign.AffineFit | None = None
        for done, (early, late) in enumerate(pairs(images.benign_images("train", n, seed=context.seed))):
            progress(0.4 * done / n, "realigning")
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


def _told(family: Family, vision: VisionSpec, layer: int) -> dict[str, object]:
    """What is left, and the operations an image takes (`stages.models.flops`), against the default exit before."""
    before, after = encoder_flops(vision, vision.default_exit), encoder_flops(vision, layer)
    return {
        "family": family.name,
        "exits": list(range(1, layer + 1)),
        "default_exit": layer,
        "default_exit_before": vision.default_exit,
        "encoder_flops": after,
        "encoder_flops_saved": before - after,
    }


def _removed(left_out: LeftOut) -> dict[str, object]:
    return {"removed_tensors": left_out.tensors, "removed_parameters": left_out.parameters}


def _measured(utility: Mapping[int, Utility], params: EarlyExitParams) -> dict[str, object]:
    """The table that `layer: auto` chose by; nothing for a fixed layer."""
    if not utility:
        return {}
    rows = {
        str(exit): {"right": measured.right, "asked": measured.asked, "utility": round(measured.share, 6)}
        for exit, measured in utility.items()
    }
    return {"utility": rows, "tolerance": params.tolerance}


def _check(layer: int, layers: int) -> None:
    if not 1 <= layer <= layers:
        raise RecipeError(
            f"layer {layer} is not an exit of this model",
            why=f"its image encoder has {layers} blocks",
            way_out=f"choose a layer from 1 to {layers}",
        )
