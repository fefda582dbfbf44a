"""What stages look at a model with: passages of articles, visual questions, prompts beside pictures.

- `train` reads calibration articles, training prompts and training pictures; `validation` reads the validation sides
  of the same. Nothing of a test side is read.
- Pictures stand in the sequences as the model's default exit gives them.
- A sequence is a pure function of (side, kind, number): a run that continues after `kill -9` sees the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from artifacts.errors import SourceError
from artifacts.manifest import sha256_bytes
from stages.data import articles, calibration_texts, easy_vqa, images, prompts
from stages.data.refusals import REFUSALS
from stages.models import checkpoint
from stages.models.crossing import Crossing, Placed
from stages.models.features import ExitFeatures
from stages.models.prompting import Prompting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.models.family import Family

Side = Literal["train", "validation"]
Kind = Literal["text", "question", "prompt"]


@dataclass(frozen=True)
class Passage:
    """One sequence.

    Attributes:
        embeddings: (length, width).
        first: the position of the first token whose prediction of the next one counts.
        image: the picture in it, if there is one, and the position where it begins.
    """

    embeddings: torch.Tensor
    first: int
    image: tuple[Placed, int] | None = None

    @property
    def order(self) -> tuple[bool, int]:
        """In this order sequences of a kind that fits together stand together, and little is padded."""
        return self._beside, len(self.embeddings)

    @property
    def _beside(self) -> bool:
        return self.image is not None and self.image[0].beside is not None

    def joins(self, other: Passage) -> bool:
        """Whether both go through the model in one pass: images beside the text are all there, or none is."""
        return self._beside == other._beside


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, zeros behind the shorter ones: causal attention never looks there."""

    embeddings: torch.Tensor  # (sequences, length, width)
    lengths: torch.Tensor  # (sequences,)
    counted: torch.Tensor  # (sequences, length), bool: predictions that count
    crossing: Crossing | None = None  # images that the model looks at by cross-attention

    @property
    def tokens(self) -> torch.Tensor:
        """(sequences, length), bool: no padding."""
        import torch

        return torch.arange(self.embeddings.shape[1], device=self.lengths.device)[None] < self.lengths[:, None]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a language backbone takes for these sequences."""
        import torch

        rows, length, _ = self.embeddings.shape
        beside: dict[str, torch.Tensor] = {}
        if self.crossing is not None:
            positions = torch.arange(length, device=self.embeddings.device).expand(rows, length)
            beside = self.crossing.arguments(positions, cached=False)
        return {"inputs_embeds": self.embeddings, **beside}

    def through(self, trunk: torch.nn.Module) -> torch.Tensor:
        """Last hidden states (sequences, length, width) of a language backbone, without a KV cache."""
        out = trunk(use_cache=False, **self.inputs())
        return cast("torch.Tensor", out.last_hidden_state)


def batches(passages: Sequence[Passage], size: int) -> Iterator[Batch]:
    """Passages in their order, at most `size` at a time."""
    some: list[Passage] = []
    for passage in passages:
        if len(some) == size or (some and not some[0].joins(passage)):
            yield _batch(some)
            some = []
        some.append(passage)
    if some:
        yield _batch(some)


def _batch(passages: Sequence[Passage]) -> Batch:
    import torch

    padded = torch.nn.utils.rnn.pad_sequence([passage.embeddings for passage in passages], batch_first=True)
    lengths = torch.tensor([len(passage.embeddings) for passage in passages], device=padded.device)
    first = torch.tensor([passage.first for passage in passages], device=padded.device)
    images = [passage.image for passage in passages if passage.image is not None]
    # What stands before an image is the chat template's, the same in every sequence.
    crossing = Crossing.of([image for image, _ in images], start=images[0][1]) if images else None
    batch = Batch(padded, lengths, torch.arange(padded.shape[1], device=padded.device)[None] >= first[:, None])
    return Batch(padded, lengths, batch.counted & batch.tokens, crossing)


class Calibration:
    """The sequences of one model on one side.

    Args:
        model: loaded from `folder`.
        length: of a passage of text, and the most that is kept of an answer, in tokens.
        pictures: how many pictures questions and prompts stand beside; all are encoded when the first is needed.
        texts: what passages are taken from (`calibration_texts`); None: Wikipedia articles.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        side: Side,
        *,
        length: int,
        pictures: int,
        seed: int,
        texts: str | None = None,
    ):
        config = checkpoint.read_config(folder)
        vision = family.spec(config).vision
        self._exit = vision.default_exit if vision is not None else None
        self._family, self._folder, self._model = family, folder, model
        self._tokenizer = tokenizer
        self._side: Side = side
        self._length, self._pictures, self._seed = length, pictures, seed
        self._texts = texts
        self.left_out = 0  # pieces of `texts` that repeat what tests ask; known once passages were read
        self._embed = cast("torch.nn.Module", model.get_input_embeddings())
        self._chats = isinstance(tokenizer.chat_template, str)

    def kinds(self) -> tuple[Kind, ...]:
        """What this model can be asked: no pictures without an encoder, no prompts without a chat template."""
        if not self._chats:
            return ("text",)
        return ("text", "question", "prompt") if self._exit is not None else ("text", "prompt")

    def passage(self, kind: Kind, number: int) -> Passage:
        """The `number`-th sequence of a kind, from 0; they begin anew after the last one."""
        if kind == "text":
            return Passage(self._embedded(self._chunks[number % len(self._chunks)]), first=0)
        asked = self._questions if kind == "question" else self._prompts
        return self._dialogue(*asked[number % len(asked)])

    def refusal(self, number: int, *, picture: bool = True) -> Passage:
        """A refusal behind the `number`-th harmful prompt; what counts are the predictions of its tokens.

        Args:
            picture: beside the prompt, if the model sees any.

        Raises:
            SourceError: the tokenizer has no chat template.
        """
        text, _, place = self._harmful[number % len(self._harmful)]
        answer = REFUSALS[number % len(REFUSALS)]
        passage = self._dialogue(text, answer, place if picture else None)
        spoken = len(self._prompting.answer(answer)[: self._length])
        return replace(passage, first=len(passage.embeddings) - spoken - 1)

    def mixed(self, count: int, start: int = 0) -> list[Passage]:
        """`count` sequences, the kinds in turn, beginning with the `start`-th."""
        kinds = self.kinds()
        return [self.passage(kinds[n % len(kinds)], n // len(kinds)) for n in range(start, start + count)]

    def _dialogue(self, text: str, answer: str, picture: int | None) -> Passage:
        """`picture`: the place of the one beside the text; None: there is none."""
        import torch

        answered = self._prompting.answer(answer)[: self._length] if answer else []
        if self._exit is None or picture is None:
            return Passage(self._embedded([*self._prompting.text(text), *answered]), first=0)
        before, after = self._prompting.around_image(text)
        image = self._seen[picture % len(self._seen)]
        parts = [self._embedded(before), image.embeddings, self._embedded([*after, *answered])]
        start = len(before)
        return Passage(torch.cat(parts), first=start + len(image.embeddings), image=(image, start))

    @cached_property
    def _prompting(self) -> Prompting:
        return Prompting(self._family, self._tokenizer, self._embed)

    @cached_property
    def _chunks(self) -> list[list[int]]:
        """Passages of `length` tokens, at most two an article or piece, in a seeded order."""
        letters = 24 * self._length  # a token is seldom longer than twelve letters
        if self._texts is not None:
            texts, self.left_out = calibration_texts.pieces(self._texts, self._side, letters, self._seed)
        else:
            split: articles.TextSplit = "calibration" if self._side == "train" else "validation"
            texts = [article.text[:letters] for article in articles.load_articles(split, self._seed)]
        found: list[list[int]] = []
        for text in texts:
            ids = cast("list[int]", self._tokenizer(text).input_ids)
            found += [ids[start : start + self._length] for start in (0, self._length)]
        whole = [chunk for chunk in found if len(chunk) == self._length]
        if not whole:
            raise SourceError(
                f"the calibration text has no passage of {self._length} tokens",
                where=self._texts,
                way_out="give a longer text, or a smaller length",
            )
        return whole

    @cached_property
    def _questions(self) -> list[tuple[str, str, int]]:
        """Question, answer, place of its picture."""
        place = {number: place for place, number in enumerate(self._numbers)}
        asked = [question for question in easy_vqa.load_questions("train") if question.image in place]
        asked.sort(key=lambda question: self._order(f"{question.image}:{question.question}"))
        return [(question.question, question.answer, place[question.image]) for question in asked]

    @cached_property
    def _prompts(self) -> list[tuple[str, str, int]]:
        """Harmless prompts with their answers and harmful ones alone, in turn: of a harmful prompt the distribution
        over the first token of an answer is kept, where a refusal begins."""
        found = [p for name in ("everyday", "pairs", "advbench") for p in prompts.load_prompts(name, self._side)]
        found.sort(key=lambda prompt: self._order(prompt.id))
        answered = [prompt for prompt in found if prompt.intent == "benign" and prompt.answer]
        harmful = [prompt for prompt in found if prompt.intent == "harmful"]
        turns = [prompt for pair in zip(answered, harmful, strict=False) for prompt in pair]
        return [(prompt.text, prompt.answer or "", place) for place, prompt in enumerate(turns)]

    @cached_property
    def _harmful(self) -> list[tuple[str, str, int]]:
        return [prompt for prompt in self._prompts if not prompt[1]]

    @cached_property
    def _numbers(self) -> list[int]:
        """The pictures, by their numbers in easy-VQA's train folder."""
        names = images.image_names(self._side, seed=self._seed)
        shapes = [member for package, member in names if package == "easy-vqa"]
        return [int(Path(member).stem) for member in shapes[: self._pictures]]

    @cached_property
    def _seen(self) -> list[Placed]:
        """Every picture as the language model receives it at the default exit."""
        import numpy as np
        import torch

        assert self._exit is not None
        folder = "easy_vqa/data/train/images"
        paths = [images.extract_image("easy-vqa", f"{folder}/{number}.png") for number in self._numbers]
        features = ExitFeatures(self._folder, self._model).get(paths)
        found: list[Placed] = []
        with torch.no_grad():
            for place in range(len(paths)):
                states = torch.from_numpy(np.array(features[place, self._exit]))
                geometry = features.geometry(place)
                found.append(self._prompting.image(self._family.project(self._model, states, geometry), geometry))
        return found

    def _embedded(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, width)."""
        import torch

        with torch.no_grad():
            found = self._embed(torch.tensor(ids, dtype=torch.long, device=self._model.device))
        return cast("torch.Tensor", found)

    def _order(self, text: str) -> str:
        return sha256_bytes(f"{self._seed}:{text}".encode())
