"""Every pair of a recipe, checked and divided: what is trained on, and what accuracy is measured on.

Nothing that a gate measures is ever trained on: pairs that ask a prompt of our test split are refused (or dropped and
counted), and pairs that ask a prompt of the validation split are held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from artifacts.errors import RecipeError, StageError
from artifacts.manifest import canonical_json, sha256_bytes
from stages.data import prompt_sets, prompts
from stages.reward_model import labels, pairs, phrases
from stages.reward_model.pairs import Pair, UnusableRowError
from stages.reward_model.params import RewardModelParams

_DIVISION: Final = "preferences-1"


@dataclass(frozen=True)
class Preferences:
    """What a recipe's data come to.

    Attributes:
        digests: source -> SHA-256 of what was read.
        dropped: source -> rows that could not be used.
    """

    train: Sequence[Pair]
    held_out: Sequence[Pair]
    digests: Mapping[str, str]
    dropped: Mapping[str, int]


def check_sources(params: RewardModelParams) -> None:
    """Refuse sources that cannot be read, without reading them.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    for source in params.data:
        if source.startswith(phrases.PREFIX):
            prompt_sets.check_set(source.removeprefix(phrases.PREFIX))
        elif source.startswith("labels:"):
            if source != labels.SOURCE:
                raise RecipeError(f"unknown labels {source!r}", way_out=f"did you mean {labels.SOURCE}?")
        else:
            pairs.check_source(source)
    for source in params.held_out_data:
        if source.startswith((phrases.PREFIX, "labels:")):
            raise RecipeError(
                f"held_out_data: {source} is no file",
                why="sets of prompts and labels are divided by themselves",
                way_out="name it under data",
            )
        pairs.check_source(source)


def load_preferences(params: RewardModelParams) -> Preferences:
    """Read everything.

    Raises:
        SourceError: a file cannot be read, or holds rows that cannot be used. StageError: nothing to train on, or
            nothing to measure on.
    """
    reader = _Reader(params)
    sets = [source.removeprefix(phrases.PREFIX) for source in params.data if source.startswith(phrases.PREFIX)]
    if sets:
        reader.add_prompts(sets)
    if labels.SOURCE in params.data:
        reader.add_labels()
    for source in params.data:
        if not source.startswith((phrases.PREFIX, "labels:")):
            reader.add_file(source, measure_only=False)
    for source in params.held_out_data:
        reader.add_file(source, measure_only=True)
    for found, purpose in ((reader.train, "to train on"), (reader.held_out, "to measure accuracy on")):
        if not found:
            raise StageError(
                f"there are no pairs {purpose}",
                where=", ".join((*params.data, *params.held_out_data)),
                why=f"{len(reader.train)} are for training, {len(reader.held_out)} held out, "
                f"{sum(reader.dropped.values())} dropped",
                way_out="give more data, or another held_out",
            )
    return Preferences(reader.train, reader.held_out, reader.digests, reader.dropped)


class _Reader:
    def __init__(self, params: RewardModelParams):
        self._params = params
        self.train: list[Pair] = []
        self.held_out: list[Pair] = []
        self.digests: dict[str, str] = {}
        self.dropped: dict[str, int] = {}

    def add_prompts(self, sets: Sequence[str]) -> None:
        self.train += phrases.prompt_pairs(sets, held_out=False)
        self.held_out += phrases.prompt_pairs(sets, held_out=True)
        digest = sha256_bytes(canonical_json([prompts.prompts_fingerprint(), phrases.phrases_digest()]))
        self.digests |= {phrases.PREFIX + name: digest for name in sets}

    def add_labels(self) -> None:
        found = labels.label_pairs()
        self.digests[labels.SOURCE] = sha256_bytes(canonical_json([[pair.chosen, pair.rejected] for pair in found]))
        # They were gathered by others, in words near to ours: what only resembles a test prompt goes too.
        self._divide(found, labels.SOURCE, at_least=prompts.NEAR, refuse=False, measure_only=False)

    def add_file(self, source: str, measure_only: bool) -> None:
        self.digests[source], rows = pairs.read_file(source)
        found: list[Pair] = []
        refuse, dropped = self._params.unusable == "refuse", 0
        for place, row in rows:
            try:
                found.append(pairs.pair_of(row, source, place))
            except UnusableRowError:
                if refuse:
                    raise
                dropped += 1
        if not found:
            raise StageError("the file holds no pairs", where=source, why=f"{dropped} rows could not be used")
        self.dropped[source] = dropped
        self._divide(found, source, at_least=prompts.DUPLICATE, refuse=refuse, measure_only=measure_only)

    def _divide(self, found: list[Pair], source: str, *, at_least: float, refuse: bool, measure_only: bool) -> None:
        turns = [(index, text) for index, pair in enumerate(found) for text in pair.asked]
        texts = [text for _, text in turns]
        tested = {turns[place][0]: prompt for place, prompt in prompts.resembling(texts, "test", at_least).items()}
        if tested and refuse:
            first = min(tested)
            raise UnusableRowError(
                f"a prompt of the test split is asked here: {tested[first].id}",
                where=found[first].place,
                why=f"{len(tested)} of {len(found)} rows ask what verification measures on; trained on, it would "
                "measure nothing",
                way_out="take these rows out, or say unusable: drop",
            )
        validated = {turns[place][0] for place in prompts.resembling(texts, "validation", at_least)}
        for index, pair in enumerate(found):
            if index in tested:
                self.dropped[source] = self.dropped.get(source, 0) + 1
            elif measure_only or index in validated or self._kept_out(pair):
                self.held_out.append(pair)
            else:
                self.train.append(pair)

    def _kept_out(self, pair: Pair) -> bool:
        """By the first thing asked, so that one dialogue's variants stand on one side whatever the file's order."""
        if self._params.held_out_data and pair.source != labels.SOURCE:
            return False
        digest = hashlib.sha256(f"{_DIVISION}:{prompts.normalise(pair.asked[0])}".encode()).hexdigest()
        return int(digest[:8], 16) / 16**8 < self._params.held_out
