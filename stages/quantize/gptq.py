"""Stage `gptq`: the language model of a checkpoint is quantized by GPTQModel and put back beside tower and projector.

What comes out is a checkpoint in the AutoGPTQ layout (`checkpoint_format: gptq`): stock transformers loads it, images
included, where optimum and gptqmodel are installed. The image encoder, the projector, embeddings and the head stay as
they are. The calibration shows the model what it will see: text, visual questions with their pictures, and prompts,
harmful ones too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from artifacts.disk import fsync_tree, write_atomically
from artifacts.errors import RecipeError, StageError
from stages.data.calibration_mix import CalibrationMix
from stages.models import checkpoint
from stages.models.family import Family, family_named, family_of
from stages.models.spec import TextSpec
from stages.quantize.gptq_checkpoint import put_back, write_language_model
from stages.quantize.gptq_model import Matrix, Settings, check_installed, quantize_language_model
from stages.resources import device_of
from stages.stage import Context, Located, Planned, Stage, StageParams

if TYPE_CHECKING:
    from stages.data.calibration import Batch, Kind

_STEPS: Final = 4
_GROUPS: Final = (32, 64, 128)
_PACKED: Final = 32  # columns of a matrix come in this many, whatever the bits
_DIGITS: Final = 6
_QUANTIZED: Final = "quantized"  # in scratch: the language model
_NOTED: Final = "quantized.json"  # beside it, once it is whole


class GPTQParams(StageParams):
    bits: Literal[2, 3, 4, 8] = Field(
        default=4, description="of a weight; 4 and 8 have fast kernels everywhere, 3 and 2 cost much quality"
    )
    group_size: Literal[-1, 32, 64, 128] = Field(
        default=128, description="columns that share a scale; must divide every row; -1: one scale a row"
    )
    desc_act: bool = Field(
        default=False, description="round the most active columns first: a little better, slower kernels"
    )
    sym: bool = Field(default=True, description="the grid is symmetric around 0; some fast kernels know no other")
    damp_percent: float = Field(
        default=0.05, gt=0, lt=1, description="share of the mean that is added to the Hessian's diagonal"
    )
    calibration: Annotated[CalibrationMix, Located()] = Field(
        default=CalibrationMix(), description="sequences whose activations say which errors matter"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute; auto: a GPU if any")


@dataclass(frozen=True)
class _Quantized:
    """What is told of the quantized language model in scratch."""

    matrices: list[Matrix]
    kinds: Mapping[Kind, int]  # sequences of the calibration
    blocks: str  # their name in the whole model


class GPTQStage(Stage[GPTQParams]):
    """Checkpoint to GPTQ checkpoint."""

    name = "gptq"
    code_version = "2"
    summary = "quantize the language model with GPTQ, for transformers and vLLM"
    accepts = ("checkpoint",)
    output_type = "gptq"
    libraries = ("gptqmodel", "torch", "transformers")
    Params = GPTQParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        self.params.calibration.check()
        planned = super().plan(inputs)
        if planned.spec is None:
            return planned
        family = family_named(planned.spec.family)
        if family is not None:
            _check_family(family)
        self._check_group(planned.spec.text)
        return replace(planned, spec=replace(planned.spec, quantization=self._type))

    def check_ready(self) -> None:
        check_installed()

    def downloads(self) -> Sequence[str]:
        return self.params.calibration.downloads()

    def fingerprint(self) -> str:
        return self.params.calibration.fingerprint()

    def run(self, context: Context) -> Mapping[str, object]:
        params = self.params
        source = context.input("checkpoint")
        config = checkpoint.read_config(source.path)
        family = family_of(config, where=str(source.path))
        spec = family.spec(config)
        _check_family(family)
        self._check_group(spec.text)
        check_installed()
        dtype, device = checkpoint.dtype_of(config), device_of(params.device, context.team)

        done = _noted(context.scratch) or self._quantized(context, family, dtype, device)
        matrices, quantized = done.matrices, context.scratch / _QUANTIZED
        context.progress(3, _STEPS, "putting the language model back")
        made = put_back(family, source.path, quantized, context.output, self._quantization(done.blocks))
        _check_loads(context, family, dtype)
        for layer, loss in _losses(matrices).items():
            context.metric("gptq_loss", loss, step=layer)
        context.metric("model_bytes", made.quantized_bytes + made.other_bytes)
        context.progress(_STEPS, _STEPS)
        return {
            "family": family.name,
            "type": self._type,
            "bits": params.bits,
            "group_size": params.group_size,
            "exits": list(range(1, spec.vision.layers + 1)) if spec.vision else [],
            "default_exit": spec.vision.default_exit if spec.vision else None,
            "image_tokens": spec.vision.image_tokens if spec.vision else None,
            "quantized_matrices": made.matrices,
            "quantized_bytes": made.quantized_bytes,
            "other_bytes": made.other_bytes,
            "calibration_samples": dict(done.kinds),
            "calibration_tokens": {
                f"layers.{matrix.layer}.{matrix.name}": matrix.tokens for matrix in matrices
            },  # what each matrix saw: the proof that calibration ran
            "loss": {str(layer): round(loss, _DIGITS) for layer, loss in _losses(matrices).items()},
            "base": str(source.metadata.get("model") or source.metadata.get("base") or ""),
            "base_digest": source.digest,
            "gptqmodel": version("gptqmodel"),
        }

    def _quantized(self, context: Context, family: Family, dtype: checkpoint.DType, device: str) -> _Quantized:
        """Quantize the language model into scratch, and note there what is told of it."""
        params, quantized = self.params, context.scratch / _QUANTIZED
        context.progress(0, _STEPS, "reading calibration data")
        batches, kinds, blocks = self._taken_out(context, family, dtype, device)

        def tell(done: int, of: int) -> None:
            context.progress(1 + 2 * done / of, _STEPS, f"quantizing, block {done} of {of}")

        matrices = quantize_language_model(
            context.scratch / "text",
            quantized,
            Settings(params.bits, params.group_size, params.desc_act, params.sym, params.damp_percent),
            batches,
            scratch=context.scratch,
            dtype=dtype,
            device=device,
            progress=tell,
        )
        found = _Quantized(matrices, kinds, blocks)
        fsync_tree(quantized)
        write_atomically(context.scratch / _NOTED, json.dumps(asdict(found)).encode(), context.scratch)
        return found

    def _taken_out(
        self, context: Context, family: Family, dtype: checkpoint.DType, device: str
    ) -> tuple[list[Batch], Mapping[Kind, int], str]:
        """Write the language model alone into scratch. Returns the calibration as its embeddings, how many sequences
        of each kind there are, and the name of the blocks in the whole model. That is gone when this returns."""
        from stages.data.calibration import batches as one_by_one

        source, wanted = context.input("checkpoint").path, self.params.calibration
        model = family.load(source, dtype=dtype, device=device)
        tokenizer = checkpoint.load_tokenizer(source)
        material = wanted.material(family, source, model, tokenizer, "train", context.seed)
        counts, passages = wanted.counts(material.kinds()), wanted.passages(material)
        wanted.tell(context, material.left_out)
        write_language_model(family, model, context.scratch / "text", source)
        trunk = family.trunk(model)
        name = next(name for name, module in model.named_modules() if module is trunk)
        return list(one_by_one(passages, 1)), counts, f"{name}.layers"

    def _check_group(self, text: TextSpec) -> None:
        """Refuse groups that do not divide the rows of the language model.

        Raises:
            RecipeError: with the sizes that do.
        """
        group = self.params.group_size
        widths = sorted({text.hidden_size, text.intermediate_size, text.heads * text.head_dim})
        wrong = [width for width in widths if width % (_PACKED if group == -1 else group)]
        if not wrong:
            return
        valid = [size for size in _GROUPS if not any(width % size for width in widths)]
        if not valid:
            raise RecipeError(
                f"this language model cannot be quantized by GPTQ: its rows have {wrong[0]} columns",
                why=f"{_PACKED} columns are packed together",
                way_out="use the gguf stage",
            )
        raise RecipeError(
            f"group_size: {group} does not divide the rows of this language model, which have {wrong[0]} columns",
            why="the last group of a row would be smaller, and the kernels that run such models do not know that",
            way_out=f"use group_size: {valid[-1]}; {', '.join(map(str, [*valid, -1]))} all work",
        )

    @property
    def _type(self) -> str:
        """One word for reports and registries; l-ppo's `quantizer` takes the same, where a row has groups."""
        group = "" if self.params.group_size == -1 else f"-{self.params.group_size}"
        return f"gptq-{self.params.bits}bit{group}"

    def _quantization(self, blocks: str) -> dict[str, object]:
        """`quantization_config`, read by transformers, optimum and vLLM."""
        params = self.params
        return {
            "quant_method": "gptq",
            "bits": params.bits,
            "group_size": params.group_size,
            "desc_act": params.desc_act,
            "sym": params.sym,
            "damp_percent": params.damp_percent,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "format": "gptq",
            "pack_dtype": "int32",
            # optimum would look for blocks under every name that it knows, and not find SmolVLM's.
            "block_name_to_quantize": blocks,
            "meta": {"quantizer": [f"gptqmodel:{version('gptqmodel')}"]},
        }


