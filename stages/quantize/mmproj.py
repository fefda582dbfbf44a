"""The mmproj file of a LLaVA or LLaVA-NeXT with a SigLIP or CLIP tower: the encoder up to one exit, and the projector.

llama.cpp's converter refuses LLaVA towers and its legacy script leaves the encoder one block early (issue 25817 there),
so the file is written here with `gguf`. What makes it exit l of `hidden_states`: `block_count = l`, only the first l
blocks, `feature_layer = [l]`, and no `v.post_ln`, which would be applied before the feature is taken. A CLIP tower's
position table is written in the order in which the installed runtime numbers tokens (`stages.runtimes.llamacpp_cls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.disk import appearing
from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.spec import VisionSpec
from stages.runtimes.exits import derive_exit
from stages.runtimes.gguf_header import CLS_KEY, RESAMPLE_KEY, RESIZE_KEY, ClsOrder
from stages.runtimes.llamacpp_cls import position_table

if TYPE_CHECKING:
    import gguf

__all__ = ["FloatType", "appearing", "derive_exit", "write_mmproj"]

FloatType = Literal["F16", "F32"]

_BLOCK: Final[Mapping[str, str]] = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_NEWLINE: Final = "v.image_newline"  # LLaVA-NeXT's
_OUTSIDE: Final[Mapping[str, str]] = {
    "image_newline": _NEWLINE,
    "embeddings.class_embedding": "v.class_embd",
    "pre_layrnorm.weight": "v.pre_ln.weight",  # transformers' spelling
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "linear_1.weight": "mm.0.weight",
    "linear_1.bias": "mm.0.bias",
    "linear_2.weight": "mm.2.weight",
    "linear_2.bias": "mm.2.bias",
}
_NAME: Final = re.compile(
    r"^(?:model\.)?(?:vision_tower\.(?:vision_model\.)?|multi_modal_projector\.|(?=image_newline$))"
    r"(?:encoder\.layers\.(?P<block>\d+)\.)?(?P<rest>.+)$"
)
_GELU: Final = {"gelu", "gelu_new", "gelu_pytorch_tanh"}  # llama.cpp's gelu; measured: embeddings agree to 1e-3
_CLS_TENSORS: Final = ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias")
_POSITIONS: Final = "v.position_embd.weight"
_PIL_FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class _Tower:
    """What transformers takes where config.json or the image processor says nothing."""

    act: str
    eps: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_TOWERS: Final[Mapping[str, _Tower]] = {
    "siglip_vision_model": _Tower("gelu_pytorch_tanh", 1e-6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": _Tower(
        "quick_gelu", 1e-5, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}


def write_mmproj(
    folder: Path,
    target: Path,
    vision: VisionSpec,
    exit: int,
    *,
    name: str,
    metadata: Mapping[str, object] = MappingProxyType({}),
    type: FloatType = "F16",
    cls: ClsOrder | None = None,
) -> None:
    """Write the mmproj of a checkpoint whose image features are taken after `exit` blocks.

    Matrices get `type`; biases, norms and positions stay F32. The file appears whole or not at all.

    Args:
        name: of the model. metadata: more `general.*` keys.
        cls: for a CLIP tower, where the runtime puts CLS (`llamacpp_cls.cls_order()`).

    Raises:
        StageError: a tower, an activation or image processor that llama.cpp has not, or missing tensors.
        StoreError: the disk is full.
    """
    import gguf

    config = checkpoint.read_config(folder)
    tower = _mapping(config, "vision_config")
    known = _check(folder, config, tower, vision, exit)
    if vision.has_cls and cls is None:
        raise ValueError("a tower with CLS needs the runtime's order")
    writer = gguf.GGUFWriter(path=None, arch="clip")
    writer.add_type("mmproj")
    described = {key.removeprefix("general."): value for key, value in metadata.items()}
    gguf.Metadata(name=f"{name} image encoder", **described).set_gguf_meta_model(writer)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if type == "F32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", str(tower.get("hidden_act") or known.act) in _GELU)
    writer.add_uint32("clip.vision.image_size", vision.image_size)
    writer.add_uint32("clip.vision.patch_size", vision.patch_size)
    writer.add_uint32("clip.vision.embedding_length", vision.hidden_size)
    writer.add_uint32("clip.vision.feed_forward_length", vision.intermediate_size)
    writer.add_uint32("clip.vision.block_count", exit)
    writer.add_uint32("clip.vision.attention.head_count", vision.heads)
    eps = float(cast("float", tower.get("layer_norm_eps", known.eps)))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", eps)
    writer.add_array("clip.vision.feature_layer", [exit])
    _add_preprocessing(writer, folder, vision, known)
    tensors = dict(_tensors(folder, exit))
    if config.get("model_type") == "llava_next":
        _add_tiles(writer, folder, vision)
    else:
        tensors.pop(_NEWLINE, None)
    missing = [name for name in _expected(exit, vision) if name not in tensors]
    if missing:
        raise StageError(
            f"the checkpoint lacks {len(missing)} tensors of its image encoder, {missing[0]} first", where=str(folder)
        )
    if cls is not None and vision.has_cls:
        writer.add_string(CLS_KEY, cls)
        tensors[_POSITIONS] = position_table(tensors[_POSITIONS], cls)
    writer.add_uint32("clip.vision.projection_dim", int(tensors["mm.2.weight"].shape[0]))
    for tensor_name in sorted(tensors, key=_order):
        data, kind = _stored(tensor_name, tensors[tensor_name], type)
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    with appearing(target) as part:
        writer.write_header_to_file(path=part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check(
    folder: Path, config: Mapping[str, object], tower: Mapping[str, object], vision: VisionSpec, exit: int
) -> _Tower:
    kind = str(tower.get("model_type"))
    known = _TOWERS.get(kind)
    if known is None:
        raise StageError(
            f"no mmproj can be written for the tower {kind!r}",
            where=str(folder),
            why=f"what is known here of llama.cpp's image encoders covers {' and '.join(_TOWERS)}",
            way_out="use a model with one of these towers",
        )
    if not 1 <= exit <= vision.layers:
        raise StageError(f"exit {exit} is outside 1..{vision.layers}", where=str(folder))
    for key, value, default in (
        ("vision_config.hidden_act", tower.get("hidden_act"), known.act),
        ("projector_hidden_act", config.get("projector_hidden_act"), "gelu"),
    ):
        act = str(value or default)
        if act not in (_GELU if key.startswith("projector") else _GELU | {"quick_gelu"}):
            raise StageError(f"llama.cpp has no activation {act!r} for {key}", where=str(folder))
    return known


def _add_preprocessing(writer: gguf.GGUFWriter, folder: Path, vision: VisionSpec, known: _Tower) -> None:
    processor = _image_processor(folder)
    scale = float(cast("float", processor.get("rescale_factor", 1 / 255)))
    if abs(scale * 255 - 1) > 1e-6 or processor.get("do_rescale") is False:
        raise StageError(
            f"the image processor scales pixels by {scale}, llama.cpp by 1/255",
            where=str(folder),
            way_out="set rescale_factor to 1/255 in preprocessor_config.json, fold the rest into the patch embedding",
        )
    normalize = processor.get("do_normalize") is not False
    mean = cast("list[float]", processor.get("image_mean") or known.mean) if normalize else [0.0] * 3
    std = cast("list[float]", processor.get("image_std") or known.std) if normalize else [1.0] * 3
    writer.add_array("clip.vision.image_mean", [float(value) for value in mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in std])
    resample = processor.get("resample", 3)
    if not isinstance(resample, int) or resample not in _PIL_FILTERS:
        raise StageError(f"unknown resampling filter {resample!r}", where=str(folder))
    size = processor.get("size")
    if isinstance(size, int):  # as OpenAI wrote it
        size = {"shortest_edge": size}
    crop = isinstance(size, Mapping) and "shortest_edge" in size
    if crop and processor.get("do_center_crop", True) is False:
        raise StageError("the image processor does not make square images, llama.cpp needs them", where=str(folder))
    writer.add_string(RESAMPLE_KEY, _PIL_FILTERS[resample])
    writer.add_string(RESIZE_KEY, "crop" if crop else "stretch")
    side = size.get("shortest_edge" if crop else "height") if isinstance(size, Mapping) else vision.image_size
    cut = processor.get("crop_size", side) if crop else side
    cut = cut.get("height") if isinstance(cut, Mapping) else cut
    if not side == cut == vision.image_size:
        raise StageError(
            f"the image processor makes {side} pixels a side and keeps {cut}, the image encoder takes "
            f"{vision.image_size}",
            where=str(folder),
        )


def _add_tiles(writer: gguf.GGUFWriter, folder: Path, vision: VisionSpec) -> None:
    """What an image may be fitted into; llama.cpp then cuts it into squares of the encoder's size."""
    pinpoints = cast("list[tuple[int, int]]", _image_processor(folder).get("image_grid_pinpoints") or [])
    pixels = [int(side) for height, width in pinpoints for side in (width, height)]
    if not pixels or any(side % vision.image_size for side in pixels):
        raise StageError(
            f"image_grid_pinpoints {pinpoints!r} are no multiples of the image encoder's {vision.image_size} pixels",
            where=str(folder),
        )
    writer.add_array("clip.vision.image_grid_pinpoints", pixels)
    writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")


