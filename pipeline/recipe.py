"""The recipe: its schema, and how a file becomes one.

Read with what it includes (`include`), override, expand the matrix, validate: in that order. Every value keeps its file
and line to the end, so that whatever is wrong, here or in a stage's own parameters, is said with its place and the
nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from artifacts.errors import PipelineError, RecipeError
from pipeline.device import ByteSize, Device, device, device_names
from pipeline.explain import explain, nearest
from pipeline.include import read_with_includes
from pipeline.matrix import expand_matrix
from pipeline.targets import Target
from pipeline.yaml_source import Document, Mark, Place, Value, parse_scalar, plain
from stages.data.calibration_mix import CalibrationMix
from stages.resources import Resources

SOURCE_ID = "source"  # the implicit first stage
CALIBRATION = "calibration"  # of the recipe, and of stages that calibrate
STAGE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
MatrixExpression = Annotated[str, Field(pattern=r"^\$\{\{ *matrix\..*\}\}$")]
"""What stands for a value until the matrix is written out."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageEntry(_Part):
    """One stage of a recipe."""

    uses: str = Field(description="Name of the stage's kind, e.g. early-exit.")
    needs: Annotated[tuple[str, ...], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        default=(SOURCE_ID,), min_length=1, description="Ids of the stages whose artifacts it takes; default: source."
    )
    with_: dict[str, object] = Field(default_factory=dict, alias="with", description="The stage's parameters.")
    seed: Seed | MatrixExpression | None = Field(default=None, description="Its own seed; default: the recipe's.")
    resources: Resources = Field(default=Resources(), description="How many processes share its work.")
    matrix: dict[str, list[bool | int | float | str]] | None = Field(
        default=None, description="Axes; the stage is run once for each combination, `${{ matrix.AXIS }}` in `with`."
    )


Fraction = Annotated[float, Field(ge=0, le=1)]
MAX_DEGENERATE = 0.1  # what shipped models measured here keep well below, and models broken by compression do not


class Gates(_Part):
    """Conditions that must hold before anything is published. A gate that could not be measured fails."""

    max_asr: Fraction | None = Field(
        default=None, description="Attack success rate of the shipped artifact, averaged over its exits."
    )
    max_worst_asr: Fraction | None = Field(default=None, description="The same at the worst single exit.")
    max_degenerate: Fraction | None = Field(
        default=None,
        description="Share of babble and empty responses to harmful requests, at the worst exit; where max_asr or "
        f"max_worst_asr is set, {MAX_DEGENERATE} unless said otherwise: what babbles is not safe.",
    )
    max_over_refusal: Fraction | None = Field(
        default=None, description="Refused share of benign and frightening-but-harmless prompts."
    )
    max_over_refusal_rise: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="The same share: shipped minus source, over the exits of the shipped one.",
    )
    max_utility_drop: float | None = Field(
        default=None, ge=-1, le=1, description="VQA accuracy at the default exit: source minus shipped."
    )
    min_fidelity: float | None = Field(
        default=None, ge=-1, le=1, description="Cosine of image embeddings against transformers, at the worst exit."
    )
    max_kl: float | None = Field(
        default=None,
        ge=0,
        description="KL of next-token distributions against the checkpoint before quantization, nats a token; the "
        "larger of ordinary text's and refusals'.",
    )
    memory: Literal["device"] | ByteSize | None = Field(
        default=None, description="Measured peak memory: within the device's budget, or within a size such as 1GiB."
    )

    @field_validator("memory", mode="before")
    @classmethod
    def _word_or_size(cls, value: object) -> object:
        from pipeline.device import parse_bytes

        return value if value == "device" else parse_bytes(value)

    def asked(self) -> dict[str, float | str]:
        """The gates in force, in the order of the schema: those that the recipe sets, and `max_degenerate` beside a
        safety gate."""
        gates = self.model_dump()
        if self.max_degenerate is None and (self.max_asr, self.max_worst_asr) != (None, None):
            gates["max_degenerate"] = MAX_DEGENERATE
        return {name: value for name, value in gates.items() if value is not None}


