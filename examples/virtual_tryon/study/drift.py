"""The stage ``drift``: how far each merge changes pictures that ask for none of what its LoRAs were trained on.

The base draws some prompts without identifiers, and so does every merge with the same seeds; the scorer compares them.
"""

import json
from typing import Any

from loramerge.diffusion import Sampling, Use, generate
from loramerge.files import make_folder, read_json, write_text
from loramerge.scoring import Interval, Shot, dinov2, drift, interval

from . import bases, loras, scores
from .job import Job, cleared, needed
from .ledger import fingerprint, versions
from .noise import Piece
from .protocol import Setting

BASE = "@base"
"""The base's own pictures, in the place of a setting; no setting can have this name."""


def settings_of(job: Job, group: str) -> list[Setting]:
    """List the settings whose drift is measured: those with LoRAs that act wherever they are loaded."""
    return [s for s in job.settings if s.prompts == group and s.loras and not s.compose]


def pieces(job: Job) -> list[Piece]:
    groups = [group for group in job.groups if job.protocol.drift and settings_of(job, group)]
    return [(group, repeat) for group in groups for repeat in job.repeats]


def run(job: Job, piece: Piece) -> bool:
    """Draw and compare the pictures of a group's settings, with the LoRAs of one training."""
    group, repeat = piece
    asked, drawing = job.protocol.drift, job.protocol.drawing
    assert asked is not None
    scores.check(job.protocol.scorer)
    merged = {setting.name: loras.merged(job, setting, repeat) for setting in settings_of(job, group)}
    seeds, target = list(range(asked.seeds)), job.drift_file(group, repeat)
    found = fingerprint(
        asked,
        drawing,
        {name: lora.sha256 for name, lora in merged.items() if lora},
        job.base_digest,
        job.protocol.base.dtype,
        job.scorer_digest,
        job.device,
        versions(*loras.LIBRARIES),
    )
    known = f"drift/{target.stem}"
    if job.ledger.has(known, found, [target]):
        return False
    folder = target.with_suffix("")
    cleared(folder)
    make_folder(target.parent)
    pipe = bases.drawing_pipeline(job.protocol.base, job.device, drawing.scheduler)
    drawn = generate(
        pipe,
        {BASE: [], **{name: [Use(lora)] for name, lora in merged.items() if lora}},
        asked.prompts,
        seeds,
        folder,
        sampling=Sampling(steps=drawing.steps, guidance=drawing.guidance),
        batch=drawing.batch,
        base=bases.title(job.protocol.base),
    )
    shots = [Shot(one.setting, one.prompt, one.seed, one.path) for one in drawn]
    encoder = dinov2(job.protocol.scorer.model, device=job.device, quiet=True)
    measured: dict[str, list[list[Any]]] = {}
    for row in drift(shots, encoder, base=BASE).rows:
        measured.setdefault(row.shot.setting, []).append([row.shot.prompt, row.cosine])
    with job.ledger.making(known, found):
        write_text(target, json.dumps(measured) + "\n")
    return True


def read(job: Job, group: str) -> dict[str, Interval]:
    """Return the mean drift of a group's settings by name, with its interval over prompts; empty if none was measured."""
    values: dict[str, list[tuple[str, float]]] = {}
    for repeat in job.repeats if job.protocol.drift and settings_of(job, group) else ():
        for name, rows in read_json(needed(job.drift_file(group, repeat), "drift")).items():
            values.setdefault(name, []).extend(rows)
    return {name: interval([value for _, value in r], [prompt for prompt, _ in r]) for name, r in values.items()}
