from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from artifacts.store import Store
from pipeline.keys import cached_artifacts, content_key
from stages.stage import Stage, StageParams, stage_class, stage_names

INPUT = {"source": "a" * 64}


def key(
    stage: Stage[StageParams],
    inputs: dict[str, str] = INPUT,
    seed: int = 0,
    device: dict[str, int] | None = None,
) -> str:
    return content_key(stage, inputs, seed=seed, device=device or {})


def test_a_key_is_a_full_digest() -> None:
    assert len(key(toy.stage(toy.Chain))) == 64


def test_writing_a_default_out_changes_nothing() -> None:
    assert key(toy.stage(toy.Chain)) == key(toy.stage(toy.Chain, steps=5))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_keys_agree_exactly_when_parameters_and_seed_do(steps: int, others: int, seed: int, another: int) -> None:
    first, second = toy.stage(toy.Chain, steps=steps), toy.stage(toy.Chain, steps=others)
    assert (key(first, seed=seed) == key(second, seed=another)) == ((steps, seed) == (others, another))


def test_every_input_and_its_place_counts() -> None:
    stage = toy.stage(toy.Join)
    keys = {
        key(stage, {"a": "1" * 64, "b": "2" * 64}),
        key(stage, {"a": "2" * 64, "b": "1" * 64}),
        key(stage, {"a": "1" * 64}),
        key(stage, {"a": "1" * 64, "b": "3" * 64}),
    }
    assert len(keys) == 4


def test_the_id_of_an_only_input_does_not_count_and_that_of_one_among_many_does() -> None:
    assert key(toy.stage(toy.Chain), {"x": "1" * 64}) == key(toy.stage(toy.Chain), {"y": "1" * 64})
    assert key(toy.stage(toy.Join), {"x": "1" * 64}) != key(toy.stage(toy.Join), {"y": "1" * 64})


class Newer(toy.Chain):
    code_version = "2"


class WithLibrary(toy.Chain):
    libraries: ClassVar[tuple[str, ...]] = ("pydantic",)


class WithFingerprint(toy.Chain):
    def fingerprint(self) -> str:
        return "content of a folder"


def test_code_version_libraries_and_fingerprint_count() -> None:
    keys = {key(toy.stage(cls)) for cls in (toy.Chain, Newer, WithLibrary, WithFingerprint)}
    assert len(keys) == 4


def test_the_device_counts_only_for_stages_that_read_it() -> None:
    plain, reader = toy.stage(toy.Trouble, kind="none"), toy.stage(toy.DeviceReader, kind="device")
    assert key(plain, device={"memory": 1}) == key(plain, device={"memory": 2})
    assert key(reader, device={"memory": 1}) != key(reader, device={"memory": 2})


def test_nothing_is_cached_in_a_store_that_is_not_there(tmp_path: Path) -> None:
    assert cached_artifacts(toy.chain_graph(), Store(tmp_path / "none")) == {}
    assert not (tmp_path / "none").exists()


ASKING: dict[str, dict[str, object]] = {
    "early-exit": {"layer": "auto"},
    "gguf": {"type": "auto", "target": "90MB"},
    "prune": {"drop": 1},
    "reward-model": {"data": ["prompts:pairs"]},
}


def test_stages_that_read_our_prompts_count_them_in_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.data import prompt_sets, prompts

    kinds = {name: stage_class(name) for name in stage_names() if name != "source"}
    made = {name: kind(kind.Params.model_validate(ASKING.get(name, {}))) for name, kind in kinds.items()}
    asking = {name: stage for name, stage in made.items() if set(prompt_sets.packages()) <= set(stage.downloads())}
    assert {"l-ppo", "sft", "prune", "imatrix", "gptq", "gguf", "reward-model", "icet-verify"} <= asking.keys()
    before = {name: key(stage) for name, stage in asking.items()}
    monkeypatch.setattr(prompts, "NEAR", 0.7)
    assert [name for name, stage in asking.items() if key(stage) == before[name]] == []
