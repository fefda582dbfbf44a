"""One way of turning a prompt into the text that a model was tuned on, shared by training and every runtime.

The checkpoint's own chat template is rendered by transformers' sandboxed renderer; the rendered text is cut at the
place of the image, so that each runtime can tokenize the two pieces alike and put image embeddings between them.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SLOT = "<image>"  # LLaVA's placeholder; templates print it where the image goes


@dataclass(frozen=True)
class Turn:
    """A single-turn conversation: `before`, the image's tokens, `after`. Without an image, `before` is empty."""

    before: str
    after: str


def render(chat_template: str, prompt: str, *, image: bool) -> Turn:
    """Render a user prompt, with or without an image before it, up to the point where the model answers.

    An `<image>` written by the user is defused: it would open a second slot.

    Raises:
        ValueError: the template does not print the image slot exactly once.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    clean = prompt.replace(IMAGE_SLOT, "< image >")
    content: str | list[dict[str, str]] = clean
    if image:
        content = [{"type": "image"}, {"type": "text", "text": clean}]
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": content}]],
        chat_template=chat_template,
        add_generation_prompt=True,
    )
    text: str = rendered[0]
    if not image:
        return Turn(before="", after=text)
    if text.count(IMAGE_SLOT) != 1:
        raise ValueError(f"the chat template prints {IMAGE_SLOT} {text.count(IMAGE_SLOT)} times, not once")
    before, after = text.split(IMAGE_SLOT)
    return Turn(before=before, after=after)
