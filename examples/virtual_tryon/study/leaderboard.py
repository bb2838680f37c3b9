"""Rank merge methods on eight pairs of LoRAs whose true merge is known: two persons, each in four garments.

Every method merges every pair, once for each training of its LoRAs.  The table has means over the pairs, with
intervals over pairs, and what each method is better or worse by than the sum over √2.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from loramerge.errors import OptionError
from loramerge.files import write_text
from loramerge.merging.methods import Method
from loramerge.scoring import Interval, interval

from .. import world
from ..world import CONCEPTS, SCENES
from . import drift, noise, page, scores, truth
from .content import Report, Table, section
from .job import Job
from .protocol import Concept, Protocol, Setting
from .scores import TRUTH

PERSONS = ("profile", "profile2")
GARMENTS = ("barca", "white_shirt", "stanford", "disney")
PAIRS = {f"{person}-{garment}": (person, garment) for person, garment in product(PERSONS, GARMENTS)}
FAMILY = "methods"
AGAINST = "sqrt"
"""The entry that all others are compared with."""


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard."""

    name: str
    label: str
    method: str = "linear"
    weights: str | tuple[float, ...] = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)


ENTRIES = (
    Entry("average", "average (1/N)"),
    Entry(AGAINST, "sum over √N", weights="sqrt"),
    Entry("sum", "sum (1 each)", weights="sum"),
    Entry("l2", "by norms (l2)", weights="l2"),
    Entry("equal", "equal norms, over √N", weights="equal"),
    Entry("energy", "mean energy kept", weights="energy"),
    Entry("energy_sum", "all energy kept", weights="energy-sum"),
    Entry("slerp", "slerp", "slerp"),
    Entry("karcher", "Karcher mean", "karcher"),
    Entry("ties", "TIES at ½, ½", "ties"),
    Entry("magmax", "MagMax", "magmax"),
    Entry("knots", "KnOTS", "knots"),
    Entry("tsv", "TSV-M", "tsv", "sum"),
    Entry("iso_cts", "Iso-CTS", "iso_cts", "sum"),
    Entry("np_lora", "NP-LoRA", "np_lora", "sum"),
    Entry("mutual", "NP-LoRA without order", "np_lora", "sum", {"order": "none"}),
    Entry("wudi", "WUDI, closed form", "wudi"),
    Entry("wudi_sqrt", "WUDI, over √N", "wudi", "sqrt"),
)


@dataclass(frozen=True)
class Measure:
    """A column of the table."""

    name: str
    text: str
    value: Callable[[Job, str, str], float]
    """Of a job, a pair and an entry's name."""
    more: bool
    """True if a larger value is better."""


def _kept(job: Job, pair: str, entry: str) -> float:
    found = truth.read(job, pair, [setting_name(pair, entry)])
    return found.share(setting_name(pair, entry), found.concepts).mean


def _like(job: Job, pair: str, entry: str) -> float:
    name = setting_name(pair, entry)
    return scores.read(job, pair, [name])[TRUTH].mean(name, TRUTH).mean


def _noise(what: str) -> Callable[[Job, str, str], float]:
    return lambda job, pair, entry: noise.read(job, pair, what)[setting_name(pair, entry)]


def _drift(job: Job, pair: str, entry: str) -> float:
    return drift.read(job, pair)[setting_name(pair, entry)].mean


MEASURES = (
    Measure("attributes", "share of both concepts' attributes that the judge finds in pictures", _kept, True),
    Measure("likeness", "cosine of pictures with the true pictures of the same prompt", _like, True),
    Measure("joint", "noise error on true pictures of both concepts", _noise(noise.JOINT), False),
    Measure(
        "fit",
        "on each LoRA's own data, the squared distance from that LoRA's prediction, in units of the base's",
        _noise(noise.FIT),
        False,
    ),
    Measure("drift", "1 − cosine with the base's picture, for prompts that ask for no concept", _drift, False),
)


def setting_name(pair: str, entry: str) -> str:
    return f"{pair}.{entry}"


