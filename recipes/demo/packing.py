"""Several conversations packed into one sequence: what they share is computed once.

A pack is one prefix (the text before the image, and the image) and many branches (questions with answers). Every branch
attends to the prefix and to itself, never to another branch, and its positions go on where the prefix ends: for each
branch the numbers are those of a sequence of its own. Eight questions about one picture cost 200 tokens, not 800.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from stages.data.chat import render

IMAGE_TOKENS = 64
EOS = 2


@dataclass(frozen=True)
class Sample:
    """One exchange; `complete` False: the answer was cut off, so no end of turn is taught."""

    prompt: str
    answer: str
    weight: float = 1.0
    complete: bool = True


@dataclass(frozen=True)
class Branch:
    """Token ids; those from `answer_start` on are taught."""

    ids: list[int]
    answer_start: int
    weight: float


@dataclass(frozen=True)
class Pack:
    """`image`: row of the feature table, or None. `prefix` excludes the image's tokens."""

    prefix: list[int]
    image: int | None
    branches: list[Branch]

    @property
    def prefix_length(self) -> int:
        return len(self.prefix) + (IMAGE_TOKENS if self.image is not None else 0)


@dataclass(frozen=True)
class Batch:
    """Packs side by side, padded to one length."""

    ids: torch.Tensor  # (packs, length)
    images: list[int]  # feature rows, one for each pack that has an image
    image_mask: torch.Tensor  # (packs, length) bool: where image tokens stand
    positions: torch.Tensor  # (packs, length)
    attention: torch.Tensor  # (packs, 1, length, length) bool: True where a query may look
    rows: torch.Tensor  # (targets,) pack of each taught token
    columns: torch.Tensor  # (targets,) position whose hidden state predicts it
    targets: torch.Tensor  # (targets,) token ids
    weights: torch.Tensor  # (targets,) sum to 1
    last_columns: torch.Tensor  # (branches,) position before the first answer token, in the order of the branches


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def make_pack(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], image: int | None) -> Pack:
    """Samples about the same image (or about none) as one pack."""
    prefix: list[int] = []
    branches: list[Branch] = []
    for sample in samples:
        turn = render(str(tokenizer.chat_template), sample.prompt, image=image is not None)
        prefix = encode(tokenizer, turn.before)
        question = encode(tokenizer, turn.after)
        answer = encode(tokenizer, sample.answer) + ([EOS] if sample.complete else [])
        branches.append(Branch(question + answer, len(question), sample.weight))
    if image is None:
        shared = common_prefix([branch.ids[: branch.answer_start] for branch in branches])
        prefix = branches[0].ids[:shared]
        branches = [Branch(b.ids[shared:], b.answer_start - shared, b.weight) for b in branches]
    return Pack(prefix, image, branches)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share; at least one token of each is left over."""
    shortest = min(len(sequence) for sequence in sequences) - 1
    for position in range(shortest):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return shortest


def collate(packs: Sequence[Pack]) -> Batch:
    """Lay packs side by side."""
    lengths = [pack.prefix_length + sum(len(branch.ids) for branch in pack.branches) for pack in packs]
    length = max(lengths)
    ids = torch.full((len(packs), length), EOS)
    image_mask = torch.zeros(len(packs), length, dtype=torch.bool)
    positions = torch.zeros(len(packs), length, dtype=torch.long)
    attention = torch.eye(length, dtype=torch.bool).repeat(len(packs), 1, 1)  # padding looks at itself: no NaN
    rows, columns, targets, weights, last = [], [], [], [], []
    for row, pack in enumerate(packs):
        end = pack.prefix_length
        ids[row, : len(pack.prefix)] = torch.tensor(pack.prefix, dtype=torch.long)
        image_mask[row, len(pack.prefix) : end] = True
        positions[row, :end] = torch.arange(end)
        attention[row, :end, :end] = torch.ones(end, end).tril().bool()
        start = end
        for branch in pack.branches:
            size = len(branch.ids)
            stop = start + size
            ids[row, start:stop] = torch.tensor(branch.ids)
            positions[row, start:stop] = torch.arange(end, end + size)
            attention[row, start:stop, :end] = True
            attention[row, start:stop, start:stop] = torch.ones(size, size).tril().bool()
            taught = range(branch.answer_start, size)
            rows += [row] * len(taught)
            columns += [start + place - 1 for place in taught]
            targets += branch.ids[branch.answer_start :]
            weights += [branch.weight / max(len(taught), 1)] * len(taught)
            last.append(start + branch.answer_start - 1)
            start = stop
    weight = torch.tensor(weights, dtype=torch.float32)
    return Batch(
        ids=ids,
        images=[pack.image for pack in packs if pack.image is not None],
        image_mask=image_mask,
        positions=positions,
        attention=attention[:, None],
        rows=torch.tensor(rows, dtype=torch.long),
        columns=torch.tensor(columns, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=weight / weight.sum().clamp_min(1e-9),
        last_columns=torch.tensor(last),
    )


def hidden_states(model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """(packs, length, width): the trunk's output. `features`: (images, 64, vision width), as `batch.images` lists."""
    trunk = model.model.language_model
    embeddings = model.get_input_embeddings()(batch.ids)
    if batch.images:
        projected = model.model.multi_modal_projector(features).to(embeddings.dtype)
        mask = batch.image_mask[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(mask, projected)
    hidden: torch.Tensor = trunk(
        inputs_embeds=embeddings, attention_mask=batch.attention, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return hidden


def loss(model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the taught tokens: mean over a branch's tokens, weighted mean over branches."""
    hidden = hidden_states(model, batch, features)[batch.rows, batch.columns]  # the head runs on answers only
    logits = model.lm_head(hidden).float()
    each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return (each * batch.weights).sum()
