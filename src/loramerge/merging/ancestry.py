"""The LoRAs that a merged file was made from: their names, hashes, licences and places on the Hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..files import hub
from ..files.metadata import RECIPE, inputs_of, weight_of
from ..files.storage.texts import said
from ..files.triggers import LICENCE

MOST = 50
"""The most repositories of parents that are asked: a header may come from anyone."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A LoRA that another one was merged from."""

    name: str
    weight: str
    sha256: str
    """`LoRA.sha256` of its tensors; empty if the record has none."""
    reference: hub.Reference | None
    """Its place on the Hub, with the commit that was fetched."""
    licences: tuple[str, ...]
    """Its licence, and who says so: its repository, its header, or both; empty if neither does."""
    bases: tuple[str, ...] = ()
    """The base models that its repository names."""
    asked: bool = False
    """True if its repository was read."""
    parents: tuple["Parent", ...] = ()
    """The LoRAs that it was merged from itself."""

    @property
    def is_known(self) -> bool:
        """True if somebody says what its licence is."""
        return bool(self.licences)


def parents_of(metadata: Mapping[str, str]) -> tuple[Parent, ...]:
    """Return what a file's header records of its parents, and theirs, with what their repositories say.

    Args:
        metadata: The strings in the header.
    """
    asked: list[hub.Reference] = []

    @cache
    def facts(reference: hub.Reference) -> hub.Facts | None:
        asked.append(reference)
        return hub.facts(reference._replace(file=None)) if len(asked) <= MOST else None

    def parents(text: str | None) -> Iterator[Parent]:
        record = said(text)
        for entry in inputs_of(record):
            yield parent(entry, record)

    def parent(entry: Mapping[str, Any], record: Mapping[str, Any]) -> Parent:
        own = entry.get("metadata")
        header = own if isinstance(own, dict) else {}
        source = entry.get("source")
        reference = hub.parse(source) if isinstance(source, str) and source.startswith("hf://") else None
        there = facts(reference) if reference else None
        stated = header.get(LICENCE)
        licences = {"its repository": there.licence if there else "", "its header": str(stated or "")}
        inner = header.get(RECIPE)
        return Parent(
            name=str(entry.get("name", "")),
            weight=weight_of(entry, record),
            sha256=str(entry.get("sha256", "")),
            reference=reference,
            licences=tuple(f"{text} (says {who})" for who, text in licences.items() if text),
            bases=there.bases if there else (),
            asked=there is not None,
            parents=tuple(parents(inner if isinstance(inner, str) else None)),
        )

    return tuple(parents(metadata.get(RECIPE)))


def every(parents: tuple[Parent, ...]) -> Iterator[Parent]:
    """Yield parents, their own parents, and so on."""
    for parent in parents:
        yield parent
        yield from every(parent.parents)
