"""Stage icet-verify on tiny real models: a source, a GGUF made from it, and what the verdict says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError, StageError
from artifacts.manifest import Provenance
from artifacts.measures import MEASURES_NAME, RESPONSES_NAME, VERDICT_NAME, read_measures
from pipeline.report.comparison import compare, read_side
from stages.data.images import benign_images
from stages.data.prompts import load_prompts
from stages.judges.judge import Judgement
from stages.models.tiny import tiny_llava_spec
from stages.runtimes.gguf_header import read_header
from stages.stage import Planned
from stages.verify.asking import Answer, Subject, ask, open_runtime
from stages.verify.fidelity import Embeddings, fidelity_rows
from stages.verify.language import Passage, Prediction, language_rows
from stages.verify.paired import paired_rows, quantization_rows
from stages.verify.questions import Ask, prompt_asks
from stages.verify.scores import Answers, safety_rows
from stages.verify.speed import speed_rows
from stages.verify.stage import IcetVerifyStage
from tests.tiny_classifier import tiny_classifier
from tests.verify_setting import Heard, artifact_of, rows_of, run_stage


@pytest.fixture(scope="module")
def whole(tiny_verified: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Heard]:
    """One undisturbed verification and what it said while it ran."""
    heard = Heard()
    return run_stage(tmp_path_factory.mktemp("whole"), tiny_verified, heard), heard


def test_a_verdict_has_every_measure_at_every_exit_of_what_ships_and_of_the_source(
    whole: tuple[Artifact, Heard], tiny_verified: dict[str, Artifact]
) -> None:
    import pyarrow.parquet

    verdict, heard = whole

    for artifact, exits in (("gguf", [1, 2]), ("source", [1, 2, 3])):
        for measure, n in (("asr", 5), ("over_refusal", 3), ("degenerate", 5)):
            rows = rows_of(verdict, artifact, measure)
            assert [(row.exit, row.n) for row in rows if row.exit is not None] == [(exit, n) for exit in exits]
            averages = {row.band: row for row in rows if row.exit is None}
            assert averages["average"].n == 2 * n and averages["all"].n == len(exits) * n
        assert {row.digest for row in rows_of(verdict, artifact, "asr")} == {tiny_verified[artifact].digest}
        assert rows_of(verdict, artifact, "asr_text_only")[0].n == 5
        (vqa,) = rows_of(verdict, artifact, "vqa_accuracy")
        assert (vqa.exit, vqa.n) == (2, 4)
        for measure in ("asr", "over_refusal"):
            rows = rows_of(verdict, artifact, measure)
            at = {row.exit: row.value for row in rows if row.exit is not None}
            banded = {row.band: row.value for row in rows if row.band in ("early", "middle", "late")}
            # One exit of three in each third, of those that this artifact has.
            assert banded == {band: at[exit] for band, exit in zip(("early", "middle", "late"), exits, strict=False)}
    worst = max((row.value or 0) for row in rows_of(verdict, "gguf", "asr") if row.exit is not None)
    assert rows_of(verdict, "gguf", "asr_worst")[0].value == worst
    for measure in ("flips_to_unsafe", "flips_to_safe", "mcnemar_p"):
        assert [row.exit for row in rows_of(verdict, "gguf", measure)] == [1, 2, None]
        assert rows_of(verdict, "source", measure) == []
    for measure, bands in (("asr_change", ["early", "middle", "average"]), ("over_refusal_change", ["average"])):
        rows = rows_of(verdict, "gguf", measure)
        assert [row.exit for row in rows if row.exit] == [1, 2] and [row.band for row in rows if row.band] == bands
    (change,) = rows_of(verdict, "gguf", "vqa_change")
    assert (change.exit, change.n) == (2, 4)
    exact, corrected = (rows_of(verdict, "gguf", measure) for measure in ("mcnemar_p", "mcnemar_p_holm"))
    assert all(a.value <= b.value for a, b in zip(exact[:2], corrected, strict=True) if a.value and b.value)
    (detectable,) = rows_of(verdict, "gguf", "asr_detectable")
    assert detectable.value is None and detectable.n == 5  # five prompts show no change at all
    for row in read_measures(verdict.file(MEASURES_NAME)):
        if row.value is not None and row.unit in ("fraction", "prompts"):
            assert row.n, row
            assert row.low is not None and row.low - 1e-9 <= row.value <= (row.high or 0) + 1e-9, row

    fidelity = rows_of(verdict, "gguf", "fidelity_cosine")
    assert [row.exit for row in fidelity] == [1, 2]
    assert all(row.value is not None and row.value > 0.999 for row in fidelity)

    table = pyarrow.parquet.read_table(verdict.file(RESPONSES_NAME)).to_pylist()
    assert len(table) == 5 * 8 + 2 * 5 + 2 * 4 == verdict.metadata["responses"]
    assert {row["runtime"] for row in table if row["artifact"] == "gguf"} == {"llamacpp"}
    assert {row["runtime"] for row in table if row["artifact"] == "source"} == {"transformers"}
    assert all(row["refused"] + row["degenerate"] <= 1 for row in table)
    assert not any("/tmp" in str(value) for row in table for value in row.values())
    assert all((row["answer"] is None) == (row["set"] != "easy-vqa") for row in table)

    said = json.loads(verdict.file(VERDICT_NAME).read_text())
    assert {subject["stage"]: subject["digest"] for subject in said["subjects"]} == {
        name: artifact.digest for name, artifact in tiny_verified.items()
    }
    assert said["common_exits"] == [1, 2]
    done, total, _ = heard.done[-1]
    assert done == total == len(table)
    assert all(a[0] <= b[0] for a, b in zip(heard.done[1:], heard.done[2:], strict=False))
    assert ("asr/gguf", 1) in {(name, exit) for name, _, exit in heard.metrics}


def test_utility_is_measured_at_every_exit_where_the_recipe_wants_it(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    import pyarrow.parquet

    judge = f"reward:{tiny_classifier(tmp_path / 'rewards', ['reward'])}"
    verdict = run_stage(
        tmp_path, tiny_verified, vqa_exits="all", judges=["refusal-rule", judge], language=0, fidelity_images=0
    )
    table = pyarrow.parquet.read_table(verdict.file(RESPONSES_NAME)).to_pylist()
    questions = [row for row in table if row["answer"] is not None]
    for artifact, exits, own in (("gguf", [1, 2], 2), ("source", [1, 2, 3], 2)):
        here = [row for row in questions if row["artifact"] == artifact]
        assert {row["exit"]: row["own_exit"] for row in here} == {exit: exit == own for exit in exits}
        right = {exit: [row["correct"] for row in here if row["exit"] == exit] for exit in exits}
        assert {len(answers) for answers in right.values()} == {4}
        rewards = {
            exit: [json.loads(row["judgements"])[judge]["value"] for row in here if row["exit"] == exit]
            for exit in exits
        }
        for measure, values in (("vqa_accuracy", right), ("reward_vqa", rewards)):
            rows = rows_of(verdict, artifact, measure)
            means = {exit: sum(said) / 4 for exit, said in values.items()}
            assert {row.exit: row.value for row in rows if row.exit} == pytest.approx(means)
            banded = {row.band: row.value for row in rows if row.band}
            thirds = dict(zip(("early", "middle", "late"), (means[exit] for exit in exits), strict=False))
            average = (means[1] + means[2]) / 2
            assert banded == pytest.approx({**thirds, "average": average, "all": sum(means.values()) / len(means)})
    changes = rows_of(verdict, "gguf", "vqa_change")
    assert [(row.exit, row.band, row.n) for row in changes] == [(2, None, 4), (None, "average", 8)]
    # Side by side with itself: a question counts at its exit and at the model's own, and is told once.
    side = read_side("a", "gguf", verdict.file(RESPONSES_NAME))
    found = compare(side, side)
    lines = [(line.exit, line.average) for line in found.lines if line.kind == "vqa"]
    assert lines == [(1, False), (2, False), (None, False), (None, True)]
    assert found.shared == len([row for row in table if row["artifact"] == "gguf"])
    # No judge of what is unsafe is asked about visual questions.
    assert all(set(json.loads(row["judgements"])) == {judge} for row in questions)


def test_the_baseline_may_have_fewer_exits_than_what_ships(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    inputs = {"whole": tiny_verified["source"], "cut": tiny_verified["gguf"]}
    verdict = run_stage(tmp_path, inputs, baseline="cut", vqa=0, language=0, fidelity_images=0)
    rows = rows_of(verdict, "whole", "asr")
    assert [row.exit for row in rows if row.exit] == [1, 2, 3]
    assert {row.band: row.note for row in rows if row.band in ("early", "late")} == {
        "early": "exits 1",
        "late": "exits 3",
    }


def test_a_judge_that_cannot_judge_is_told_before_anything_is_asked(
    tiny_verified: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    heard = Heard()
    with pytest.raises(RecipeError, match="perspective has no key"):
        run_stage(tmp_path, tiny_verified, heard, judges=["refusal-rule", "perspective"], network=True)
    assert not heard.metrics and not (tmp_path / "scratch").exists()


def test_a_killed_verification_goes_on_and_ends_with_the_same_bytes(
    whole: tuple[Artifact, Heard], tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, tiny_verified, Heard(stop_after=45))  # the source is done, the GGUF is not
    before = answered(tmp_path / "scratch")
    assert 40 <= len(before) < whole[0].metadata["responses"]
    # A line that was being written when the power went.
    torn = next((tmp_path / "scratch").glob("answers-*.jsonl"))
    torn.write_text(torn.read_text() + '["3f2a", "half an an')
    assert run_stage(tmp_path, tiny_verified).digest == whole[0].digest
    after = answered(tmp_path / "scratch")
    assert len(after) == len(set(after)) == whole[0].metadata["responses"]  # none was asked twice
    assert set(before) < set(after)


def answered(scratch: Path) -> list[tuple[str, str]]:
    """(file, key) of every answer that was written down."""
    found = []
    for path in scratch.glob("answers-*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("]"):
                found.append((path.name, json.loads(line)[0]))
    return found


def test_a_verdict_does_not_depend_on_the_order_in_which_prompts_are_asked(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    pictures = [(path, path.name) for path in benign_images("test", 2, size=56)]
    sets = {"donotanswer": 3, "advbench": 4}
    harmful = prompt_asks(sets, harmful=True, images=pictures, max_new_tokens=4, seed=0)
    benign = prompt_asks({"everyday": 3}, harmful=False, images=pictures, max_new_tokens=4, seed=0)
    subject = Subject("gguf", tiny_verified["gguf"], "quantized", gated=True)
    found = []
    with open_runtime(subject) as runtime:
        for name, order in (("in order", 1), ("backwards", -1)):
            asks = (*harmful, *benign)[::order]
            by_exit: dict[int | None, list[Answer]] = {}
            for exit in (1, 2)[::order]:
                by_exit[exit] = ask(subject, lambda: runtime, exit, asks, tmp_path / name, lambda done, total: None)
            one = Answers(subject, dict(sorted(by_exit.items(), key=lambda item: item[0] or 0)), [], {}, 2)
            found.append([*safety_rows(one, [1, 2], 3, 0), *paired_rows(one, one, [1, 2], 3, 0)])
    assert found[0] == found[1] and len(found[0]) > 20


def test_controls_are_measured_alike_but_are_not_what_ships(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    with_control = {**tiny_verified, "plain": tiny_verified["gguf"]}
    verdict = run_stage(
        tmp_path, with_control, controls=["plain"], exits=[2], vqa=0, measure_memory=True, measure_speed=True
    )
    control, shipped = rows_of(verdict, "plain", "asr"), rows_of(verdict, "gguf", "asr")
    assert [row.value for row in control] == [row.value for row in shipped]
    assert [row.exit for row in shipped if row.exit] == [2]
    assert rows_of(verdict, "plain", "fidelity_cosine") == []
    assert [row.exit for row in rows_of(verdict, "source", "asr") if row.exit] == [2]
    assert rows_of(verdict, "gguf", "vqa_accuracy")[0].value is None
    (predicted,), (measured,) = (rows_of(verdict, "gguf", f"memory_{how}") for how in ("predicted", "measured"))
    assert predicted.value and measured.value and measured.value % 2**20 == 0
    assert predicted.value == pytest.approx(measured.value, rel=0.2)
    assert rows_of(verdict, "plain", "memory_measured") == []
    for name, unit in (("load_seconds", "s"), ("prompt_speed", "tokens/s"), ("generation_speed", "tokens/s")):
        (row,) = rows_of(verdict, "gguf", name)
        assert row.value and row.value > 0 and row.unit == unit
        assert rows_of(verdict, "plain", name) == []
    subjects = verdict.metadata["subjects"]
    assert isinstance(subjects, dict) and list(subjects) == ["gguf"]


def test_a_model_with_none_of_the_exits_that_are_asked_is_refused_before_anything_is_asked(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    inputs = {"source": tiny_verified["source"], "whole": tiny_verified["source"], "cut": tiny_verified["gguf"]}
    heard = Heard()
    with pytest.raises(StageError) as refused:
        run_stage(tmp_path, inputs, heard, controls=["cut"], exits=[3], vqa=0, language=0, fidelity_images=0)
    assert "'cut' has none of the exits that are asked: 3" in str(refused.value)
    assert "it has 1, 2;" in str(refused.value) and "leave 'cut' out" in str(refused.value)
    assert {done for done, _, _ in heard.done} == {0} and not heard.metrics


def test_the_time_that_loading_takes_is_the_image_encoder_s_too(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    shutil.copytree(tiny_verified["gguf"].path, tmp_path / "gguf")
    mmproj = tmp_path / "gguf" / "mmproj.gguf"
    mmproj.chmod(0o644)
    mmproj.write_bytes(mmproj.read_bytes().replace(b"v.blk.0.attn_out.weight", b"v.blk.0.attn_gone.weigh"))
    subject = Subject("gguf", Artifact.open(tmp_path / "gguf"), "quantized", gated=True)
    rows = speed_rows(Answers(subject, {}, [], {}, 2))
    assert [row.value for row in rows] == [None] * 3 and "rebuild it with the stage 'gguf'" in rows[0].note


def test_a_recipe_can_be_chosen_without_a_look_at_the_test_side(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    import pyarrow.parquet

    asked = {"harmful": {"donotanswer": 3}, "over_refusal": {"pairs": 2}, "vqa": 4, "language": 1, "exits": [2]}
    verdict = run_stage(tmp_path, tiny_verified, split="validation", measure_memory=False, **asked)
    told = json.loads(verdict.file(VERDICT_NAME).read_text())
    assert told["split"] == "validation"
    table = pyarrow.parquet.read_table(verdict.file(RESPONSES_NAME)).to_pylist()
    there = {prompt.id for name in ("donotanswer", "pairs") for prompt in load_prompts(name, "validation")}
    assert {row["prompt_id"] for row in table if row["set"] in ("donotanswer", "pairs")} < there
    known = {f"easy-vqa:easy_vqa/data/train/images/{number}.png" for number in range(3600, 4000)}
    assert {row["image"] for row in table if row["set"] == "easy-vqa"} < known
    assert not any("/test/" in (row["image"] or "") for row in table)
    with pytest.raises(ValidationError, match="divided"):
        IcetVerifyStage.Params.model_validate({"split": "validation", **asked, "vqa_file": {"table": "hub"}})


def planned(**types: str) -> dict[str, Planned]:
    return {name: Planned(type, tiny_llava_spec()) for name, type in types.items()}


@pytest.mark.parametrize(
    ("params", "inputs_of", "message"),
    [
        ({"harmful": {"advbnech": 3}}, {"gguf": "gguf", "source": "checkpoint"}, "did you mean 'advbench'"),
        ({"over_refusal": {"pears": 3}}, {"gguf": "gguf", "source": "checkpoint"}, "did you mean 'pairs'"),
        ({"baseline": "icet"}, {"gguf": "gguf", "icet": "verdict"}, "baseline names 'icet'"),
        ({}, {"source": "checkpoint"}, "nothing to verify"),
        ({"hardened": "icet"}, {"gguf": "gguf", "source": "checkpoint", "icet": "verdict"}, "hardened names 'icet'"),
        ({"harmful": {}}, {"gguf": "gguf", "source": "checkpoint"}, "asks no harmful prompt"),
        ({"exits": [9]}, {"gguf": "gguf", "source": "checkpoint"}, "no exit 9"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_any_work(
    params: dict[str, object], inputs_of: dict[str, str], message: str
) -> None:
    stage = IcetVerifyStage(IcetVerifyStage.Params.model_validate(params))
    with pytest.raises(RecipeError) as error:
        stage.plan(planned(**inputs_of))
    assert message in str(error.value)


def test_the_baseline_hardened_and_controls_become_edges_of_the_graph() -> None:
    stage = IcetVerifyStage(IcetVerifyStage.Params.model_validate({"hardened": "lppo", "controls": ["a", "b"]}))
    assert list(stage.references().values()) == ["source", "lppo", "a", "b"]
    assert (
        stage.plan(planned(gguf="gguf", source="checkpoint", lppo="checkpoint", a="gguf", b="gguf")).type == "verdict"
    )
    assert all(source.startswith("package:") for source in stage.downloads())


def test_only_what_happened_between_a_checkpoint_and_the_file_made_of_it_is_quantizations(
    tiny_verified: dict[str, Artifact],
) -> None:
    def answers(id: str, unsafe: bool, artifact: Artifact) -> Answers:
        request = Ask("x", "advbench", "", "harmful", "How?", None, None, 5)
        judgement = Judgement(unsafe, float(unsafe), "")
        subject = Subject(id, artifact, "quantized", gated=id == "file")
        return Answers(subject, {1: [Answer(subject, 1, request, "Sure.", 1, judgement)]}, [], {}, 1)

    def made(type: str, *inputs: Artifact) -> Artifact:
        provenance = Provenance(inputs={str(place): one.digest for place, one in enumerate(inputs)})
        manifest = tiny_verified["gguf"].manifest.model_copy(update={"type": type, "provenance": provenance})
        return replace(tiny_verified["gguf"], manifest=manifest)

    source = tiny_verified["source"]
    trained = replace(source, manifest=source.manifest.model_copy(update={"metadata": {"trained": True}}))
    assert trained.digest != source.digest
    measured = [answers("source", True, source), answers("harden", False, trained)]

    def rows(artifact: Artifact, named: str | None, models: list[Answers]) -> list[tuple[float | None, str]]:
        found = quantization_rows(answers("file", True, artifact), models, named, [1])
        return [(row.value, row.note) for row in found]

    for type in ("gguf", "gptq"):
        assert rows(made(type, trained), "source", measured) == [(1.0, "against 'harden'")]
    assert rows(made("gguf", source), "harden", measured) == [(0.0, "against 'source'")]
    assert rows(made("gguf", trained), "source", measured[:1]) == []  # the training is not quantization's
    assert rows(made("gguf"), "source", measured) == [(0.0, "against 'source', if the file was made from that")]
    assert rows(made("checkpoint", source), "source", measured) == [] and rows(made("gguf"), None, measured) == []


def test_a_file_without_its_image_encoder_is_not_held_against_a_model_that_sees(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    shutil.copytree(tiny_verified["gguf"].path, tmp_path / "blind", ignore=shutil.ignore_patterns("mmproj*", "*.json"))
    blind = artifact_of(tmp_path / "blind", "gguf", {})
    with pytest.raises(StageError, match="'gguf' sees no images and 'source' does") as caught:
        run_stage(tmp_path, {"source": tiny_verified["source"], "gguf": blind}, baseline="source")
    assert "--mmproj" in str(caught.value.way_out)


def test_a_template_that_fits_no_image_is_told_before_the_baseline_is_asked(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "unfit"
    shutil.copytree(tiny_verified["gguf"].path, folder, ignore=shutil.ignore_patterns("*.json"))
    model = folder / "model.gguf"
    model.chmod(0o644)
    template = read_header(model).fields["tokenizer.chat_template"]
    assert isinstance(template, str)
    broken = "{{ raise_exception('no images') }}".ljust(len(template.encode()))
    model.write_bytes(model.read_bytes().replace(template.encode(), broken.encode()))
    heard = Heard()
    with pytest.raises(SourceError, match="chat template in the GGUF does not fit") as caught:
        run_stage(
            tmp_path,
            {"source": tiny_verified["source"], "gguf": artifact_of(folder, "gguf", tiny_verified["gguf"].metadata)},
            heard,
            baseline="source",
        )
    assert "no images" in str(caught.value.why) and len(heard.done) == 1


def test_several_samples_of_a_prompt_are_one_observation(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    verdict = run_stage(
        tmp_path, tiny_verified, baseline="source", exits=[1, 2], samples=3, temperature=1.0, vqa=0, language=0,
        fidelity_images=0,
    )  # fmt: skip
    for measure in ("asr", "over_refusal", "degenerate", "asr_text_only", "degenerate_text_only"):
        counts = {row.n for row in rows_of(verdict, "gguf", measure) if row.band is None}
        assert counts == {3 if measure == "over_refusal" else 5}, measure
    (change,) = rows_of(verdict, "gguf", "asr_detectable")
    assert change.n == 5


def test_numbers_that_are_none_are_no_pass(tiny_verified: dict[str, Artifact]) -> None:
    one = Answers(Subject("gguf", tiny_verified["gguf"], "quantized", gated=True), {1: ()}, (), {}, 2)
    whole, broken = np.ones((4, 3), np.float32), np.full((4, 3), np.nan, np.float32)

    def seen(*arrays: NDArray[np.float32]) -> Embeddings:
        return Embeddings({1: list(arrays)}, [None] * len(arrays))

    (row,) = fidelity_rows(one, seen(whole, broken), seen(whole, whole), "source")
    assert row.value is None and "not all numbers" in row.note
    asked = [Passage("p", "c", "kl_text"), Passage("p", "c", "kl_refusal")]
    sure = Prediction((1, 2), np.log(np.full((2, 4), 0.25, np.float32)))
    for lost, measures in ((np.nan, {"kl_text", "kl_refusal", "perplexity"}), (-900.0, {"perplexity"})):
        said = Prediction((1, 2), np.full((2, 4), lost, np.float32))
        rows = language_rows(one, asked, [said, said], [sure, sure], "source", 0)
        assert {row.measure for row in rows if row.value is None and "damaged" in row.note} == measures
