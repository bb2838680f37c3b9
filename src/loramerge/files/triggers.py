"""Trigger words: the phrase in a LoRA's header, or the tags of its training captions."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .metadata import RECIPE, inputs_of
from .storage.texts import as_json, said

PHRASE, TAGS = "modelspec.trigger_phrase", "ss_tag_frequency"
PHRASES = (PHRASE, "trigger_phrase", "ss_trigger_words", "trigger_words", "trainedWords", "activation text")
"""The entries in which tools put a trigger phrase, the commonest first."""
LICENCE = "modelspec.license"

MEANT = re.compile(r"trigger|activation|trained.?words|keyword", re.IGNORECASE)
"""Matches keys under which people expect trigger words."""

MOST = 1000
"""The most tags that a merge keeps, over all its parents."""
LONGEST = 2000
"""The most characters of a merge's trigger phrase."""


def words(metadata: Mapping[str, str], most: int = 8) -> list[str]:
    """Return the trigger phrase, or the most frequent tags of the training captions."""
    phrase = phrase_in(metadata)
    return [phrase] if phrase else [tag for tag, _ in tags(metadata).most_common(most)]


def phrase_in(metadata: Mapping[str, str]) -> str:
    """Return the trigger phrase; empty if there is none."""
    return next((phrase for key in PHRASES if (phrase := metadata.get(key, "").strip())), "")


def unread(key: str) -> str:
    """Say who reads trigger words where, if a key seems meant for them and isn't such a place; else return nothing."""
    if key in (PHRASE, TAGS) or not MEANT.search(key):
        return ""
    return (
        f"few programs look for trigger words under {key!r}: SwarmUI, ComfyUI's managers and most others read {PHRASE}, and "
        f"A1111, Forge and ComfyUI-Lora-Manager {TAGS}"
    )


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
    entries = inputs_of(said(metadata.get(RECIPE)))
    # The header of a resized LoRA has its entries; the recipe of a merge has each parent's.
    shared = {key: value for key, value in metadata.items() if key != RECIPE} if len(entries) == 1 else {}
    parents = [parent for entry in entries for parent in _parents(entry, shared)]
    return parents or [(name, words(metadata))]


def _parents(entry: Mapping[str, Any], shared: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    own = entry.get("metadata")
    strings = {k: v for k, v in own.items() if isinstance(v, str)} if isinstance(own, dict) else {}
    return [(name, found) for name, found in by_parent(str(entry.get("name", "")), {**shared, **strings}) if found]


def joined(parents: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """Return the entries of a merge: all trigger phrases, and the tags of all parents in one folder.

    One folder, as ComfyUI-Lora-Manager reads the first only, while A1111 and Forge add up all.  Parents with the same tags,
    as the checkpoints of one run have them, count once.

    Args:
        parents: Name and header of every LoRA that is merged.
    """
    found: dict[str, str] = {}
    if phrases := _phrases(parents):
        found[PHRASE] = ", ".join(phrases)
    counted: dict[str, tuple[str, Counter[str]]] = {}
    for name, metadata in parents:
        if counts := tags(metadata):
            counted.setdefault(metadata[TAGS], (name, counts))
    each = max(1, MOST // max(1, len(counted)))
    total: Counter[str] = Counter()
    for _, counts in counted.values():
        total.update(dict(counts.most_common(each)))
    names = " + ".join(name.removesuffix(".safetensors") for name, _ in counted.values())
    return found | ({TAGS: as_json({names[:LONGEST]: dict(total.most_common())})} if total else {})


def _phrases(parents: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    kept: list[str] = []
    for phrase in dict.fromkeys(phrase_in(metadata) for _, metadata in parents):
        if phrase and len(", ".join([*kept, phrase])) <= LONGEST:
            kept.append(phrase)
    return kept
