"""`pipeline serve`: an OpenAI-compatible server for one model, by llama-cpp-python's own, made safe for a laptop.

What is added to it: the prompt that was verified (`served_chat`); `/health`; images only from within a request, for the
library would fetch any address that a caller names, files of this machine included; and no leave for web pages of other
origins to ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError, StoreError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from artifacts.attestation_check import Policy
    from pipeline.commands.model import FoundModel, Room

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_Q8_0: Final = 8  # ggml's number
_REQUESTS: Final = 16 << 20  # bytes of the server at work; 8 were measured, with a picture in the request


def prepare(
    name: str,
    runs_dir: Path,
    *,
    device: str | None = None,
    context: int | None = None,
    policy: Policy | None = None,
    mmproj: Path | None = None,
) -> tuple[FoundModel, Room]:
    """Find what is to be served, and decide how much it may take. Nothing is loaded.

    Raises:
        RecipeError, StoreError, StageError: it cannot be served. GateError: the policy refuses it.
    """
    from pipeline.commands.model import find_model, room_for
    from stages.runtimes.gguf_header import check_language_model, check_pair, read_vision_header
    from stages.runtimes.gguf_parts import read_model
    from stages.runtimes.llamacpp_cls import check_cls

    _library()  # before anything is fetched, and what it takes is counted
    found = find_model(name, runs_dir, policy, mmproj)
    if found.model is None:
        raise RecipeError(
            f"{found.name} is a {found.type} checkpoint, which llama.cpp does not run",
            where=str(found.folder),
            way_out="`pipeline chat` asks it through transformers; RUN.md of a bundle says more",
        )
    header = read_model(found.model)
    check_language_model(header)
    if found.mmproj is not None:
        vision = read_vision_header(found.mmproj)
        check_pair(header, vision)
        check_cls(vision)  # made for another llama.cpp: its answers would be others
    return found, room_for(found, device, context, _REQUESTS)


def _library() -> ModuleType:
    """Raises:
    StoreError: the server's libraries are missing.
    """
    try:
        # Loaded here, so that the memory plan counts them.
        import uvicorn  # noqa: F401
        from llama_cpp.server import app
        from transformers.utils import chat_template_utils  # noqa: F401
    except ImportError as error:
        raise StoreError(
            "serving needs libraries that are not installed",
            why=str(error),
            way_out="pip install 'icet-pipeline[stages,publish]'",
        ) from error
    module: ModuleType = app
    return module


@contextmanager
def application(found: FoundModel, room: Room, api_key: str | None = None) -> Iterator[FastAPI]:
    """The server, with the model loaded; it is freed afterwards.

    Raises:
        RecipeError: llama.cpp refuses the model.
    """
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    from pipeline.commands.served_chat import chat_handler
    from stages.runtimes.gguf_header import read_vision_header
    from stages.runtimes.rehearsal import DEFAULT_UBATCH

    kept = {"type_k": _Q8_0, "type_v": _Q8_0} if room.kv_cache == "Q8_0" else {}
    library = _library()
    settings = ModelSettings(
        model=str(found.model),
        model_alias=found.name,
        n_ctx=room.context,
        n_batch=DEFAULT_UBATCH,
        n_ubatch=DEFAULT_UBATCH,  # what the memory plan counts with
        logits_all=False,
        flash_attn=True,  # as the runtime that verified it chose; without it attention takes memory of its own
        clip_model_path=str(found.mmproj) if found.mmproj is not None else None,
        chat_format="mtmd" if found.mmproj is not None else None,
        verbose=False,
        **kept,
    )
    try:
        app: FastAPI = library.create_app(server_settings=ServerSettings(api_key=api_key), model_settings=[settings])
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"llama.cpp refuses {found.name}", where=str(found.model), why=str(error)) from error
    app.user_middleware = [
        entry for entry in app.user_middleware if getattr(entry.cls, "__name__", "") != "CORSMiddleware"
    ]
    proxy = library._llama_proxy
    llama = proxy(found.name)
    template = llama.metadata.get("tokenizer.chat_template")
    if template:  # without one /v1/completions still answers
        vision = read_vision_header(found.mmproj) if found.mmproj is not None else None
        llama.chat_handler = chat_handler(llama, template, vision)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "model": found.name, "context": room.context}

    try:
        yield app
    finally:
        proxy.free()


def serve(found: FoundModel, room: Room, host: str, port: int, api_key: str | None) -> None:
    """Serve until it is stopped.

    Raises:
        RecipeError: another machine could reach it, and nothing keeps it out.
    """
    if host not in _LOOPBACK and not api_key:
        raise RecipeError(
            f"{host} can be reached from other machines",
            why="whoever reaches it may ask the model",
            way_out="add --api-key, or set PIPELINE_API_KEY; or stay on 127.0.0.1",
        )
    import uvicorn

    with application(found, room, api_key) as app:
        uvicorn.run(app, host=host, port=port, log_level="warning")


def show_room(found: FoundModel, room: Room, host: str, port: int) -> str:
    """One line about what is served, and how much it takes."""
    from pipeline.device import show_bytes

    memory = ""
    if room.predicted is not None and room.budget is not None:
        memory = f", {show_bytes(room.predicted)} of {show_bytes(room.budget)} ({room.device})"
    unverified = "  UNVERIFIED" if found.bundle is not None and found.bundle.unverified else ""
    return f"{found.name}: http://{host}:{port}/v1, context {room.context}{memory}{unverified}"
