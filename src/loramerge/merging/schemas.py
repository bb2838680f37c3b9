"""The JSON Schema of recipes, made of the tables and dataclasses by which a recipe is read.

Editors check and complete a TOML file by it, where its first line is ``#:schema`` and the schema's place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..files.architectures import ARCHITECTURES
from ..files.dialects import DIALECTS
from ..tensors import NAMES
from .methods import METHODS
from .methods.options import Option
from .recipe_text import ENTRIES, WEIGHT, Input, Output
from .rules import RULES

VERSION = 1
"""Raised when a file that was valid is valid no more."""

RECIPE_SCHEMA = Path(__file__).with_name(f"recipe.v{VERSION}.schema.json")
"""The schema as a file of the package; ``tools/write_schemas.py`` writes it."""

TYPES: Mapping[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    NoneType: "null",
}
"""JSON's word for each kind."""

OFFERED: Mapping[str, Iterable[str]] = {
    "method": METHODS,
    "weights": RULES,
    "architecture": ARCHITECTURES,
    "dialect": DIALECTS,
    "to": [name for name, dialect in DIALECTS.items() if dialect.writes],
    "dtype": [name for name in NAMES.values() if "float" in name],
}
"""The names that an editor offers for an entry; other texts are valid too, such as methods of other packages."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe that makes a file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:loramerge:recipe:{VERSION}",
        "title": "A recipe of loramerge: a merge of LoRAs",
        "type": "object",
        "properties": {
            **{name: _entry(name, kinds) for name, kinds in ENTRIES.items()},
            "loras": {"type": "array", "minItems": 1, "items": lora_schema()},
            "output": _table(Output),
            "ranks": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "required": ["loras"],
        "additionalProperties": False,
        "allOf": [options_rule("method", name, METHODS[name].options, default="linear") for name in METHODS],
    }


def lora_schema() -> dict[str, Any]:
    """Return the schema of an entry of ``[[loras]]``: a path, or a name on the Hub with what belongs to it."""
    found = _table(Input)
    found["properties"]["weight"] = _entry("weight", WEIGHT)
    return found | {
        "oneOf": [{"required": ["path"]}, {"required": ["hub"]}],
        "dependentRequired": {"revision": ["hub"], "filename": ["hub"]},
    }


def options_rule(entry: str, name: str, options: Mapping[str, Option], *, default: str) -> dict[str, Any]:
    """Return the rule that a method, or a composition, takes its own options only; without a name it is the default."""
    chosen: dict[str, Any] = {"properties": {entry: {"const": name}}}
    if name != default:
        chosen["required"] = [entry]
    properties = {option.name: {"description": option.wanted} for option in options.values()}
    return {
        "if": chosen,
        "then": {"properties": {"options": {"properties": properties, "additionalProperties": False}}},
    }


def _table(kind: type) -> dict[str, Any]:
    """Return the schema of a table that is read into a dataclass."""
    hints = get_type_hints(kind)
    properties = {f.name: _entry(f.name, get_args(hints[f.name]) or (hints[f.name],)) for f in fields(kind)}
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _entry(name: str, kinds: Iterable[Any]) -> dict[str, Any]:
    """Return the schema of an entry of one of several kinds; TOML has no null."""
    names = [TYPES[kind] for kind in kinds if kind is not NoneType]
    found: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    if "array" in names:
        found["items"] = {"type": "string"}
    if name == "weight":
        found["additionalProperties"] = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"\.\."}]}
    if name in OFFERED:
        found = {"anyOf": [{"enum": list(OFFERED[name])}, found]}
    return found
