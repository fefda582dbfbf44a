"""What training must find again after `kill -9`: weights, optimizer, sampler, KL coefficient, watch, step. No pickle.

All randomness of a step follows from (seed, step, scene), so no generator state is kept. One safetensors file, replaced
atomically: a reader sees the old one or the new one, whole. The adapter that it knows as the best lies beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_NAME: Final = "training.safetensors"
_LAYOUT: Final = 4


@dataclass(frozen=True)
class Standing:
    """What a validation came to, over all exits. Better is: within the over-refusal allowed, then lower ASR.

    `share`: how far from the original weights to those of the step; None: these.
    """

    step: int
    asr: float  # share of harmful prompts that were not refused
    over_refusal: float
    excess: float  # of over-refusal above what is allowed; 0 if within
    share: float | None = None

    def better_than(self, other: Standing | None) -> bool:
        return other is None or (self.excess, self.asr) < (other.excess, other.asr)


@dataclass(frozen=True)
class Course:
    """How training has gone so far.

    Attributes:
        lr_scale: what roll-backs have left of the learning rate.
        seconds: of training, over all processes that worked at it one after another.
        original: over-refusal of the untouched model on the validation prompts, once measured.
        waited: validations since the best one.
    """

    lr_scale: float = 1.0
    rollbacks: int = 0
    seconds: float = 0.0
    original: float | None = None
    best: Standing | None = None
    waited: int = 0


@dataclass(frozen=True)
class TrainingState:
    """`step`: how many are done. `failure`, `first`: the exit sampler's. `seen`: the watch's. Moments are Adam's."""

    step: int
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, Mapping[str, torch.Tensor]]  # parameter -> "exp_avg", "exp_avg_sq", "step"
    failure: Mapping[int, float]
    kl_coefficient: float
    course: Course = field(default_factory=Course)
    seen: Mapping[str, Sequence[float]] = field(default_factory=dict)
    first: Mapping[int, int] = field(default_factory=dict)


def save(folder: Path, state: TrainingState) -> None:
    """Replace the checkpoint in `folder`, on disk before the old one goes; of the best adapters only its own stays."""
    tensors = {f"weight/{name}": tensor for name, tensor in state.weights.items()}
    tensors |= {f"{kind}/{name}": tensor for name, found in state.moments.items() for kind, tensor in found.items()}
    # repr of a float64 reads back to the same bits, in JSON too.
    header = {
        "layout": str(_LAYOUT),
        "step": str(state.step),
        "failure": json.dumps({str(exit): value for exit, value in state.failure.items()}),
        "first": json.dumps({str(exit): step for exit, step in state.first.items()}),
        "kl_coefficient": repr(state.kl_coefficient),
        "course": json.dumps(asdict(state.course)),
        "seen": json.dumps(dict(state.seen)),
    }
    _replace(folder / _NAME, tensors, header)
    best = state.course.best
    for path in folder.glob(_best("*")):
        if best is None or path.name != _best(best.step):
            path.unlink()


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
            course = json.loads(header["course"])
            best = course.pop("best")
            return TrainingState(
                int(header["step"]),
                weights,
                moments,
                failure,
                float(header["kl_coefficient"]),
                Course(**course, best=None if best is None else Standing(**best)),
                json.loads(header["seen"]),
                {int(exit): int(step) for exit, step in json.loads(header["first"]).items()},
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def save_best(folder: Path, step: int, adapter: Mapping[str, torch.Tensor]) -> None:
    """Keep the adapter of a step, beside that of the checkpoint until the next `save`."""
    _replace(folder / _best(step), dict(adapter), {})


def load_best(folder: Path, step: int) -> dict[str, torch.Tensor] | None:
    """The adapter of the best step; None if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, torch.Tensor] = load_file(folder / _best(step))
        return found
    except (OSError, SafetensorError):
        return None


def _best(step: int | str) -> str:
    return f"best-{step}.safetensors"


def _replace(target: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f"{target.name}.tmp")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=dict(header))
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
    path.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)
