"""The record of a merge in the header of its file: enough to make it again, and to see whether anything has changed.

A record is written from a plan (`record`, `as_text`), compared with another (`comparable`), and read as the entries
of a recipe (`from_metadata`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import FileError, MergeError
from ..files.metadata import CHANGED
from ..files.storage.texts import as_json, parsed
from ..registry import code_of
from ..tensors import NAMES
from .methods import METHODS

if TYPE_CHECKING:
    from .methods import Method
    from .plans import Plan

UNKNOWN = "0" * 64
"""Placeholder of a hash that is not known yet."""

LEARNED = {"ziplora": "zip", "lsq": "calibrate"}
"""Methods learned on a model, with the CLI command that runs each."""


def record(plan: "Plan", hashes: Sequence[str], base: str | None = None) -> dict[str, Any]:
    """Record how a plan was made.

    Args:
        plan: The plan.
        hashes: SHA-256 of every input's tensors, see `LoRA.sha256`.
        base: SHA-256 of the base model, see `Checkpoint.sha256`, if ΔW depends on it.
    """
    weights = plan.weights.given
    # JSON has no infinity; an option reads the text.
    options = {name: "inf" if value == math.inf else value for name, value in plan.options.items()}
    found: dict[str, Any] = {"loramerge": __version__, **_method(plan.method), "options": options}
    found |= {"weights": weights} if isinstance(weights, str) else {}
    found |= {"weights_sha256": plan.weights.sha256} if plan.weights.sha256 else {}
    found |= {"scope": plan.weights.scope} if plan.weights.scope else {}
    found |= {"rank": plan.rank}
    if plan.budget:
        value = plan.budget.value
        found["budget"] = {plan.budget.kind: int(value) if plan.budget.kind == "max_size" else value}
        found["ranks"] = {m: plan.rank_of(m) for m, step in plan.steps.items() if not step.rankless}
    found |= {"exclude": list(plan.exclude)} if plan.exclude else {}
    found |= {"device": plan.device} if plan.device else {}
    found |= {"base": plan.base.name} if plan.base else {}
    found |= {"base_sha256": base} if base else {}
    found["inputs"] = [_input(lora, sha256) for lora, sha256 in zip(plan.given, hashes, strict=True)]
    if not isinstance(weights, str):
        for entry, weight in zip(found["inputs"], weights, strict=True):
            entry["weight"] = dict(weight) if isinstance(weight, Mapping) else weight
    cut_as = {"cut_as": plan.cut_as} if plan.cut_as not in (None, plan.dialect) else {}
    return found | {"output": {"dialect": plan.dialect, "dtype": NAMES[plan.dtype], **cut_as}}


def _method(method: "Method") -> dict[str, Any]:
    """Name a method so that it is found again; one that isn't loramerge's own also by the SHA-256 of its file."""
    if method.name in METHODS:
        return {"method": method.name}
    return {"method": method.reference or method.name, "method_sha256": code_of(method.function)}


def _input(lora: Any, sha256: str) -> dict[str, Any]:
    """Describe one LoRA: its name, hash and source, without the directories of this machine."""
    entry = {"name": lora.name, "sha256": sha256}
    if lora.as_read and lora.origin.source is not None:
        entry |= {"source": lora.origin.source, **lora.origin.forced}
    return entry


def as_text(recipe: dict[str, Any], metadatas: Sequence[Mapping[str, str]]) -> str:
    """Write a record as the text of a header, with the metadata that each input alone had."""
    for entry, metadata in zip(recipe["inputs"], metadatas, strict=True):
        if metadata:
            entry["metadata"] = metadata
    return as_json(recipe)


def comparable(recipe: Mapping[str, Any]) -> Any:
    """Return a record without what doesn't change the tensors: the inputs' own metadata, and what was allowed."""
    kept = parsed(as_json(recipe), "the record")
    kept["output"].pop("allow_lossy", None)
    for entry in kept["inputs"]:
        entry.pop("metadata", None)
    return kept


def from_metadata(text: str | None, name: str) -> dict[str, Any]:
    """Read the record in a header, in the form of a parsed recipe file; `entries` checks its values.

    Raises:
        MergeError: There is none that can be run again.
    """
    if not text:
        raise MergeError(f"{name} has no recipe: it was not merged by loramerge.")
    try:
        found = parsed(text, name)
        learned = LEARNED.get(found["method"])
        data = _as_toml(found)
        known = ":" in found["method"] or found["method"] in METHODS
        missing = [str(entry["name"]) for entry in found["inputs"] if not entry.get("source")]
    except (FileError, KeyError, TypeError, AttributeError):
        raise MergeError(f"{name} has no recipe that can be run again: an older loramerge made it.") from None
    if learned:
        raise MergeError(
            f"{name} has no recipe that 'loramerge merge' can run again: it was learned on a model, by 'loramerge {learned}' "
            f"or loramerge.learned. Ways out: 'loramerge {learned}' with the settings that 'loramerge inspect --json' "
            "shows, or 'loramerge merge --weights' with its coefficients, if they were saved."
        )
    if found.get(CHANGED):
        raise MergeError(
            f"{name} has no recipe that can be run again: it was changed since, as layers were left out or have other numbers. "
            "Way out: run the recipe of the file that it was made from, and change the result anew."
        )
    if not known:
        raise MergeError(
            f"{name} has no recipe that can be run again: its method {found['method']!r} is not one of loramerge's, and no "
            "module that can be imported held it under a name. Way out: put it into a file of its own, and merge with "
            "method='module:name', or --method module:name."
        )
    if missing:
        raise MergeError(
            f"{name} has no recipe that can be run again: {' and '.join(missing)} came from memory, not from a file. "
            "Way out: save them first, then merge the files."
        )
    return data


def _as_toml(found: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a record's entries to the keys of a recipe file; a record has its budget in a table of its own."""
    from .recipe_text import KEYS

    data = {key: found[key] for key in (*KEYS, "ranks") if key in found}
    # JSON has no infinity, so `as_json` writes it as text.
    data["options"] = {name: float(v) if v in ("inf", "-inf") else v for name, v in found["options"].items()}
    data |= {**found.get("budget", {}), "loras": [_as_entry(entry) for entry in found["inputs"]]}
    return data | {"output": {("to" if key == "dialect" else key): value for key, value in found["output"].items()}}


def _as_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("sha256", "weight", "architecture", "dialect", "adapter") if key in entry}
    source = entry.get("source") or ""
    if source.startswith("hf://"):
        return {"hub": source.removeprefix("hf://"), **kept}
    return {"path": source, **kept}