def _noted(scratch: Path) -> _Quantized | None:
    """What a run that ended behind the quantization has left."""
    if not (scratch / _NOTED).exists():
        return None
    noted = json.loads((scratch / _NOTED).read_bytes())
    return _Quantized([Matrix(**matrix) for matrix in noted["matrices"]], noted["kinds"], noted["blocks"])


def _check_family(family: Family) -> None:
    """Raises: RecipeError: no GPTQ for that family."""
    if not family.gptq:
        raise RecipeError(
            f"the gptq stage does not know models of the family {family.name}",
            way_out="leave the stage out, or use gguf",
        )


def _check_loads(context: Context, family: Family, dtype: checkpoint.DType) -> None:
    """What was written loads, and gives finite numbers.

    Raises:
        StageError: not so.
    """
    import torch

    model = family.load(context.output, dtype=dtype)
    with torch.inference_mode():
        out = family.trunk(model)(inputs_embeds=model.get_input_embeddings()(torch.arange(8)[None]), use_cache=False)
        finite = bool(torch.isfinite(out.last_hidden_state).all())
    if not finite:
        raise StageError(
            "the quantized model gives numbers that are not finite",
            where=str(context.output),
            way_out="choose more bits, or a smaller group_size",
        )


def _losses(matrices: Sequence[Matrix]) -> dict[int, float]:
    """Mean squared error of a block's matrices on the calibration, mean over them."""
    found: dict[int, list[float]] = {}
    for matrix in matrices:
        found.setdefault(matrix.layer, []).append(matrix.loss)
    return {layer: sum(losses) / len(losses) for layer, losses in found.items()}
