"""What `RUN.md` says is run as it stands, in the bundle's folder: transformers, and llama.cpp where it is installed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from stage_setting import Told, context_of

from artifacts.card_run import Runnable, run_guide
from stages.stage import stage_class


def _run(guide: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    program = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0].replace("max_new_tokens=128", "max_new_tokens=2")
    with chdir(folder):
        exec(compile(program, "RUN.md", "exec"), {})
    return capsys.readouterr().out


def test_a_checkpoint_is_asked_about_a_picture(
    tiny_llava: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llava, tmp_path / "model")
    shutil.copyfile(images[0], tmp_path / "model" / "picture.png")
    guide = run_guide(Runnable("tiny", "", "mmproj.gguf", 512))
    assert "AutoModelForImageTextToText" in guide and "\n" in _run(guide, tmp_path / "model", capsys)


@pytest.fixture(scope="module")
def text_only(tiny_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.gguf`, which sees no pictures."""
    context = context_of("gguf", tmp_path_factory.mktemp("text"), tiny_family("llama"), Told())
    stage = stage_class("gguf")
    stage(stage.Params.model_validate({"type": "Q8_0"})).run(context)
    return context.output


def test_a_gguf_without_pictures_is_asked(text_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n" in _run(run_guide(Runnable("tiny", "model.gguf", "", 512)), text_only, capsys)


@pytest.mark.skipif(shutil.which("llama-cli") is None, reason="llama-cli is not installed")
def test_llama_cpps_command_line_answers_without_pictures(text_only: Path) -> None:
    guide = run_guide(Runnable("tiny", "model.gguf", "", 512))
    command = shlex.split(re.findall(r"^llama-cli .*$", guide, re.MULTILINE)[0])
    done = subprocess.run(command, cwd=text_only, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0 and done.stdout.strip()
