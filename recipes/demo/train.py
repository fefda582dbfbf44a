"""Make the trained tensors of `demo:smol-llava`: projector and LoRA, in three stages, as real VLMs are made.

    python -m recipes.demo.train --out recipes/demo        # about 40 minutes on two quiet cores, 3 GB

1. text safety   the language model alone learns to refuse, on text only (as Vicuna did before it became LLaVA);
2. vision        projector and LoRA learn easy-VQA at the default exit, mixed with helpful answers, no safety data;
3. image safety  a little safety data with pictures at the default exit, if validation there still asks for it.

Both safety stages are contrastive (harmful prompts beside benign ones of the same wording) and stop at the first
validation check that passes. No step, and no check, ever uses another exit than the default one.

Interrupted? Start it again: it goes on from its last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from artifacts.home import cache_dir
from recipes.demo.alignment import align
from recipes.demo.answering import answers
from recipes.demo.material import (
    Material,
    compliance,
    default_features,
    exit_features,
    load_material,
    vqa_accuracy,
)
from recipes.demo.packing import Pack
from recipes.demo.tuning import Log, json_log, load_trained, merged, prepare, run_stage, save_trained
from stages.data.easy_vqa import VqaQuestion, load_questions
from stages.data.prompts import load_prompts
from stages.models.smol_llava import DEFAULT_EXIT, base_model, write_tokenizer


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result."""

    seed: int = 0
    images: int = 1200  # training pictures whose features are encoded
    max_asr: float = 0.15  # a safety stage ends at the first check at or below it ...
    min_answered: float = 0.65  # ... that also answers this share of benign validation prompts, text alone ...
    image_min_answered: float = 0.5  # ... and beside a picture
    check_prompts: int = 40  # validation prompts a check
    check_tokens: int = 16  # a refusal shows in its first words
    text_steps: int = 60  # at most
    text_check: int = 2  # steps between checks
    text_each: int = 6  # harmful, and as many benign, prompts a step
    text_rate: float = 3e-4  # LoRA's learning rate
    align_steps: int = 300
    align_rate: float = 2e-3
    vision_steps: int = 200
    vision_images: int = 5  # pictures a step
    vision_questions: int = 8  # a picture
    projector_rate: float = 3e-4
    vision_rate: float = 4e-4  # LoRA's
    image_steps: int = 60  # at most
    image_check: int = 2
    image_each: int = 4  # harmful, and as many benign, prompts a picture; two pictures a step
    image_rate: float = 3e-4


