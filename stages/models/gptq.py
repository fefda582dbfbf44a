"""Loading checkpoints in the AutoGPTQ layout with transformers: what it needs, and which kernel computes.

Notable: the kernel is GPTQModel's `gptq_torch` whatever the processor. It unpacks a matrix and multiplies, so answers
are those of the file's own numbers, in float32 as in float16; the faster ones on CPUs (`_weight_int4pack_mm_cpu`)
compute in bfloat16 and know 4 bits only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DISTRIBUTIONS: Final = ("gptqmodel", "optimum")
_METHOD: Final = "gptq"


def is_gptq(config: Mapping[str, object]) -> bool:
    """Whether a config.json is that of a GPTQ checkpoint."""
    return _section(config).get("quant_method") == _METHOD


def missing_distributions() -> list[str]:
    """What is not installed of that which GPTQ needs: GPTQModel, and optimum, by which transformers calls it."""
    return [name for name in _DISTRIBUTIONS if importlib.util.find_spec(name) is None]


def loading_arguments(config: Mapping[str, object], where: str) -> dict[str, object]:
    """What `from_pretrained` takes for this checkpoint beside the usual; nothing if it is not quantized.

    Raises:
        SourceError: quantized in another way, or GPTQModel or optimum is not installed.
    """
    section = _section(config)
    if not section:
        return {}
    if not is_gptq(config):
        raise SourceError(
            f"the checkpoint is quantized by {section.get('quant_method')!r}",
            where=where,
            why="of quantized checkpoints only GPTQ's are read",
            way_out="start from the checkpoint before it was quantized",
        )
    if missing := missing_distributions():
        raise SourceError(
            f"a GPTQ checkpoint cannot be loaded without {' and '.join(missing)}",
            where=where,
            way_out="pip install 'icet-pipeline[gptq]'",
        )
    from transformers import GPTQConfig

    return {"quantization_config": GPTQConfig(bits=section.get("bits"), backend="gptq_torch")}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """GPTQModel greets, and tells of its kernels, on the standard output; transformers warns of a chosen kernel."""
    with (
        Path(os.devnull).open("w") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def interpreted(model: PreTrainedModel) -> None:
    """Take back GPTQModel's `torch.compile` of the unpacking: it needs a C++ compiler on the user's machine and ten
    seconds before the first answer."""
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)  # the compiled one hides the class's method


def _section(config: Mapping[str, object]) -> Mapping[str, object]:
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}
