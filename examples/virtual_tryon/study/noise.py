"""The stage ``noise``: errors of the noise that the base predicts with a merge, on true pictures and on the sets.

Examples, times and noise are the same for all merges of a pair.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramerge import LoRA
from loramerge.diffusion import Images, applied, from_images
from loramerge.files import file_digest, make_folder, read_json, write_text
from loramerge.scoring import METADATA

from . import bases, loras
from .job import Job, needed
from .ledger import fingerprint, versions
from .sets import REFERENCE

JOINT, FIT = "joint", "fit"
EXAMPLES = 64
"""Noised pictures of each kind."""
Piece = tuple[str, int]
"""The name of a pair's prompts, and the number of the training."""


def pieces(job: Job) -> list[Piece]:
    return [(group, repeat) for group in job.groups for repeat in job.repeats]


def run(job: Job, piece: Piece) -> bool:
    """Measure every merge of a pair."""
    group, repeat = piece
    settings = [setting for setting in job.settings if setting.prompts == group]
    names = settings[0].loras
    folders = [job.truth_folder(group, REFERENCE), *map(job.set_folder, names)]
    merged = {setting.name: loras.merged(job, setting, repeat) for setting in settings}
    alone = [loras.load(job, name, repeat) for name in names]
    target = _file(job, group, repeat)
    found = fingerprint(
        {name: lora.sha256 for name, lora in merged.items() if lora},
        [lora.sha256 for lora in alone],
        [file_digest(needed(folder / METADATA, "data")) for folder in folders],
        EXAMPLES,
        job.base_digest,
        versions(*loras.LIBRARIES),
    )
    known = f"noise/{target.stem}"
    if job.ledger.has(known, found, [target]):
        return False
    make_folder(target.parent)
    denoiser = bases.denoiser(job.protocol.base, job.device)
    errors = Errors(denoiser, folders, alone, seed=job.protocol.data.seed)
    measured = {name: errors.of(lora) for name, lora in merged.items()}
    with job.ledger.making(known, found):
        write_text(target, json.dumps(measured) + "\n")
    return True


class Errors:
    """Measures merges of some LoRAs on noised pictures that are the same for all of them.

    Args:
        denoiser: The base, loaded to learn on.
        folders: The true pictures of all concepts, then the set of each LoRA.
        alone: The LoRAs.
        seed: Of times and noise.
    """

    def __init__(self, denoiser: Any, folders: Sequence[Path], alone: Sequence[LoRA], *, seed: int) -> None:
        images = from_images(denoiser, folders, flip=False)
        noised = [_noised(images, i, seed) for i in range(len(folders))]
        self.denoiser, self.wanted = denoiser, noised[0][1]
        self.batches = [batch for batch, _ in noised]
        own = self.batches[1:]
        base = _predicted(denoiser, None, own)
        self.teachers = [_predicted(denoiser, lora, [batch])[0] for lora, batch in zip(alone, own, strict=True)]
        self.effects = [_distance(b, t) for b, t in zip(base, self.teachers, strict=True)]

    def of(self, merged: LoRA | None) -> dict[str, float]:
        """Return a merge's errors by name; None is the base alone."""
        joint, *apart = _predicted(self.denoiser, merged, self.batches)
        fits = [_distance(p, t) / effect for p, t, effect in zip(apart, self.teachers, self.effects, strict=True)]
        return {JOINT: _distance(joint, self.wanted), FIT: sum(fits) / len(fits)}


def read(job: Job, group: str, what: str) -> Mapping[str, float]:
    """Return a measure of every merge of a pair, by the setting's name: the mean over the trainings."""
    found: list[Any] = [read_json(needed(_file(job, group, repeat), "noise")) for repeat in job.repeats]
    return {name: sum(each[name][what] for each in found) / len(found) for name in found[0]}


def _file(job: Job, group: str, repeat: int) -> Any:
    return job.out / "noise" / f"{group}@{repeat + 1}.json"


def _noised(images: Images, folder: int, seed: int) -> tuple[Any, Tensor]:
    """Return noised pictures of a folder as a batch, and what the base should predict of them."""
    generator = torch.Generator().manual_seed(seed)
    held, schedule = images.latents[folder][:, 0], images.schedule
    chosen = torch.arange(EXAMPLES) % len(held)
    noise = torch.randn((EXAMPLES, *held.shape[1:]), generator=generator)
    timesteps = schedule.timesteps(EXAMPLES, generator)
    sample = schedule.noised(held[chosen], noise, timesteps)
    batch = images.conditions[folder].batch(sample, timesteps, chosen)
    return batch, schedule.target(held[chosen], noise, timesteps)


@torch.no_grad()
def _predicted(denoiser: Any, lora: LoRA | None, batches: Sequence[Any]) -> list[Tensor]:
    with applied(denoiser.pipe, [(lora, 1.0)] if lora else []):
        return [denoiser.predict(batch).float() for batch in batches]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())
