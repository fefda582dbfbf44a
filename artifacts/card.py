"""The model card: `README.md` with Hugging Face's front matter, said from what was measured and nothing else.

Format: huggingface_hub's ModelCardData (hub-docs, modelcard.md); `model-index` holds the gates' measured values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

EXIT_MAP: Final = "exits.svg"


@dataclass(frozen=True)
class Gate:
    """One gate as it was checked. `value` None: not measured."""

    name: str
    limit: float | str
    value: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Step:
    """One stage between the source and what ships."""

    id: str
    uses: str
    facts: Mapping[str, str]  # in words


@dataclass(frozen=True)
class Card:
    """What a bundle's papers say. Texts and figures are about the shipped artifact only."""

    name: str
    type: str  # "gguf", "gptq"
    quantization: str
    sees_images: bool
    base_models: tuple[str, ...]  # Hugging Face ids; none where the source was a folder
    source: str  # as the recipe names it
    licence: str  # SPDX identifier in lower case, or "other"
    headline: str
    steps: tuple[Step, ...] = ()
    gates: tuple[Gate, ...] = ()
    exits: tuple[int, ...] = ()
    default_exit: int | None = None
    device: str = ""
    context: int = 2048  # tokens
    memory_predicted: int | None = None  # bytes
    memory_measured: int | None = None  # bytes
    prompts: int | None = None  # the fewest that stand behind a rate
    judge: str = ""
    unverified: bool = False
    has_exit_map: bool = False
    tools: Mapping[str, str] = field(default_factory=dict)  # distribution -> version


def spdx(licence: str) -> str:
    """An SPDX expression for what Hugging Face calls a licence: `apache-2.0` -> `Apache-2.0`; others are references."""
    from license_expression import get_spdx_licensing

    known: dict[str, str] = {name.casefold(): name for name in get_spdx_licensing().known_symbols}
    return known.get(licence.casefold(), f"LicenseRef-{licence}")


def model_card(card: Card) -> str:
    """The whole text of README.md. The same card gives the same text."""
    return f"---\n{_front_matter(card)}\n---\n\n{_body(card)}"


def _front_matter(card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-text-to-text" if card.sees_images else "text-generation",
            dataset_type="icet-verify",
            dataset_name="safety at every exit, on the files that ship",
            metric_type=gate.name,
            metric_name=gate.name,
            metric_value=gate.value,
        )
        for gate in card.gates
        if gate.value is not None
    ]
    data = ModelCardData(
        base_model=list(card.base_models) or None,
        base_model_relation="quantized" if card.base_models else None,
        license=card.licence,
        license_name="see-licence-of-the-base-model" if card.licence == "other" else None,
        library_name="gguf" if card.type == "gguf" else "transformers",
        pipeline_tag="image-text-to-text" if card.sees_images else "text-generation",
        tags=[card.type, "icet", "unverified"] if card.unverified else [card.type, "icet"],
        model_name=card.name,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _body(card: Card) -> str:
    parts = [f"# {card.name}", ""]
    if card.unverified:
        parts += ["> **Unverified.** It was published although a gate failed or was never checked. See the gates.", ""]
    parts += [card.headline or "No verification stands behind this model.", ""]
    base = " and ".join(card.base_models) or card.source
    parts += [f"A {card.quantization or card.type} version of {base}, `RUN.md` says how to run it.", ""]
    parts += ["## What was done", ""]
    if card.steps:
        parts += ["| step | kind | what it did |", "| --- | --- | --- |"]
        parts += [
            f"| {step.id} | {step.uses} | {_cell('; '.join(f'{k}: {v}' for k, v in step.facts.items())) or '-'} |"
            for step in card.steps
        ]
    else:
        parts += ["Nothing but quantization is known of it."]
    parts += ["", "## Exits", ""]
    if card.exits:
        parts += [
            f"The image encoder may be left after layers {card.exits[0]} to {card.exits[-1]}; this file leaves it "
            f"after layer {card.default_exit}. Safety was measured at each of them: refusals learned at one exit "
            "may be gone at another (ICET, arXiv 2411.04291).",
        ]
        if card.has_exit_map:
            parts += ["", f"![Attack success rate at every exit]({EXIT_MAP})"]
    else:
        parts += ["It sees no images, so it has no exits."]
    parts += ["", "## Gates", ""]
    if card.gates:
        parts += ["| gate | limit | measured | held | |", "| --- | --- | --- | --- | --- |"]
        parts += [
            f"| {gate.name} | {_figure(gate, gate.limit)} | {_figure(gate, gate.value)} "
            f"| {'yes' if gate.passed else '**no**'} | {_cell(gate.reason)} |"
            for gate in card.gates
        ]
    else:
        parts += ["No gate was set."]
    parts += ["", "## Memory", "", _memory(card), "", "## Intended use and limits", "", *_limits(card)]
    parts += ["", "## Licence", "", _licence(card), ""]
    return "\n".join(parts)


def _figure(gate: Gate, value: float | str | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    return f"{value / 2**20:,.0f} MiB" if gate.name == "memory" else f"{value:.6g}"


def _memory(card: Card) -> str:
    def show(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 2**20:,.0f} MiB"

    place = f" for the device `{card.device}`" if card.device else ""
    return (
        f"Planned{place} at a context of {card.context} tokens: {show(card.memory_predicted)} predicted, "
        f"{show(card.memory_measured)} measured."
    )


def _limits(card: Card) -> list[str]:
    measured = f"judged by {card.judge}" if card.judge else "not judged"
    several = f" with {card.prompts} prompts behind the smallest rate" if card.prompts else ""
    return [
        "- Made for answering questions about text" + (" and images" if card.sees_images else "") + " on a user's own "
        "machine. The uses that its base model rules out are ruled out here too.",
        f"- Safety was {measured}{several}. What these prompts do not ask, they do not show; English only, one turn.",
        "- The figures hold for these very files in the runtime that verified them. Another quantization, another exit "
        "or another chat template is another model.",
        "- Compression costs quality: a gate on utility says how much was allowed.",
    ]


def _licence(card: Card) -> str:
    if card.licence == "other":
        return "The licence of the base model applies; it could not be read from the source. See NOTICE.md."
    return f"`{card.licence}`, as its base model. See LICENSE where it is there, and NOTICE.md."


def notice(card: Card) -> str:
    """NOTICE.md: where the model comes from and what made it."""
    lines = ["# Notices", "", f"{card.name} was made from {card.source}."]
    lines += [f"- base model: https://huggingface.co/{name}" for name in card.base_models]
    lines += [f"- licence: {card.licence}", "", "Made with:", ""]
    lines += [f"- {name} {number}" for name, number in sorted(card.tools.items())]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
