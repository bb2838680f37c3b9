"""The stage ``data``: the sets that LoRAs are trained on, and the pictures of a perfect merge."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loramerge.errors import OptionError
from loramerge.files import listing_digest
from loramerge.scoring import METADATA, captioned, digest, ignored_in

from .. import make_sets, world
from ..world import CONCEPTS, SCENES, Example
from . import bases
from .job import Job, cleared
from .ledger import fingerprint
from .protocol import Mixed

REFERENCE = "reference"
"""The true pictures that generated ones are compared with."""
TRUE = "true"
"""Other true pictures, which show the score of a perfect merge."""
NOTHING = "nothing"
"""Pictures under the same prompts with none of the concepts."""
APART = 1_000
"""Offset between the seeds of both kinds of true pictures."""


def make(job: Job) -> bool:
    """Draw the sets, or check the user's folders and mix them; return False if it was done already.

    Raises:
        FileError: A folder or a caption is missing, or a picture can't be read.
        OptionError: A caption does not call the concept by its identifier, or the world does not know it.
    """
    found = _fingerprint(job)
    wanted = [job.set_folder(name) for name in _sets(job)]
    if job.ledger.has("data", found, wanted):
        return False
    with job.ledger.making("data", found):
        for folder in (job.out / "sets", job.out / "truth"):
            cleared(folder)
        if job.drawn:
            _draw(job)
        else:
            _check(job)
            _mix(job)
    return True


def _fingerprint(job: Job) -> str:
    protocol = job.protocol
    if job.drawn:
        place = Path(world.__file__).parent
        code = listing_digest(place, place.rglob("*.py"))
        return fingerprint(
            protocol.data, _sets(job), protocol.mixed, protocol.prompts, code, bases.resolution(protocol.base)
        )
    own = {name: digest(captioned(job.set_folder(name))) for name in _plain(job)}
    return fingerprint(own, protocol.mixed, {name: protocol.concept(name).identifier for name in own})


def _sets(job: Job) -> list[str]:
    """List every set of the run."""
    return [*_plain(job), *(mixed.name for mixed in _mixed(job))]


def _mixed(job: Job) -> list[Mixed]:
    return [mixed for mixed in job.protocol.mixed if job.drawn or mixed.name in job.sets]


def _plain(job: Job) -> list[str]:
    """List the sets of single concepts: all that can be drawn, or those that the run needs."""
    if job.drawn:
        return [concept.name for concept in job.protocol.concepts]
    concepts = [concept.name for group in job.groups for concept in job.protocol.shown(group)]
    mixed = [name for m in _mixed(job) for name in (m.own, m.other)]
    made = {one.name for one in (*job.protocol.mixed, *job.protocol.beside)}
    trained = [name for name in (*job.sets, *job.untrained) if name not in made]
    trained += [one.own for name in job.sets if (one := job.beside(name))]
    return list(dict.fromkeys([*concepts, *mixed, *trained]))


# ---- the drawn world


def _draw(job: Job) -> None:
    data, side = job.protocol.data, bases.resolution(job.protocol.base)
    unknown = [name for name in _plain(job) if name not in CONCEPTS]
    if unknown:
        raise OptionError(f"The world draws no {unknown[0]!r}. It draws: {', '.join(CONCEPTS)}.")
    for name in _plain(job):
        make_sets.write(world.concept_set(CONCEPTS[name], data.count, seed=data.seed), job.set_folder(name), side)
    for mixed in _mixed(job):
        own, other = CONCEPTS[mixed.own], CONCEPTS[mixed.other]
        examples = world.mixed_set(own, other, data.count, mixed.borrowed, seed=data.seed)
        make_sets.write(examples, job.set_folder(mixed.name), side)
    for group in job.protocol.prompts:
        for what, examples in truths(job, group):
            make_sets.write(examples, job.truth_folder(group, what), side)


def truths(job: Job, group: str) -> Iterator[tuple[str, list[Example]]]:
    """Make true pictures for some prompts: of all their concepts (twice), of each alone, of none.

    Each list goes by prompt, then by seed; every example's text is the prompt.
    """
    data, names = job.protocol.data, [concept.name for concept in job.protocol.shown(group)]
    prompts = job.protocol.prompts[group]
    scenes = [scene_of(prompt, names) for prompt in prompts]

    def shown(some: Sequence[str], seed: int) -> list[Example]:
        concepts = [CONCEPTS[name] for name in some]
        return [
            replace(world.truth(concepts, scene, seed=seed + i), text=prompt)
            for prompt, scene in zip(prompts, scenes, strict=True)
            for i in range(data.truths)
        ]

    yield REFERENCE, shown(names, data.seed)
    yield TRUE, shown(names, data.seed + APART)
    for name in names:
        yield name, shown([name], data.seed + APART)
    yield NOTHING, shown([], data.seed + APART)


def scene_of(prompt: str, names: Sequence[str]) -> str:
    """Find the scene that a prompt asks for.

    Raises:
        OptionError: It is none of the world's.
    """
    asked = {world.truth([CONCEPTS[name] for name in names], scene, seed=0).text: scene for scene in SCENES}
    if prompt not in asked:
        known = "\n".join(asked)
        raise OptionError(f"The world does not know the truth about {prompt!r}. With these concepts it knows:\n{known}")
    return asked[prompt]


# ---- the user's folders


def left_out(job: Job) -> list[str]:
    """Describe the files in the user's folders that aren't pictures, one line per folder."""
    folders = [] if job.drawn else [job.set_folder(name) for name in _plain(job)]
    return [line for folder in folders if folder.is_dir() and (line := ignored_in(folder))]


def _check(job: Job) -> None:
    """Check that every caption names its concept."""
    for name in _plain(job):
        concept = job.protocol.concept(name)
        without = [p for p in captioned(job.set_folder(name)) if concept.identifier not in p.caption]
        if without:
            raise OptionError(
                f"{without[0].path}: the caption {without[0].caption[:60]!r} does not say {concept.identifier!r}, by which "
                f"prompts call the {name}; {len(without)} captions of {job.set_folder(name)} don't."
            )


def _mix(job: Job) -> None:
    """Copy one set and the first pictures of another into one folder."""
    for mixed in _mixed(job):
        theirs = captioned(job.set_folder(mixed.other))
        if len(theirs) < mixed.borrowed:
            raise OptionError(
                f"{mixed.name} borrows {mixed.borrowed} pictures of {mixed.other}, which has {len(theirs)}."
            )
        folder = job.set_folder(mixed.name)
        folder.mkdir(parents=True)
        lines = []
        for i, picture in enumerate([*captioned(job.set_folder(mixed.own)), *theirs[: mixed.borrowed]]):
            name = f"{i:03d}{picture.path.suffix.lower()}"
            shutil.copyfile(picture.path, folder / name)
            lines.append(json.dumps({"file_name": name, "text": picture.caption}, ensure_ascii=False))
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
