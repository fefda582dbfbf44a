"""Training: TRL's RewardTrainer on tokens, resumable, the same weights for the same seed.

The loss of a pair is -log sigmoid(r(chosen) - r(rejected)), plus `center` * (r(chosen) + r(rejected))^2 (arXiv
2312.09244), which fixes the origin that the first part leaves free.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import SourceError, StageError
from stages.judges.reward_model import encode
from stages.models import checkpoint
from stages.models.family import family_of
from stages.reward_model.pairs import Pair
from stages.reward_model.params import RewardModelParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tell = Callable[[int, Mapping[str, float]], None]  # optimizer steps done, what the trainer has to say of the last

_TOLD: Final = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "grad_norm": "grad_norm"}
_TOLD_LR: Final = {"learning_rate": "lr"}


def from_checkpoint(folder: Path, seed: int) -> PreTrainedModel:
    """The language model of a checkpoint of any family, with a new head of one label.

    Raises:
        StageError: transformers has no sequence-classification class for it.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    family = family_of(checkpoint.read_config(folder), where=str(folder))
    trunk = family.trunk(family.load(folder, dtype="float32"))
    config = type(trunk.config).from_dict(trunk.config.to_dict())  # type: ignore[union-attr, operator]
    config.num_labels = 1
    torch.manual_seed(seed)  # of the head
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise StageError(
            f"the language model of this {family.name} cannot be made a reward model",
            why=f"transformers has no sequence-classification class for {config.model_type}",
            way_out="name another one: model: hub:openai-community/gpt2, or a folder",
        ) from error
    base = getattr(model, model.base_model_prefix)
    base.load_state_dict(trunk.state_dict())
    return cast("PreTrainedModel", model.float())


def from_folder(folder: Path, seed: int) -> PreTrainedModel:
    """A causal or sequence-classification model; a head that is not there, or has other labels, is made anew.

    Raises:
        SourceError: the folder holds no such model, or one that lacks more than a head.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    checkpoint.read_config(folder)
    checkpoint.weight_files(folder)
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            num_labels=1,
            ignore_mismatched_sizes=True,  # a head for other labels
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise SourceError(
            "no reward model can be made of it", where=str(folder), why=why[0] if why else None
        ) from error
    lacking = sorted(name for name in info["missing_keys"] if str(name).startswith(model.base_model_prefix + "."))
    if lacking:
        raise SourceError(
            f"{len(lacking)} tensors are missing, {lacking[0]} first",
            where=str(folder),
            why="config.json describes a larger or another model than the weight files hold",
        )
    return cast("PreTrainedModel", model)


def tokens(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Pair, list[int], list[int]]]:
    """Pairs with the ids of both dialogues, without those that are too long."""
    rows = ((pair, encode(tokenizer, pair.chosen), encode(tokenizer, pair.rejected)) for pair in pairs)
    return [row for row in rows if max(len(row[1]), len(row[2])) <= max_length]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Pair, list[int], list[int]]],
    params: RewardModelParams,
    *,
    device: str,
    seed: int,
    scratch: Path,
    tell: Tell,
) -> PreTrainedModel:
    """Train, going on from the last whole checkpoint in `scratch`; an adapter is merged.

    Raises:
        StageError: the loss is no number any more.
    """
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Teller(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: object, state: object, control: object, logs: Mapping[str, float], **_: object) -> None:
            if "loss" in logs:
                step = int(state.global_step)  # type: ignore[attr-defined]
                if not math.isfinite(logs["loss"]):
                    raise StageError(
                        f"the loss is {logs['loss']} after step {step}", way_out="lower lr, or raise warmup"
                    )
                tell(step, {name: logs[key] for key, name in (_TOLD | _TOLD_LR).items() if key in logs})

    # Kernels whose sums depend on the order of threads would break `kill -9` and start again = undisturbed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    micro = min(params.micro_batch, params.batch)
    with warnings.catch_warnings():
        # TRL sets options by their old names.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = RewardConfig(
            output_dir=str(scratch),
            max_steps=params.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=params.batch // micro,
            learning_rate=params.lr,
            lr_scheduler_type="linear",
            warmup_steps=int(params.warmup * params.steps),
            weight_decay=params.weight_decay,
            center_rewards_coefficient=params.center or None,
            max_length=None,  # too long ones are gone already
            bf16=params.dtype == "bfloat16",
            gradient_checkpointing=params.gradient_checkpointing,
            use_cpu=device == "cpu",
            seed=seed % 2**32,
            data_seed=seed % 2**32,
            save_strategy="steps",
            save_steps=params.checkpoint_every,
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
        )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"chosen_ids": [chosen for _, chosen, _ in rows], "rejected_ids": [rejected for _, _, rejected in rows]}
        ),
        processing_class=tokenizer,
        callbacks=[Teller()],
        peft_config=_adapter(params),
    )
    trainer.remove_callback(PrinterCallback)  # only the console prints
    done, last = _last_checkpoint(scratch)
    if last is not None and done >= params.steps:
        trainer._load_from_checkpoint(last)  # `train` would add a step to what is finished
    else:
        trainer.train(resume_from_checkpoint=last)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if params.lora_rank is not None:
        trained = trained.merge_and_unload()
    if not all(bool(torch.isfinite(weight).all()) for weight in trained.parameters()):
        raise StageError("some weights are no numbers any more", way_out="lower lr, or raise warmup")
    return cast("PreTrainedModel", trained.to("cpu").eval().requires_grad_(False))


def _adapter(params: RewardModelParams) -> object:
    """peft's LoraConfig, or None; the head is trained whole."""
    if params.lora_rank is None:
        return None
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.SEQ_CLS, r=params.lora_rank, lora_alpha=params.lora_alpha, target_modules="all-linear"
    )


def _last_checkpoint(scratch: Path) -> tuple[int, str | None]:
    """Steps and folder of the last one that was written to its end; those that were not are taken away.

    The trainer's checkpoints hold pickles: these are our own, in a folder that nobody else writes into.
    """
    whole: list[tuple[int, Path]] = []
    for folder in scratch.glob("checkpoint-*"):
        try:
            # It is what the trainer writes last.
            whole.append((int(json.loads((folder / "trainer_state.json").read_bytes())["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    if not whole:
        return 0, None
    steps, folder = max(whole)
    return steps, str(folder)
