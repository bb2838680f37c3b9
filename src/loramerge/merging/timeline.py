"""Where each checkpoint stands in its run: the step or epoch that its header or its name says."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import MergeError, OptionError
from ..files.storage.texts import said

Header = Mapping[str, str]

WAY_OUT = "Way out: the step of every checkpoint, in the order of the files (--steps 500,1000, or steps=[500, 1000])."


@dataclass(frozen=True)
class Timeline:
    """The place of each checkpoint in its run."""

    numbers: tuple[int, ...]
    unit: str
    """``step`` or ``epoch``; ``number`` if a name doesn't say which of the two it counts."""
    notes: tuple[str, ...] = ()
    """Sentences on steps that were given and differ from those that the files say."""


def _training_info(header: Header) -> object:
    return said(header.get("training_info")).get("step")


HEADERS: tuple[tuple[str, str, Callable[[Header], object]], ...] = (
    ("step", "ss_steps", lambda header: header.get("ss_steps")),  # kohya sd-scripts, musubi-tuner, loramerge
    ("step", "training_info", _training_info),  # ai-toolkit
    ("epoch", "ss_epoch", lambda header: header.get("ss_epoch")),
)
"""Entries of headers that say a checkpoint's place, the most exact first: unit, name, and how it is read."""

WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("step", re.compile(r"(?:steps?|save|checkpoint|iter)[-_ ]?(\d{1,12})(?!\d)", re.IGNORECASE)),
    ("epoch", re.compile(r"(?:epochs?|ep)[-_ ]?(\d{1,12})(?!\d)", re.IGNORECASE)),
)
"""Words in names before a number: ``step00000500``, ``checkpoint-500``, ``save-1500-10-0``, ``epoch10``."""

DIGITS = re.compile(r"\d{1,12}(?!\d)")


def timeline(headers: Sequence[Header], names: Sequence[str], steps: Sequence[int] | None = None) -> Timeline:
    """Find each checkpoint's place: as given, or by the first entry that all headers have, or by the names.

    Args:
        headers: The checkpoints' metadata.
        names: Their names.
        steps: The steps, if they were given.

    Raises:
        MergeError: Headers and names don't say it, or don't agree on the order.
        OptionError: The steps aren't one positive number for each checkpoint, all different.
    """
    places = list(_places(headers, names))
    if steps is not None:
        return _as_given(steps, names, places)
    if not places:
        listed = ", ".join(names[:4]) + ", …" * (len(names) > 4)
        raise MergeError(
            f"The order of the checkpoints is unclear: neither their metadata (ss_steps, training_info, ss_epoch) nor the names "
            f"{listed} have one number for each, all different. {WAY_OUT}"
        )
    (key, first), *others = places
    for other_key, other in others:
        if pair := _turned(first, other):
            i, j = pair
            raise MergeError(
                f"The order of the checkpoints is unclear: by {key} {names[i]} ({first.numbers[i]}) is before {names[j]} "
                f"({first.numbers[j]}), by {other_key} after it ({other.numbers[i]} and {other.numbers[j]}). {WAY_OUT}"
            )
    return first


Places = Sequence[tuple[str, Timeline]]
"""The checkpoints' places by each entry of their headers, or their names, that says them."""


def _places(headers: Sequence[Header], names: Sequence[str]) -> Iterator[tuple[str, Timeline]]:
    for unit, key, read in HEADERS:
        numbers = _distinct(map(read, headers))
        if numbers is not None:
            yield key, Timeline(numbers, unit)
    if named := _by_name(names):
        yield "the names", named


def _turned(first: Timeline, other: Timeline) -> tuple[int, int] | None:
    """Return two checkpoints that follow each other in one order, and are the other way round in the other."""
    pairs = pairwise(sorted(range(len(first.numbers)), key=first.numbers.__getitem__))
    return next(((i, j) for i, j in pairs if other.numbers[i] > other.numbers[j]), None)


def _as_given(steps: Sequence[int], names: Sequence[str], places: Places) -> Timeline:
    """Return the steps that were given, if they aren't in another order than all that the files say."""
    found = _distinct(steps)
    if found is None or len(found) != len(names):
        raise OptionError(
            f"Steps given: {', '.join(map(str, steps))}; checkpoints: {len(names)}. Wanted one positive whole number for "
            "each, all different."
        )
    given = Timeline(found, "step")
    if places and all(_turned(given, place) for _, place in places):
        key, place = places[0]
        i, j = _turned(given, place) or (0, 0)
        raise OptionError(
            f"The steps contradict the files: {names[i]} is given as step {found[i]} and {names[j]} as {found[j]}, and by "
            f"{key} they are {place.numbers[i]} and {place.numbers[j]}. Way out: the steps in the order of the files, which is "
            "that of the command line; or leave them out."
        )
    notes = [
        f"the steps given differ from {key}: {names[i]} is given as {found[i]}, and {key} say{'s' * (key[-5:] != 'names')} "
        f"{place.numbers[i]}"
        for key, place in places
        if place.unit == "step"
        for i in [next((i for i, (a, b) in enumerate(zip(found, place.numbers, strict=True)) if a != b), None)]
        if i is not None
    ]
    return Timeline(found, "step", tuple(notes[:1]))


def _by_name(names: Sequence[str]) -> Timeline | None:
    """Read the number after a word that says what it counts, or else the only number in which the names differ."""
    for unit, word in WORDS:
        marked = [word.findall(name) for name in names]
        numbers = _distinct(found[-1] for found in marked if found)
        if numbers is not None and len(numbers) == len(names):
            return Timeline(numbers, unit)
    if len({DIGITS.sub("#", name) for name in names}) != 1:
        return None
    columns = list(zip(*map(DIGITS.findall, names), strict=True))
    differing = [column for column in columns if len({*map(int, column)}) > 1]
    numbers = _distinct(differing[0]) if len(differing) == 1 else None
    return None if numbers is None else Timeline(numbers, "number")


def _distinct(values: Iterable[object]) -> tuple[int, ...] | None:
    """Return values as whole numbers from 1, all different; None if they aren't."""
    found = tuple(int(text) if re.fullmatch(r"[0-9]{1,12}", text := str(value)) else 0 for value in values)
    return found if found and all(found) and len({*found}) == len(found) else None
