"""Chats with `pipeline serve`: the model is given what the verification gave it, token for token and pixel for pixel.

llama-cpp-python's own handlers would print an image as if it were text, without what the chat template puts around it,
add a second BOS where the template names one, and resize images by other filters. So the template is rendered by
`stages.data.chat`, as every runtime does, and pixels are prepared as `stages.runtimes.llamacpp_vision` does.

A message with one image is put to the model with the image first, wherever the caller named it: that is what models
are trained on, and what was verified.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import HTTPException
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    MTMDChatHandler,
    chat_formatter_to_chat_completion_handler,
)

from artifacts.errors import StageError
from stages.data.chat import render_conversation
from stages.runtimes.gguf_header import VisionHeader
from stages.runtimes.llamacpp_vision import prepare_image

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandler

_LARGEST_IMAGE: Final = 32 << 20  # characters of a data URL

Message = Mapping[str, object]


def chat_handler(llama: Llama, template: str, vision: VisionHeader | None) -> LlamaChatCompletionHandler:
    """What answers chats; `vision` is None of a model that sees no images."""
    if vision is not None:
        return _SeeingHandler(template, vision)

    def formatted(*, messages: Sequence[Message], tools: object = None, **_: object) -> ChatFormatterResponse:
        (text,) = _pieces(llama, template, messages, tools, sees=False)
        return ChatFormatterResponse(prompt=text, added_special=False)

    return chat_formatter_to_chat_completion_handler(formatted)


class _SeeingHandler(MTMDChatHandler):  # type: ignore[misc]  # llama-cpp-python has no types
    """llama-cpp-python's multimodal handler, with our text and our pixels."""

    def __init__(self, template: str, vision: VisionHeader) -> None:
        super().__init__(str(vision.header.path), verbose=False)
        self._template, self._vision = template, vision

    def __call__(self, *, llama: Llama, messages: Sequence[Message], tools: object = None, **options: object) -> object:
        marker = self._mtmd_cpp.mtmd_default_marker().decode()
        # A marker that somebody wrote would stand for one image more.
        pieces = [piece.replace(marker, f"{marker[0]} {marker[1:]}") for piece in self._text(llama, messages, tools)]
        return super().__call__(llama=llama, messages=messages, tools=tools, icet_text=marker.join(pieces), **options)

    def _text(self, llama: Llama, messages: Sequence[Message], tools: object) -> list[str]:
        return _pieces(llama, self._template, messages, tools, sees=True)

    def _get_chat_template(self, llama_model: Llama) -> str:
        return "{{ icet_text }}"  # rendered by `__call__`

    def _postprocess_template_text(self, text: str, image_urls: list[str], media_marker: str) -> str:
        return text

    def load_image(self, image_url: str) -> bytes:
        if not image_url.startswith("data:image/") or len(image_url) > _LARGEST_IMAGE:
            raise HTTPException(400, "an image must be in the request, as data:image/png;base64,..., and below 24 MB")
        loaded: bytes = super().load_image(image_url)
        return loaded

    def _create_bitmap_from_bytes(self, image_bytes: bytes) -> object:
        try:
            pixels = prepare_image(image_bytes, self._vision, where=Path("image"))
        except StageError as error:
            raise HTTPException(400, f"{error.what}: {error.why}") from error
        height, width, _ = pixels.shape
        return self._mtmd_cpp.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))


def _pieces(llama: Llama, template: str, messages: Sequence[Message], tools: object, *, sees: bool) -> list[str]:
    """The texts before, between and after the images of a conversation."""
    conversation = [{**message, "content": _content(message.get("content"), sees)} for message in messages]
    try:
        pieces = render_conversation(template, conversation, tools=tools, today=True)  # type: ignore[arg-type]
    except ValueError as error:
        raise HTTPException(400, f"the model's chat template does not take this conversation: {error}") from error
    if llama._model.add_bos_token():  # the tokenizer puts one there
        pieces[0] = pieces[0].removeprefix(llama._model.token_get_text(llama.token_bos()))
    return pieces


def _content(content: object, sees: bool) -> object:
    """A message as verification asks: a text alone is a string, one image stands before the text."""
    if not isinstance(content, list):
        return content
    texts = [{"type": "text", "text": part["text"]} for part in content if part.get("type") == "text"]
    images = [part for part in content if part.get("type") == "image_url"]
    if not images:
        return "\n".join(part["text"] for part in texts)
    if not sees:
        raise HTTPException(400, "this model sees no images")
    if len(images) == 1:
        return [{"type": "image"}, *texts]
    kinds = {"text": "text", "image_url": "image"}
    return [
        {"type": kinds[part["type"]], **({"text": part["text"]} if part["type"] == "text" else {})}
        for part in content
        if part.get("type") in kinds
    ]
