"""The stage ``generate``: settings × prompts × seeds."""

from collections.abc import Sequence
from pathlib import Path

from loramerge import LoRA
from loramerge.diffusion import Composed, Sampling, Use, check_fits, generate

from .bases import drawing_pipeline
from .job import Job, cleared
from .ledger import fingerprint, versions
from .loras import LIBRARIES, given, load, merged
from .protocol import Setting


def draw(job: Job, setting: Setting) -> bool:
    """Draw the missing pictures of a setting.

    Rounding depends on the other pictures of a batch, so an interrupted batch is drawn again as a whole, and a
    resumed run gives the same pictures as an uninterrupted one.
    """
    drawing, shots = job.protocol.drawing, job.shots(setting)
    used = composed(job, setting) if setting.compose else merged(job, setting)
    batch = batch_size(len(job.seeds(setting)), drawing.batch)
    found = depends_on(job, used, batch)
    folder, known = job.pictures / setting.name, f"pictures/{setting.name}"
    if job.ledger.has(known, found):
        _remove_parts([shot.path for shot in shots], batch)
    else:
        if job.ledger.has_any(known):  # the folder is from another run of ours
            cleared(folder)
        job.ledger.add(known, found)
    if all(shot.path.exists() for shot in shots):
        return False
    prompts = list(job.protocol.prompts[setting.prompts])
    pipe = drawing_pipeline(job.protocol.base, job.device, drawing.scheduler)
    check_fits(pipe, given(job))
    generate(
        pipe,
        {setting.name: used if isinstance(used, Composed) else [Use(used)] if used else []},
        prompts,
        job.seeds(setting),
        job.pictures,
        sampling=Sampling(steps=drawing.steps, guidance=drawing.guidance),
        batch=batch,
        base=job.protocol.base.model.rsplit("/", 1)[-1] if job.protocol.base.miniature else None,
    )
    return True


def composed(job: Job, setting: Setting) -> Composed:
    """Return the LoRAs of a setting with what prompts call them, and their composition."""
    weights = setting.weights if isinstance(setting.weights, tuple) else [1.0] * len(setting.loras)
    concepts = [job.protocol.concept(name) for name in setting.loras]
    uses = [
        Use(load(job, concept.name), weight, words=concept.identifier, noun=concept.noun)
        for concept, weight in zip(concepts, weights, strict=True)
    ]
    return Composed(uses, setting.compose or "", setting.options)


def depends_on(job: Job, used: LoRA | Composed | None, batch: int) -> str:
    """Fingerprint all that a setting's pictures depend on, except prompt and seed, which are in their names."""
    drawing = job.protocol.drawing
    return fingerprint(
        drawing.steps,
        drawing.guidance,
        drawing.scheduler,
        batch,
        (used.recipe(), [(use.lora.sha256, use.weight) for use in used])
        if isinstance(used, Composed)
        else used and used.sha256,
        job.base_digest,
        job.protocol.base.dtype,
        job.device,
        versions(*LIBRARIES),
    )


def _remove_parts(paths: Sequence[Path], batch: int) -> None:
    """Remove the pictures of incomplete batches."""
    for start in range(0, len(paths), batch):
        part = paths[start : start + batch]
        if not all(path.exists() for path in part):
            for path in part:
                path.unlink(missing_ok=True)


def batch_size(seeds: int, most: int) -> int:
    """Return the largest batch size up to ``most`` that divides the number of seeds."""
    return max(size for size in range(1, max(1, min(seeds, most)) + 1) if seeds % size == 0)
