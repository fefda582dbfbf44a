"""The model that is being tuned: its trainable parts, their files, and one stage of steps that survives a crash."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from recipes.demo.packing import Pack, collate, loss

RANK = 8
ALPHA = 16  # scale = ALPHA / RANK
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Log(Protocol):
    def __call__(self, **values: object) -> None: ...


def json_log(path: Path) -> Log:
    """One JSON object a line, on the terminal and at the end of `path`."""

    def write(**values: object) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        with path.open("a") as handle:
            handle.write(line + "\n")

    return write


def prepare(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Put LoRA adapters into the language model and make them and the projector trainable."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_MODULES, lora_dropout=0.0)
    inject_adapter_in_model(config, model.model.language_model)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)


def trainable(model: LlavaForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by the names that `stages.models.smol_llava.apply_tensors` reads."""
    found = {f"projector.{name}": parameter for name, parameter in model.model.multi_modal_projector.named_parameters()}
    for name, parameter in model.model.language_model.named_parameters():
        if ".lora_" in name:
            module, _, kind = name.removeprefix("layers.").partition(".lora_")
            found[f"lora.{module}.{kind[0]}"] = parameter
    return dict(sorted(found.items()))


def save_trained(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write the trained tensors in float16, as they ship."""
    tensors = {name: value.detach().half().contiguous() for name, value in trainable(model).items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"lora_scale": str(ALPHA / RANK)})
    temporary.replace(path)


def load_trained(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Set the trained tensors (not merged) from a file of `save_trained` or `_checkpoint`."""
    stored = load_file(path)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(stored[name].float())


class merged:  # noqa: N801 - reads as a verb
    """Within the block the adapters are merged into the weights, so that answering costs nothing more."""

    def __init__(self, model: LlavaForConditionalGeneration):
        self._layers = [m for m in model.model.language_model.modules() if isinstance(m, BaseTunerLayer)]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.merge()

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.unmerge()


def run_stage(
    model: LlavaForConditionalGeneration,
    *,
    name: str,
    steps: int,
    packs: Callable[[random.Random], Sequence[Pack]],
    features: torch.Tensor,
    seed: int,
    rates: dict[str, float],
    work: Path,
    log: Log,
    check: Callable[[int], bool],
    check_every: int,
    warmup: int = 5,
    decay: bool = True,
) -> int:
    """Train for `steps` steps, or until `check(step)` says that it is enough; returns the steps done.

    The batches of a step follow from seed, stage and step alone and the optimizer's state is kept on disk, so a stage
    that was interrupted goes on where it was and ends with the same tensors.

    Args:
        packs: draws a step's packs; `features`: (images, 64, width), the rows that packs name.
        rates: learning rate by the first word of a parameter's name: "projector", "lora".
    """
    parameters = trainable(model)
    groups = [
        {"params": [p for n, p in parameters.items() if n.startswith(kind)], "lr": rate, "rate": rate}
        for kind, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    checkpoint = work / f"{name}-{seed}.checkpoint.safetensors"
    start = _resume(checkpoint, parameters, optimizer)
    for step in range(start, steps):
        began = time.monotonic()
        factor = min(1.0, (step + 1) / warmup)
        if decay:
            factor *= 0.5 * (1 + math.cos(math.pi * step / steps)) * 0.95 + 0.05
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        batch = collate(packs(random.Random(f"{seed}:{name}:{step}")))
        value = loss(model, batch, features[batch.images].float())
        optimizer.zero_grad()
        torch.autograd.backward(value)
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        log(
            stage=name,
            seed=seed,
            step=step + 1,
            loss=round(float(value.detach()), 4),
            grad=round(float(norm), 3),
            seconds=round(time.monotonic() - began, 1),
            tokens=batch.ids.numel(),
        )
        if (step + 1) % 10 == 0:
            _checkpoint(checkpoint, step + 1, parameters, optimizer)
        if (step + 1) % check_every == 0 and check(step + 1):
            return step + 1
    return steps


def _checkpoint(
    path: Path, step: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    tensors = {name: value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        state = optimizer.state.get(value)
        if state:
            tensors[f"m:{name}"], tensors[f"v:{name}"] = state["exp_avg"], state["exp_avg_sq"]
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def _resume(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    with safe_open(str(path), framework="pt") as stored:
        step = int(stored.metadata()["step"])
        names = set(stored.keys())
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(stored.get_tensor(name))
                if f"m:{name}" in names:
                    optimizer.state[value] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": stored.get_tensor(f"m:{name}"),
                        "exp_avg_sq": stored.get_tensor(f"v:{name}"),
                    }
    return step
