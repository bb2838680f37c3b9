"""Other numbers for the blocks of a LoRA: for models that were pruned or stretched.

A rule says what becomes of a list's blocks: ``blocks.{i}=blocks.{i+12}``, or of one block: ``blocks.5=blocks.7``.  It
is about the names that the file has, behind the prefix of its dialect.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ..errors import DialectError, OptionError, counted
from .architectures import ARCHITECTURES
from .building import LayerBuilder
from .dialects import DIALECTS
from .dialects.forms import BEFORE
from .dialects.naming import UNKNOWN
from .lora import LoRA, from_tensors
from .metadata import of_changed

NUMBER = re.compile(r"\{i(?:(?P<sign>[+-])(?P<shift>\d+)|\*(?P<times>\d+)/(?P<over>[1-9]\d*))?\}")
"""Matches the number of a block in a rule's right side."""

LIST = r"((?:[\w-]+\.)*[a-zA-Z][\w-]*)\.({[^{}]*}|\d+)"
FORMS = "blocks.{i}=blocks.{i+12}, blocks.{i}=blocks.{i*40/28}, or blocks.5=blocks.7"


@dataclass(frozen=True)
class Rule:
    """The new numbers of the blocks of one list."""

    text: str
    source: str
    """The list's path in the file."""
    which: str
    """``{i}``, or the number of a block."""
    target: str
    number: str
    """The new number: ``{i+12}``, or a number."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the list and the number in a key, behind its prefix."""
        return re.compile(rf"{re.escape(self.source).replace(re.escape('.'), '[._]')}([._])(\d+)(?=[._])")

    def of(self, number: int) -> int | None:
        """Return the new number of a block; None if the rule isn't about it."""
        if self.which != "{i}" and int(self.which) != number:
            return None
        match = NUMBER.fullmatch(self.number)
        if match is None:
            return int(self.number)
        if match["times"]:
            return number * int(match["times"]) // int(match["over"])
        shift = int(match["shift"] or 0)
        return number - shift if match["sign"] == "-" else number + shift


def pairs(typed: Iterable[str]) -> dict[str, str]:
    """Split rules as they are typed, ``OLD=NEW``.

    Raises:
        OptionError: One has no equals sign.
    """
    found = {}
    for text in typed:
        old, sign, new = text.partition("=")
        if not sign:
            raise OptionError(f"Can't read the map {text!r}. Wanted {FORMS}.")
        found[old] = new
    return found


def parse(rules: Mapping[str, str]) -> list[Rule]:
    """Read rules, the old names with the new ones.

    Raises:
        OptionError: One has another form.
    """
    if not rules:
        raise OptionError(f"A map of no blocks. Wanted {FORMS}.")
    return [_rule(source, target) for source, target in rules.items()]


def _rule(source: str, target: str) -> Rule:
    text = f"{source}={target}"
    ends = re.fullmatch(LIST, source.strip()), re.fullmatch(LIST, target.strip())
    if not all(ends) or ends[0] is None or ends[1] is None:
        raise OptionError(f"Can't read the map {text!r}. Wanted {FORMS}.")
    old, new = ends[0][2], ends[1][2]
    known = NUMBER.fullmatch(new) if old == "{i}" else new.isdigit()
    if not (old == "{i}" or old.isdigit()) or not known:
        raise OptionError(
            f"Can't read the map {text!r}: which block follows from which has to be said with i. Wanted {FORMS}."
        )
    return Rule(text, ends[0][1], old, ends[1][1], new)


