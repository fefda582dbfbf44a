"""Where the installed llama.cpp puts the CLS token of a CLIP tower, asked of the library itself.

llama.cpp appends CLS after the patches, while its position numbers and its choice of rows assume CLS first (its issue
25814): every patch gets its neighbour's position, the first patch never reaches the language model, and CLS is handed
over as the last image token. A fix would turn this round, so no version number is trusted. The probe is an image
encoder of two blocks that add nothing, between a patch embedding and a projector that copy: what comes out says, for
every image token, which patch it is and which row of the position table it was given.

Notable: the answer is kept in the cache folder under the library's version and its files' digest.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.disk import write_atomically
from artifacts.errors import StageError
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from stages.runtimes.gguf_header import ClsOrder, VisionHeader, read_vision_header

if TYPE_CHECKING:
    import gguf

_FORMAT: Final = 1  # raise it when the probe changes
_SIDE: Final = 2  # patches a side
_PATCHES: Final = _SIDE**2
_PIXELS: Final = 4  # a patch's side
_WIDTH: Final = 32
_BLOCKS: Final = 2
_LIFT: Final = 64.0  # added before the projector's GELU, taken away behind it: there GELU is the identity
_IS_CLS, _ROW, _PATCH = 0, 1, 2  # what the first three numbers of every token mean
_EXPECTED: Final[dict[tuple[tuple[int, ...], tuple[int, ...]], ClsOrder]] = {
    # (patch that each image token is, -1 CLS), (row of the position table that it got)
    ((0, 1, 2, 3), (1, 2, 3, 4)): "first",
    ((1, 2, 3, -1), (1, 2, 3, 4)): "last",
}


def position_table(table: NDArray[np.float32], order: ClsOrder) -> NDArray[np.float32]:
    """A position table (CLS, patches), as checkpoints have it, in the order in which the runtime numbers tokens."""
    return table if order == "first" else np.roll(table, -1, axis=0)


def image_slots(order: ClsOrder | None, tokens: int) -> tuple[int, ...]:
    """Which patch each image token is, -1 where it is none; `order` None: a tower without CLS."""
    return (*range(1, tokens), -1) if order == "last" else tuple(range(tokens))


@cache
def cls_order() -> ClsOrder:
    """Where the installed runtime puts CLS; about a second the first time, then remembered.

    Raises:
        StageError: llama.cpp does not run, or arranges tokens in a way that is not known here.
    """
    kept = cache_dir() / "probes" / f"cls-{_library_digest()}.json"
    try:
        answer = json.loads(kept.read_text(encoding="utf-8"))["cls"]
        if answer in ("first", "last"):
            return cast("ClsOrder", answer)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet, or half a file: ask
    patches, rows = _probe()
    found = _EXPECTED.get((patches, rows))
    if found is None:
        raise StageError(
            "the installed llama.cpp arranges the tokens of a CLIP tower in a way that is not known here",
            why=f"its image tokens are the patches {list(patches)} (-1 is CLS) with the positions {list(rows)}",
            way_out="install the llama-cpp-python that requirements.lock names",
        )
    with suppress(OSError):  # a home that cannot be written costs a second each time
        write_atomically(kept, canonical_json({"cls": found, "llama_cpp": version("llama-cpp-python")}), kept.parent)
    return found


def check_cls(vision: VisionHeader) -> None:
    """Refuse an image encoder whose position table was written for the other order.

    Raises:
        StageError: so it is.
    """
    if not vision.has_cls:
        return
    wanted, here = vision.cls_order or "first", cls_order()
    if wanted == here:
        return
    made = (
        f"its position table was written for a llama.cpp that puts CLS {wanted}"
        if vision.cls_order
        else "its position table begins with CLS, as checkpoints have it"
    )
    raise StageError(
        f"{vision.header.path.name} and the installed llama.cpp ({version('llama-cpp-python')}) do not fit together",
        where=str(vision.header.path),
        why=f"{made}; this one puts CLS {here} (its issue 25814), so every patch would get another one's position",
        way_out="run the stage 'gguf' again with this llama.cpp, or install the one that the file was made for",
    )


def _library_digest() -> str:
    """SHA-256 over the version and the files that compute: another build may answer differently."""
    from stages.runtimes.llamacpp_library import vision_library

    folder = Path(str(vision_library().__file__)).parent / "lib"
    files = sorted(path for path in folder.glob("*mtmd*") if path.is_file() and not path.is_symlink())
    parts = [f"{path.name} {sha256_file(path)}" for path in files]
    return sha256_bytes("\n".join([f"{_FORMAT}", version("llama-cpp-python"), *parts]).encode())


def _probe() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(patch, -1 for CLS) and (row of the position table) of every image token."""
    from stages.runtimes.llamacpp_library import TextModel
    from stages.runtimes.llamacpp_vision import VisionEncoder

    with tempfile.TemporaryDirectory(prefix="icet-probe-") as folder:
        text, encoder = Path(folder) / "model.gguf", Path(folder) / "mmproj.gguf"
        write_probe_model(text)
        write_probe_encoder(encoder)
        model = TextModel(text)
        vision = VisionEncoder(model, read_vision_header(encoder))
        try:
            pixels = np.zeros((_SIDE * _PIXELS, _SIDE * _PIXELS, 3), dtype=np.uint8)
            for patch in range(_PATCHES):
                top, left = (place * _PIXELS for place in divmod(patch, _SIDE))
                pixels[top : top + _PIXELS, left : left + _PIXELS] = 50 * (patch + 1)
            tokens = vision.encode(_BLOCKS, pixels, where=encoder)
        finally:
            vision.close()
            model.close()
    is_cls = tokens[:, _IS_CLS] > 0.5
    patches = np.where(is_cls, -1, np.rint(tokens[:, _PATCH] * 255 / 50) - 1)
    return tuple(int(patch) for patch in patches), tuple(int(row) for row in np.rint(tokens[:, _ROW]))


