"""TRL's side: `trl.experimental.ppo.PPOTrainer` as it is, one step a turn. Runs in TRL 1.12's environment.

    python trl_ppo.py task.json '{"value": "full", "rewards": "small", "per_device": 8, "rollout": 16}'

Nothing of TRL is patched. `pad_token` is one that the model never says: TRL takes whatever equals it for padding, and
the model's own (`<|im_end|>`) stands in every prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from turns import Turns

PAD = "<reponame>"
LONG = 200  # steps that the data set lasts: at its end accelerate would step the optimizer after every micro-batch


class Turn(TrainerCallback):  # type: ignore[misc]
    """Ends a turn after each step."""

    def __init__(self, turns: Turns):
        self._turns = turns

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._turns.wait(seconds=self._turns.seconds())


def value_model(folder: str, kind: str, lora: LoraConfig) -> PreTrainedModel:
    """A sequence classifier on the policy's own weights, as TRL's examples take one.

    Args:
        kind: full: all of it is trained, TRL's way; lora: an adapter like the policy's, and the head; head: only that.
    """
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    if kind != "full":
        model.requires_grad_(False)
        if kind == "lora":
            inject_adapter_in_model(lora, model)
        model.score.requires_grad_(True)
    torch.nn.init.zeros_(model.score.weight)
    return model


def reward_model(folder: str, kind: str) -> PreTrainedModel:
    """A sequence classifier with random weights; small: one block of width 64, which costs next to nothing."""
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    if kind == "small":
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 1, 1
        config.hidden_size, config.head_dim, config.intermediate_size = 64, 64, 64
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False)


def main() -> None:
    turns = Turns()
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    setting = json.loads(sys.argv[2])
    folder, responses = task["checkpoint"], task["prompts_per_step"] * task["samples"]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = PAD
    lora = LoraConfig(r=task["lora_rank"], lora_alpha=task["lora_alpha"], target_modules=task["lora_targets"])
    ids = [prompt["ids"] for prompt in task["prompts"]]
    assert not any(tokenizer.pad_token_id in row for row in ids)
    rows = [row for row in ids for _ in range(task["samples"])]  # it draws one response to a prompt
    rows *= 1 + LONG * responses // len(rows)
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=setting["per_device"],
            gradient_accumulation_steps=responses // setting["per_device"],
            local_rollout_forward_batch_size=setting["rollout"],
            num_mini_batches=1,
            num_ppo_epochs=task["ppo_epochs"],
            response_length=task["response_tokens"],
            stop_token=None,
            temperature=1.0,
            learning_rate=task["lr"],
            kl_coef=task["kl"],
            cliprange=task["clip"],
            vf_coef=task["c1"],
            gamma=task["gamma"],
            lam=task["lam"],
            max_grad_norm=task["max_grad_norm"],
            total_episodes=LONG * responses,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            ref_model=None,  # the policy without its adapter
            reward_model=reward_model(folder, setting["rewards"]),
            value_model=value_model(folder, setting["value"], lora),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            peft_config=lora,
            callbacks=[Turn(turns)],
        )
        turns.wait(ready=True)
        trainer.train()


if __name__ == "__main__":
    main()
