"""The stage ``score``: compare every picture with every concept that its prompt asks for, by three views.

Settings are scored one by one, so that a further one changes no digit of the others.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramerge.errors import FileError
from loramerge.files import file_digest, make_folder, read_json, write_text
from loramerge.scoring import Encoder, Reference, Row, Scores, Shot, dinov2, images_in, pixels, score

from .job import Job, needed
from .ledger import fingerprint, versions
from .protocol import Concept, Scorer
from .sets import NOTHING, REFERENCE, TRUE

WHOLE, CROPPED, PIXELS, TRUTH = "whole", "cropped", "pixels", "truth"
"""Views: whole pictures; the parts that show each concept; the pixels themselves; likeness to the true pictures."""
SECOND_WHOLE, SECOND_TRUTH = "second whole", "second truth"
"""Two of the views through the protocol's second encoder."""
Subject = tuple[str, str]
"""The name of a list of prompts, and a setting or a kind of true pictures such as ``:true``."""


def subjects(job: Job) -> list[Subject]:
    """List what is scored: the settings, and true pictures if the world is drawn."""
    true = [(group, f":{what}") for group in job.groups for what in truth_kinds(job, group)] if job.drawn else []
    return [*((setting.prompts, setting.name) for setting in job.settings), *true]


def truth_kinds(job: Job, group: str) -> list[str]:
    """List the kinds of true pictures that are scored like settings."""
    return [TRUE, *(concept.name for concept in job.protocol.shown(group)), NOTHING]


def check(scorer: Scorer) -> None:
    """Refuse a missing scorer.

    Raises:
        FileError: The miniature's judge is missing.
    """
    if scorer.attributes and not (Path(scorer.model) / "attributes.json").is_file():
        raise FileError(
            f"No judge in {scorer.model}: wanted a folder with attributes.json. Ways out: --scorer FOLDER, or train one: "
            "python -m examples.virtual_tryon.train_scorer."
        )


def shots_of(job: Job, subject: Subject) -> list[Shot]:
    """List the pictures of a subject."""
    group, name = subject
    if not name.startswith(":"):
        found = job.shots(job.protocol.setting(name))
        for shot in found:
            needed(shot.path, "generate")
        return found
    return true_shots(job, group, name)


def true_shots(job: Job, group: str, name: str) -> list[Shot]:
    """List true pictures, by prompt and seed."""
    folder = needed(job.truth_folder(group, name.removeprefix(":")), "data")
    count = job.protocol.data.truths
    asked = [(prompt, seed) for prompt in job.protocol.prompts[group] for seed in range(count)]
    return [Shot(name, prompt, seed, folder / f"{i:03d}.png") for i, (prompt, seed) in enumerate(asked)]


def run(job: Job, subject: Subject) -> bool:
    """Score the pictures of a subject."""
    group, name = subject
    check(job.protocol.scorer)
    concepts, shots = job.protocol.shown(group), shots_of(job, subject)
    target = job.score_file(group, name)
    known = f"scores/{group}/{target.stem}"
    true = true_shots(job, group, f":{REFERENCE}") if job.drawn else []
    found = fingerprint(
        concepts,
        {concept.name: list(map(file_digest, _pictures(job, concept))) for concept in concepts},
        [(shot.prompt, shot.seed) for shot in shots],
        [file_digest(shot.path) for shot in [*shots, *true]],
        job.scorer_digest,
        job.device,
        versions("torch", "transformers"),
        *([job.second_digest] if job.protocol.second else []),
    )
    if job.ledger.has(known, found, [target]):
        return False
    make_folder(target.parent)
    views = _views(job, concepts, shots, true)
    with job.ledger.making(known, found):
        write_text(target, json.dumps({view: [_plain(row) for row in rows] for view, rows in views.items()}) + "\n")
    return True


def _pictures(job: Job, concept: Concept) -> list[Path]:
    return images_in(needed(job.set_folder(concept.name), "data"))


def _views(
    job: Job, concepts: Sequence[Concept], shots: Sequence[Shot], true: Sequence[Shot]
) -> Mapping[str, tuple[Row, ...]]:
    encoder = dinov2(job.protocol.scorer.model, device=job.device, quiet=True)
    whole = [Reference(concept.name, _pictures(job, concept)) for concept in concepts]
    cropped = [
        Reference(concept.name, _pictures(job, concept), concept.crop, concept.own_crop)
        for concept in concepts
        if concept.crop
    ]
    found = {WHOLE: score(shots, whole, encoder).rows, PIXELS: score(shots, whole, pixels()).rows}
    if cropped:
        found[CROPPED] = score(shots, cropped, encoder).rows
    if true:
        found[TRUTH] = _likeness(shots, true, encoder, TRUTH)
    if job.protocol.second:
        other = dinov2(job.protocol.second.model, device=job.device, quiet=True)
        found[SECOND_WHOLE] = score(shots, whole, other).rows
        if true:
            found[SECOND_TRUTH] = _likeness(shots, true, other, SECOND_TRUTH)
    return found


def _likeness(shots: Sequence[Shot], true: Sequence[Shot], encoder: Encoder, name: str) -> tuple[Row, ...]:
    """Score each prompt's pictures against the true pictures of that prompt."""
    rows: list[Row] = []
    for prompt in _prompts(shots):
        mine = [shot for shot in shots if shot.prompt == prompt]
        true_ones = Reference(name, [shot.path for shot in true if shot.prompt == prompt])
        rows += score(mine, [true_ones], encoder).rows
    return tuple(rows)


def _prompts(shots: Sequence[Shot]) -> list[str]:
    return list(dict.fromkeys(shot.prompt for shot in shots))


def _plain(row: Row) -> list[Any]:
    return [row.shot.prompt, row.shot.seed, row.reference, row.cosine, row.pairwise]


def read(job: Job, group: str, names: Sequence[str]) -> dict[str, Scores]:
    """Read the scores of some subjects under the same prompts, by view."""
    rows: dict[str, list[Row]] = {}
    for name in names:
        file = needed(job.score_file(group, name), "score")
        shots = {(shot.prompt, shot.seed): shot for shot in shots_of(job, (group, name))}
        for view, found in read_json(file).items():
            rows.setdefault(view, []).extend(
                Row(shots[prompt, seed], reference, cosine, pairwise)
                for prompt, seed, reference, cosine, pairwise in found
            )
    return {view: Scores(view, tuple(found), "seed") for view, found in rows.items()}
