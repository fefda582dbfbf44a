"""What training must find again after `kill -9`: weights, optimizer, sampler, KL coefficient, step. No pickle.

All randomness of a step follows from (seed, step), so no generator state is kept. One safetensors file, replaced
atomically: a reader sees the old one or the new one, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_NAME: Final = "training.safetensors"
_LAYOUT: Final = 1


@dataclass(frozen=True)
class TrainingState:
    """`step`: how many steps are done. `failure`: the exit sampler's. Optimizer moments are Adam's."""

    step: int
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, Mapping[str, torch.Tensor]]  # parameter -> "exp_avg", "exp_avg_sq", "step"
    failure: Mapping[int, float]
    kl_coefficient: float


def save(folder: Path, state: TrainingState) -> None:
    """Replace the checkpoint in `folder`; on disk before the old one goes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight/{name}": tensor for name, tensor in state.weights.items()}
    tensors |= {f"{kind}/{name}": tensor for name, found in state.moments.items() for kind, tensor in found.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # repr of a float64 reads back to the same bits.
    header = {
        "layout": str(_LAYOUT),
        "step": str(state.step),
        "failure": json.dumps({str(exit): value for exit, value in state.failure.items()}),
        "kl_coefficient": repr(state.kl_coefficient),
    }
    path = folder / f"{_NAME}.tmp"
    save_file(tensors, path, metadata=header)
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
    path.replace(folder / _NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def load(folder: Path) -> TrainingState | None:
    """The checkpoint in `folder`; None if there is none, or none that can be read (training then begins anew)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / _NAME), framework="pt") as handle:
            header: Mapping[str, str] = handle.metadata() or {}
            if header.get("layout") != str(_LAYOUT):
                return None
            weights: dict[str, torch.Tensor] = {}
            moments: dict[str, dict[str, torch.Tensor]] = {}
            for key in handle.keys():  # noqa: SIM118 - it is no mapping
                kind, _, name = key.partition("/")
                if kind == "weight":
                    weights[name] = handle.get_tensor(key)
                else:
                    moments.setdefault(name, {})[kind] = handle.get_tensor(key)
            failure = {int(exit): float(value) for exit, value in json.loads(header["failure"]).items()}
            return TrainingState(int(header["step"]), weights, moments, failure, float(header["kl_coefficient"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
