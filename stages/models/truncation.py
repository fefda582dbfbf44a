"""Leave the encoder early without loading the model: tensors are copied from file to file, config.json is edited.

A model of any size passes through a process of some tens of megabytes, and the kept weights come out bit for bit.
Loading, `Family.truncate` and saving give the same model; this is what families can do whose towers are a plain row of
blocks, with tensors that need no change when later blocks go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.models import checkpoint
from stages.models.shards import LeftOut, copy_weights


@dataclass(frozen=True)
class DiskCut:
    """What a family says of a tower that is cut after some block."""

    config: Mapping[str, object]  # the new config.json
    keeps: Callable[[str], bool]  # of a tensor's name, in any layout


def cut_files(source: Path, target: Path, cut: DiskCut) -> LeftOut:
    """Write the checkpoint in `source` with its encoder cut into `target`, companions included.

    Raises:
        SourceError: as `checkpoint.weight_files`.
    """
    left_out = copy_weights(source, target, lambda name: name if cut.keeps(name) else None)
    text = json.dumps(cut.config, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    checkpoint.copy_companions(source, target)
    checkpoint.make_readable(target)
    return left_out
