"""Conversations as the model's own template prints them, cut at their images."""

from __future__ import annotations

from datetime import date

import pytest

from stages.data.chat import Turn, answer_place, render, render_conversation
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


TEXT_ONLY = "{% for m in messages %}[INST] {{ m['content'] + '' }} [/INST]{% endfor %}"  # as Mistral's: knows no parts
SPACED = (  # as SmolVLM's: a space before what is said
    "{% for m in messages %}{{ m['role'] | capitalize }}:{% if m['content'] is string %}{{ ' ' + m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else ' ' + p['text'] }}{% endfor %}"
    "{% endif %}<end>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_a_template_that_knows_no_parts_gets_the_image_on_a_line_before_the_text() -> None:
    assert render(TEXT_ONLY, "What is it?", image=True) == Turn("[INST] ", "\nWhat is it? [/INST]")


def test_what_cannot_be_rendered_is_one_kind_of_error() -> None:
    for broken in ("{{ 1 + 'a' }}", "{{ raise_exception('no system turn') }}", "{% if %}"):
        for image in (True, False):
            with pytest.raises(ValueError, match="cannot be rendered"):
                render(broken, "Hi", image=image)


def test_what_is_asked_today_is_asked_tomorrow() -> None:
    dated = "{{ strftime_now('%d %B %Y') }} {{ date_string }} {{ messages[0]['content'] }}"
    assert render(dated, "Hi", image=False).after == "26 July 2024 26 Jul 2024 Hi"
    (told,) = render_conversation(dated, [{"role": "user", "content": "Hi"}], today=True)
    assert told.startswith(date.today().strftime("%d %B %Y %d %b %Y"))
    for blocks in ("  {% if true %}a{% endif %}\n b", "\n\n{{ 'a' }}", "{%- if true -%} a{%- endif %}"):
        assert render("{# strftime_now #}" + blocks, "a", image=False) == render("{# #}" + blocks, "a", image=False)


@pytest.mark.parametrize(("template", "lead"), [(SPACED, " "), (CHAT_TEMPLATE, "")])
def test_what_stands_before_an_answer_is_the_templates_word(template: str, lead: str) -> None:
    before, found = answer_place(template)
    assert found == lead and before == render(template, "Hi", image=False).after