class Publish(_Part):
    """Where the shipped artifact goes once every gate holds."""

    to: str = Field(
        description="oci-layout:FOLDER, oci:HOST/NAME:TAG, folder:FOLDER, hf:USER/NAME or ollama:NAME; FOLDER is "
        "relative to the working directory."
    )
    sign: Literal["keyless"] | Path | None = Field(
        default=None,
        description="Private key, an elliptic curve's in PEM, that signs it; or `keyless`: an identity, by Sigstore.",
    )
    sigstore: Path | None = Field(default=None, description="Configuration of another Sigstore than the public one.")
    certificate: Path | None = Field(default=None, description="Certificate of that key, in PEM.")
    chain: tuple[Path, ...] = Field(default=(), description="Certificates between it and the authority.")


def _or_null(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, {"type": "null"}]


class Recipe(_Part):
    """A model, a device, the stages between them, and what must hold at the end."""

    recipe: Literal[1] = Field(description="Version of this schema.")
    name: str = Field(pattern=STAGE_ID, description="Short name; runs are named after it.")
    source: dict[str, object] = Field(
        description="The model to start from: {model: demo:..., hub id, folder or .gguf}."
    )
    device: Device | None = Field(
        default=None, description="Name of a device profile, or {memory: 2GiB, context: 2048}."
    )
    stages: dict[Annotated[str, Field(pattern=STAGE_ID)], StageEntry] = Field(
        min_length=1, description="Stage id -> stage; null drops an included recipe's."
    )
    calibration: CalibrationMix | None = Field(
        default=None,
        description="What quantizers (imatrix, gptq) are calibrated on; what one of them says in its own `calibration` "
        "wins.",
    )
    gates: Gates = Field(
        default=Gates(),
        description="Conditions for publishing; null drops an included recipe's.",
        json_schema_extra=_or_null,
    )
    publish: Publish | None = Field(default=None, description="Where to publish; nowhere when absent.")
    seed: Seed = Field(default=0, description="Seed of every stage that has none of its own.")
    include: str | list[str] | None = Field(
        default=None, description="Recipes to start from; what is written here wins. Paths are relative to this file."
    )
    matrix: dict[str, list[bool | int | float | str]] | None = Field(
        default=None, description="Axes for every stage that mentions `${{ matrix.AXIS }}`."
    )

    _document: Document = PrivateAttr(default_factory=lambda: Document({}))
    _path: Path = PrivateAttr(default=Path("recipe.yaml"))

    @field_validator("device", mode="before")
    @classmethod
    def _profile(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return device(value)
        except KeyError:
            raise ValueError(f"unknown device {value!r}; {nearest(value, device_names())}") from None

    @field_validator("gates", mode="before")
    @classmethod
    def _none_of_the_included(cls, value: object) -> object:
        return {} if value is None else value

    @property
    def path(self) -> Path:
        """The file that the recipe was read from."""
        return self._path

    def seed_of(self, stage_id: str) -> int:
        """A stage's seed: its own, or the recipe's."""
        entry = self.stages.get(stage_id)
        own = entry.seed if entry is not None else None
        return own if isinstance(own, int) else self.seed

    def resources_of(self, stage_id: str) -> Resources:
        """What a stage may use of the machine."""
        entry = self.stages.get(stage_id)
        return Resources() if entry is None else entry.resources

    def where(self, *place: str | int) -> str:
        """`file:line` of a place such as ("stages", "exit", "with", "layer"), or of its nearest written parent."""
        return str(self._document.mark(place))

    def mark(self, place: Place) -> Mark:
        """The mark of a place, or of its nearest written parent."""
        return self._document.mark(place)

    @property
    def document(self) -> Document:
        """What was read, with includes, overrides and the matrix applied, and where each value is written."""
        return self._document


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `a.b=c` overrides applied.

    Raises:
        RecipeError: whatever is wrong with it that can be seen without its stages (see `graph.build_graph` for those).
    """
    document = read_with_includes(path)
    for override in overrides:
        _override(document, override)
    return validate_recipe(document, path)


def recipe_of(data: dict[str, Value], name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a program wrote; `name` stands where a file's would in messages.

    Raises:
        RecipeError: as `load_recipe`.
    """
    document = Document(data, {(): Mark(name)})
    for override in overrides:
        _override(document, override)
    return validate_recipe(document, Path(name))


def validate_recipe(document: Document, path: Path) -> Recipe:
    """Check a merged document and make the recipe of it.

    Raises:
        RecipeError: unknown or missing key, wrong type, unknown device, a matrix that names nothing.
    """
    _check(document)  # before the matrix, so that it works on the right shapes
    expanded = expand_matrix(document)
    recipe = _check(expanded)
    recipe._document = expanded
    recipe._path = path
    _refuse_unavailable(recipe)
    return recipe


def _check(document: Document) -> Recipe:
    data = document.data
    if "recipe" not in data:
        raise RecipeError(
            "the key 'recipe' is missing",
            where=str(document.mark(())),
            why="it says which version of the schema the file follows",
            way_out="begin the file with `recipe: 1`",
        )
    try:
        return Recipe.model_validate(plain(data))
    except ValidationError as error:
        raise explain(error, Recipe, document, ()) from None


def _refuse_unavailable(recipe: Recipe) -> None:
    if SOURCE_ID in recipe.stages:
        raise RecipeError(
            "a stage may not be named 'source'",
            where=recipe.where("stages", SOURCE_ID),
            why="that is the id of the model that the recipe starts from",
            way_out="choose another id",
        )
    if recipe.gates.memory == "device" and recipe.device is None:
        raise RecipeError(
            "the gate `memory: device` has no device to measure against",
            where=recipe.where("gates", "memory"),
            way_out=f"add `device:`, one of {', '.join(device_names())}; or give the gate a size such as 1GiB",
        )
    if recipe.publish is not None:
        try:
            Target.parse(recipe.publish.to)
        except PipelineError as error:
            where = recipe.where("publish", "to")
            raise RecipeError(error.what, where=where, why=error.why, way_out=error.way_out) from None
        _refuse_signer(recipe, recipe.publish)


def _refuse_signer(recipe: Recipe, publish: Publish) -> None:
    if isinstance(publish.sign, Path) and not publish.sign.expanduser().is_file():
        raise RecipeError(
            f"there is no key {publish.sign}",
            where=recipe.where("publish", "sign"),
            way_out="make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        )
    if publish.certificate is not None and not isinstance(publish.sign, Path):
        raise RecipeError(
            "a certificate does not sign",
            where=recipe.where("publish", "certificate"),
            way_out="add `sign:`, the private key that belongs to it",
        )
    named = (("certificate", [publish.certificate]), ("chain", publish.chain), ("sigstore", [publish.sigstore]))
    for part, paths in named:
        for path in paths:
            if path is not None and not path.expanduser().is_file():
                raise RecipeError(f"there is no {path}", where=recipe.where("publish", part))


def _override(document: Document, text: str) -> None:
    name, equals, raw = text.partition("=")
    where = f"--set {text}"
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"cannot read the override {text!r}", way_out="write it like --set stages.harden.with.steps=4"
        )
    value = parse_scalar(raw, where)
    target: Value = document.data
    for depth, key in enumerate(keys):
        place = tuple(keys[: depth + 1])
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise RecipeError(
                    f"{'.'.join(place)} does not exist", where=where, why=f"there are {len(target)} items"
                )
            if depth == len(keys) - 1:
                target[int(key)] = value
            else:
                target = target[int(key)]
            continue
        if not isinstance(target, dict):
            parent = ".".join(keys[:depth])
            raise RecipeError(f"{parent} has no keys", where=where, why=f"it is {target!r}")
        _known(target, place, where)
        if depth == len(keys) - 1:
            for stale in [at for at in document.marks if at[: len(place)] == place]:
                del document.marks[stale]
            target[key] = value
            document.marks[place] = Mark(where)
        else:
            if target.get(key) is None:
                target[key] = {}
                document.marks[place] = Mark(where)
            target = target[key]


def _known(target: dict[str, Value], place: Place, where: str) -> None:
    """Refuse an override of what neither the recipe has nor its schema knows; stage parameters are checked later."""
    key = str(place[-1])
    choices: tuple[str, ...]
    if len(place) == 1:
        choices = tuple(name for name in Recipe.model_fields if name != "include")
    elif len(place) == 2 and place[0] == "stages":
        choices = tuple(target)
    elif len(place) == 3 and place[0] == "stages":
        choices = tuple(field.alias or name for name, field in StageEntry.model_fields.items())
    elif len(place) == 2 and place[0] == "gates":
        choices = tuple(Gates.model_fields)
    else:
        return
    if key not in choices:
        raise RecipeError(f"there is no {'.'.join(map(str, place))} to set", where=where, way_out=nearest(key, choices))