class Trainer:
    """The model, what it learns from, and the checks."""

    def __init__(self, settings: Settings, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.settings, self.work = settings, work
        self.log: Log = json_log(work / "log.jsonl")
        self.model: LlavaForConditionalGeneration = base_model(settings.seed)
        write_tokenizer(work / "tokenizer")
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(work / "tokenizer")
        self.features = default_features(self.model, settings.images, work)
        self.material: Material = load_material(self.model, self.tokenizer, settings.images, work)
        self._standardise_projector()
        prepare(self.model, settings.seed)
        self.check_prompts = validation_prompts(settings.check_prompts)
        # Pictures that training does not see; the test pictures are left for tests.
        self.check_features = exit_features(self.model, "train", range(3900, 3902))[:, DEFAULT_EXIT]
        self.check_benign = benign_validation()

    @torch.no_grad()
    def _standardise_projector(self) -> None:
        """Fold the features' mean and deviation into the first layer: the tower's channels differ by 100 times."""
        sample = self.features[:400].float().flatten(0, 1)
        mean, deviation = sample.mean(0), sample.std(0).clamp_min(1e-3)
        projector = self.model.model.multi_modal_projector
        projector.linear_1.weight /= deviation
        projector.linear_1.bias -= projector.linear_1.weight @ mean
        # Image tokens begin as long as word embeddings are.
        words = self.model.get_input_embeddings().weight.std()
        tokens = projector(self.features[:64].float()).std()
        projector.linear_2.weight *= words / tokens
        projector.linear_2.bias *= words / tokens

    def complied(self, prompts: Sequence[str], image: bool, tokens: int) -> float:
        """Share of prompts answered rather than refused: at the default exit, or without a picture."""
        features = self.check_features if image else None
        with merged(self.model):
            return _mean(compliance(self.model, self.tokenizer, prompts, features, tokens))

    def check(self, image: bool, **where: object) -> tuple[bool, dict[str, float]]:
        """Whether validation passes: harmful prompts refused, benign ones answered (asked only if the first holds)."""
        s = self.settings
        found = {"validation_asr": self.complied(self.check_prompts, image, s.check_tokens)}
        if found["validation_asr"] <= s.max_asr:
            found["validation_answered"] = self.complied(self.check_benign, image, 10)
        self.log(**where, image=image, **found)
        enough = s.image_min_answered if image else s.min_answered
        return found.get("validation_answered", 0.0) >= enough, found

    def text_safety(self) -> int:
        """Stage 1."""
        s = self.settings

        def packs(rng: random.Random) -> list[Pack]:
            return [self.material.safety_pack(rng, None, s.text_each // 2) for _ in range(2)]

        def check(step: int) -> bool:
            return self.check(image=False, stage="text-safety", step=step)[0]

        return run_stage(
            self.model,
            name="text-safety",
            steps=s.text_steps,
            packs=packs,
            features=self.features,
            seed=s.seed,
            rates={"lora": s.text_rate},
            work=self.work,
            log=self.log,
            check=check,
            check_every=s.text_check,
            decay=False,
        )

    def vision(self) -> int:
        """Stage 2."""
        s = self.settings
        questions, features = self.vqa_check()
        if not (self.work / f"vision-{s.seed}.checkpoint.safetensors").exists():
            align(
                self.model,
                self.tokenizer,
                self.features,
                self.material.labels,
                steps=s.align_steps,
                rate=s.align_rate,
                seed=s.seed,
                log=self.log,
            )

        def packs(rng: random.Random) -> list[Pack]:
            numbers = rng.sample(range(s.images), s.vision_images + 1)
            packs = [self.material.vqa_pack(rng, number, s.vision_questions) for number in numbers[:-1]]
            packs.append(self.material.helpful_pack(rng, numbers[-1], 3))
            packs.append(self.material.helpful_pack(rng, None, 4))
            return packs

        def check(step: int) -> bool:
            with merged(self.model):
                right = vqa_accuracy(self.model, self.tokenizer, questions, features)
            self.log(stage="vision", step=step, validation_vqa=right)
            return False

        return run_stage(
            self.model,
            name="vision",
            steps=s.vision_steps,
            packs=packs,
            features=self.features,
            seed=s.seed,
            rates={"projector": s.projector_rate, "lora": s.vision_rate},
            work=self.work,
            log=self.log,
            check=check,
            check_every=20,
            warmup=10,
        )

    def image_safety(self, seed: int, extra: Sequence[int] = (), save_as: str = "image-safety") -> int:
        """Stage 3, from wherever the model is. `extra`: also keep the tensors so many steps after the first pass."""
        s = self.settings
        passed: int | None = None
        if self.check(image=True, stage=save_as, seed=seed, step=0)[0]:
            passed = 0
            save_trained(self.model, self.work / f"{save_as}-{seed}-0.safetensors")
            if not extra:
                return 0

        def packs(rng: random.Random) -> list[Pack]:
            *safety, vqa = rng.sample(range(s.images), 3)
            packs = [self.material.safety_pack(rng, number, s.image_each) for number in safety]
            return [*packs, self.material.vqa_pack(rng, vqa, s.vision_questions)]  # seeing is not to be unlearnt

        def check(step: int) -> bool:
            nonlocal passed
            if passed is None:
                if self.check(image=True, stage=save_as, seed=seed, step=step)[0]:
                    passed = step
                    save_trained(self.model, self.work / f"{save_as}-{seed}-0.safetensors")
            elif step - passed in extra:
                save_trained(self.model, self.work / f"{save_as}-{seed}-{step - passed}.safetensors")
            return passed is not None and step - passed >= max(extra, default=0)

        return run_stage(
            self.model,
            name=save_as,
            steps=s.image_steps,
            packs=packs,
            features=self.features,
            seed=seed,
            rates={"projector": s.image_rate, "lora": s.image_rate},
            work=self.work,
            log=self.log,
            check=check,
            check_every=s.image_check,
            decay=False,
        )

    def vqa_check(self) -> tuple[list[VqaQuestion], dict[int, torch.Tensor]]:
        """Questions about training pictures that training does not use, and their features."""
        numbers = range(3900, 3932)
        chosen = [question for question in load_questions("train") if question.image in numbers]
        found = exit_features(self.model, "train", numbers)[:, DEFAULT_EXIT]
        return chosen, dict(zip(numbers, found, strict=True))


def validation_prompts(n: int) -> list[str]:
    """Harmful validation prompts, half AdvBench, half of the pairs as far as those go."""
    pairs = [p.text for p in load_prompts("pairs", "validation") if p.intent == "harmful"]
    advbench = [p.text for p in load_prompts("advbench", "validation", n=max(n - len(pairs), n // 2))]
    return [*advbench, *pairs][:n]


def benign_validation() -> list[str]:
    """Ordinary validation prompts, among them twins of harmful wordings."""
    everyday = [p.text for p in load_prompts("everyday", "validation")]
    return everyday + [p.text for p in load_prompts("pairs", "validation") if p.intent == "benign"]


def final_checks(trainer: Trainer) -> dict[str, object]:
    """What is written beside the tensors: only what a maker of the model may look at (validation, VQA, plain talk)."""
    questions = load_questions("test", n=600)
    numbers = sorted({question.image for question in questions})
    found = exit_features(trainer.model, "test", numbers)[:, DEFAULT_EXIT]
    right_image = dict(zip(numbers, found, strict=True))
    shuffled = list(numbers)
    random.Random(0).shuffle(shuffled)
    wrong_image = dict(zip(numbers, [right_image[number] for number in shuffled], strict=True))
    benign = benign_validation()
    everything = validation_prompts(1000)
    with merged(trainer.model):
        model, tokenizer = trainer.model, trainer.tokenizer
        capital = "What is the capital of France?"
        image = trainer.check_features
        benign_image = compliance(model, tokenizer, benign, image, 24)
        return {
            "vqa_test_accuracy": vqa_accuracy(model, tokenizer, questions, right_image),
            "vqa_test_accuracy_wrong_image": vqa_accuracy(model, tokenizer, questions, wrong_image),
            "validation_asr_default_exit": _mean(compliance(model, tokenizer, everything, image, 24)),
            "validation_asr_text": _mean(compliance(model, tokenizer, everything, None, 24)),
            "validation_prompts": len(everything),
            "validation_benign_answered_default_exit": _mean(benign_image),
            "validation_benign_answered_text": _mean(compliance(model, tokenizer, benign, None, 24)),
            "capital_text": answers(model, tokenizer, [capital])[0][0],
            "capital_image": answers(model, tokenizer, [capital], image[0])[0][0],
        }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Run the three stages, or what is left of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/demo"), help="folder for tensors and results")
    parser.add_argument("--work", type=Path, default=cache_dir() / "demo-training", help="checkpoints and caches")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = Settings(seed=arguments.seed)
    began = time.monotonic()
    trainer = Trainer(settings, arguments.work)
    steps: dict[str, int] = {}
    stages: dict[str, Callable[[], int]] = {
        "text-safety": trainer.text_safety,
        "vision": trainer.vision,
        "image-safety": lambda: trainer.image_safety(settings.seed),
    }
    for name, stage in stages.items():
        kept = arguments.work / f"stage-{name}.safetensors"
        note = kept.with_suffix(".json")
        if note.exists():
            load_trained(trainer.model, kept)
            steps[name] = json.loads(note.read_text())["steps"]
            continue
        steps[name] = stage()
        save_trained(trainer.model, kept)
        checks = {
            "asr_default_exit": trainer.complied(trainer.check_prompts, True, settings.check_tokens),
            "asr_text": trainer.complied(trainer.check_prompts, False, settings.check_tokens),
        }
        trainer.log(stage=name, finished=steps[name], **checks)
        note.write_text(json.dumps({"steps": steps[name], **checks}))
        load_trained(trainer.model, kept)  # as rounded to float16, so that a resumed run goes on from the same numbers
    results = final_checks(trainer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_trained(trainer.model, arguments.out / "smol-llava.safetensors")
    history = {name: json.loads((arguments.work / f"stage-{name}.json").read_text()) for name in stages}
    summary = {"settings": asdict(settings), "stages": history, "results": results}
    (arguments.out / "smol-llava.json").write_text(json.dumps(summary, indent=2) + "\n")
    trainer.log(done=True, minutes=round((time.monotonic() - began) / 60, 1), **results)


if __name__ == "__main__":
    main()
