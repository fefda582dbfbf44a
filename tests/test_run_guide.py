"""The part of `RUN.md` for transformers is a program: it runs as it stands, in the bundle's folder."""

from __future__ import annotations

import re
import shutil
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


def test_a_gguf_without_pictures_is_asked(
    tiny_family: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of("gguf", tmp_path, tiny_family("llama"), Told())
    stage = stage_class("gguf")
    stage(stage.Params.model_validate({"type": "Q8_0"})).run(context)
    guide = run_guide(Runnable("tiny", "model.gguf", "", 512))
    assert "\n" in _run(guide, context.output, capsys)
