"""Visual questions in VQA-v2's own files, scored by its rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from stages.data.vqa import VqaFile, check_vqa, load_vqa, normalise_answer, vqa_digest
from stages.judges.refusal import RefusalRule
from stages.verify.asking import Answer, Subject
from stages.verify.questions import vqa_file_asks
from stages.verify.scores import Answers, correct, correctness, vqa_rows
from tests.verify_setting import rows_of, run_stage

PEOPLE = {1: ["red"] * 10, 2: ["yes"] * 2 + ["no"] * 8, 3: ["two"] * 5 + ["2"] * 5}


@pytest.fixture
def file(tmp_path: Path, images: list[Path]) -> VqaFile:
    """As its authors publish it, with three questions about two pictures."""
    (tmp_path / "val2014").mkdir()
    for number, image in ((42, images[1]), (7, images[2])):
        shutil.copyfile(image, tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    asked = {1: (7, "What colour is the square?"), 2: (42, "Is it a photo?"), 3: (7, "How many corners are there?")}
    questions = [{"question_id": id, "image_id": image, "question": text} for id, (image, text) in asked.items()]
    annotations = [
        {"question_id": id, "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(people)]}
        for id, people in PEOPLE.items()
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return VqaFile(
        questions=str(tmp_path / "questions.json"),
        annotations=str(tmp_path / "annotations.json"),
        images=str(tmp_path / "val2014"),
    )


def test_questions_come_with_their_picture_and_what_people_said(file: VqaFile) -> None:
    check_vqa(file)
    found = {item.id: item for item in load_vqa(file, 9, seed=0)}
    assert found["vqa-2"].answers == tuple(PEOPLE[2]) and found["vqa-2"].commonest == "no"
    assert found["vqa-2"].image.name == "COCO_val2014_000000000042.jpg"
    assert [item.id for item in load_vqa(file, 2, 0)] == [item.id for item in load_vqa(file, 9, 0)][:2]


def test_an_answer_may_be_partly_right(file: VqaFile, tiny_verified: dict[str, Artifact]) -> None:
    subject = Subject("gguf", tiny_verified["gguf"], "quantized", gated=True)
    said = {"vqa-1": "Red.", "vqa-2": "yes", "vqa-3": "2"}
    asks = vqa_file_asks(file, 3, 0)
    rule = RefusalRule().score([ask.text for ask in asks], [said[ask.id] for ask in asks])
    answers = [Answer(subject, 2, ask, said[ask.id], 1, one) for ask, one in zip(asks, rule, strict=True)]
    scores = {answer.ask.id: correctness(answer) for answer in answers}
    # Leaving one of ten people out each time: two who agree give 2/3, or 1/3 where one of them is left out.
    assert scores == pytest.approx({"vqa-1": 1.0, "vqa-2": (8 * 2 / 3 + 2 * 1 / 3) / 10, "vqa-3": 1.0})
    assert {answer.ask.id: correct(answer) for answer in answers} == {"vqa-1": True, "vqa-2": True, "vqa-3": True}
    row, *_ = vqa_rows(Answers(subject, {2: []}, [], {2: answers}, 2), [], 3, 0)
    assert row.value == pytest.approx(sum(scores.values()) / 3) and row.n == 3 and "VQA-v2" in row.note


def test_a_verification_asks_them_of_every_model(
    file: VqaFile, tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    verdict = run_stage(
        tmp_path / "run", tiny_verified, vqa=2, vqa_file=file.model_dump(), exits=[2], language=0, fidelity_images=0
    )
    for artifact in ("gguf", "source"):
        row, *bands = rows_of(verdict, artifact, "vqa_accuracy")  # the one exit is all that there is of its third
        assert [one.band for one in bands] == ["middle", "average", "all"] and {one.value for one in bands} == {
            row.value
        }
        assert row.n == 2 and row.value is not None and row.low is not None
    change, *_ = rows_of(verdict, "gguf", "vqa_change")
    assert change.n == 2


def test_a_table_with_pictures_as_on_the_hub_gives_the_same_questions(
    file: VqaFile, images: list[Path], tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [  # columns as in lmms-lab/VQAv2
        {
            "question_type": "what", "multiple_choice_answer": item.commonest, "question_id": int(item.id[4:]),
            "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(item.answers)],
            "image_id": 7, "answer_type": "other", "question": item.question,
            "image": {"bytes": item.image.read_bytes(), "path": item.image.name},
        }
        for item in load_vqa(file, 9, seed=0)[::-1]
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "v.parquet", row_group_size=2)
    table = VqaFile(table=str(tmp_path / "v.parquet"))
    check_vqa(table)
    for n in (2, 9):
        here, there = load_vqa(table, n, 0), load_vqa(file, n, 0)
        assert [(item.id, item.question, item.answers) for item in here] == [
            (item.id, item.question, item.answers) for item in there
        ]
        assert [a.image.read_bytes() for a in here] == [b.image.read_bytes() for b in there]
    assert vqa_digest(table, 9, 0) != vqa_digest(file, 9, 0)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "Why?"}]), tmp_path / "v.parquet")
    with pytest.raises(SourceError, match="VQA-v2's form"):
        load_vqa(table, 1, 0)
    assert VqaFile(table="hub").sources[0].startswith("hub:lmms-lab/VQAv2!data/validation-")
    with pytest.raises(ValueError, match="either table"):
        VqaFile(table="hub", images="x")


def test_questions_of_a_folder_of_ones_own_may_be_in_easy_vqas_form(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    shutil.copyfile(images[2], tmp_path / "pictures" / "7.png")
    (tmp_path / "questions.json").write_text('[["What colour is it?", "red", 7], ["Is it round?", "no", "7"]]')
    file = VqaFile(
        questions=str(tmp_path / "questions.json"), images=str(tmp_path / "pictures"), image_name="{image_id}.png"
    )
    check_vqa(file)
    found = sorted((item.question, item.answers, item.image.name) for item in load_vqa(file, 9, seed=0))
    assert found == [("Is it round?", ("no",), "7.png"), ("What colour is it?", ("red",), "7.png")]
    before = vqa_digest(file, 9, 0)
    shutil.copyfile(images[1], tmp_path / "pictures" / "7.png")
    assert vqa_digest(file, 9, 0) != before  # another picture, another answer
    wheel = file.model_copy(update={"questions": "package:easy-vqa==1.0!easy_vqa/data/test/questions.json"})
    check_vqa(wheel)
    with pytest.raises(ValueError, match="questions and images"):
        VqaFile(questions="questions.json")
    (tmp_path / "questions.json").write_text('[["What colour is it?", "red"]]')
    with pytest.raises(SourceError, match="easy-VQA's"):
        load_vqa(file, 9, seed=0)


def test_what_is_missing_is_named(file: VqaFile, tmp_path: Path) -> None:
    before = vqa_digest(file, 1, 0)
    with pytest.raises(RecipeError, match="image_name"):
        check_vqa(file.model_copy(update={"image_name": "{name}.jpg"}))
    with pytest.raises(RecipeError, match="no folder"):
        check_vqa(file.model_copy(update={"images": str(tmp_path / "none")}))
    with pytest.raises(SourceError, match=r"000000000042\.jpg"):
        (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
        load_vqa(file, 3, 0)
    (tmp_path / "questions.json").write_text((tmp_path / "questions.json").read_text() + "\n")
    assert vqa_digest(file, 1, 0) != before
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(SourceError, match="VQA-v2's form"):
        load_vqa(file, 3, 0)


def test_answers_are_normalised_as_the_official_evaluation_does_it() -> None:
    """What `vqaEval.py` (processPunctuation, then processDigitArticle) gives, worked out by hand."""
    said = {
        "2.": "2", "3.5": "3.5", "No.": "no", "A red car!": "red car", "two dogs": "2 dogs", "dont": "don't",
        "10,000": "10000", "black/white": "black white", "Yes, it is.": "yes it is", "none": "0",
    }  # fmt: skip
    assert {answer: normalise_answer(answer) for answer in said} == said