def protocol(given: Protocol, entries: Sequence[Entry], *, repeats: int, seeds: int) -> Protocol:
    """Return the leaderboard's protocol, with base, scorer and training of another one."""
    concepts = tuple(Concept(name=name, identifier=CONCEPTS[name].identifier) for name in (*PERSONS, *GARMENTS))
    called = {concept.name: concept.identifier for concept in concepts}
    prompts = {
        pair: tuple(world.prompt(scene, person=called[person], garment=called[garment]) for scene in SCENES)
        for pair, (person, garment) in PAIRS.items()
    }
    settings = tuple(
        Setting(
            name=setting_name(pair, entry.name),
            label=entry.label,
            loras=names,
            family=FAMILY,
            method=entry.method,
            weights=entry.weights,
            options=entry.options,
            prompts=pair,
        )
        for pair, names in PAIRS.items()
        for entry in entries
    )
    return replace(
        given,
        name="leaderboard",
        title="Merge methods on eight pairs with a known truth",
        training=replace(given.training, repeats=repeats),
        drawing=replace(given.drawing, seeds=seeds),
        concepts=concepts,
        mixed=(),
        prompts=prompts,
        settings=settings,
    )


def of_ones_own(text: str) -> Entry:
    """Return the entry of a method in a file, ``my.py`` or ``my.py:name``, or in a package, ``package.module:name``.

    Raises:
        OptionError: There is no such file, or not exactly one method in it.
    """
    place, _, name = text.partition(":")
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise OptionError(f"--method {text}: there is no file {file}.")
        sys.path.insert(0, str(file.parent))
        place = file.stem
        name = name or _only_method(place, text)
    if not name:
        raise OptionError(f"--method {text}: wanted my.py, my.py:name or package.module:name.")
    return Entry(name.lower(), name, f"{place}:{name}")


def _only_method(module: str, text: str) -> str:
    found = [name for name, value in vars(importlib.import_module(module)).items() if isinstance(value, Method)]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise OptionError(f"--method {text}: wanted one method in it, found {listed}. Way out: {text}:NAME.")
    return found[0]


def table(job: Job, entries: Sequence[Entry]) -> tuple[Report, str]:
    """Return the leaderboard as a report and as CSV."""
    values = {
        (entry.name, measure.name): [measure.value(job, pair, entry.name) for pair in PAIRS]
        for entry in entries
        for measure in MEASURES
    }
    first = MEASURES[0]
    order = sorted(entries, key=lambda entry: -_over_pairs(values[entry.name, first.name]).mean)
    rows, lines = [], []
    for entry in order:
        cells = []
        for measure in MEASURES:
            mine, theirs = values[entry.name, measure.name], values[AGAINST, measure.name]
            mean, more = _over_pairs(mine), _over_pairs([a - b for a, b in zip(mine, theirs, strict=True)])
            star = " *" if more.excludes_zero and entry.name != AGAINST else ""
            cells.append(f"{mean.mean:.3f}" if entry.name == AGAINST else f"{mean.mean:.3f} ({more:+.3f}){star}")
            lines += [_line(entry, measure, pair, value) for pair, value in zip(PAIRS, mine, strict=True)]
        rows.append((entry.label, *cells))
    told = [f"- {m.name}: {m.text}; {'more' if m.more else 'less'} is better" for m in MEASURES]
    note = (
        f"Means over {len(PAIRS)} pairs; in brackets the difference from the sum over √N, paired, with its 95 % interval "
        "over pairs. A star: the interval leaves out zero."
    )
    head = ("Method", *(measure.name for measure in MEASURES))
    report = Report(job.protocol.title, (section("Leaderboard", told, Table(head, tuple(rows), note)),))
    return report, page.csv_text(lines)


def write(job: Job, entries: Sequence[Entry]) -> list[Path]:
    """Write the leaderboard as a page, as Markdown and as CSV."""
    report, lines = table(job, entries)
    texts = {"leaderboard.html": page.html(report), "leaderboard.md": page.markdown(report), "leaderboard.csv": lines}
    for name, text in texts.items():
        write_text(job.out / name, text)
    return [job.out / name for name in texts]


def _over_pairs(values: Sequence[float]) -> Interval:
    return interval(values, range(len(values)))


def _line(entry: Entry, measure: Measure, pair: str, value: float) -> dict[str, Any]:
    return {"method": entry.label, "measure": measure.name, "pair": pair, "value": value}
