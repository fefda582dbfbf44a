"""Feature alignment, LLaVA's first stage in miniature: image tokens begin near the words that name what they show.

The projector alone learns from captions, at the default exit; the language model is not run, only its word embeddings
are looked at, so that it takes half a minute. Afterwards the language model has words to read, not to decipher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from recipes.demo.tuning import Log
from stages.data.easy_vqa import COLOURS, SHAPES, TRUTH, VqaQuestion


def is_negated(question: str) -> bool:
    """ "is there not a blue shape?" """
    return not {"not", "no"}.isdisjoint(question.rstrip("?").split())


def attributes(questions: Sequence[VqaQuestion]) -> tuple[str | None, str | None]:
    """Colour and shape of a picture, as its questions tell them: by an answer, or by what a question takes for true."""
    said: set[str] = set()
    for question in questions:
        words = question.question.rstrip("?").split()
        if question.answer not in TRUTH:
            said |= {question.answer, *words}
        elif (question.answer == "yes") != is_negated(question.question):
            said |= set(words)
    colour = [word for word in COLOURS if word in said]
    shape = [word for word in SHAPES if word in said]
    return colour[0] if len(colour) == 1 else None, shape[0] if len(shape) == 1 else None


def align(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features: torch.Tensor,
    labels: Sequence[tuple[str | None, str | None]],
    *,
    steps: int,
    rate: float,
    seed: int,
    log: Log,
) -> None:
    """Train the projector so that some image token resembles the picture's colour word, and some its shape word.

    Args:
        features: (images, 64, vision width) at the default exit. labels: colour and shape of each.
    """
    projector = model.model.multi_modal_projector
    embedding = model.get_input_embeddings().weight.detach()
    length = embedding.norm(dim=-1).mean()
    kinds = [sorted(COLOURS), sorted(SHAPES)]
    words = [
        torch.nn.functional.normalize(
            embedding[[tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in kind]], dim=-1
        )
        for kind in kinds
    ]
    targets = [
        torch.tensor([kind.index(str(label[i])) if label[i] else -100 for label in labels])
        for i, kind in enumerate(kinds)
    ]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(labels), (48,), generator=generator)
        tokens = projector(features[rows].float())
        value = ((tokens.norm(dim=-1) / length - 1) ** 2).mean()
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        for vectors, target in zip(words, targets, strict=True):
            # Log-sum-exp over the tokens: one patch that knows is enough.
            logits = torch.logsumexp(20 * unit @ vectors.T, dim=1)
            value = value + torch.nn.functional.cross_entropy(logits, target[rows], ignore_index=-100)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log(stage="align", step=step + 1, loss=round(float(value.detach()), 4))
