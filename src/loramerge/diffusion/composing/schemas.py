"""The JSON Schema of the TOML files that describe a composition, as `merging.schemas` has that of a merge's recipes."""

from pathlib import Path
from typing import Any

from ...merging.schemas import VERSION, lora_schema, options_rule
from . import COMPOSITIONS

COMPOSITION_SCHEMA = Path(__file__).parents[1] / f"composition.v{VERSION}.schema.json"
"""The schema as a file of the package; ``tools/write_schemas.py`` writes it."""

NUMBER = {"type": "number"}


def composition_schema() -> dict[str, Any]:
    """Return the JSON Schema of a file with ``[compose]``."""
    rules = [options_rule("name", name, found.options, default="blend") for name, found in COMPOSITIONS.items()]
    name = {"anyOf": [{"enum": list(COMPOSITIONS)}, {"type": "string"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:loramerge:composition:{VERSION}",
        "title": "A composition of loramerge: several LoRAs at work at once",
        "type": "object",
        "properties": {
            "compose": {
                "type": "object",
                "properties": {"name": name, "options": {"type": "object"}},
                "additionalProperties": False,
                "allOf": rules,
            },
            "loras": {"type": "array", "minItems": 1, "items": _lora()},
        },
        "required": ["compose", "loras"],
        "additionalProperties": False,
    }


def _lora() -> dict[str, Any]:
    """Return the schema of an entry of ``[[loras]]``: that of a merge with one number for a weight, and its place."""
    found = lora_schema()
    found["properties"] |= {
        "weight": {"type": ["number", "string"]},
        **{key: {"type": "string"} for key in ("words", "noun", "mask")},
        "box": {"type": "array", "items": NUMBER, "minItems": 4, "maxItems": 4},
        "curve": {"type": "array", "items": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}},
    }
    return found
