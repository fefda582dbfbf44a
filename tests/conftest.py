"""Fixtures that every test may use: a tiny real model, built once a session, and a few images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trust_setting import Setting

    from artifacts.artifact import Artifact

# Tests must not reach for a hub, and must leave cores for each other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def pipeline_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every test's store, runs and caches live in a temporary folder, in this process and in those it starts."""
    from artifacts.home import cache_dir

    home = tmp_path_factory.mktemp("home")
    # Wheels are pinned by digest and checked on every use, so tests may share those already fetched.
    wheels = cache_dir() / "wheels"
    if wheels.is_dir():
        (home / "wheels").symlink_to(wheels)
    before = os.environ.get("PIPELINE_HOME")
    os.environ["PIPELINE_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["PIPELINE_HOME"]
    else:
        os.environ["PIPELINE_HOME"] = before


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `demo:tiny-llava` (3 encoder blocks, default exit 2). Read only: copy it before changing it."""
    from stages.models.tiny import build_tiny_llava

    folder = tmp_path_factory.mktemp("tiny-llava")
    build_tiny_llava(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_family(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by kind, see `tests.tiny_families`; each is built once. Read only."""
    from tests.tiny_families import build

    @cache
    def built(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        build(kind, folder, tiny_llava)
        return folder

    return built


@pytest.fixture(scope="session")
def tiny_verified(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """`source`, that tiny model, and `gguf`, made of it in Q8_0 with two of three exits. Read only."""
    from tests.verify_setting import make_inputs

    return make_inputs(tmp_path_factory.mktemp("verified"), tiny_llava)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small PNG files that differ: noise, a gradient, a red square."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    gradient = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], 64, axis=1).repeat(3, axis=2)
    square = np.zeros((56, 56, 3), dtype=np.uint8)
    square[14:42, 14:42, 0] = 255
    paths = []
    for name, pixels in (("noise", noise), ("gradient", gradient), ("square", square)):
        path = folder / f"{name}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A run, a signer and the bundle that came of them. Read only: `Setting.copy` gives a bundle to change."""
    from trust_setting import Setting

    return Setting(tmp_path_factory.mktemp("trust"))