def _image_processor(folder: Path) -> Mapping[str, object]:
    """The image processor's settings; transformers 5 may keep them inside processor_config.json."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content if key is None else content.get(key)
            if isinstance(found, dict):
                return cast("Mapping[str, object]", found)
    raise StageError(
        "the checkpoint has no image processor", where=str(folder), why="preprocessor_config.json is missing"
    )


def _tensors(folder: Path, exit: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """llama.cpp's names and F32 values of what the file holds; blocks after the exit are not read."""
    from safetensors import safe_open

    for path in checkpoint.weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                found = _NAME.match(key)
                if found is None:
                    continue
                rest = found["rest"]
                if found["block"] is None:
                    name = _OUTSIDE.get(rest)
                else:
                    module, _, kind = rest.rpartition(".")
                    inside = int(found["block"]) < exit and module in _BLOCK
                    name = f"v.blk.{found['block']}.{_BLOCK[module]}.{kind}" if inside else None
                if name is not None:
                    yield name, handle.get_tensor(key).float().numpy()


def _expected(exit: int, vision: VisionSpec) -> Iterator[str]:
    yield from ("v.patch_embd.weight", _POSITIONS, "mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias")
    if vision.has_cls:
        yield from _CLS_TENSORS
    for block in range(exit):
        for part in _BLOCK.values():
            yield from (f"v.blk.{block}.{part}.weight", f"v.blk.{block}.{part}.bias")


def _order(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    return (1, int(parts[2]), name) if parts[1] == "blk" else (0 if parts[0] == "v" else 2, 0, name)


def _stored(
    name: str, value: NDArray[np.float32], type: FloatType
) -> tuple[NDArray[np.generic], gguf.GGMLQuantizationType]:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if type == "F32" or value.ndim < 2 or name == _POSITIONS:
        return np.ascontiguousarray(value), kinds.F32
    return np.ascontiguousarray(value.astype(np.float16)), kinds.F16


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = config.get(key)
    return cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}
