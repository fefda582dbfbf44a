"""Batched greedy answers of a LLaVA for any exit's features: the image's part of the context is computed once.

The measuring runtime of the pipeline is `stages.runtimes`; this small one answers from a model in memory, in the middle
of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from recipes.demo.packing import EOS, common_prefix, encode
from stages.data.chat import render


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    features: torch.Tensor | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> list[tuple[str, bool]]:
    """Greedy answer to each prompt about one image, and whether it ended by itself.

    Args:
        features: (64, vision width) of one image at some exit; None: text only.
    """
    found: list[tuple[str, bool]] = [("", False)] * len(prompts)
    turns = [render(str(tokenizer.chat_template), prompt, image=features is not None) for prompt in prompts]
    branches = [encode(tokenizer, turn.after) for turn in turns]
    embed = model.get_input_embeddings()
    if features is None:
        shared = common_prefix(branches) if len(branches) > 1 else 0
        prefix = embed(torch.tensor([branches[0][:shared]], dtype=torch.long))
        branches = [branch[shared:] for branch in branches]
    else:
        before = embed(torch.tensor([encode(tokenizer, turns[0].before)]))
        prefix = torch.cat([before, model.model.multi_modal_projector(features[None])], dim=1)
    # Similar lengths together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(branches[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _generate(model, prefix, [branches[index] for index in chosen], max_new_tokens)
        for index, ids in zip(chosen, batch, strict=True):
            ended = EOS in ids
            kept = ids[: ids.index(EOS)] if ended else ids
            found[index] = (str(tokenizer.decode(kept, skip_special_tokens=True)).strip(), ended)
    return found


def _generate(
    model: LlavaForConditionalGeneration, prefix: torch.Tensor, branches: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Token ids after each branch. The prefix is run once; branches are padded on their left, after the prefix."""
    trunk, embed = model.model.language_model, model.get_input_embeddings()
    count, shared, longest = len(branches), prefix.shape[1], max(len(branch) for branch in branches)
    cache = DynamicCache()
    if shared:
        trunk(inputs_embeds=prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
    ids = torch.full((count, longest), EOS)
    mask = torch.zeros(count, shared + longest, dtype=torch.long)
    positions = torch.zeros(count, longest, dtype=torch.long)
    mask[:, :shared] = 1
    for row, branch in enumerate(branches):
        ids[row, longest - len(branch) :] = torch.tensor(branch)
        mask[row, shared + longest - len(branch) :] = 1
        positions[row, longest - len(branch) :] = torch.arange(shared, shared + len(branch))
    written: list[list[int]] = [[] for _ in branches]
    alive = list(range(count))
    for _ in range(max_new_tokens):
        hidden = trunk(
            inputs_embeds=embed(ids), attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1)
        for place, row in enumerate(alive):
            written[row].append(int(token[place]))
        going = [place for place, row in enumerate(alive) if written[row][-1] != EOS]
        if not going:
            break
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(len(alive), 1, dtype=torch.long)], dim=1)
        ids = token[:, None]
        if len(going) < len(alive):  # rows that have ended cost nothing more
            keep = torch.tensor(going)
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            alive = [alive[place] for place in going]
    return written
