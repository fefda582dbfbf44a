"""Another exit's mmproj from the shipped one: metadata changes and blocks are dropped, weights never."""

from __future__ import annotations

import re
from pathlib import Path

from artifacts.errors import StageError
from stages.runtimes.gguf_header import read_vision_header

_BLOCK = re.compile(r"v\.blk\.(\d+)\.")
_COUNT_KEY = "clip.vision.block_count"
_FEATURE_KEY = "clip.vision.feature_layer"


def derive_exit(mmproj: Path, exit: int, target: Path) -> None:
    """Write to `target` the mmproj whose image features are taken after `exit` blocks.

    The first `exit` blocks and everything outside the blocks keep their bytes, whatever the tensor types are.
    `block_count` and `feature_layer` must both be written: without `feature_layer` llama.cpp runs one block fewer
    (issue 25817 there). Idefics3's encoder runs all blocks that there are, and its norm behind them belongs to every
    exit's projection: there only `block_count` changes.

    Raises:
        SourceError: `mmproj` is missing or damaged. StageError: it has no such exit.
    """
    import gguf

    vision = read_vision_header(mmproj)
    if not 1 <= exit <= vision.blocks:
        raise StageError(
            f"there is no exit {exit} in {mmproj.name}",
            where=str(mmproj),
            why=f"its image encoder has {vision.blocks} blocks",
            way_out=f"choose an exit between 1 and {vision.blocks}",
        )
    reader = gguf.GGUFReader(mmproj)
    writer = gguf.GGUFWriter(path=target, arch="clip", endianess=reader.endianess)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        if field.name in (_COUNT_KEY, _FEATURE_KEY):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_uint32(_COUNT_KEY, exit)
    if vision.projector == "mlp":
        writer.add_array(_FEATURE_KEY, [exit])
    kept = [tensor for tensor in reader.tensors if _kept(tensor.name, exit, vision.projector)]
    for tensor in kept:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in kept:
        writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
    writer.close()


def _kept(name: str, exit: int, projector: str) -> bool:
    # LLaVA's norm after the tower would be applied before the feature is taken, which is no exit of hidden_states.
    if projector == "mlp" and name.startswith("v.post_ln."):
        return False
    block = _BLOCK.match(name)
    return block is None or int(block.group(1)) < exit