def write_probe_encoder(target: Path) -> None:
    """An image encoder of two blocks that add nothing."""
    import gguf

    writer = gguf.GGUFWriter(path=target, arch="clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in (
        ("image_size", _SIDE * _PIXELS),
        ("patch_size", _PIXELS),
        ("embedding_length", _WIDTH),
        ("feed_forward_length", _WIDTH),
        ("projection_dim", _WIDTH),
        ("block_count", _BLOCKS),
        ("attention.head_count", 1),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.0] * 3)
    writer.add_array("clip.vision.image_std", [1.0] * 3)
    writer.add_array("clip.vision.feature_layer", [_BLOCKS])
    cls = np.zeros(_WIDTH, dtype=np.float32)
    cls[_IS_CLS] = 1
    positions = np.zeros((_PATCHES + 1, _WIDTH), dtype=np.float32)
    positions[:, _ROW] = np.arange(_PATCHES + 1)
    patches = np.zeros((_WIDTH, 3, _PIXELS, _PIXELS), dtype=np.float32)
    patches[_PATCH] = 1 / (3 * _PIXELS**2)  # the patch's mean
    one, lift = np.eye(_WIDTH, dtype=np.float32), np.full(_WIDTH, _LIFT, dtype=np.float32)
    tensors = {"v.class_embd": cls, "v.position_embd.weight": positions, "v.patch_embd.weight": patches}
    for block in range(_BLOCKS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
            tensors[f"v.blk.{block}.{part}.weight"] = np.zeros((_WIDTH, _WIDTH), dtype=np.float32)
            tensors[f"v.blk.{block}.{part}.bias"] = np.zeros(_WIDTH, dtype=np.float32)
        for part in ("ln1", "ln2"):
            tensors[f"v.blk.{block}.{part}.weight"] = np.ones(_WIDTH, dtype=np.float32)
            tensors[f"v.blk.{block}.{part}.bias"] = np.zeros(_WIDTH, dtype=np.float32)
    tensors |= {"mm.0.weight": one, "mm.0.bias": lift, "mm.2.weight": one, "mm.2.bias": -lift}
    _write(writer, tensors)


def write_probe_model(target: Path) -> None:
    """The smallest language model that llama.cpp lets an image encoder stand beside."""
    import gguf

    writer = gguf.GGUFWriter(path=target, arch="llama")
    writer.add_name("probe")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    square, norm = np.zeros((_WIDTH, _WIDTH), dtype=np.float32), np.ones(_WIDTH, dtype=np.float32)
    tensors = {"token_embd.weight": np.zeros((len(pieces), _WIDTH), dtype=np.float32), "output_norm.weight": norm}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = square
    tensors |= {"blk.0.attn_norm.weight": norm, "blk.0.ffn_norm.weight": norm}
    _write(writer, tensors)


def _write(writer: gguf.GGUFWriter, tensors: dict[str, NDArray[np.float32]]) -> None:
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
