"""`RUN.md` and `Modelfile`: the exact commands for this very bundle, made from its own file names and figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MODELFILE: Final = "Modelfile"
QUESTION: Final = "What is in the picture?"


@dataclass(frozen=True)
class Runnable:
    """What the commands need to know.

    Attributes:
        model: the file to give to llama.cpp; "" for a checkpoint, whose folder is given.
        prompt: a turn of the chat template in Ollama's form, `{{ .Prompt }}` where the user speaks; "" when unknown.
        small_cache: keys and values are kept in Q8_0, as the memory plan counts them.
    """

    name: str
    model: str
    mmproj: str
    context: int  # tokens
    template: str = ""  # file name of the chat template
    prompt: str = ""
    small_cache: bool = False


def modelfile(what: Runnable) -> str:
    """Ollama's Modelfile: a second FROM is the image encoder (ollama, docs/modelfile.md)."""
    lines = [f"FROM ./{what.model}"]
    if what.mmproj:
        lines.append(f"FROM ./{what.mmproj}")
    if what.prompt:
        lines.append(f'TEMPLATE """{what.prompt}"""')
    return "\n".join([*lines, f"PARAMETER num_ctx {what.context}", "PARAMETER temperature 0", ""])


def llama_server(what: Runnable) -> list[str]:
    """The command line of llama.cpp's server."""
    return ["llama-server", *_files(what), "--host", "127.0.0.1", "--port", "8080"]


def run_guide(what: Runnable) -> str:
    """The whole text of RUN.md."""
    return _checkpoint_guide(what) if not what.model else _gguf_guide(what)


def _gguf_guide(what: Runnable) -> str:
    ask = [*_files(what), *(["--image", "picture.png"] if what.mmproj else []), "-p", _question(what), "-n", "128"]
    if not what.mmproj:
        ask.append("-st")  # one turn, by the chat template
    return "\n".join(
        [
            f"# Running {what.name}",
            "",
            "Every command is meant for this folder. The context of "
            f"{what.context} tokens is the one that the memory plan (`memory.json`) is made for.",
            "",
            *_own(what),
            "## llama.cpp",
            "",
            *_block(llama_server(what)),
            *_block(["llama-mtmd-cli" if what.mmproj else "llama-cli", *ask]),
            "## Ollama",
            "",
            *_ollama_cache(what),
            *_block(["ollama", "create", what.name, "-f", MODELFILE], ["ollama", "run", what.name]),
            "## Docker Model Runner",
            "",
            "From a registry it runs as it is: `docker model pull HOST/NAME:TAG`, then `docker model run` with that "
            "name. From this folder:",
            "",
            *_docker(what),
            "## transformers",
            "",
            *_transformers_of_gguf(what),
        ]
    )


def _docker(what: Runnable) -> list[str]:
    """It takes absolute paths only (docker/model-runner, cmd/cli/commands/package.go)."""
    files = {"--gguf": what.model, "--mmproj": what.mmproj, "--chat-template": what.template}
    given = " ".join(f'{option} "$PWD/{name}"' for option, name in files.items() if name)
    package = f"docker model package {given} --context-size {what.context} {what.name}"
    return ["```sh", package, shlex.join(["docker", "model", "run", what.name]), "```", ""]


def _transformers_of_gguf(what: Runnable) -> list[str]:
    if what.mmproj:
        return ["transformers reads no mmproj files: of this model it can load the language part only.", ""]
    return _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{what.model}")',
        f'tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="{what.model}")',
        *_ask(what, "tokenizer"),
    )


def _ask(what: Runnable, by: str) -> list[str]:
    """`by`: the variable that knows the chat template."""
    text = f'{{"type": "text", "text": "{_question(what)}"}}'
    content = f'[{{"type": "image", "path": "picture.png"}}, {text}]' if what.mmproj else f'"{_question(what)}"'
    return [
        f'messages = [{{"role": "user", "content": {content}}}]',
        f"inputs = {by}.apply_chat_template(",
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)",
        f'print({by}.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _checkpoint_guide(what: Runnable) -> str:
    auto = "AutoModelForImageTextToText" if what.mmproj else "AutoModelForCausalLM"
    return "\n".join(
        [
            f"# Running {what.name}",
            "",
            "A GPTQ checkpoint: llama.cpp, Ollama and Docker Model Runner do not read it.",
            "",
            *_block(["pipeline", "chat", ".", *(["--image", "picture.png"] if what.mmproj else [])]),
            "## transformers",
            "",
            "Needs `gptqmodel` and `optimum` beside transformers.",
            "",
            *_python(
                f"from transformers import {auto}, AutoProcessor",
                "",
                f'model = {auto}.from_pretrained(".")',
                'processor = AutoProcessor.from_pretrained(".")',
                *_ask(what, "processor"),
            ),
        ]
    )


def _own(what: Runnable) -> list[str]:
    chat = ["pipeline", "chat", ".", *(["--image", "picture.png"] if what.mmproj else []), "--prompt", _question(what)]
    return [
        "## This pipeline",
        "",
        *_block(["pipeline", "check", ".", "--key", "signer.pub"], chat, ["pipeline", "serve", "."]),
    ]


def _files(what: Runnable) -> list[str]:
    cache = ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"] if what.small_cache else []
    mmproj = ["--mmproj", what.mmproj] if what.mmproj else []
    return ["-m", what.model, *mmproj, "-c", str(what.context), *cache, "--jinja"]


def _ollama_cache(what: Runnable) -> list[str]:
    if not what.small_cache:
        return []
    return [
        "The memory plan counts keys and values in Q8_0: start Ollama with `OLLAMA_FLASH_ATTENTION=1 "
        "OLLAMA_KV_CACHE_TYPE=q8_0`.",
        "",
    ]


def _question(what: Runnable) -> str:
    return QUESTION if what.mmproj else "What is the capital of France?"


def _block(*commands: Sequence[str]) -> list[str]:
    return ["```sh", *(shlex.join(command) for command in commands), "```", ""]
