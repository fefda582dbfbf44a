"""GPTQModel on a language model, fed with embeddings instead of token ids.

Notable:
- images stand in the calibration as they do in use: their tokens among the embeddings, or beside the text for models
  with cross-attention. GPTQModel's definitions know text, and for a few models their processors' images; ours is a
  subclass of the text model's definition that takes `inputs_embeds`;
- Llama 3.2 Vision's cross-attention blocks are quantized too: GPTQModel's own definition leaves them out, since it does
  not pass images to them. A sequence without an image goes around them, as in transformers;
- a matrix that saw no token is an error. GPTQModel would round it to nearest and go on (`fallback`), which is off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from artifacts.errors import StageError
from stages.data.calibration import Batch
from stages.machine import cores
from stages.models import checkpoint
from stages.models.gptq import missing_distributions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOG: Final = "gptqmodel.log"
_CROSSING: Final = ("q_proj:0", "k_proj:0", "v_proj:0", "o_proj:1")


@dataclass(frozen=True)
class Settings:
    """How a matrix is rounded; the names are GPTQModel's."""

    bits: int
    group_size: int  # columns that share a scale; -1: all
    desc_act: bool
    sym: bool
    damp_percent: float


@dataclass(frozen=True)
class Matrix:
    """What GPTQModel says of one matrix."""

    layer: int
    name: str  # in its block: self_attn.q_proj
    tokens: int  # that its calibration saw
    loss: float  # mean squared error of its output


class _Quantizer(Protocol):
    """The part of GPTQModel's `BaseQModel` that is used."""

    @classmethod
    def from_pretrained(cls, folder: str, config: object, *, dtype: torch.dtype) -> _Quantizer: ...

    model: PreTrainedModel
    layer_callback: Callable[..., None]

    def quantize(self, calibration: object, **settings: object) -> Mapping[str, list[Mapping[str, str | int]]]: ...

    def save(self, folder: str) -> None: ...


def check_installed() -> None:
    """Raises: StageError: GPTQModel, or optimum, without which transformers and peft do not work beside it."""
    if missing := missing_distributions():
        raise StageError(
            f"the gptq stage needs {' and '.join(missing)}",
            why="GPTQModel quantizes, and transformers loads what it makes only with optimum",
            way_out="pip install 'icet-pipeline[gptq]', or leave the stage out",
        )


def quantize_language_model(
    folder: Path,
    target: Path,
    settings: Settings,
    batches: Sequence[Batch],
    *,
    scratch: Path,
    dtype: checkpoint.DType,
    device: str,
    progress: Callable[[int, int], None],
) -> list[Matrix]:
    """Quantize the text-only checkpoint in `folder`, block by block; `target` appears whole or not at all.

    Args:
        batches: one sequence each, embeddings of the model's own.
        scratch: GPTQModel's words go to a file here, and whatever it leaves behind.
        progress: blocks done, of all.

    Returns:
        One entry a matrix, in the order of blocks.

    Raises:
        StageError: GPTQModel cannot quantize this model with these settings, or a matrix saw no token.
    """
    check_installed()
    folder, target, scratch = folder.resolve(), target.resolve(), scratch.resolve()  # the working folder will change
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(cores()))
    try:
        with _silent(scratch):
            quantizer = _load(folder, settings, dtype, device)
            blocks = cast("torch.nn.ModuleList", quantizer.model.get_submodule("model.layers"))
            _go_around(blocks)
            quantizer.layer_callback = lambda layer_idx, submodule_finalized: progress(layer_idx + 1, len(blocks))
            log = quantizer.quantize([_example(batch) for batch in batches], batch_size=1)
            part = target.with_name(f"{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            quantizer.save(str(part))
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise StageError(
            "GPTQModel cannot quantize this language model",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            way_out=f"its log is {scratch / LOG}; another group_size or bits may have a kernel where this has none",
        ) from error
    matrices = [
        Matrix(int(entry["layer"]), str(entry["module"]), int(entry["samples"]), float(entry["loss"]))
        for entries in log.values()
        for entry in entries
    ]
    if blind := [matrix for matrix in matrices if not matrix.tokens]:
        raise StageError(
            f"{len(blind)} matrices saw no calibration token, layers.{blind[0].layer}.{blind[0].name} first",
            why="without any, GPTQ has no errors to correct",
            way_out="raise calibration.samples",
        )
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return sorted(matrices, key=lambda matrix: (matrix.layer, matrix.name))


def _load(folder: Path, settings: Settings, dtype: checkpoint.DType, device: str) -> _Quantizer:
    from gptqmodel import QuantizeConfig
    from gptqmodel.models.auto import MODEL_MAP
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    crossing = bool(getattr(config, "cross_attention_layers", None))
    base = MODEL_MAP["llama" if crossing else config.model_type]
    definition = cast("type[_Quantizer]", type("EmbeddingsQModel", (base,), _overrides(base, crossing)))
    quantization = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        desc_act=settings.desc_act,
        sym=settings.sym,
        damp_percent=settings.damp_percent,
        # Its order of columns, most active first within whole groups, costs nothing; whole rows have no groups.
        act_group_aware=settings.group_size > 0 and not settings.desc_act,
        device=device,
        offload_to_disk=False,
        pack_impl="original",  # the other one is compiled at run time, into the user's cache
        fallback=None,
    )
    return definition.from_pretrained(str(folder), quantization, dtype=checkpoint.torch_dtype(dtype))


def _overrides(base: type, crossing: bool) -> dict[str, object]:
    """What differs from GPTQModel's definition of the text model."""

    def prepare_dataset(self: _Quantizer, calibration_dataset: object, **_: object) -> object:
        return calibration_dataset

    def run_input_capture(
        self: _Quantizer, example: Mapping[str, torch.Tensor], use_cache: bool, data_device: object
    ) -> object:
        # The ids are only counted; the embeddings are what goes in.
        return self.model(**{name: given for name, given in example.items() if name != "input_ids"}, use_cache=False)

    found: dict[str, object] = {"prepare_dataset": prepare_dataset, "run_input_capture": run_input_capture}
    if crossing:
        from transformers import MllamaForCausalLM

        *path, block = base.module_tree  # type: ignore[attr-defined]
        parts = list(block.items())
        place = [name for name, _ in parts].index("self_attn") + 1
        found["module_tree"] = [*path, dict([*parts[:place], ("cross_attn", _CROSSING), *parts[place:]])]
        found["layer_modules_strict"] = False  # no block has both attentions
        found["loader"] = MllamaForCausalLM
    return found


def _example(batch: Batch) -> dict[str, torch.Tensor]:
    import torch

    inputs = {name: given.cpu() for name, given in batch.inputs().items()}
    return {"input_ids": torch.zeros(batch.embeddings.shape[:2], dtype=torch.long), **inputs}


def _go_around(blocks: torch.nn.ModuleList) -> None:
    """Make cross-attention blocks pass on what stands beside no image: GPTQModel sends every sequence through all."""

    def around(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def skipping(
            hidden_states: torch.Tensor, cross_attention_states: torch.Tensor | None = None, **given: object
        ) -> torch.Tensor:
            if cross_attention_states is None:
                return hidden_states
            return forward(hidden_states, cross_attention_states=cross_attention_states, **given)

        return skipping

    for block in blocks:
        if hasattr(block, "cross_attn"):
            block.forward = around(block.forward)


@contextlib.contextmanager
def _silent(scratch: Path) -> Iterator[None]:
    """GPTQModel prints, draws bars, and writes `logs/` into the working folder: all of that goes to `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    with (
        (scratch / LOG).open("a", encoding="utf-8") as log,
        contextlib.chdir(scratch),
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
