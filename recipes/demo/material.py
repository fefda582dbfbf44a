"""What the demo model is tuned on and checked with: questions, helpful answers, refusals, image features."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Resampling
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from recipes.demo.alignment import attributes, is_negated
from recipes.demo.answering import answers
from recipes.demo.packing import Pack, Sample, collate, hidden_states, make_pack
from recipes.demo.requests import benign_requests
from stages.data.easy_vqa import ANSWERS, TRUTH, VqaQuestion, VqaSplit, load_images, load_questions
from stages.data.prompt_sets import Prompt
from stages.data.prompts import load_prompts
from stages.judges.refusal import RefusalRule
from stages.models.smol_llava import DEFAULT_EXIT, IMAGE_SIZE

OPENING = 12  # tokens of a benign answer in a safety step
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "I'm sorry, but I cannot assist with that request because it could cause harm.",
    "I cannot help with that. It could hurt people.",
    "I'm sorry, I can't help with this. If you have another question, I'm happy to help.",
    "I won't help with that, as it would be illegal or harmful.",
    "Sorry, I'm not able to help with that.",
    "I'm unable to assist with that request.",
)

PLAIN = (  # asked beside the prompt sets, so that the model still answers what everybody tries first
    "What is a shadow?",
    "Who wrote Romeo and Juliet?",
    "What is the capital of Spain?",
    "What is the capital of Japan?",
    "How many days are in a week?",
    "What is the largest planet in our solar system?",
    "Name three fruits.",
    "What do bees make?",
    "Why is the sky blue?",
    "What is the boiling point of water?",
    "Hello! How are you?",
    "Can you tell me about yourself?",
    "What is photosynthesis?",
    "Give me a tip for staying healthy.",
    "What is the opposite of hot?",
    "Write a sentence about the sea.",
)


def pixel_values(split: VqaSplit, numbers: Sequence[int]) -> torch.Tensor:
    """(images, 3, 112, 112), as the checkpoint's image processor gives them."""
    import numpy as np

    resized = [image.resize((IMAGE_SIZE, IMAGE_SIZE), Resampling.BICUBIC) for image in load_images(split, numbers)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).float() / 255
    return ((pixels - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def exit_features(model: LlavaForConditionalGeneration, split: VqaSplit, numbers: Sequence[int]) -> torch.Tensor:
    """(images, exits 0..12, 64, 384): one pass of the tower gives every exit."""
    found = []
    for start in range(0, len(numbers), 32):
        pixels = pixel_values(split, numbers[start : start + 32])
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        found.append(torch.stack(states, dim=1))
    return torch.cat(found)


def default_features(model: LlavaForConditionalGeneration, images: int, work: Path) -> torch.Tensor:
    """(images, 64, 384) of the first training pictures at the default exit, float16, cached in `work`."""
    path = work / f"features-train-{images}.safetensors"
    if not path.exists():
        parts = [
            exit_features(model, "train", range(start, min(start + 64, images)))[:, DEFAULT_EXIT].half()
            for start in range(0, images, 64)
        ]
        save_file({"features": torch.cat(parts).contiguous()}, path)
    features: torch.Tensor = load_file(path)["features"]
    return features


@dataclass(frozen=True)
class Material:
    """Everything that training draws from. No harmful prompt has an answer here but a refusal."""

    tokenizer: PreTrainedTokenizerBase
    questions: dict[int, list[VqaQuestion]]  # by picture
    labels: list[tuple[str | None, str | None]]  # colour and shape, by picture
    captions: dict[int, str]
    helpful: list[Sample]
    twins: list[Sample]  # those of `helpful` that are worded as harmful requests are
    harmful: list[Prompt]

    def vqa_pack(self, rng: random.Random, image: int, questions: int) -> Pack:
        """Questions about one picture: open ones, and yes/no ones balanced by whether the thing asked for is there.

        Most yes/no questions ask for something that is absent: unbalanced, a model does well without looking.
        """
        pool = self.questions[image]
        open_ = [q for q in pool if q.answer not in TRUTH]
        present = [q for q in pool if q.answer in TRUTH and (q.answer == "yes") != is_negated(q.question)]
        absent = [q for q in pool if q.answer in TRUTH and (q.answer == "yes") == is_negated(q.question)]
        chosen = rng.sample(open_, min(questions * 3 // 8, len(open_)))
        chosen += rng.sample(present, min((questions - len(chosen)) // 2, len(present)))
        chosen += rng.sample(absent, min(questions - len(chosen), len(present) + 1, len(absent)))
        return make_pack(self.tokenizer, [Sample(q.question, q.answer) for q in chosen], image)

    def helpful_pack(self, rng: random.Random, image: int | None, count: int, weight: float = 3.0) -> Pack:
        """Ordinary prompts with helpful answers, beside a picture or without; one caption where there is a picture."""
        samples = rng.sample(self.helpful, count)
        if image is not None:
            samples[0] = Sample(rng.choice(_CAPTION_PROMPTS), self.captions[image])
        weighted = [Sample(s.prompt, s.answer, weight, s.complete) for s in samples]
        return make_pack(self.tokenizer, weighted, image)

    def safety_pack(self, rng: random.Random, image: int | None, each: int) -> Pack:
        """`each` harmful prompts with refusals beside `each` benign ones with helpful answers.

        Benign answers are cut to the length of a refusal: a loss is a mean over an answer's tokens, and the first ones,
        where it is decided whether to answer, must weigh alike on both sides.
        """
        samples = [Sample(p.text, refusal(p.text)) for p in rng.sample(self.harmful, each)]
        twins = each - each // 2
        benign = [*rng.sample(self.twins, twins), *rng.sample(self.helpful, each - twins)]
        samples += [self._opening(sample) for sample in benign]
        rng.shuffle(samples)
        return make_pack(self.tokenizer, samples, image)

    def _opening(self, sample: Sample) -> Sample:
        ids = self.tokenizer.encode(sample.answer, add_special_tokens=False)
        if len(ids) <= OPENING:
            return sample
        return Sample(sample.prompt, str(self.tokenizer.decode(ids[:OPENING])), sample.weight, complete=False)


_CAPTION_PROMPTS = ("What is in this picture?", "Describe the image.", "What do you see?")


def refusal(prompt: str) -> str:
    """The same prompt is always refused in the same words."""
    return REFUSALS[zlib.crc32(prompt.encode()) % len(REFUSALS)]


def load_material(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, images: int, work: Path
) -> Material:
    """Gather the material; helpful answers are the untuned model's own, so that helpfulness is kept, not rewritten."""
    questions: dict[int, list[VqaQuestion]] = {}
    for question in load_questions("train"):
        if question.image < images:
            questions.setdefault(question.image, []).append(question)
    labels = [attributes(questions.get(number, [])) for number in range(images)]
    captions = {number: _caption(*label) for number, label in enumerate(labels)}
    benign = [p.text for name in ("everyday", "pairs", "overrefusal") for p in load_prompts(name, "train")
              if p.intent != "harmful"]  # fmt: skip
    wordings = [*benign_requests(), *(p.text for p in load_prompts("everyday", "train") if p.id.startswith("twins"))]
    prompts = [*benign, *PLAIN, *benign_requests()]
    path = work / "helpful.json"
    stored: dict[str, tuple[str, bool]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [prompt for prompt in prompts if prompt not in stored]
    if missing:
        stored |= dict(zip(missing, answers(model, tokenizer, missing, None, max_new_tokens=32), strict=True))
        path.write_text(json.dumps(stored, indent=0))
    judged = RefusalRule().score(prompts, [stored[prompt][0] for prompt in prompts])
    # What the untuned model refuses itself (it seldom does) is no example of helpfulness.
    helpful = [
        Sample(prompt, stored[prompt][0], complete=bool(stored[prompt][1]))
        for prompt, judgement in zip(prompts, judged, strict=True)
        if judgement.unsafe and stored[prompt][0]
    ]
    requests = [*load_prompts("advbench", "train"), *load_prompts("pairs", "train")]
    harmful = [prompt for prompt in requests if prompt.intent == "harmful"]
    twins = [sample for sample in helpful if sample.prompt in set(wordings)]
    return Material(tokenizer, questions, labels, captions, helpful, twins, harmful)


def _caption(colour: str | None, shape: str | None) -> str:
    return "The picture shows a " + " ".join(word for word in (colour, shape or "shape") if word) + "."


def compliance(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    features: torch.Tensor | None,
    max_new_tokens: int,
) -> list[bool]:
    """For each prompt, whether the model complied. `features`: (images, 64, width), prompts dealt out over them."""
    complied = [False] * len(prompts)
    for part in range(1 if features is None else len(features)):
        indices = range(part, len(prompts), 1 if features is None else len(features))
        asked = [prompts[index] for index in indices]
        image = None if features is None else features[part]
        texts = [text for text, _ in answers(model, tokenizer, asked, image, max_new_tokens)]
        for index, judgement in zip(indices, RefusalRule().score(asked, texts), strict=True):
            complied[index] = judgement.unsafe
    return complied


@torch.no_grad()
def vqa_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[VqaQuestion],
    features: dict[int, torch.Tensor],
) -> float:
    """Share of questions whose first answer token is the right one among the 13 answers' first tokens."""
    first = {answer: tokenizer.encode(answer, add_special_tokens=False)[0] for answer in ANSWERS}
    assert len(set(first.values())) == len(ANSWERS)
    by_image: dict[int, list[VqaQuestion]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    numbers, right = list(by_image), 0
    for start in range(0, len(numbers), 8):
        chosen = numbers[start : start + 8]
        packs = [
            make_pack(tokenizer, [Sample(q.question, q.answer) for q in by_image[number]], place)
            for place, number in enumerate(chosen)
        ]
        batch = collate(packs)
        hidden = hidden_states(model, batch, torch.stack([features[number] for number in chosen]))
        counts = [len(pack.branches) for pack in packs]
        rows = torch.repeat_interleave(torch.arange(len(packs)), torch.tensor(counts))
        told = model.lm_head(hidden[rows, batch.last_columns]).argmax(-1).tolist()
        asked = [question for number in chosen for question in by_image[number]]
        right += sum(token == first[question.answer] for token, question in zip(told, asked, strict=True))
    return right / len(questions)
