"""JSON Schema of a recipe, with the parameters of every installed stage, so that editors complete recipes."""

from __future__ import annotations

from typing import Any

from pipeline.device import device_names
from pipeline.recipe import SOURCE_ID, Recipe
from stages.stage import stage_class, stage_names

JSONSchema = dict[str, Any]


def recipe_schema() -> JSONSchema:
    """The JSON Schema (2020-12) of a recipe; a stage's `with` depends on its `uses`."""
    schema: JSONSchema = Recipe.model_json_schema(by_alias=True)
    definitions: JSONSchema = schema["$defs"]
    entry = definitions.pop("StageEntry")
    choices = []
    for name in stage_names():
        try:
            stage = stage_class(name)
        except (ImportError, AttributeError):
            continue  # a stage whose packages are missing cannot be used either
        params = _params(definitions, name)
        if name == SOURCE_ID:
            schema["properties"]["source"] = params
            continue
        properties: JSONSchema = {
            **entry["properties"],
            "uses": {"const": name, "description": stage.summary},
            "with": _with_matrix(params),
        }
        required = ["uses", "with"] if params.get("required") else ["uses"]
        choices.append(
            {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        )
    schema["properties"]["stages"] = {
        **{key: value for key, value in schema["properties"]["stages"].items() if key != "patternProperties"},
        "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"},
        "additionalProperties": {"oneOf": [*choices, _changed(entry), {"type": "null"}]},
    }
    schema["properties"]["device"] = {
        "anyOf": [{"enum": list(device_names())}, {"$ref": "#/$defs/Device"}],
        "description": schema["properties"]["device"]["description"],
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Recipe"
    # An included recipe may supply what this file leaves out.
    whole = {"stages": {"additionalProperties": {"type": "object", "required": ["uses"]}}}
    schema["anyOf"] = [{"required": schema.pop("required"), "properties": whole}, {"required": ["include"]}]
    return schema


def _changed(entry: JSONSchema) -> JSONSchema:
    """What a recipe may say of a stage that it has from an included one."""
    properties = {name: value for name, value in entry["properties"].items() if name != "uses"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _params(definitions: JSONSchema, name: str) -> JSONSchema:
    """A stage's parameters; its own definitions move up under a name that no other stage has."""
    template = f"#/$defs/{name}-{{model}}"
    params: JSONSchema = stage_class(name).Params.model_json_schema(ref_template=template)
    for key, value in params.pop("$defs", {}).items():
        definitions[f"{name}-{key}"] = value
    return params


def _with_matrix(params: JSONSchema) -> JSONSchema:
    """The same parameters, each of which may also be filled in from a matrix."""
    expression = {"type": "string", "pattern": r"\$\{\{ *matrix\..*\}\}"}
    properties = {key: {"anyOf": [value, expression]} for key, value in params.get("properties", {}).items()}
    for key, value in params.get("properties", {}).items():
        for hoisted in ("title", "description", "default"):
            if hoisted in value:
                properties[key][hoisted] = value[hoisted]
    return {**params, "properties": properties}
