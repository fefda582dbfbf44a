"""Prompt sets and benign images: read for real out of the wheels; splits are what training and verification rely on."""

from __future__ import annotations

import hashlib
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import RecipeError
from stages.data.images import benign_images, image_names
from stages.data.prompt_sets import SETS, Prompt
from stages.data.prompts import DUPLICATE, NEAR, SPLITS, load_prompts, normalise, prompts_digest, split_together

WORDS = "make write bomb cake hack garden script steal plant virus how to a the of".split()  # noqa: SIM905
prompt_texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=3, max_size=8).map(" ".join), min_size=2, max_size=25)


def everything() -> list[tuple[str, str, Prompt]]:
    return [(name, split, prompt) for name in SETS for split in SPLITS for prompt in load_prompts(name, split)]


def pool_of(texts: list[str]) -> list[tuple[Prompt, str]]:
    return [
        (Prompt(f"p-{number}", text, "c", "harmful", "here"), "ab"[number % 2]) for number, text in enumerate(texts)
    ]


def cosines(texts: list[str]) -> list[list[float]]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(
        [normalise(text) for text in texts]
    )
    found: list[list[float]] = (vectors @ vectors.T).toarray().tolist()
    return found


def test_every_set_is_read_and_has_its_expected_size() -> None:
    sizes = {name: sum(len(load_prompts(name, split)) for split in SPLITS) for name in SETS}
    assert sizes["pairs"] == 300
    assert sizes["advbench"] > 500  # of 520, less duplicates
    assert sizes["donotanswer"] > 250
    assert sizes["overrefusal"] == 150
    assert sizes["everyday"] > 180
    assert sizes["harmbench"] > 190
    for name in ("requests", "misuse"):
        assert len(load_prompts(name, "train")) == sizes[name] > 90
    for name in ("donotanswer", "donotanswer-contested"):
        assert load_prompts(name, "train") == []
        assert len(load_prompts(name, "test")) > 2 * len(load_prompts(name, "validation")) > 100
    for name in ("advbench", "pairs", "overrefusal", "everyday", "harmbench"):
        assert all(len(load_prompts(name, split)) >= 15 for split in SPLITS), name


def test_every_prompt_says_where_it_comes_from_and_under_which_licence() -> None:
    for name in SETS:
        for split in SPLITS:
            for prompt in load_prompts(name, split):
                assert prompt.licence in ("MIT", "Apache-2.0") and prompt.origin and prompt.category, prompt.id


def test_no_prompt_and_no_id_stands_on_two_sides() -> None:
    found = everything()
    assert len({prompt.id for _, _, prompt in found}) == len(found)
    sides: dict[str, set[str]] = {}
    for _, split, prompt in found:
        sides.setdefault(normalise(prompt.text), set()).add(split)
    assert {text: names for text, names in sides.items() if len(names) > 1} == {}


def test_the_sets_that_the_demo_was_trained_on_have_kept_their_sides() -> None:
    demo = ("pairs", "advbench", "overrefusal", "everyday")
    sides = sorted(f"{prompt.id} {split}" for name, split, prompt in everything() if name in demo)
    # Another value: prompts that the published tensors of the demo have learned may stand on the test side now.
    known = "d57616420a2c9a8b42c9b385109c527c7420165076c6c3886054e743d27d2ca6"
    assert hashlib.sha256("\n".join(sides).encode()).hexdigest() == known


def test_answers_written_here_belong_to_training_prompts_only() -> None:
    with_answer = {split: [p.answer for p in load_prompts("overrefusal", split)] for split in SPLITS}
    assert all(with_answer["train"])
    assert not any(with_answer["validation"]) and not any(with_answer["test"])


def test_no_test_prompt_of_any_set_resembles_a_train_prompt_of_any_set() -> None:
    import numpy as np

    found = everything()
    similar = np.array(cosines([prompt.text for _, _, prompt in found]))
    side = np.array([split for _, split, _ in found])
    # The vocabulary of dropped duplicates shifts the weights a little, hence the hair of room.
    for one, other in combinations(SPLITS, 2):
        assert similar[side == one][:, side == other].max() < NEAR + 0.02


