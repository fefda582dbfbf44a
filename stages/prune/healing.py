"""Healing: the unpruned model is distilled into the pruned one for a few steps, through LoRA.

- Teacher and student are one model in memory: the teacher has all blocks and no adapter, the student lacks the dropped
  ones and has it.
- The loss is KL(teacher || student) over the whole vocabulary, at the tokens of text, questions, prompts and answers;
  on real tokens alone, no label is used.
- All randomness follows from (seed, step), and a checkpoint is one safetensors file that is replaced atomically: a run
  that is killed and continued ends with the same weights, to the bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import StageError
from stages.data.calibration import Batch, Calibration, Passage, batches
from stages.models.adapter import with_adapter
from stages.prune.depth import without_blocks
from stages.prune.params import HealParams

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from stages.models.family import Family

_NAME: Final = "healing.safetensors"
_LAYOUT: Final = "1"
_LAST_RATE: Final = 0.1  # of the first

Report = Callable[[int, float, float], None]
"""Steps done, KL in nats a token, learning rate."""


class Pair:
    """The unpruned model and the pruned one, in one set of weights.

    Args:
        model: the unpruned one, gradients off; it is changed in place when an adapter is put in.
        dropped: blocks that the pruned one lacks.
    """

    def __init__(self, family: Family, model: PreTrainedModel, dropped: Sequence[int]):
        self._trunk = family.trunk(model)
        self._head = family.head(model)
        self._dropped = tuple(dropped)
        self._adapter: PeftModel | None = None

    def adapt(self, params: HealParams, seed: int) -> dict[str, torch.nn.Parameter]:
        """Put LoRA into the blocks that stay; its parameters by their names in the pruned model's trunk."""
        import torch

        with self.pruned(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._adapter = with_adapter(self._trunk, params.lora())
            return {name: found for name, found in self._adapter.named_parameters() if found.requires_grad}

    @contextmanager
    def pruned(self) -> Iterator[None]:
        with without_blocks(self._trunk, self._dropped):
            yield

    def teacher(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities (counted, vocabulary) of the unpruned model, float32."""
        import torch

        with torch.no_grad():
            if self._adapter is None:
                return self._logprobs(batch)
            with self._adapter.disable_adapter():
                return self._logprobs(batch)

    def student(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities (counted, vocabulary) of the pruned model, float32."""
        with self.pruned():
            return self._logprobs(batch)

    def _logprobs(self, batch: Batch) -> torch.Tensor:
        hidden = batch.through(self._trunk)
        return cast("torch.Tensor", self._head(hidden[batch.counted]).float().log_softmax(-1))

    def divergence(self, passages: Sequence[Passage], size: int) -> float:
        """Mean KL(teacher || student) in nats a token, over all counted tokens."""
        import torch

        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches(passages, size):
                found = divergences(self.teacher(batch), self.student(batch))
                total, tokens = total + float(found.double().sum()), tokens + len(found)
        return total / tokens


def divergences(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of log-probabilities (tokens, vocabulary), in nats: (tokens,)."""
    import torch

    return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def heal(
    pair: Pair, calibration: Calibration, params: HealParams, *, seed: int, scratch: Path, report: Report
) -> dict[str, torch.Tensor]:
    """Train, from the checkpoint in `scratch` if there is one. Returns the adapter, on the CPU.

    Raises:
        StageError: the loss is not finite.
    """
    import torch

    parameters = pair.adapt(params, seed)
    optimizer = torch.optim.Adam(parameters.values(), lr=params.lr, betas=(0.9, 0.95))
    done = restore(scratch, parameters, optimizer)
    for step in range(done, params.steps):
        rate = params.lr * (1 - (1 - _LAST_RATE) * step / max(1, params.steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        passages = calibration.mixed(params.batch, start=step * params.batch)
        passages.sort(key=lambda passage: passage.order)
        counted = sum(len(passage.embeddings) - passage.first for passage in passages)
        loss = 0.0
        for batch in batches(passages, params.micro_batch):
            part = divergences(pair.teacher(batch), pair.student(batch)).sum() / counted
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), params.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise StageError(
                f"healing diverged at step {step + 1}",
                why=f"KL {loss:.3g}, gradient norm {float(norm):.3g}",
                way_out="lower heal.lr, or use dtype: float32",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step + 1, loss, rate)
        if (step + 1) % params.checkpoint_every == 0 or step + 1 == params.steps:
            save(scratch, step + 1, parameters, optimizer)
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def save(
    folder: Path, step: int, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Replace the checkpoint in `folder`: weights, Adam's moments and step; on disk before the old one goes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[parameter].items()}
    part = folder / f"{_NAME}.tmp"
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, part, metadata={"layout": _LAYOUT, "step": str(step)})
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    part.replace(folder / _NAME)


def restore(folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Undo `save`; returns the steps done, 0 if there is no checkpoint, or none that can be read."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / _NAME), framework="pt") as handle:
            header: Mapping[str, str] = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError):
        return 0
    if header.get("layout") != _LAYOUT or {f"weight/{name}" for name in parameters} - tensors.keys():
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
            moments = {kind: tensors[f"{kind}/{name}"] for kind in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device) for kind, value in moments.items()
            }
    return int(header["step"])
