"""Text-to-image pipelines of diffusers, by name."""

from typing import Any

from ..errors import FileError, MissingExtraError, OptionError
from ..tensors import NAMES, parse_dtype
from ..wording import did_you_mean, first_line
from .noise import silence


def load(
    base: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    quiet: bool = False,
) -> Any:
    """A pipeline, ready to draw.

    Args:
        base: A diffusers directory, or a name on the Hugging Face Hub.
        device: By default CUDA where there is one.
        dtype: ``"float16"`` …; by default float16 on CUDA and float32 elsewhere.
        variant: Of the files: ``"fp16"``.
        scheduler: Name of a class of diffusers, in place of the pipeline's own.
        quiet: Whether to silence diffusers and transformers in this process.

    Raises:
        FileError: The model is not found, or can't be read.
        OptionError: The scheduler or the dtype is unknown.
        MissingExtraError: diffusers is not installed.
    """
    try:
        import diffusers
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"Drawing needs {error.name}: pip install 'loramerge[diffusers]'.") from None
    import torch

    if quiet:
        silence("diffusers", "transformers")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    number = getattr(torch, NAMES[parse_dtype(dtype or ("float16" if place.startswith("cuda") else "float32"))])
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(base, dtype=number, variant=variant)
    except Exception as error:  # diffusers, transformers and the Hub's client raise their own and the system's errors
        raise FileError(
            f"Can't get the model {base}: {first_line(error).rstrip('.')}. Wanted a directory in diffusers' layout, or a name on the "
            "Hugging Face Hub."
        ) from error
    if scheduler:
        use_scheduler(pipe, scheduler)
    pipe.set_progress_bar_config(disable=quiet)
    return pipe.to(place)


def use_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler, with the configuration of its own.

    Raises:
        OptionError: diffusers has no scheduler of that name.
    """
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise OptionError(
            f"Unknown scheduler {name!r}.{did_you_mean(name, names)} Wanted a class of diffusers, such as "
            "EulerDiscreteScheduler."
        )
    # DDIM clips to [-1, 1] unless told: right for pixels, but latents are larger
    config = {"clip_sample": False, **pipe.scheduler.config}
    pipe.scheduler = getattr(diffusers, name).from_config(config)
