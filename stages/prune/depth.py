"""A language model without some of its blocks: as files, and for a while in memory.

What depends on a block's number is renumbered with it: tensor names, `num_hidden_layers`, and the lists of config.json
that have an entry a block or name blocks. A block's place in the KV cache (`layer_idx`) follows when transformers
builds the smaller model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import RecipeError, SourceError
from stages.models import checkpoint
from stages.models.shards import LeftOut, copy_weights, tensor_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Decoder blocks in every layout of names that transformers has used; towers keep theirs below other words.
_BLOCK: Final = re.compile(
    r"(?P<before>(?:model\.)?(?:(?:language|text)_model\.)?(?:model\.)?layers\.)(?P<number>\d+)\."
)
# Lists of a text config with an entry for each block, and lists of block numbers.
_ENTRY_A_BLOCK: Final = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
_BLOCK_NUMBERS: Final = ("cross_attention_layers", "mlp_only_layers")


def kept_blocks(depth: int, dropped: Collection[int]) -> tuple[int, ...]:
    """The numbers, from 0, of the blocks that stay."""
    return tuple(block for block in range(depth) if block not in dropped)


def least_depth(depth: int) -> int:
    """How many blocks must stay: half of them, rounded up.

    Beyond that both papers see models fall to chance, however the blocks are chosen, and healing does not bring them
    back (Gromov et al., arXiv 2403.17887, section 4.1: after 20-55% of the blocks; Men et al., arXiv 2403.03853).
    """
    return -(-depth // 2)


def check_dropped(dropped: Sequence[int], depth: int) -> None:
    """Refuse blocks that are not there, and too many of them.

    Raises:
        RecipeError: with the valid choice.
    """
    wrong = sorted({block for block in dropped if not 0 <= block < depth})
    if wrong:
        raise RecipeError(
            f"layers: {', '.join(map(str, wrong))} {'are' if len(wrong) > 1 else 'is'} not in this language model",
            why=f"its {depth} blocks are numbered from 0, as in the names of its tensors",
            way_out=f"choose layers from 0 to {depth - 1}",
        )
    check_amount(len(dropped), depth)


def check_amount(dropped: int, depth: int) -> None:
    """Refuse to drop so many blocks that no model is left.

    Raises:
        RecipeError: with the largest valid number.
    """
    least = least_depth(depth)
    if depth - dropped < least:
        raise RecipeError(
            f"{dropped} of {depth} blocks cannot be dropped: at least {least} must stay",
            why="without half of their blocks language models fall to chance, however the blocks are chosen, and "
            "healing does not bring them back (arXiv 2403.17887, section 4.1)",
            way_out=f"drop at most {depth - least}, and begin with a sixth: {max(1, depth // 6)}"
            if depth > least
            else "leave the stage out",
        )


def cross_attention_blocks(config: Mapping[str, object]) -> frozenset[int]:
    """The blocks of a config.json's language model that read the image by cross-attention (Llama 3.2 Vision)."""
    numbers = _text_section(config).get("cross_attention_layers")
    return frozenset(cast("list[int]", numbers)) if isinstance(numbers, list) else frozenset()


def check_cross_attention(dropped: Collection[int], config: Mapping[str, object]) -> None:
    """Refuse to drop a block that reads the image.

    Raises:
        RecipeError: with the blocks that may go.
    """
    wrong = sorted(cross_attention_blocks(config) & set(dropped))
    if wrong:
        raise RecipeError(
            f"layers: {', '.join(map(str, wrong))} cannot be dropped",
            why="these blocks read the image by cross-attention; without them the model goes blind by degrees",
            way_out="choose others: all but " + ", ".join(map(str, sorted(cross_attention_blocks(config)))),
        )


def text_fields(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, object]:
    """The fields of a text config that another depth changes, with their new values."""
    depth = int(cast("int", config.num_hidden_layers))
    fields: dict[str, object] = {"num_hidden_layers": len(kept)}
    for name in _ENTRY_A_BLOCK:
        entries = getattr(config, name, None)
        if isinstance(entries, list) and len(entries) == depth:
            fields[name] = [entries[block] for block in kept]
    for name in _BLOCK_NUMBERS:
        numbers = getattr(config, name, None)
        if isinstance(numbers, list):
            fields[name] = [new for new, old in enumerate(kept) if old in numbers]
    return fields


def cut(source: Path, target: Path, dropped: Collection[int]) -> LeftOut:
    """Write the checkpoint in `source` without these blocks of its language model into `target`.

    Tensors are copied from file to file: the model is never in memory. Stock transformers loads the result.

    Raises:
        SourceError: the tensors are not named as transformers names a decoder's blocks.
    """
    from transformers import AutoConfig

    config = checkpoint.read_config(source)
    text = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False).get_text_config()
    depth = int(text.num_hidden_layers)
    kept = kept_blocks(depth, dropped)
    matches = [match for match in map(_BLOCK.match, tensor_names(source)) if match is not None]
    found = {int(match["number"]) for match in matches}
    if found != set(range(depth)) or len({match["before"] for match in matches}) != 1:
        raise SourceError(
            f"the tensors of {len(found)} decoder blocks were found, config.json names {depth}",
            where=str(source),
            why="a block can only be dropped where its tensors are called [...]layers.NUMBER.[...]",
        )
    new_number = {old: new for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        match = _BLOCK.match(name)
        if match is None:
            return name
        number = new_number.get(int(match["number"]))
        return None if number is None else f"{match['before']}{number}.{name[match.end() :]}"

    left_out = copy_weights(source, target, rename)
    # Lists that transformers derives from other fields are written out: of a shorter model it would derive others.
    cast("dict[str, object]", _text_section(config)).update(text_fields(text, kept))
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    checkpoint.copy_companions(source, target)
    return left_out


@contextmanager
def without_blocks(trunk: torch.nn.Module, dropped: Collection[int]) -> Iterator[None]:
    """Inside, a trunk lacks these blocks; the others are the same modules. For passes without a KV cache."""
    import torch

    config = cast("PreTrainedConfig", trunk.config)
    layers = cast("torch.nn.ModuleList", trunk.layers)
    kept = kept_blocks(len(layers), dropped)
    fields = text_fields(config, kept)
    before = {name: getattr(config, name) for name in fields}
    # Llama 3.2 Vision's trunk has a copy of its own.
    copies = {name: getattr(trunk, name) for name in fields if hasattr(trunk, name)}
    try:
        trunk.layers = torch.nn.ModuleList([layers[block] for block in kept])
        for name, value in fields.items():
            setattr(config, name, value)
            if name in copies:
                setattr(trunk, name, value)
        yield
    finally:
        trunk.layers = layers
        for name, value in before.items():
            setattr(config, name, value)
        for name, value in copies.items():
            setattr(trunk, name, value)


def _text_section(config: Mapping[str, object]) -> Mapping[str, object]:
    section = config.get("text_config")
    return cast("Mapping[str, object]", section) if isinstance(section, Mapping) else config
