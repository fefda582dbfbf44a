"""Realignment: an earlier exit's features, mapped to those that the projector knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, StageError
from artifacts.manifest import Manifest
from stages.early_exit import EarlyExitParams, EarlyExitStage
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.features import ExitFeatures
from stages.models.realign import Affine, AffineFit, explained, fold
from stages.models.tiny import tiny_llava_spec
from stages.stage import Context, Planned


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_affine_map_is_found_again_from_noisy_pairs() -> None:
    matrix, offset = _random(6, 6), _random(6, seed=1) * 3
    fit = AffineFit(6)
    for image in range(40):
        x = _random(50, 6, seed=10 + image) * 2 + 5
        fit.add(x.float(), (x @ matrix.T + offset + 0.1 * _random(50, 6, seed=100 + image)).float())
    found = fit.solve()
    assert torch.allclose(found.matrix, matrix, atol=0.03)
    held_out = _random(200, 6, seed=999) * 2 + 5
    wanted = held_out @ matrix.T + offset
    assert explained(found(held_out), wanted) > 0.999
    assert explained(held_out, wanted) < 0.5


def test_too_few_patches_are_refused() -> None:
    fit = AffineFit(8)
    fit.add(_random(31, 8), _random(31, 8))
    with pytest.raises(StageError, match="31 patches are too few"):
        fit.solve()


@pytest.mark.parametrize(("parts", "bias"), [(1, True), (4, True), (4, False)])
def test_a_folded_layer_is_the_layer_after_the_map(parts: int, bias: bool) -> None:
    affine = Affine(_random(5, 5), _random(5, seed=1))
    layer = torch.nn.Linear(5 * parts, 7, bias=bias)
    x = _random(3, parts, 5, seed=2)
    with torch.no_grad():
        expected = layer(affine(x).flatten(1).float())
        fold(affine, layer)
        assert torch.allclose(layer(x.flatten(1).float()), expected, atol=1e-5)
    with pytest.raises(StageError, match="does not take features of 5"):
        fold(affine, torch.nn.Linear(9, 2))


class _Metrics:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def log(self, message: str) -> None: ...

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.seen[name] = value


def _cut(source: Path, output: Path, layer: int, **more: object) -> tuple[Mapping[str, object], dict[str, float]]:
    output.mkdir()
    artifact = Artifact(source, Manifest.of_folder(source, "checkpoint", {}))
    metrics = _Metrics()
    context = Context("exit", {"source": artifact}, output, output.parent / "scratch", 0, metrics)
    params = EarlyExitParams.model_validate({"layer": layer, **more})
    return EarlyExitStage(params).run(context), metrics.seen


def test_a_realigned_exit_gives_the_language_model_nearer_to_what_the_default_exit_gave(
    tiny_llava: Path, images: list[Path], tmp_path: Path
) -> None:
    plain, _ = _cut(tiny_llava, tmp_path / "plain", 1)
    metadata, metrics = _cut(tiny_llava, tmp_path / "realigned", 1, realign=True, realign_images=24)
    assert "explained_after" not in plain
    assert metadata["explained_after"] == metrics["explained_after"]
    assert metrics["explained_after"] > metrics["explained_before"]

    family = family_of(checkpoint.read_config(tiny_llava))
    full = family.load(tiny_llava)
    with torch.no_grad():
        wanted = family.project(full, torch.from_numpy(ExitFeatures(tiny_llava, full).get(images)[0, 2].copy()), ())
        distance = {}
        for name in ("plain", "realigned"):
            features = torch.from_numpy(ExitFeatures(tmp_path / name).get(images)[0, 1].copy())
            tokens = family.project(family.load(tmp_path / name), features, ())
            distance[name] = float((tokens - wanted).norm())
    assert distance["realigned"] < 0.8 * distance["plain"]


def test_at_the_default_exit_there_is_nothing_to_realign(tiny_llava: Path, tmp_path: Path) -> None:
    metadata, metrics = _cut(tiny_llava, tmp_path / "same", 2, realign=True)
    assert not metrics and "explained_after" not in metadata


def test_a_projector_that_is_not_linear_in_the_features_is_refused_before_work_starts() -> None:
    spec = replace(tiny_llava_spec(), family="idefics3")
    stage = EarlyExitStage(EarlyExitParams(layer=1, realign=True))
    with pytest.raises(RecipeError, match="projector of idefics3 cannot be realigned"):
        stage.plan({"checkpoint": Planned(type="checkpoint", spec=spec)})
