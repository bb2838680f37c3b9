"""The JSON Schemas of what ``--json`` prints, one per command, made of the dataclasses that hold it where there is one."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from ..checkpoints.extracting import Fit
from ..checkpoints.rewriting import Change
from ..comparing.measures import MEASURES
from ..merging.schemas import TYPES

VERSION = 1
"""Raised when a program that reads an output may fail on it."""

OUTPUT_SCHEMAS = Path(__file__).with_name(f"outputs.v{VERSION}.schema.json")
"""The schemas as a file of the package; ``tools/write_schemas.py`` writes it."""

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer"}
NUMBER: Schema = {"type": ["number", "string", "null"]}
"""A number; JSON has no infinity, so it is the text "inf", and not-a-number is null."""
FLAG: Schema = {"type": "boolean"}


def optional(kind: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    return {"anyOf": [kind, {"type": "null"}]}


def listed(kind: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": kind}


def by_name(kind: Schema) -> Schema:
    """Return the schema of an object with any keys."""
    return {"type": "object", "additionalProperties": kind}


def table(properties: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Return the schema of an object with these keys and no others; some of them may be missing."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def held(kind: type) -> dict[str, Schema]:
    """Return the schemas of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {f.name: NUMBER if hints[f.name] is float else {"type": TYPES[hints[f.name]]} for f in fields(kind)}


def texts(*names: str) -> dict[str, Schema]:
    """Return the schemas of entries that are all texts."""
    return dict.fromkeys(names, TEXT)


ALONE = table({"modules": COUNT, "norm": NUMBER, "effective_rank": NUMBER})
PAIR = table({"loras": listed(COUNT), "modules": COUNT, **dict.fromkeys(MEASURES, NUMBER)})
ROW = table(
    {
        **texts("name", "component", "block"),
        "modules": COUNT,
        "loras": listed(ALONE),
        "pairs": listed(PAIR),
        "sum": ALONE,
    }
)
MODULE = table(
    {
        "kind": TEXT,
        "shape": listed(COUNT),
        "rank": optional(COUNT),
        "dim": optional(COUNT),
        "alpha": NUMBER,
        "dtype": TEXT,
    },
    {"norm": NUMBER},
)

OUTPUTS: Mapping[str, Schema] = {
    "inspect": table(
        {
            "name": TEXT,
            "architecture": optional(TEXT),
            "alike": listed(TEXT),
            "dialect": TEXT,
            "trigger_words": listed(TEXT),
            "base_model": TEXT,
            "notes": listed(TEXT),
            "extras": listed(TEXT),
            "modules": by_name(MODULE),
            "metadata": by_name(TEXT),
        }
    ),
    "compare": table(
        {
            "loras": listed(TEXT),
            "architecture": optional(TEXT),
            "conflict_rows": optional(COUNT),
            "seed": COUNT,
            "base": optional(TEXT),
            "total": ROW,
            "blocks": listed(ROW),
            "modules": listed(ROW),
            "dense": listed(table(texts("lora", "module", "kind"))),
            "not_compared": listed(table(texts("lora", "module", "kind"))),
            "advice": TEXT,
        }
    ),
    "check": listed(
        table(
            {
                **texts("file", "reader", "verdict", "dialect"),
                "families": listed(TEXT),
                "layers": COUNT,
                "ignored": listed(TEXT),
                "findings": listed(table({"what": TEXT, "modules": listed(TEXT)})),
                "unknown": listed(TEXT),
            }
        )
    ),
    "metadata": by_name(TEXT),
    "bake": table(
        {
            "output": TEXT,
            "norm": NUMBER,
            "rounding_loss": NUMBER,
            "left_out": listed(TEXT),
            "tensors": by_name(table({**held(Change), "rounding_loss": NUMBER})),
        }
    ),
    "extract": table(
        {
            "output": TEXT,
            "relative_error": NUMBER,
            "modules": by_name(table({**held(Fit), "relative": NUMBER})),
            "not_held": by_name(table({"norm": NUMBER, "relative": NUMBER})),
            "notes": listed(TEXT),
        }
    ),
    "compositions": listed(table({**texts("name", "title", "source", "passes"), "options": listed(TEXT)})),
    "dialects": listed(table({"name": TEXT, "writes": FLAG, "title": TEXT, "source": TEXT})),
    "methods": listed(
        table(
            texts("name", "package"),
            {**texts("error", "reference", "title", "source"), "options": listed(TEXT)},
        )
    ),
    "doctor": table(
        {
            **texts("loramerge", "python", "system"),
            "packages": listed(table(texts("name", "wanted", "installed", "needed_by", "status"))),
            "extras": by_name(FLAG),
            "devices": listed(TEXT),
            "largest_error": NUMBER,
        }
    ),
}
"""The schema of what each command prints with ``--json``."""


def output_schemas() -> Schema:
    """Return all schemas in one document: that of a command is ``#/$defs/COMMAND``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:loramerge:outputs:{VERSION}",
        "title": "What loramerge's commands print with --json",
        "$defs": dict(OUTPUTS),
    }