def test_both_members_of_a_pair_stand_on_one_side_and_only_the_benign_one_has_an_answer() -> None:
    for split in SPLITS:
        pairs = load_prompts("pairs", split)
        assert {p.id.removesuffix("-benign") for p in pairs if p.intent == "benign"} == {
            p.id.removesuffix("-harmful") for p in pairs if p.intent == "harmful"
        }
    assert all((p.answer is None) == (p.intent != "benign") for _, _, p in everything() if p.intent != "borderline")


def test_more_prompts_keep_those_that_were_there() -> None:
    full = load_prompts("advbench", "train", seed=3)
    for n in (0, 1, 17, 10_000):
        assert load_prompts("advbench", "train", n, seed=3) == full[:n]
    assert load_prompts("advbench", "train", seed=4) != full
    assert {p.id for p in load_prompts("advbench", "train", seed=4)} == {p.id for p in full}
    assert prompts_digest(full) == prompts_digest(load_prompts("advbench", "train", seed=3))
    assert prompts_digest(full) != prompts_digest(full[1:])


def test_an_unknown_set_or_split_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'advbench'"):
        load_prompts("advbnech", "test")
    with pytest.raises(RecipeError, match="train, validation, test"):
        load_prompts("advbench", "tests")


@settings(max_examples=40, deadline=None)
@given(prompt_texts)
def test_split_keeps_what_resembles_each_other_together_and_drops_duplicates(texts: list[str]) -> None:
    found = split_together(pool_of(texts))
    assert found == split_together(pool_of(texts))
    similar = cosines(texts)
    number = [int(prompt.id.removeprefix("p-")) for prompt, _, _ in found]
    for (a, (_, _, side)), (b, (_, _, other)) in combinations(zip(number, found, strict=True), 2):
        if similar[a][b] >= NEAR:
            assert side == other
        assert similar[a][b] < DUPLICATE + 1e-9
    # What was dropped has a copy that was kept, directly or through another dropped one.
    for gone in set(range(len(texts))) - set(number):
        assert any(similar[gone][other] >= DUPLICATE - 1e-9 for other in range(gone))


@settings(max_examples=30, deadline=None)
@given(prompt_texts, st.integers(0, 1))
def test_a_held_out_set_and_what_resembles_it_never_stand_on_the_train_side(texts: list[str], which: int) -> None:
    name = "ab"[which]
    found = split_together(pool_of(texts), held_out=frozenset({name}))
    assert not any(side == "train" for _, set_name, side in found if set_name == name)
    similar = cosines(texts)
    numbers = [(int(prompt.id.removeprefix("p-")), set_name, side) for prompt, set_name, side in found]
    for (a, held, _), (b, _, side) in product(numbers, repeat=2):
        assert held != name or similar[a][b] < NEAR or side != "train"


def test_benign_images_of_different_splits_are_different_files_and_prefixes_hold() -> None:
    chosen = {split: benign_images(split, 20) for split in SPLITS}
    assert all(len(set(paths)) == 20 and all(path.is_file() for path in paths) for paths in chosen.values())
    for one, other in combinations(SPLITS, 2):
        assert not {p.read_bytes() for p in chosen[one]} & {p.read_bytes() for p in chosen[other]}
        assert not set(image_names(one)) & set(image_names(other))
    assert benign_images("test", 3) == chosen["test"][:3]
    assert {package for package, _ in image_names("test", 4)} == {"scikit-image", "easy-vqa"}


def test_a_damaged_image_in_the_cache_is_written_again() -> None:
    path = benign_images("validation", 1)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert benign_images("validation", 1)[0].read_bytes() == whole


def test_the_fingerprint_follows_what_decides_which_prompts_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.data import prompts

    before = prompts.prompts_fingerprint()
    assert before == prompts.prompts_fingerprint()
    monkeypatch.setattr(prompts, "NEAR", 0.7)
    assert prompts.prompts_fingerprint() != before
