"""One way of turning a prompt into the text that a model was tuned on, shared by training and every runtime.

The checkpoint's own chat template is rendered by transformers' sandboxed renderer; the rendered text is cut at the
place of the image, so that each runtime can tokenize the two pieces alike and put image embeddings between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    content = [{"type": "image"}, {"type": "text", "text": prompt}] if image else prompt
    pieces = render_conversation(
        chat_template, [{"role": "user", "content": content}], slot=slot, special_tokens=special_tokens
    )
    return Turn(before=pieces[0] if image else "", after=pieces[-1])


def render_conversation(
    chat_template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    slot: str = IMAGE_SLOT,
    special_tokens: Mapping[str, str] = MappingProxyType({}),
    tools: Sequence[Mapping[str, object]] | None = None,
) -> list[str]:
    """The text of a conversation up to the point where the model answers, cut at its images: a piece more than those.

    A message's `content` is a text, or parts `{"type": "image"}` and `{"type": "text", "text": ...}`.

    Raises:
        ValueError: the template does not print the image slot once for each image.
    """
    clean = [{**message, "content": _defused(message.get("content"), slot)} for message in messages]
    images = sum(part["type"] == "image" for message in clean for part in _parts(message["content"]))

    def rendered(conversation: Sequence[Mapping[str, object]]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=chat_template,
            add_generation_prompt=True,
            tools=tools,
            **special_tokens,
        )
        return str(texts[0])

    text = "" if images else rendered(clean)
    asked = [message["content"] for message in clean if message.get("role") == "user"]
    # Templates of vision-language models may read parts only, and print nothing of a plain string.
    if images or any(isinstance(content, str) and content.strip() not in text for content in asked):
        text = rendered([{**message, "content": _parts(message["content"])} for message in clean])
    if not images:
        return [text]
    pieces = text.split(slot)
    if len(pieces) != images + 1:
        raise ValueError(f"the chat template prints {slot} {len(pieces) - 1} times, and there are {images} images")
    return pieces


def _parts(content: object) -> list[dict[str, str]]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if isinstance(content, str) else []


def _defused(content: object, slot: str) -> object:
    if isinstance(content, list):
        return [{**part, "text": _defused(part["text"], slot)} if "text" in part else part for part in content]
    return content.replace(slot, f"{slot[0]} {slot[1:-1]} {slot[-1]}") if isinstance(content, str) else content
