"""Stage `l-ppo` on a tiny real model: what it makes, what it tells, and that it survives being killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from stage_setting import Told, context_of

from artifacts.errors import RecipeError, StageError
from artifacts.manifest import sha256_file
from pipeline.keys import content_key, library_versions
from stages.lppo import checkpoint as training
from stages.lppo.material import validation_exits, validation_prompts
from stages.lppo.params import LPPOParams, PromptShares
from stages.lppo.stage import LPPOStage
from stages.models.checkpoint import read_config
from stages.models.family import family_of
from stages.models.tiny import tiny_llava_spec
from stages.stage import Context, Planned

_SMALL = {"steps": 3, "images": 2, "max_new_tokens": 5, "samples": 2, "validation": 1, "checkpoint_every": 1}


@dataclass
class _Hardened:
    context: Context
    reporter: Told
    metadata: Mapping[str, object]
    encoded: int  # calls of the image encoder


@pytest.fixture(scope="module")
def hardened(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> _Hardened:
    """One undisturbed run of the stage."""
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    encoded = []
    forward = SiglipVisionModel.forward

    def counted(self: SiglipVisionModel, *args: object, **kwargs: object) -> object:
        encoded.append(1)
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    reporter = Told()
    context = context_of("harden", tmp_path_factory.mktemp("hardened"), tiny_llava, reporter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiglipVisionModel, "forward", counted)
        metadata = LPPOStage(LPPOParams.model_validate(_SMALL)).run(context)
    return _Hardened(context, reporter, metadata, len(encoded))


def test_the_stage_hardens_a_checkpoint_and_tells_its_curves(hardened: _Hardened, tiny_llava: Path) -> None:
    reporter, metadata, output = hardened.reporter, hardened.metadata, hardened.context.output
    assert metadata["exits"] == [1, 2, 3] and metadata["default_exit"] == 2
    json.dumps(metadata)
    named = {name for name, *_ in reporter.metrics}
    assert {"reward", "kl", "clip_fraction", "value_loss", "over_refusal", "lr", "refusal", "validation_kl"} <= named
    assert {exit for name, _, _, exit in reporter.metrics if name == "validation_refusal"} == {1, 2, 3}
    assert reporter.done == sorted(reporter.done)
    assert (output / "chat_template.jinja").is_file()
    assert sha256_file(output / "model.safetensors") != sha256_file(tiny_llava / "model.safetensors")
    # Two training images and four validation images: each once, however many steps there are.
    assert hardened.encoded <= 6


_KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_lppo_stage import _SMALL, LPPOParams, LPPOStage, Told, context_of

    class Loud(Told):
        def progress(self, done, total, note=""):
            print(done, flush=True)

    LPPOStage(LPPOParams.model_validate(_SMALL)).run(context_of("harden", Path({folder!r}), Path({source!r}), Loud()))
"""


def test_a_process_killed_in_the_middle_and_started_again_writes_the_same_weights(
    hardened: _Hardened, tiny_llava: Path, tmp_path: Path
) -> None:
    code = textwrap.dedent(_KILLED).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), source=str(tiny_llava)
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    killed = start()
    assert killed.stdout is not None
    for line in killed.stdout:
        if float(line) >= 2:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert training.load(tmp_path / "scratch") is not None
    assert not (tmp_path / "output" / "model.safetensors").exists()
    assert start().wait() == 0
    digests = [sha256_file(folder / "model.safetensors") for folder in (hardened.context.output, tmp_path / "output")]
    assert digests[0] == digests[1]


def test_a_stated_bound_stops_the_stage_with_what_broke_it_and_a_way_out(tiny_llava: Path, tmp_path: Path) -> None:
    given = LPPOParams.model_validate({**_SMALL, "bounds": {"min_length": 6}})  # a response has 5 tokens
    with pytest.raises(StageError, match="stopped after step 3: response length is") as refusal:
        LPPOStage(given).run(context_of("harden", tmp_path, tiny_llava, Told()))
    assert "the bound 6" in str(refusal.value) and "bounds.min_length" in str(refusal.value)
    assert not (tmp_path / "output" / "model.safetensors").exists()


