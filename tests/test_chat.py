"""Conversations as the model's own template prints them, cut at their images."""

from __future__ import annotations

import pytest

from stages.data.chat import Turn, render, render_conversation
from stages.models.tiny import CHAT_TEMPLATE

# Reads parts only, as LLaVA-1.5's own on the hub.
PARTS = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS])
def test_a_conversation_of_one_question_is_what_is_verified(template: str) -> None:
    asked = "What is <image>?\nSay."
    with_image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    turn = render(template, asked, image=True)
    assert render_conversation(template, with_image) == [turn.before, turn.after]
    assert "< image >" in turn.after and turn.after.startswith("\n")
    alone = render(template, asked, image=False)
    assert alone == Turn("", render_conversation(template, [{"role": "user", "content": asked}])[0])
    assert "< image >" in alone.after


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS])
def test_nothing_of_a_longer_conversation_is_lost(template: str) -> None:
    image, ask = {"type": "image"}, {"type": "text", "text": "And these?"}
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": [image, image, ask]},
    ]
    pieces = render_conversation(template, said)
    assert len(pieces) == 4 and "Be brief." in pieces[0]
    assert "What is it?" in pieces[1] and "A square." in pieces[1] and "And these?" in pieces[3]
    text = render_conversation(template, [said[0], {"role": "user", "content": "Why?"}, said[2]])
    assert len(text) == 1 and all(words in text[0] for words in ("Be brief.", "Why?", "A square."))


def test_a_template_that_prints_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="prints <image> 0 times, and there are 1 images"):
        render("{{ messages[0]['content'][1]['text'] }}", "Hi", image=True)
