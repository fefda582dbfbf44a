"""One way of turning a prompt into the text that a model was tuned on, shared by training and every runtime.

The checkpoint's own chat template is rendered by transformers' sandboxed renderer; the rendered text is cut at the
place of the image, so that each runtime can tokenize the two pieces alike and put image embeddings between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from types import MappingProxyType
from typing import Final

# Templates may print the date. That of a day is what Llama 3's falls back on, or results would change overnight.
_DAY: Final = date(2024, 7, 26)
_CODES: Final = ("%-d", "%d", "%e", "%B", "%b", "%m", "%Y", "%y", "%A", "%a", "%j", "%H", "%M", "%S")
_ON_THAT_DAY: Final = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{_DAY.strftime(code)}')" for code in _CODES)
    + " }}{% endmacro %}\n"  # the line's end goes with the block
)
_MARK: Final = "@answer@"

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
    today: bool = False,
) -> Turn:
    """Render a user prompt, with or without an image before it, up to the point where the model answers.

    `slot` is the token that the template prints where the image goes. One written by the user is defused: it would
    open a second slot. `special_tokens` are those that a template may name, such as `bos_token`. `today`: as in
    `render_conversation`.

    Raises:
        ValueError: the template does not print the image slot exactly once.
    """
    content = [{"type": "image"}, {"type": "text", "text": prompt}] if image else prompt
    pieces = render_conversation(
        chat_template, [{"role": "user", "content": content}], slot=slot, special_tokens=special_tokens, today=today
    )
    return Turn(before=pieces[0] if image else "", after=pieces[-1])


def render_conversation(
    chat_template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    slot: str = IMAGE_SLOT,
    special_tokens: Mapping[str, str] = MappingProxyType({}),
    tools: Sequence[Mapping[str, object]] | None = None,
    today: bool = False,
) -> list[str]:
    """The text of a conversation up to the point where the model answers, cut at its images: a piece more than those.

    A message's `content` is a text, or parts `{"type": "image"}` and `{"type": "text", "text": ...}`. A template that
    knows no parts, as language models have it, gets the slot on a line before the text. `today`: whether templates that
    print a date print today's, for who talks to the model, or always the same.

    Raises:
        ValueError: the template cannot be rendered, or does not print the image slot once for each image.
    """
    clean = [{**message, "content": _defused(message.get("content"), slot)} for message in messages]
    images = sum(part["type"] == "image" for message in clean for part in _parts(message["content"]))
    as_parts = [{**message, "content": _parts(message["content"])} for message in clean]
    as_text = [{**message, "content": _joined(message["content"], slot)} for message in clean]
    write = partial(rendered, chat_template, special_tokens=special_tokens, tools=tools, today=today)
    if not images:
        text = write(clean)
        asked = [message["content"] for message in clean if message.get("role") == "user"]
        # Templates of vision-language models may read parts only, and print nothing of a plain string.
        if any(isinstance(content, str) and content.strip() not in text for content in asked):
            text = write(as_parts)
        return [text]
    problem = ""
    for conversation in (as_parts, as_text):
        try:
            pieces = write(conversation).split(slot)
        except ValueError as error:
            problem = problem or str(error)
            continue
        if len(pieces) == images + 1:
            return pieces
        problem = f"the chat template prints {slot} {len(pieces) - 1} times, and there are {images} images"
    raise ValueError(problem)


def answer_place(
    chat_template: str, *, special_tokens: Mapping[str, str] = MappingProxyType({}), slot: str = IMAGE_SLOT
) -> tuple[str, str]:
    """Some conversation up to where the model answers, and what the template puts before the answer itself, such as
    a space: an answer that is shown to a model must begin as its own do."""
    said = [{"role": "user", "content": "Hi"}]
    (before,) = render_conversation(chat_template, said, slot=slot, special_tokens=special_tokens)
    for content in (_MARK, [{"type": "text", "text": _MARK}]):
        asked = said if content == _MARK else [{"role": "user", "content": _parts("Hi")}]
        try:
            whole = rendered(
                chat_template, [*asked, {"role": "assistant", "content": content}], special_tokens, prompt=False
            )
        except ValueError:
            continue
        lead, found, _ = whole.removeprefix(before).partition(_MARK)
        if found and whole.startswith(before) and not lead.strip():
            return before, lead
    return before, ""


def answer_tokens(place: tuple[str, str], text: str, tokens: Callable[[str], list[int]]) -> list[int]:
    """An answer as it stands behind a prompt, without an end: cut into tokens there, behind what the template puts
    before it.

    Args:
        place: as `answer_place` gives it. tokens: of a text, nothing added.
    """
    before, lead = place
    head, whole = tokens(before), tokens(before + lead + text)
    return whole[len(head) :] if whole[: len(head)] == head else tokens(lead + text)


def rendered(
    chat_template: str,
    conversation: Sequence[Mapping[str, object]],
    special_tokens: Mapping[str, str] = MappingProxyType({}),
    tools: Sequence[Mapping[str, object]] | None = None,
    *,
    today: bool = False,
    prompt: bool = True,
) -> str:
    """A conversation as the template writes it. `prompt`: up to where the model answers.

    Raises:
        ValueError: it cannot be rendered.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    fixed = f"{_ON_THAT_DAY}{chat_template}" if "strftime_now" in chat_template else chat_template
    try:
        texts, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=chat_template if today else fixed,
            add_generation_prompt=prompt,
            tools=tools,
            date_string=(date.today() if today else _DAY).strftime("%d %b %Y"),
            **special_tokens,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error
    return str(texts[0])


def _parts(content: object) -> list[dict[str, str]]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if isinstance(content, str) else []


def _joined(content: object, slot: str) -> str:
    return "".join(part["text"] if part["type"] == "text" else f"{slot}\n" for part in _parts(content))


def _defused(content: object, slot: str) -> object:
    if isinstance(content, list):
        return [{**part, "text": _defused(part["text"], slot)} if "text" in part else part for part in content]
    return content.replace(slot, f"{slot[0]} {slot[1:-1]} {slot[-1]}") if isinstance(content, str) else content
