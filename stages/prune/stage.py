"""Stage `prune`: the language model loses the blocks that change its states least, and may be healed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import StageError
from stages.data import articles, easy_vqa, images, prompt_sets, prompts
from stages.models import checkpoint
from stages.models.adapter import merged
from stages.models.family import Family, family_of
from stages.models.licence import inherited
from stages.prune import depth
from stages.prune.params import PruneParams
from stages.resources import device_of
from stages.stage import Context, Planned, Stage

if TYPE_CHECKING:
    import torch

    from stages.data.calibration import Calibration, Kind, Passage, Side
    from stages.prune.scores import Scores

_DIGITS: Final = 6  # of what goes into the manifest: kernels of another machine differ behind them
_TOGETHER: Final = 4  # sequences in a pass


@dataclass
class Found:
    """What the measurements have given."""

    dropped: tuple[int, ...]
    scores: Scores | None = None
    adapter: Mapping[str, torch.Tensor] | None = None
    divergence: dict[str, float] = field(default_factory=dict)  # "pruned", "healed": nats a token


class PruneStage(Stage[PruneParams]):
    """Depth pruning of the language model: a checkpoint that stock transformers loads and llama.cpp's converter knows.

    Listed layers without healing are dropped file to file, in little memory whatever the model's size.
    """

    name = "prune"
    code_version = "2"
    summary = "drop the blocks of the language model that do least"
    accepts = ("checkpoint",)
    output_type = "checkpoint"
    libraries = ("torch", "transformers", "peft")
    Params = PruneParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        planned = super().plan(inputs)
        if planned.spec is None:
            return planned
        self._check(planned.spec.text.layers)
        text = replace(planned.spec.text, layers=planned.spec.text.layers - self.params.amount)
        return Planned(type=self.output_type, spec=replace(planned.spec, text=text))

    def downloads(self) -> Sequence[str]:
        if not self._loads:
            return ()
        return (articles.SOURCE, *easy_vqa.SOURCES, *images.packages(), *prompt_sets.packages())

    def fingerprint(self) -> str:
        return prompts.prompts_fingerprint() if self._loads else ""

    def run(self, context: Context) -> Mapping[str, object]:
        params = self.params
        source = context.input("checkpoint").path
        config = checkpoint.read_config(source)
        family = family_of(config, where=str(source))
        spec = family.spec(config)
        self._check(spec.text.layers)
        if params.layers is not None:
            depth.check_cross_attention(params.layers, config)
        found = self._measured(context, family) if self._loads else Found(tuple(sorted(params.layers or ())))

        context.progress(0.95, 1, "writing")
        target = context.output if found.adapter is None else context.scratch / "pruned"
        left_out = depth.cut(source, target, found.dropped)
        if found.adapter is not None and params.heal is not None:
            healed = merged(family, target, checkpoint.dtype_of(config), found.adapter, params.heal.lora())
            checkpoint.save_model(healed, context.output, companions_from=source)
        checkpoint.make_readable(context.output)
        context.progress(1, 1)
        return {
            **inherited(context.input("checkpoint")),
            "family": family.name,
            "exits": list(range(1, spec.vision.layers + 1)) if spec.vision else [],
            "default_exit": spec.vision.default_exit if spec.vision else None,
            "method": params.chosen_by,
            "layers_before": spec.text.layers,
            "layers": spec.text.layers - len(found.dropped),
            "dropped_layers": list(found.dropped),
            "removed_tensors": left_out.tensors,
            "removed_parameters": left_out.parameters,
            "block_influence": _rounded(found.scores.influence) if found.scores else {},
            "angular_distance": _rounded(found.scores.distance) if found.scores else {},
            "kl_to_unpruned": {name: round(value, _DIGITS) for name, value in found.divergence.items()},
        }

    @property
    def _loads(self) -> bool:
        """Whether the model must be in memory."""
        return self.params.chosen_by != "layers" or self.params.heal is not None

    def _check(self, layers: int) -> None:
        if self.params.layers is not None:
            depth.check_dropped(self.params.layers, layers)
        else:
            depth.check_amount(self.params.amount, layers)

    def _measured(self, context: Context, family: Family) -> Found:
        """Choose, measure and heal with the model in memory; it is gone when this returns."""
        import torch

        from stages.data.calibration import Calibration
        from stages.prune.healing import Pair, heal

        params, source, seed = self.params, context.input("checkpoint").path, context.seed
        # Kernels whose sums depend on the order of threads would break `kill -9` and start again = undisturbed.
        torch.use_deterministic_algorithms(True, warn_only=True)
        context.progress(0, 1, "loading")
        model = family.load(source, dtype=params.dtype, device=device_of(params.device, context.team))
        tokenizer = checkpoint.load_tokenizer(source)

        def material(side: Side, pictures: int) -> Calibration:
            length = params.calibration.length
            return Calibration(family, source, model, tokenizer, side, length=length, pictures=pictures, seed=seed)

        trunk, fixed = family.trunk(model), depth.cross_attention_blocks(checkpoint.read_config(source))
        if params.layers is not None:
            found = Found(tuple(sorted(params.layers)))
        else:
            context.progress(0.05, 1, "measuring what every block does")
            found = self._chosen(context, trunk, material("train", max(1, params.calibration.questions)), fixed)
        context.log(f"dropping blocks {', '.join(map(str, found.dropped))}, counted from 0")
        pair = Pair(family, model, found.dropped)
        held_out: list[Passage] = []
        if params.validation:
            held_out = material("validation", params.validation).mixed(params.validation)
            found.divergence["pruned"] = pair.divergence(held_out, _TOGETHER)
            context.metric("kl_to_unpruned", found.divergence["pruned"], step=0)
        healing = params.heal
        if healing is None:
            return found

        def tell(step: int, kl: float, lr: float) -> None:
            context.metric("kl", kl, step=step)
            context.metric("lr", lr, step=step)
            context.progress(0.2 + 0.7 * step / healing.steps, 1, f"healing, step {step}: KL {kl:.3f}")

        train = material("train", healing.pictures)
        found.adapter = heal(pair, train, healing, seed=seed, scratch=context.scratch / "healing", report=tell)
        if held_out:
            found.divergence["healed"] = pair.divergence(held_out, _TOGETHER)
            context.metric("kl_to_unpruned", found.divergence["healed"], step=healing.steps)
        return found

    def _chosen(self, context: Context, trunk: torch.nn.Module, material: Calibration, fixed: Collection[int]) -> Found:
        from stages.data.calibration import batches
        from stages.prune.scores import least_angle, least_influential, score_blocks

        wanted, drop = self.params.calibration, self.params.amount
        amounts: dict[Kind, int] = {"text": wanted.texts, "question": wanted.questions, "prompt": wanted.prompts}
        passages = [material.passage(kind, n) for kind in material.kinds() for n in range(amounts[kind])]
        if not passages:
            raise StageError(
                "there is nothing to judge the blocks on",
                why=f"this model can only be asked: {', '.join(material.kinds())}",
                way_out="raise calibration.texts",
            )
        scores = score_blocks(
            cast("torch.nn.ModuleList", trunk.layers),
            lambda batch: batch.through(trunk),
            batches(passages, _TOGETHER),
            span=drop,
        )
        for block, value in scores.influence.items():
            context.metric("block_influence", value, step=block)
        for first, value in scores.distance.items():
            context.metric("angular_distance", value, step=first)
        angular = self.params.chosen_by == "angular"
        return Found(least_angle(scores, fixed) if angular else least_influential(scores, drop, fixed), scores)


def _rounded(scores: Mapping[int, float]) -> dict[str, float]:
    return {str(block): round(value, _DIGITS) for block, value in scores.items()}
