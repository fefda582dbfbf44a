"""One way of turning a prompt into the text that a model was tuned on, shared by training and every runtime.

The checkpoint's own chat template is rendered by transformers' sandboxed renderer; the rendered text is cut at the
place of the image, so that each runtime can tokenize the two pieces alike and put image embeddings between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

IMAGE_SLOT = "<image>"  # LLaVA's placeholder; templates print it where the image goes


@dataclass(frozen=True)
class Turn:
    """A single-turn conversation: `before`, the image's tokens, `after`. Without an image, `before` is empty."""

    before: str
    after: str


def render(
    chat_template: str,
    prompt: str,
    *,
    image: bool,
    slot: str = IMAGE_SLOT,
    special_tokens: Mapping[str, str] = MappingProxyType({}),
) -> Turn:
    """Render a user prompt, with or without an image before it, up to the point where the model answers.

    `slot` is the token that the template prints where the image goes. One written by the user is defused: it would
    open a second slot. `special_tokens` are those that a template may name, such as `bos_token`.

    Raises:
        ValueError: the template does not print the image slot exactly once.
    """
    clean = prompt.replace(slot, f"{slot[0]} {slot[1:-1]} {slot[-1]}")
    if not image:
        text = _rendered(chat_template, clean, special_tokens)
        # Templates of vision-language models may read parts only, and print nothing of a plain string.
        if clean.strip() not in text:
            text = _rendered(chat_template, [{"type": "text", "text": clean}], special_tokens)
        return Turn(before="", after=text)
    text = _rendered(chat_template, [{"type": "image"}, {"type": "text", "text": clean}], special_tokens)
    if text.count(slot) != 1:
        raise ValueError(f"the chat template prints {slot} {text.count(slot)} times, not once")
    before, after = text.split(slot)
    return Turn(before=before, after=after)


def _rendered(chat_template: str, content: str | list[dict[str, str]], special_tokens: Mapping[str, str]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": content}]],
        chat_template=chat_template,
        add_generation_prompt=True,
        **special_tokens,
    )
    text: str = rendered[0]
    return text
