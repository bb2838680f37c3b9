"""Text-to-image pipelines of diffusers, by name."""

from typing import Any

from ..errors import OptionError
from ..merging import check_device
from ..tensors import NAMES, parse_dtype
from ..wording import did_you_mean
from .noise import silence
from .opening import need, opened


def load(
    base: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A pipeline, ready to draw.

    Args:
        base: A diffusers directory, or a name on the Hugging Face Hub.
        device: By default CUDA where there is one.
        dtype: ``"float16"`` …; by default float16 on CUDA and float32 elsewhere.
        variant: Of the files: ``"fp16"``.
        scheduler: Name of a class of diffusers, in place of the pipeline's own.
        quiet: Whether to silence diffusers and transformers in this process.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        FileError: The model is not found, or can't be read.
        OptionError: The scheduler, the dtype or the device is unknown, or the model brings code that is not trusted.
        MissingExtraError: diffusers is not installed.
    """
    need("Drawing", "diffusers", "peft", "transformers")
    import torch

    if quiet:
        silence("diffusers", "transformers")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(place)
    number = getattr(torch, NAMES[parse_dtype(dtype or ("float16" if place.startswith("cuda") else "float32"))])
    if scheduler:
        _scheduler(scheduler)
    pipe = opened(base, dtype=number, variant=variant, trust_remote_code=trust_remote_code)
    if scheduler:
        use_scheduler(pipe, scheduler)
    pipe.set_progress_bar_config(disable=quiet)
    return pipe.to(place)


def use_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler, with the configuration of its own.

    Raises:
        OptionError: diffusers has no scheduler of that name.
    """
    # DDIM clips to [-1, 1] unless told: right for pixels, but latents are larger
    config = {"clip_sample": False, **pipe.scheduler.config}
    pipe.scheduler = _scheduler(name).from_config(config)


def _scheduler(name: str) -> Any:
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise OptionError(
            f"Unknown scheduler {name!r}.{did_you_mean(name, names)} Wanted a class of diffusers, such as "
            "EulerDiscreteScheduler."
        )
    return getattr(diffusers, name)
