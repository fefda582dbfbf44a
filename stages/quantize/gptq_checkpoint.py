"""The language model of a checkpoint, taken out for the quantizer and put back beside tower and projector.

The tower, the projector, embeddings, norms and the head keep the bytes, the dtype and the names that they have in the
source; every quantized matrix `X.weight` is replaced by `X.qweight`, `X.qzeros`, `X.scales` and `X.g_idx` (the
AutoGPTQ layout) in files of their own. Tensors are copied from file to file and never all in memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.shards import copy_weights, tensor_names, tensor_names_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from stages.models.family import Family

CONFIG: Final = "quantize_config.json"
_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_MATRIX: Final = re.compile(r"(?:^|\.)(?P<matrix>layers\.\d+\..+)\.(?P<part>weight|qweight|qzeros|scales|g_idx)$")


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of a language model with its head, by the config of the backbone.

    Raises:
        StageError: there is none.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    # Llama 3.2 Vision's is registered under the name of the whole model.
    name = NAMES.get(config.model_type) or NAMES.get(config.model_type.removesuffix("_text_model"))
    if name is None:
        raise StageError(
            f"transformers has no causal language model for {config.model_type!r}",
            way_out="the gptq stage works on Llama, Mistral, Qwen2, Qwen3, SmolLM3 and Llama 3.2 Vision backbones",
        )
    return cast("type[PreTrainedModel]", getattr(transformers, name))


def write_language_model(family: Family, model: PreTrainedModel, folder: Path, companions_from: Path) -> None:
    """Save backbone and head of `model` as a text-only checkpoint with its tokenizer."""
    import torch

    trunk, head = family.trunk(model), family.head(model)
    config = cast("PreTrainedConfig", trunk.config)
    state = {f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}
    state["lm_head.weight"] = cast("torch.nn.Linear", head).weight
    with torch.device("meta"):
        text = causal_class(config)(config)
    text.load_state_dict(state, strict=False, assign=True)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save_model(text, folder, companions_from=companions_from)


@dataclass(frozen=True)
class Assembled:
    """What a quantized checkpoint is made of."""

    matrices: int  # that were quantized
    quantized_bytes: int  # of their parts
    other_bytes: int  # of everything else: tower, projector, embeddings, norms, head


def put_back(
    family: Family, source: Path, quantized: Path, target: Path, quantization: Mapping[str, object]
) -> Assembled:
    """Write the whole model into `target`: the matrices of `quantized`, a text-only checkpoint, and all else from
    `source`. config.json and quantize_config.json say how it was quantized.

    Raises:
        StageError: a quantized matrix has no counterpart in the source.
    """
    new_names: dict[str, tuple[str, str]] = {}  # name in the quantized checkpoint -> matrix in the blocks, part
    for name in tensor_names(quantized):
        found = _MATRIX.search(name)
        if found is not None and found["part"] in _PARTS:
            new_names[name] = found["matrix"], found["part"]
    replaced = _counterparts(family, source, {matrix for matrix, _ in new_names.values()})
    stems = {matrix: name.removesuffix("weight") for matrix, name in replaced.items()}
    gone = frozenset(replaced.values())

    target.mkdir(parents=True, exist_ok=True)
    rest, matrices = target / "rest", target / "matrices"
    copy_weights(source, rest, lambda name: None if name in gone else name)
    copy_weights(quantized, matrices, lambda name: _renamed(new_names.get(name), stems))
    files = [(path, path.parent == matrices) for folder in (rest, matrices) for path in _written(folder)]
    index: dict[str, str] = {}
    sizes = {True: 0, False: 0}
    for place, (path, is_quantized) in enumerate(files, 1):
        name = f"model-{place:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(tensor_names_of(path), name)
        sizes[is_quantized] += path.stat().st_size
        path.replace(target / name)
    shutil.rmtree(rest)
    shutil.rmtree(matrices)

    config = {**checkpoint.read_config(source), "quantization_config": dict(quantization)}
    weights = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(index.items()))}
    for file, content in (("config.json", config), (CONFIG, dict(quantization)), (checkpoint.INDEX, weights)):
        (target / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    checkpoint.copy_companions(source, target)
    checkpoint.make_readable(target)
    return Assembled(len(stems), sizes[True], sizes[False])


def _counterparts(family: Family, source: Path, matrices: Collection[str]) -> dict[str, str]:
    """Matrix in the blocks -> the name of its weight in the source, whichever layout that has."""
    found: dict[str, str] = {}
    for name in tensor_names(source):
        match = _MATRIX.search(name)
        if match is not None and match["part"] == "weight" and family.tower not in name and match["matrix"] in matrices:
            found[match["matrix"]] = name
    if missing := sorted(set(matrices) - set(found)):
        raise StageError(
            f"{len(missing)} quantized matrices have no counterpart in the checkpoint, {missing[0]} first",
            where=str(source),
            why="its tensors are named as in no known layout",
        )
    return found


def _renamed(part: tuple[str, str] | None, stems: Mapping[str, str]) -> str | None:
    return None if part is None else stems[part[0]] + part[1]


def _written(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
