"""The stage ``truth``: compare what the judge sees in each picture with what should be there.

A picture's share of a concept is the share of the concept's attributes that the judge finds as they are
in the true pictures; all concepts count alike.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from loramerge.errors import FileError
from loramerge.files import file_digest, make_folder, read_text, write_text
from loramerge.scoring import METADATA, Interval, interval, read as read_picture

from ..world import CONCEPTS
from . import scores
from .job import Job, needed
from .ledger import fingerprint, versions
from .scores import Subject
from .sets import REFERENCE

ATTRIBUTES = {
    "person": ("skin", "hair", "style", "beard", "glasses"),
    "garment": ("garment", "pattern", "colour", "second", "emblem"),
    "scarf": ("scarf",),
    "wall": ("wall",),
}
"""The attributes that identify each kind of concept."""
SCENE = "scene"


@dataclass(frozen=True)
class Finding:
    """The judge's answer about one attribute of one picture."""

    setting: str
    prompt: str
    seed: int
    concept: str
    """Name of the concept, or ``"scene"``."""
    attribute: str
    wanted: str
    found: str

    @property
    def right(self) -> bool:
        return self.wanted == self.found


@dataclass(frozen=True)
class Findings:
    """All findings of the pictures under the same prompts."""

    rows: tuple[Finding, ...]

    @property
    def concepts(self) -> tuple[str, ...]:
        """List the concepts that should be there."""
        return tuple(dict.fromkeys(row.concept for row in self.rows if row.concept != SCENE))

    @property
    def attributes(self) -> tuple[tuple[str, str], ...]:
        """List every concept's attributes, and the scene."""
        return tuple(dict.fromkeys((row.concept, row.attribute) for row in self.rows))

    def share(self, setting: str, concepts: Iterable[str], attribute: str | None = None) -> Interval:
        """Return the share of correct attributes, concepts counting alike, with its interval over seeds."""
        values = self._shares(setting, list(concepts), attribute)
        return interval(list(values.values()), [seed for _, seed in values])

    def difference(self, setting: str, other: str, concepts: Iterable[str]) -> Interval:
        """Return a setting's share minus another's, over pictures of the same prompt and seed."""
        wanted = list(concepts)
        mine, theirs = (self._shares(name, wanted, None) for name in (setting, other))
        pairs = [key for key in mine if key in theirs]
        return interval([mine[key] - theirs[key] for key in pairs], [seed for _, seed in pairs])

    def _shares(self, setting: str, concepts: Sequence[str], attribute: str | None) -> dict[tuple[str, int], float]:
        """Compute the shares by prompt and seed."""
        right: dict[tuple[str, int], dict[str, list[bool]]] = {}
        for row in self._rows[setting]:
            if row.concept in concepts and attribute in (None, row.attribute):
                right.setdefault((row.prompt, row.seed), {}).setdefault(row.concept, []).append(row.right)
        return {key: _mean([_mean(found) for found in mine.values()]) for key, mine in right.items()}

    @cached_property
    def _rows(self) -> Mapping[str, list[Finding]]:
        found: dict[str, list[Finding]] = {}
        for row in self.rows:
            found.setdefault(row.setting, []).append(row)
        return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run(job: Job, subject: Subject) -> bool:
    """Judge the pictures of a subject."""
    group, name = subject
    scores.check(job.protocol.scorer)
    shots = scores.shots_of(job, subject)
    target = job.judged_file(group, name)
    known = f"judged/{group}/{target.stem}"
    metadata = needed(job.truth_folder(group, REFERENCE) / METADATA, "data")
    found = fingerprint(
        [(shot.prompt, shot.seed) for shot in shots],
        list(map(file_digest, [*(shot.path for shot in shots), metadata])),
        job.scorer_digest,
        ATTRIBUTES,
        job.device,
        versions("torch", "transformers"),
    )
    if job.ledger.has(known, found, [target]):
        return False
    make_folder(target.parent)
    wanted = truth(job, group)
    told = _judge(job.protocol.scorer.model, job.device).attributes(_pictures([shot.path for shot in shots]))
    rows = [
        [shot.prompt, shot.seed, concept, attribute, value, seen[attribute]]
        for shot, seen in zip(shots, told, strict=True)
        for (concept, attribute), value in wanted[shot.prompt].items()
    ]
    with job.ledger.making(known, found):
        write_text(target, json.dumps(rows) + "\n")
    return True


def truth(job: Job, group: str) -> dict[str, dict[tuple[str, str], str]]:
    """Return the values that all true pictures of a prompt show, by prompt, then concept and attribute."""
    lines = read_text(job.truth_folder(group, REFERENCE) / METADATA).splitlines()
    entries = [json.loads(line) for line in lines]
    owners = {
        attribute: concept.name
        for concept in job.protocol.shown(group)
        for attribute in ATTRIBUTES[CONCEPTS[concept.name].part]
    }
    return {
        prompt: _common([entry["attributes"] for entry in entries if entry["text"] == prompt], owners)
        for prompt in job.protocol.prompts[group]
    }


def _common(all_labels: Sequence[Mapping[str, str | None]], owners: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return the visible attributes of concepts and scene on which the true pictures agree."""
    found = {}
    for attribute, concept in {**owners, SCENE: SCENE}.items():
        values = {labels[attribute] for labels in all_labels}
        value = values.pop()
        if not values and value is not None:
            found[concept, attribute] = value
    return found


@lru_cache(maxsize=1)
def _judge(model: str, device: str) -> Any:
    from .. import judge

    return judge.load(model, device=device)


def _pictures(files: Sequence[Path]) -> Any:
    """Read pictures as bytes of shape ``(n, height, width, 3)``."""
    import numpy as np

    found = [np.asarray(read_picture(file)) for file in files]
    sizes = {picture.shape for picture in found}
    if len(sizes) > 1:
        raise FileError(f"{files[0].parent}: pictures of different sizes, {sorted(sizes)}. Remove the directory.")
    return np.stack(found)


def read(job: Job, group: str, names: Sequence[str]) -> Findings:
    """Read the judge's findings in the pictures of some subjects under the same prompts."""
    rows = []
    for name in names:
        file = needed(job.judged_file(group, name), "truth")
        rows += [Finding(name, *entry) for entry in json.loads(read_text(file))]
    return Findings(tuple(rows))
