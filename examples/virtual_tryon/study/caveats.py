"""Describe how a run differs from the study, from the run itself."""

from pathlib import Path

from .job import Job
from .protocol import Protocol, Training

BASE, ENCODER, LEARNING_RATE, RESOLUTION = "stable-diffusion-xl-base-1.0", "dinov2-base", 1e-4, 512
"""The study's settings; its models by the last part of their names."""
ITS = Training(rank=8, steps=400, batch_size=1, learning_rate=LEARNING_RATE, resolution=RESOLUTION, flip=True)
SEEDS = 1
"""Pictures per prompt and setting in the study."""


def caveats(job: Job, *, repeats: bool) -> list[str]:
    """List the differences for the top of a report.

    Args:
        job: The run.
        repeats: Whether its settings are the study's, which makes training and seeds comparable too.
    """
    found = [_base(job.protocol), _encoder(job.protocol)]
    if repeats:
        found += [_training(job), _seeds(job.protocol.drawing.seeds)]
    return [line for line in found if line]


def sizes(job: Job) -> str:
    """Say how far the scores can be compared with the published ones."""
    others = [
        what
        for what, so in (
            ("another encoder", not _its(job.protocol.scorer.model, ENCODER)),
            ("another base", not _its(job.protocol.base.model, BASE)),
            ("drawn pictures", job.drawn),
        )
        if so
    ]
    if not others:
        return (
            "Encoder and base are the study's. With its photographs the sizes can be compared with the published ones, with "
            "others the order alone."
        )
    return f"The sizes can't be compared with the published ones, because of {' and '.join(others)}; the order can."


def _its(model: str, name: str) -> bool:
    return Path(model).name.lower() == name


def _base(protocol: Protocol) -> str:
    if protocol.base.miniature:
        return "The base is a miniature: a model of SDXL's classes and names, some 400 times smaller, which draws cartoons."
    return (
        ""
        if _its(protocol.base.model, BASE)
        else f"The base is {named(protocol.base.model)}; the study's was SDXL 1.0."
    )


def _encoder(protocol: Protocol) -> str:
    if protocol.scorer.attributes:
        return (
            "The judge is an encoder of DINOv2's architecture that was trained on such drawings. Scores are cosines in its "
            "space, not DINOv2's."
        )
    if _its(protocol.scorer.model, ENCODER):
        return ""
    return (
        f"Scores are cosines in the space of {named(protocol.scorer.model)}, not of DINOv2 base, the study's encoder."
    )


def _training(job: Job) -> str:
    training = job.protocol.training
    if not job.untrained:
        return "No LoRA was trained here: all are those that the protocol names."
    side = "the base's own" if training.resolution is None else f"{training.resolution} pixels"
    rows = (
        ("rank", training.rank, ITS.rank),
        ("steps", training.steps, ITS.steps),
        ("batch", training.batch_size, ITS.batch_size),
        ("learning rate", f"{training.learning_rate:g}", f"{ITS.learning_rate:g}"),
        ("layers", training.targets, ITS.targets),
        ("size of the pictures", side, f"{RESOLUTION} pixels"),
        ("flips", "yes" if training.flip else "no", "yes"),
    )
    others = [f"{what} {ours} (the study: {theirs})" for what, ours, theirs in rows if ours != theirs]
    return f"Trained otherwise than in the study: {', '.join(others)}." if others else ""


def _seeds(count: int) -> str:
    pictures = f"{count} pictures of each prompt" if count > 1 else "1 picture of each prompt"
    return "" if count == SEEDS else f"{pictures} and setting, where the study drew {SEEDS}."


def named(model: str) -> str:
    """Return a model's short name: the last part of a directory's path."""
    return model.rsplit("/", 1)[-1] if model.startswith("/") else model