@pytest.mark.parametrize("quantizer", [None, "Q4_0", "gptq-4bit-32"])
def test_in_bfloat16_the_weights_are_trained_and_kept_in_their_own_type(
    quantizer: str | None, tiny_llava: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    given = LPPOParams.model_validate(
        {**_SMALL, "steps": 1, "prompts_per_step": 4, "validation": 0, "dtype": "bfloat16", "quantizer": quantizer}
    )
    told = Told()
    LPPOStage(given).run(context_of("harden", tmp_path, tiny_llava, told))
    assert all(math.isfinite(value) for _, value, *_ in told.metrics)
    before = load_file(tiny_llava / "model.safetensors")
    after = load_file(tmp_path / "output" / "model.safetensors")
    changed = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    assert changed and all("language_model" in name for name in changed)
    assert all(weight.dtype == torch.float32 and bool(weight.isfinite().all()) for weight in after.values())


def test_exits_that_the_model_does_not_have_are_refused_before_any_work() -> None:
    planned = {"source": Planned("checkpoint", tiny_llava_spec())}
    with pytest.raises(RecipeError, match="7 is not among the exits") as refusal:
        LPPOStage(LPPOParams(exits=(1, 7))).plan(planned)
    assert "1 to 3" in str(refusal.value)
    with pytest.raises(RecipeError):
        LPPOStage(LPPOParams(exits=())).plan(planned)
    assert LPPOStage(LPPOParams(exits=(3, 1))).plan(planned).spec == tiny_llava_spec()


def test_the_rounding_of_a_file_that_cannot_be_made_is_refused_before_any_work() -> None:
    planned = {"source": Planned("checkpoint", replace(tiny_llava_spec(), family="mllama"))}
    with pytest.raises(RecipeError, match="Q4_0 is no type that models of the family mllama") as refusal:
        LPPOStage(LPPOParams(quantizer="Q4_0")).plan(planned)
    assert "gptq-4bit-128" in str(refusal.value.way_out)
    assert LPPOStage(LPPOParams(quantizer="gptq-4bit-128")).plan(planned).spec is not None


def test_an_unknown_prompt_set_is_refused_before_any_work() -> None:
    params = LPPOParams.model_validate({"prompts": {"harmful": ["advbench", "advbnech"]}})
    with pytest.raises(RecipeError, match="advbnech"):
        LPPOStage(params).plan({})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"harmful": ["advbench", "donotanswer"]}, "prompts.harmful: nobody may train on donotanswer"),
        ({"benign": []}, "prompts.benign names no set"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_refused_before_any_work(asked: dict[str, list[str]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        LPPOStage(LPPOParams.model_validate({"prompts": asked})).plan({})
    empty = {"prompts": {"borderline": [], "borderline_share": 0.0, "validation": ["donotanswer"]}}
    LPPOStage(LPPOParams.model_validate(empty)).plan({})


def test_prompts_that_do_not_fill_their_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        LPPOParams(prompts_per_step=7, prompts_per_scene=2)
    with pytest.raises(ValueError, match="kinds of prompts"):
        LPPOParams(prompts_per_step=2)


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in LPPOParams.model_fields.values())


def test_a_judge_by_name_changes_what_is_learned(hardened: _Hardened, tiny_llava: Path, tmp_path: Path) -> None:
    given = LPPOParams.model_validate({**_SMALL, "rewards": {"judges": {"learned": 5.0}}})
    told = Told()
    LPPOStage(given).run(context_of("harden", tmp_path, tiny_llava, told))
    first, judged = (
        next(value for name, value, *_ in one.metrics if name == "reward") for one in (hardened.reporter, told)
    )
    assert first != judged  # the same responses, since no weight has changed yet
    outputs = (hardened.context.output, tmp_path / "output")
    assert len({sha256_file(folder / "model.safetensors") for folder in outputs}) == 2


def test_validation_asks_other_sets_and_other_exits_where_told(tiny_llava: Path) -> None:
    spec = family_of(config := read_config(tiny_llava)).spec(config)
    trained = LPPOParams(validation=3, exits=(1, 2))
    asked = validation_prompts(trained)
    assert {prompt.id.partition("-")[0] for prompt in asked if prompt.intent == "harmful"} <= {"advbench", "pairs"}
    assert len(asked) == 9 and validation_exits(trained, spec) == (1, 2)
    elsewhere = trained.model_copy(
        update={"prompts": PromptShares(validation=("donotanswer",)), "validation_exits": (1, 3)}
    )
    found = validation_prompts(elsewhere)
    assert {prompt.id.partition("-")[0] for prompt in found if prompt.intent == "harmful"} == {"donotanswer"}
    assert [prompt for prompt in found if prompt.intent != "harmful"] == asked[3:]  # it has none of these
    assert validation_exits(elsewhere, spec) == (1, 3)
    beyond = trained.model_copy(update={"validation_exits": (4,)})
    with pytest.raises(RecipeError, match="validation_exits: 4 is not among the exits"):
        LPPOStage(beyond).plan({"source": Planned(type="checkpoint", spec=spec)})
    unknown = trained.model_copy(update={"prompts": PromptShares(validation=("donotknow",))})
    with pytest.raises(RecipeError, match="donotknow"):
        LPPOStage(unknown).plan({"source": Planned(type="checkpoint", spec=spec)})


def test_a_quantizer_means_what_the_type_of_a_file_means() -> None:
    named = {name: LPPOParams(quantizer=name).quantizer for name in ("Q4_K", "q4_0", "Q4_K_M", "gptq-4bit-64", "none")}
    assert named == {
        "Q4_K": "Q4_K_M",
        "q4_0": "Q4_0",
        "Q4_K_M": "Q4_K_M",
        "gptq-4bit-64": "gptq-4bit-64",
        "none": "none",
    }


def test_what_llama_cpp_rounds_is_part_of_the_key_where_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> list[str]:
        stages = [LPPOStage(LPPOParams(quantizer=name)) for name in ("Q4_0", "gptq-4bit", None)]
        return [content_key(stage, {}, seed=0, device={}) for stage in stages]

    before, known = told(), library_versions(LPPOStage(LPPOParams()))
    monkeypatch.setattr("pipeline.keys._version", lambda name: known.get(name, "99"))
    assert [one == other for one, other in zip(before, told(), strict=True)] == [False, True, True]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"harmful": ["misuse"]}, "no harmful prompt to validate by"),
        ({"benign": ["requests"]}, "no benign prompt to validate by"),
        ({"validation": ["misuse"]}, "misuse has no validation side"),
        ({"harmful": []}, "names no set"),
    ],
)
def test_weights_are_not_chosen_by_prompts_that_there_are_not(prompts: dict[str, list[str]], words: str) -> None:
    stage = LPPOStage(LPPOParams.model_validate({"prompts": prompts}))
    with pytest.raises(RecipeError, match=words):
        stage.plan({"source": Planned("checkpoint", tiny_llava_spec())})
    without = LPPOStage(LPPOParams.model_validate({"prompts": {"harmful": ["misuse"]}, "validation": 0}))
    without.plan({"source": Planned("checkpoint", tiny_llava_spec())})
    mixed = {"benign": ["requests"], "validation": ["donotanswer"]}  # which has harmful ones only
    with pytest.raises(RecipeError, match="no benign prompt to validate by"):
        validation_prompts(LPPOParams.model_validate({"prompts": mixed, "validation": 2}))


def test_one_clock_is_not_shared_by_exits_that_are_trained_one_after_the_other() -> None:
    paper = {"variant": "paper", "reward_model": "hub:a/b", "max_minutes": 5}
    LPPOParams.model_validate({**paper, "exits": [1]})
    with pytest.raises(ValueError, match="max_minutes would end within the first"):
        LPPOParams.model_validate({**paper, "exits": [1, 2]})
