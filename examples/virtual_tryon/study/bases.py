"""Load the base model: as a pipeline that draws, and as a denoiser to learn on."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from loramerge.errors import FileError
from loramerge.files import read_json

from .protocol import Base


def check(base: Base) -> None:
    """Refuse a missing miniature before any work is done.

    Raises:
        FileError: The miniature is missing.
    """
    if base.miniature and not (Path(base.model) / "model_index.json").is_file():
        raise FileError(
            f"No miniature base in {base.model}: wanted a folder with model_index.json. In a protocol a path that begins "
            "with a dot counts from the protocol's own folder. Ways out: another path there, or --base FOLDER."
        )


def resolution(base: Base) -> int:
    """Return the side of the miniature's pictures in pixels."""
    check(base)
    return int(read_json(Path(base.model) / "vae" / "config.json")["sample_size"])


def title(base: Base) -> str | None:
    """Return the miniature's name for the metadata of pictures; None for the name that a model was loaded by."""
    return base.model.rsplit("/", 1)[-1] if base.miniature else None


def denoiser(base: Base, device: str, *, checkpointing: bool = False) -> Any:
    """Load the base to learn on."""
    from loramerge.diffusion import load
    from loramerge.scoring import silence

    silence("diffusers", "transformers")
    source = pipeline(base, device) if base.miniature else base.model
    return load(source, device=device, checkpointing=checkpointing, variant=base.variant)


def pipeline(base: Base, device: str) -> Any:
    """Load the base with its own scheduler.

    Raises:
        FileError: It is missing or can't be read.
    """
    if not base.miniature:
        from loramerge.diffusion import load_pipeline

        return load_pipeline(base.model, device=device, dtype=base.dtype, variant=base.variant, quiet=True)
    from .. import model

    check(base)
    model.quiet()
    return model.load(base.model, device=device)


@lru_cache(maxsize=1)
def drawing_pipeline(base: Base, device: str, scheduler: str | None) -> Any:
    """Load the base with the protocol's scheduler; cached, because one process draws many settings."""
    from loramerge.diffusion import use_scheduler

    pipe = pipeline(base, device)
    if scheduler:
        use_scheduler(pipe, scheduler)
    return pipe