def renumbered(lora: LoRA, rules: Mapping[str, str], to: str | None = None) -> LoRA:
    """Return a LoRA that was read from a file, with other numbers for its blocks.

    What a rule's list has besides the blocks that the rules are about is left out, and a note says so.

    Args:
        lora: The LoRA.
        rules: Old and new names of blocks: ``{"blocks.{i}": "blocks.{i+12}"}``.
        to: The dialect that the LoRA is for, if another than its own can't hold blocks that its family lacks.

    Raises:
        OptionError: A rule has another form, is about no block of the file, or the LoRA wasn't read.
        DialectError: Two blocks would have the same number, or one that the LoRA's family lacks.
    """
    parsed = parse(rules)
    if lora.origin is None:
        raise OptionError(f"{lora.name} wasn't read from a file, so its blocks have no names to map.")
    names = _renamed(lora.origin.tensors, parsed)
    kept = {new: lora.origin.tensors[old] for old, new in names.items() if new is not None}
    if len(kept) < sum(new is not None for new in names.values()):
        twice = next(new for new in kept if sum(new == other for other in names.values()) > 1)
        raise DialectError(f"{lora.name}: with this map two blocks would have the tensor {twice}.")
    if not kept or all(new == old for old, new in names.items()):
        listed = ", ".join(rule.text for rule in parsed)
        raise OptionError(
            f"{lora.name}: the map {listed} changes nothing; the file's names are such as {next(iter(names))}."
        )
    left = [old for old, new in names.items() if new is None]
    note = f"left out: {len(left)} tensors of blocks that the map has no number for: {left[0]} …" if left else ""
    read = partial(
        from_tensors,
        kept,
        of_changed(lora.metadata),
        lora.name,
        config=lora.origin.config,
        configured_as=(_builder(lora), {new: old for old, new in names.items() if new is not None}),
        dialect=lora.origin.forced.get("dialect"),
        notes=[f"blocks renumbered: {', '.join(rule.text for rule in parsed)}", *[note] * bool(note)],
        files=lora.files,
    )
    changed = [new for old, new in names.items() if new not in (None, old)]
    try:
        found = read(architecture=lora.origin.forced.get("architecture"))
    except OptionError:  # the family that was named lacks most of the blocks, or another has all of them
        found = _noted(read(), _beyond(lora, lora.dialect, changed, to))
    else:
        if lora.architecture and not found.families:
            found = _noted(found, _beyond(lora, found.dialect, changed, to))
    # A copy of the file would have the old names in its configuration or its header.
    return replace(found, origin=None) if found.about else found


def _builder(lora: LoRA) -> LayerBuilder:
    """Return the builder of the layers under the names that the file has."""
    assert lora.origin
    forced = lora.origin.forced
    read = from_tensors(
        lora.origin.tensors,
        lora.metadata,
        lora.name,
        config=lora.origin.config,
        architecture=forced.get("architecture"),
        dialect=forced.get("dialect"),
        adapter=forced.get("adapter"),
    )
    assert read.origin
    assert read.origin.builder
    return read.origin.builder


def _beyond(lora: LoRA, own: str, changed: Sequence[str | None], to: str | None) -> str:
    """Say which block the LoRA's family lacks.

    Raises:
        DialectError: The dialect that it is for isn't its own, and needs to know the family.
    """
    family = ARCHITECTURES[lora.architecture or ""]
    highest = max(filter(None, changed), key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    said = f"the map gives blocks that {family.title} ({family.name}) doesn't have: {highest}"
    if to is not None and DIALECTS[to].name != own:
        raise DialectError(
            f"{lora.name}: {said}. Ways out: numbers that it has; or, for a model with more blocks, the file's own dialect, "
            f"{own}, which keeps any names."
        )
    return said


def _noted(found: LoRA, said: str) -> LoRA:
    """Return a LoRA with a note on blocks that its family lacks."""
    own = [note for note in found.notes if not note.startswith(UNKNOWN)]
    return replace(found, notes=(*own, f"{said}; its {counted(len(found), 'module')} keep these names"))


def _renamed(keys: Iterable[str], rules: list[Rule]) -> dict[str, str | None]:
    """Map each key to its new name, None for one of a block that the rules leave out."""
    return {key: _new(key, rules) for key in keys}


def _new(key: str, rules: list[Rule]) -> str | None:
    match = BEFORE.match(key)
    start = match.end() if match else 0
    inside = False
    for rule in rules:
        found = rule.pattern.match(key, start)
        if not found:
            continue
        inside = True
        number = rule.of(int(found[2]))
        if number is not None and number >= 0:
            path = rule.target if found[1] == "." else rule.target.replace(".", "_")
            return f"{key[:start]}{path}{found[1]}{number}{key[found.end() :]}"
    return None if inside else key
