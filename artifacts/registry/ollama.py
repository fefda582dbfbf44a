"""Publishing into an Ollama server, through its own client: the weights, the template, the context and the licence.

Ollama keeps nothing else: not the card, the report or the attestations. Where the server is, is the client's business
(OLLAMA_HOST; this machine by default).
"""

from __future__ import annotations

import re

from artifacts.bundle import Bundle
from artifacts.card_run import MODELFILE
from artifacts.errors import StoreError


def create(bundle: Bundle, name: str) -> None:
    """Make the model `name` of the bundle's GGUF files.

    Raises:
        StoreError: the bundle is damaged or no GGUF, or Ollama cannot be reached or refuses.
    """
    bundle.refuse_damage()
    weights = [*bundle.named("model"), *bundle.named("mmproj")]
    if not weights or not all(title.endswith(".gguf") for title in weights):
        raise StoreError(f"{name} cannot be made", why="Ollama runs GGUF files, and this bundle has none")
    if len(bundle.named("model")) > 1:
        raise StoreError(f"{name} cannot be made", why="Ollama does not read models in parts", way_out="ship one file")
    try:
        import httpx
        import ollama
    except ImportError as error:
        raise StoreError("Ollama's client is not installed", way_out="pip install 'icet-pipeline[publish]'") from error
    template, parameters = _of_modelfile((bundle.folder / MODELFILE).read_text(encoding="utf-8"))
    licences = [(bundle.folder / title).read_text(encoding="utf-8") for title in bundle.named("licence")]
    client = ollama.Client()
    try:
        files = {title: client.create_blob(bundle.folder / title) for title in weights}
        client.create(name, files=files, template=template, license=licences or None, parameters=parameters)
    except (ollama.ResponseError, httpx.HTTPError, OSError) as error:
        raise StoreError(
            f"Ollama did not take {name}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            way_out="start it (`ollama serve`), or say where it is with OLLAMA_HOST; then publish again",
        ) from error


def _of_modelfile(text: str) -> tuple[str | None, dict[str, int]]:
    """What `artifacts.card_run.modelfile` wrote, in the form of the API (ollama, docs/api.md, "Create a Model")."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    parameters = re.findall(r"^PARAMETER (\w+) (\d+)$", text, re.MULTILINE)
    return template[1] if template is not None else None, {key: int(value) for key, value in parameters}
