"""Stage `icet-verify`: measures on the files that ship, in the runtime that ships, at every exit, beside the source.

Notable:
- every artifact is asked the same held-out prompts beside the same benign images, so models are compared pairwise;
- every answer is remembered as soon as it is there: a killed verification goes on with the next one;
- what cannot be measured is a row without a value, and its gate fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from artifacts.errors import RecipeError
from artifacts.lineage import training_of
from stages.data import articles, prompt_files, prompt_sets, prompts, remote_files, vqa
from stages.data import images as image_data
from stages.judges import learned, registry
from stages.judges.refusal import RefusalRule
from stages.runtimes.llamacpp_library import cache_type_of
from stages.stage import MODEL_TYPES, Context, Planned, Stage
from stages.verify import attacks, resemblance
from stages.verify.asking import Subject
from stages.verify.params import IcetVerifyParams
from stages.verify.setting import check_exits
from stages.verify.verification import Verification


class IcetVerifyStage(Stage[IcetVerifyParams]):
    """ASR per exit, over-refusal, VQA, fidelity and memory of what ships, with the source and controls beside it."""

    name = "icet-verify"
    code_version = "9"
    summary = "measure safety at every exit, utility, fidelity and memory on the shipped files"
    accepts = MODEL_TYPES
    output_type = "verdict"
    many = True
    reads_device = True
    libraries = (
        "llama-cpp-python", "torch", "transformers", "scipy", "scikit-learn", "numpy", "pillow", "pyarrow"
    )  # fmt: skip
    Params = IcetVerifyParams

    def references(self) -> Mapping[str, str]:
        named = {}
        if self.params.baseline is not None:
            named["baseline"] = self.params.baseline
        if self.params.hardened is not None:
            named["hardened"] = self.params.hardened
        named |= {f"controls[{place}]": control for place, control in enumerate(self.params.controls)}
        if self.params.fidelity_to is not None:
            named["fidelity_to"] = self.params.fidelity_to
        return named

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        for name, file in self.params.sets.items():
            if name in prompt_sets.SETS:
                raise RecipeError(f"{name!r} is a prompt set of ours", way_out="give yours another name")
            prompt_files.check_file(name, file)
        if self.params.vqa_file is not None:
            vqa.check_vqa(self.params.vqa_file)
        for name in (*self.params.harmful, *self.params.over_refusal):
            if name not in self.params.sets:
                prompt_sets.check_set(name)
        self._check_intents()
        attacks.check_generated(
            self.params.attacks,
            self.params.generated,
            in_sets=all(
                name in self.params.sets and self.params.sets[name].images is not None for name in self.params.harmful
            ),
        )
        registry.check_judges(self.params.judges, network=self.params.network)
        self._shipped(inputs)
        for parameter, id in self.references().items():
            self._check_reference(parameter, id, inputs)
        if not any(self.params.harmful.values()):
            raise RecipeError(
                "icet-verify asks no harmful prompt", way_out="give harmful: {donotanswer: 20, advbench: 20}"
            )
        if self.params.exits != "all":
            for id in self._shipped(inputs):
                spec = inputs[id].spec
                if spec is not None and spec.vision is not None:
                    check_exits(self.params.exits, spec.vision.layers, id)
        return super().plan({id: inputs[id] for id in self._shipped(inputs)})

    def downloads(self) -> Sequence[str]:
        shapes = (image_data.PACKAGES["easy-vqa"],) if self.params.vqa and self.params.vqa_file is None else ()
        text = (articles.SOURCE,) if self.params.language else ()
        visual = self.params.vqa_file
        files = [file.place for file in self.params.sets.values()]
        files += visual.sources if visual is not None else []
        files = [source for source in files if remote_files.is_remote(source)]
        meaning = learned.SOURCES if self.params.sets else ()
        more = (*shapes, *text, *files, *meaning, *registry.downloads(self.params.judges))
        return tuple(dict.fromkeys((*prompt_sets.packages(), *image_data.packages(), *more)))

    def ungated(self) -> str | None:
        if self.params.split == "test":
            return None
        return "it asks validation prompts, by which trainings choose their weights"

    def fingerprint(self) -> str:
        files = [prompt_files.file_digest(file) for file in self.params.sets.values()]
        if self.params.vqa_file is not None:
            files.append(vqa.vqa_digest(self.params.vqa_file, self.params.vqa, self.params.prompt_seed))
        if self.params.generated is not None:
            files.append(attacks.generated_digest(self.params.generated))
        if self.params.sets:
            files.append(f"{resemblance.SAME} {resemblance.LIKE}")
        return " ".join(
            (prompts.prompts_fingerprint(), RefusalRule.identity, registry.fingerprint(self.params.judges), *files)
        )

    def run(self, context: Context) -> Mapping[str, object]:
        for id, artifact in context.inputs.items():
            if not training_of(artifact).complete:
                context.log(f"{id}: what it was trained on is not known, so it may know the prompts that it is asked")
        return Verification(context, self.params, self._subjects(context)).run()

    def _shipped(self, inputs: Mapping[str, object]) -> list[str]:
        """What is verified: `needs` without the stages that are only referred to.

        Raises:
            RecipeError: nothing is left.
        """
        referred = set(self.references().values())
        shipped = [id for id in inputs if id not in referred]
        if not shipped:
            raise RecipeError(
                "icet-verify has nothing to verify",
                why=f"it needs only {', '.join(inputs) or 'nothing'}, which it compares with",
                way_out="put the stages whose files ship into needs, e.g. needs: [gguf]",
            )
        return shipped

    def _check_intents(self) -> None:
        """Refuse a set of the user's own that is asked as what it is not."""
        asked = (
            ("harmful", self.params.harmful, "over_refusal"),
            ("over_refusal", self.params.over_refusal, "harmful"),
        )
        for parameter, sets, other in asked:
            for name in (name for name, n in sets.items() if n and name in self.params.sets):
                file = self.params.sets[name]
                if (file.meaning.intent == "harmful") == (parameter == "harmful"):
                    continue
                intent = "intent: harmful" if parameter == "harmful" else "intent: benign"
                raise RecipeError(
                    f"{parameter} asks the prompt set {name!r}, whose intent is {file.meaning.intent}",
                    why=f"{parameter} takes what should be {'refused' if parameter == 'harmful' else 'answered'}",
                    way_out=f"name it in {other}" + ("" if file.layout else f", or say {intent} in sets.{name}"),
                )

    def _check_reference(self, parameter: str, id: str, inputs: Mapping[str, Planned]) -> None:
        planned = inputs.get(id)
        wanted = ("checkpoint",) if parameter in ("hardened", "fidelity_to") else MODEL_TYPES
        if planned is None or planned.type not in wanted:
            fitting = [name for name, other in inputs.items() if other.type in wanted]
            kind = f"of type {planned.type!r}" if planned else "not a stage"
            raise RecipeError(
                f"{parameter} names '{id}', which is {kind}",
                why=f"{parameter} must be a stage that makes a {' or '.join(wanted)}",
                way_out=f"for example {parameter}: {fitting[0]}" if fitting else f"name a {wanted[0]} stage",
            )

    def _subjects(self, context: Context) -> list[Subject]:
        """Every artifact to measure; the baseline first, what ships last (its figures need the others beside them)."""
        params, inputs = self.params, context.inputs
        found: list[Subject] = []
        if params.baseline is not None:
            found.append(Subject(params.baseline, inputs[params.baseline], "source", gated=False))
        if params.hardened is not None and params.hardened != params.baseline:
            found.append(Subject(params.hardened, inputs[params.hardened], "hardened", gated=False))
        found += [Subject(id, inputs[id], "quantized", gated=False) for id in dict.fromkeys(params.controls)]
        found += [Subject(id, inputs[id], "quantized", gated=True) for id in self._shipped(inputs)]
        return [replace(one, cache_type=cache_type_of(context.device)) for one in found]
