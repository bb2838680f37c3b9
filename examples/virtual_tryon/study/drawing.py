"""The stage ``generate``: settings × prompts × seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramerge import LoRA
from loramerge.diffusion import Composed, Sampling, Use, check_fits, generate
from loramerge.files import file_digest

from .bases import drawing_pipeline, title
from .job import Job, cleared, needed
from .ledger import fingerprint, versions
from .loras import LIBRARIES, given, load, merged
from .protocol import Setting

Turn = tuple[LoRA | Composed | None, list[int]]
"""A LoRA or a composition to draw with, None for the base alone, and the seeds of the pictures."""


def draw(job: Job, setting: Setting) -> bool:
    """Draw the missing pictures of a setting.

    Rounding depends on the other pictures of a batch, so an interrupted batch is drawn again as a whole, and a
    resumed run gives the same pictures as an uninterrupted one.
    """
    drawing, shots = job.protocol.drawing, job.shots(setting)
    turns = [(_used(job, setting, repeat), seeds) for repeat, seeds in job.turns(setting)]
    found = depends_on(job, turns)
    folder, known = job.pictures / setting.name, f"pictures/{setting.name}"
    if job.ledger.has(known, found):
        for _, seeds in turns:
            _remove_parts([shot.path for shot in shots if shot.seed in seeds], drawing.batch)
    else:
        if job.ledger.has_any(known):  # the folder is from another run of ours
            cleared(folder)
        job.ledger.add(known, found)
    if all(shot.path.exists() for shot in shots):
        return False
    prompts = list(job.protocol.prompts[setting.prompts])
    pipe = drawing_pipeline(job.protocol.base, job.device, drawing.scheduler)
    check_fits(pipe, given(job))
    for used, seeds in turns:
        generate(
            pipe,
            {setting.name: used if isinstance(used, Composed) else [Use(used)] if used else []},
            prompts,
            seeds,
            job.pictures,
            sampling=Sampling(steps=drawing.steps, guidance=drawing.guidance),
            batch=drawing.batch,
            base=title(job.protocol.base),
        )
    return True


def _used(job: Job, setting: Setting, repeat: int) -> LoRA | Composed | None:
    return composed(job, setting, repeat) if setting.compose else merged(job, setting, repeat)


def composed(job: Job, setting: Setting, repeat: int) -> Composed:
    """Return the LoRAs of a setting with what prompts call them, and their composition."""
    weights = setting.weights if isinstance(setting.weights, tuple) else [1.0] * len(setting.loras)
    concepts = [job.protocol.concept(name) for name in setting.loras]
    uses = [
        Use(load(job, concept.name, repeat), weight, words=concept.identifier, noun=concept.noun)
        for concept, weight in zip(concepts, weights, strict=True)
    ]
    options = {"gates": str(needed(job.merge_file(setting, repeat), "merge"))} if setting.learn else setting.options
    return Composed(uses, setting.compose or "", options)


def depends_on(job: Job, turns: Sequence[Turn]) -> str:
    """Fingerprint all that a setting's pictures depend on, except prompt and seed, which are in their names."""
    drawing = job.protocol.drawing
    return fingerprint(
        drawing.steps,
        drawing.guidance,
        drawing.scheduler,
        drawing.batch,
        [_identity(used) for used, _ in turns],
        job.base_digest,
        job.protocol.base.dtype,
        job.device,
        versions(*LIBRARIES),
    )


def _identity(used: LoRA | Composed | None) -> Any:
    if isinstance(used, Composed):
        gates = used.options.get("gates")
        return (
            used.recipe(),
            [(use.lora.sha256, use.weight) for use in used],
            *([file_digest(Path(gates))] if gates else []),
        )
    return used and used.sha256


def _remove_parts(paths: Sequence[Path], batch: int) -> None:
    """Remove the pictures of incomplete batches."""
    for start in range(0, len(paths), batch):
        part = paths[start : start + batch]
        if not all(path.exists() for path in part):
            for path in part:
                path.unlink(missing_ok=True)
