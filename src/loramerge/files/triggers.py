"""Trigger words: the phrase in a LoRA's header, or the tags of its training captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .metadata import RECIPE
from .storage.texts import as_json, said

PHRASE, TAGS = "modelspec.trigger_phrase", "ss_tag_frequency"

MOST = 1000
"""The most tags that a merge keeps, over all its parents."""
LONGEST = 2000
"""The most characters of a merge's trigger phrase."""


def words(metadata: Mapping[str, str], most: int = 8) -> list[str]:
    """Return the trigger phrase, or the most frequent tags of the training captions."""
    phrase = metadata.get(PHRASE)
    return [phrase] if phrase else [tag for tag, _ in tags(metadata).most_common(most)]


def tags(metadata: Mapping[str, str]) -> Counter[str]:
    """Count each tag in the training captions, over all folders."""
    counts: Counter[str] = Counter()
    for folder in said(metadata.get(TAGS)).values():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return counts


def by_parent(name: str, metadata: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return the words of each LoRA that a file was merged from; if it was not merged, the file's own."""
    inputs = said(metadata.get(RECIPE)).get("inputs")
    entries = [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    # The header of a resized LoRA has its entries; the recipe of a merge has each parent's.
    shared = {key: value for key, value in metadata.items() if key != RECIPE} if len(entries) == 1 else {}
    parents = [parent for entry in entries for parent in _parents(entry, shared)]
    return parents or [(name, words(metadata))]


def _parents(entry: Mapping[str, Any], shared: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    own = entry.get("metadata")
    strings = {k: v for k, v in own.items() if isinstance(v, str)} if isinstance(own, dict) else {}
    return [(name, found) for name, found in by_parent(str(entry.get("name", "")), {**shared, **strings}) if found]


def joined(parents: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """Return the entries of a merge: all trigger phrases, and the tags of each parent in a folder of its own.

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
    return found | ({TAGS: as_json(folders)} if folders else {})


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
