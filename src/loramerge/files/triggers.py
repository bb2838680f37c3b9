"""The words that call up what a LoRA learned, as its header tells them: a trigger phrase, or the captions' tags."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .metadata import RECIPE

PHRASE, TAGS = "modelspec.trigger_phrase", "ss_tag_frequency"

MOST = 1000
"""Tags that a merge keeps, of all its parents together."""
LONGEST = 2000
"""Characters of a merge's trigger phrase."""


def words(metadata: Mapping[str, str], most: int = 8) -> list[str]:
    """The trigger phrase, or the commonest tags of the training captions."""
    phrase = metadata.get(PHRASE)
    return [phrase] if phrase else [tag for tag, _ in tags(metadata).most_common(most)]


def tags(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each tag is in the training captions, of all folders together."""
    counts: Counter[str] = Counter()
    for folder in _entries(metadata.get(TAGS)).values():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return counts


def by_parent(name: str, metadata: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The words of each LoRA that a file was merged from; of another file its own."""
    inputs = _entries(metadata.get(RECIPE)).get("inputs")
    entries = [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    # What a resized LoRA had stands in its header; what the parents of a merge had stands with each of them.
    shared = {key: value for key, value in metadata.items() if key != RECIPE} if len(entries) == 1 else {}
    parents = [parent for entry in entries for parent in _parents(entry, shared)]
    return parents or [(name, words(metadata))]


def _parents(entry: Mapping[str, Any], shared: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    own = entry.get("metadata")
    said = {k: v for k, v in own.items() if isinstance(v, str)} if isinstance(own, dict) else {}
    return [(name, found) for name, found in by_parent(str(entry.get("name", "")), {**shared, **said}) if found]


def joined(parents: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """The entries of a merge: all trigger phrases, and the tags of each parent in a folder of its own.

    Args:
        parents: Name and header of every LoRA that is merged.
    """
    found: dict[str, str] = {}
    if phrases := _phrases(parents):
        found[PHRASE] = ", ".join(phrases)
    each = max(1, MOST // len(parents))
    folders: dict[str, dict[str, int]] = {}
    for name, metadata in parents:
        if counts := dict(tags(metadata).most_common(each)):
            folders[_free(name.removesuffix(".safetensors"), folders)] = counts
    return found | ({TAGS: json.dumps(folders)} if folders else {})


def _phrases(parents: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    kept: list[str] = []
    for phrase in dict.fromkeys(metadata.get(PHRASE, "").strip() for _, metadata in parents):
        if phrase and len(", ".join([*kept, phrase])) <= LONGEST:
            kept.append(phrase)
    return kept


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _entries(text: str | None) -> dict[str, Any]:
    """The entries of a JSON object; none where a stranger's text is something else."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
