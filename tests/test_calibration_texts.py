"""Calibrating on a text of the user's own: what a verdict asks is left out, and a recipe says it once for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_setting import Told, context_of

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import Manifest
from pipeline.graph import Graph, build_graph
from pipeline.recipe import load_recipe
from stages.data.articles import load_articles
from stages.data.calibration_mix import CalibrationMix
from stages.data.calibration_texts import holding, pieces
from stages.data.prompts import load_prompts
from stages.quantize.gptq import GPTQParams
from stages.quantize.importance import ImatrixParams, ImatrixStage
from stages.runtimes.gguf_header import read_header

LETTERS = 200
SHARED = """recipe: 1
name: shared
source: {{model: demo:tiny-llava}}
calibration: {{samples: 6, length: 16, texts: ./mine.txt, seed: 5}}
stages:
  matrix: {{uses: imatrix}}
  gptq: {{uses: gptq, needs: source, with: {{group_size: 32, calibration: {{samples: 4}}}}}}
  plain: {{uses: gguf, needs: source, with: {{type: Q4_0}}}}
{more}"""


def ordinary(count: int) -> list[str]:
    """What no verdict asks."""
    line = "Barn {n} by the river holds {n} bales of hay, a lamp, and room for the cart of farm {n}."
    return ["\n".join(line.format(n=100 * text + number) for number in range(30)) for text in range(count)]


def asked() -> str:
    """A test article."""
    return next(article.text for article in load_articles("test") if len(article.text) > 3000)


def write(path: Path, *texts: str) -> str:
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return str(path)


def test_pieces_that_repeat_test_material_are_left_out_and_the_others_are_all_there(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.txt", *ordinary(3))
    found, left_out = pieces(clean, "train", LETTERS)
    held, _ = pieces(clean, "validation", LETTERS)
    assert left_out == 0 and found and held and not set(found) & set(held)
    assert sorted(" ".join([*found, *held]).split()) == sorted(Path(clean).read_text().split())
    assert all(len(piece) <= LETTERS for piece in found)

    article = asked()[:1000]
    prompt = next(p.text for p in load_prompts("donotanswer", "test") if len(p.text.split()) > 8)
    mixed = write(tmp_path / "mixed.txt", *ordinary(3), article, f"Somebody asked: {prompt.upper()} Nobody answered.")
    known, left_out = pieces(mixed, "train", LETTERS)
    assert left_out >= 5
    assert not any(prompt.lower() in piece.lower() or piece in article for piece in known)


def test_the_seed_orders_the_pieces_and_changes_nothing_else(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.txt", *ordinary(2))
    first, second = (pieces(source, "train", LETTERS, seed)[0] for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "not plain text in UTF-8"),
        (b"", "no passage to calibrate on"),
        (b"ARTICLE", "no passage to calibrate on"),
    ],
)
def test_a_text_of_which_nothing_can_be_used_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(asked().encode() if content == b"ARTICLE" else content)
    with pytest.raises(SourceError, match=words):
        pieces(str(path), "train", 10_000)


def test_an_importance_matrix_is_made_of_the_users_text(tiny_llava: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "mine.txt", *ordinary(3), asked()[:2000])

    def made(texts: str | None) -> tuple[Told, dict[str, object]]:
        told = Told()
        context = context_of("imatrix", tmp_path / str(texts is None), tiny_llava, told)
        mix = CalibrationMix(samples=4, length=16, questions=0, prompts=0, texts=texts)
        metadata = ImatrixStage(ImatrixParams(calibration=mix, device="cpu")).run(context)
        Manifest.of_folder(context.output, "imatrix", metadata).write(context.output)
        assert read_header(context.output / "imatrix.gguf").fields["imatrix.datasets"] == ["text: 4 sequences"]
        return told, {entry.path: entry.sha256 for entry in Manifest.read(context.output).files}

    told, own = made(source)
    assert any("repeat what tests ask" in line for line in told.lines)
    assert own != made(None)[1]


def graph(tmp_path: Path, more: str = "") -> Graph:
    (tmp_path / "r.yaml").write_text(SHARED.format(more=more))
    return build_graph(load_recipe(tmp_path / "r.yaml"))


def test_a_recipe_says_once_what_its_quantizers_are_calibrated_on(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.txt", *ordinary(1))
    found = {node.id: node.stage for node in graph(tmp_path).nodes}
    matrix, gptq = found["matrix"].params, found["gptq"].params
    assert isinstance(matrix, ImatrixParams) and isinstance(gptq, GPTQParams)
    assert matrix.calibration == CalibrationMix(samples=6, length=16, texts=mine, seed=5)
    assert gptq.calibration == CalibrationMix(samples=4, length=16, texts=mine, seed=5)
    before = found["matrix"].fingerprint()
    write(tmp_path / "mine.txt", *ordinary(2))
    assert found["matrix"].fingerprint() != before


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe\x00", "not plain text in UTF-8"), (b" too short ", "no passage of 16 tokens")],
)
def test_a_local_text_that_no_stage_could_use_is_refused_before_any_work(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        graph(tmp_path)
    assert "mine.txt" in (caught.value.why or "") and caught.value.way_out


def test_a_prompt_stands_in_a_text_whatever_its_case_and_marks_but_not_if_it_is_ordinary_language(
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "mine.csv", *ordinary(1), 'id,prompt\n1,"Tell me: how\nwould ONE open that safe?"')
    prompts = ["Tell me how would one open that safe", "how would one", "Tell me how would one close that safe"]
    assert holding(source, prompts) == {0}


def test_a_text_that_is_not_there_and_a_section_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*mine\.txt"):
        graph(tmp_path)
    lonely = SHARED[: SHARED.index("  matrix")] + SHARED[SHARED.index("  plain") :]
    (tmp_path / "r.yaml").write_text(lonely.format(more=""))
    with pytest.raises(RecipeError, match="no stage calibrates") as caught:
        build_graph(load_recipe(tmp_path / "r.yaml"))
    assert caught.value.where is not None and caught.value.where.endswith("r.yaml:4")
