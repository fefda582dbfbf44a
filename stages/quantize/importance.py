"""Stage `imatrix`: the importance matrix of a checkpoint's language model, for `gguf` and for a quantizer of `l-ppo`.

Which columns of a matrix matter is taken from what flows into them on the calibration: passages of text, visual
questions with their pictures, and prompts, harmful ones too. llama.cpp's own imatrix program sees text alone; the file
is in its format, so its tools read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from artifacts.errors import RecipeError, StageError
from stages.data.calibration_mix import CalibrationMix
from stages.models import checkpoint
from stages.models.family import family_named, family_of
from stages.resources import device_of
from stages.runtimes.imatrix import IMATRIX_NAME, Collected, write_imatrix
from stages.stage import Context, Located, Planned, Stage, StageParams

_TOGETHER: Final = 4  # sequences in one pass


class ImatrixParams(StageParams):
    calibration: Annotated[CalibrationMix, Located()] = Field(
        default=CalibrationMix(), description="sequences whose activations say which columns matter"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute; auto: a GPU if any")


class ImatrixStage(Stage[ImatrixParams]):
    """Checkpoint to importance matrix; other stages name it in their parameter `imatrix`."""

    name = "imatrix"
    code_version = "2"
    summary = "measure which weights matter (llama.cpp's importance matrix), on text, images and safety prompts"
    accepts = ("checkpoint",)
    output_type = "imatrix"
    libraries = ("gguf", "torch", "transformers")
    Params = ImatrixParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        self.params.calibration.check()
        planned = super().plan(inputs)
        spec = planned.spec
        family = family_named(spec.family) if spec is not None else None
        if family is not None and "llamacpp" not in family.runtimes:
            raise RecipeError(
                f"no importance matrix is made of models of the family {family.name}",
                why="llama.cpp's quantizer uses it, and llama.cpp does not run this family",
                way_out="leave the stage out; gptq calibrates by itself",
            )
        return planned

    def downloads(self) -> Sequence[str]:
        return self.params.calibration.downloads()

    def fingerprint(self) -> str:
        return self.params.calibration.fingerprint()

    def run(self, context: Context) -> Mapping[str, object]:
        from stages.data.calibration import batches
        from stages.runtimes.activations import collect

        wanted = self.params.calibration
        source = context.input("checkpoint")
        config = checkpoint.read_config(source.path)
        family = family_of(config, where=str(source.path))
        device = device_of(self.params.device, context.team)
        model = family.load(source.path, dtype=checkpoint.dtype_of(config), device=device)
        tokenizer = checkpoint.load_tokenizer(source.path)
        context.progress(0, wanted.samples, "reading calibration data")
        material = wanted.material(family, source.path, model, tokenizer, "train", context.seed)
        counts, passages = wanted.counts(material.kinds()), wanted.passages(material)
        wanted.tell(context, material.left_out)
        passages.sort(key=lambda passage: passage.order)
        trunk = family.trunk(model)
        collected = collect(
            trunk,
            batches(passages, _TOGETHER),
            lambda done: context.progress(done, len(passages), "watching activations"),
        )
        stored = _named(context, collected, trunk)
        shown = [f"{kind}: {count} sequences" for kind, count in counts.items() if count]
        write_imatrix(
            context.output / IMATRIX_NAME, stored, datasets=shown, chunks=len(passages), chunk_size=wanted.length
        )
        tokens = sum(len(passage.embeddings) for passage in passages)
        context.metric("calibration_tokens", tokens)
        return {
            "family": family.name,
            "entries": len(stored),
            "calibration_samples": dict(counts),
            "calibration_tokens": tokens,
            "base": str(source.metadata.get("model") or source.metadata.get("base") or ""),
            "base_digest": source.digest,
        }


def _named(context: Context, collected: Mapping[str, Collected], trunk: object) -> dict[str, Collected]:
    """What was collected, under the names of the tensors that the GGUF will have."""
    from typing import cast

    import torch

    from stages.runtimes.mixture import outline_of
    from stages.runtimes.tensor_names import stored_names

    outline = outline_of(context.input("checkpoint").path)
    names = stored_names(list(collected), cast("torch.nn.Module", trunk), outline)
    found = {
        names[name]: entry
        for name, entry in collected.items()
        if outline.shapes.get(names[name], (0,))[0] == entry.sums.shape[1]
    }
    if not found:
        raise StageError(
            "no layer of this model is a tensor of its own in the GGUF",
            why=f"{names[next(iter(names))]} is not in it" if names else "it has no linear layers",
            way_out="quantize without an importance matrix",
        )
    if missing := sorted(set(names.values()) - set(found)):
        context.log(f"{len(missing)} layers have no tensor of their own in the GGUF, {missing[0]} first: no entry")
    return found
