"""Open text-to-image pipelines of diffusers by name."""

import os
from pathlib import Path
from typing import Any

from ..devices import check_device
from ..errors import FileError, OptionError, did_you_mean, first_line, need
from ..files.storage.paths import path_of
from ..scoring.quiet import hushed, silence
from ..tensors import NAMES, parse_dtype


def load_pipeline(
    base: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a pipeline that is ready to draw.

    Args:
        base: A diffusers directory, or a name on the Hugging Face Hub.
        device: CUDA by default if there is a GPU.
        dtype: ``"float16"`` …; by default float16 on CUDA and float32 elsewhere.
        variant: Which of the repository's files to load, such as ``"fp16"``.
        scheduler: Name of a class of diffusers, instead of the pipeline's own.
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
    """Replace a pipeline's scheduler, keeping its configuration.

    Raises:
        OptionError: diffusers has no scheduler of that name, or its noise doesn't follow the seed.
    """
    # DDIM clips to [-1, 1] by default: right for pixels, but latents are larger
    config = {"clip_sample": False, **pipe.scheduler.config}
    made = _scheduler(name).from_config(config)
    if "noise_sampler_seed" in made.config:
        raise OptionError(
            f"A {name} adds noise that doesn't follow the pictures' seeds. Way out: another scheduler, such as "
            "DPMSolverMultistepScheduler."
        )
    pipe.scheduler = made


def _scheduler(name: str) -> Any:
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise OptionError(
            f"Unknown scheduler {name!r}.{did_you_mean(name, names)} Wanted a class of diffusers, such as "
            "EulerDiscreteScheduler."
        )
    return getattr(diffusers, name)


def opened(
    source: str | os.PathLike[str], *, dtype: Any, variant: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Open a pipeline of diffusers.

    Args:
        source: A directory that diffusers saved, or a name on the Hugging Face Hub.
        dtype: A torch dtype.
        variant: Which of its files, such as ``"fp16"``.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        FileError: The model is missing or can't be read, or the Hub can't be reached.
        OptionError: It is a single file, or brings code that is not trusted.
    """
    text = os.fspath(source)
    path = path_of(source)
    _check(text, path)
    try:
        with hushed():
            from diffusers import DiffusionPipeline

            return DiffusionPipeline.from_pretrained(
                str(path) if path.exists() else text, dtype=dtype, variant=variant, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # diffusers, the Hub's client and the readers of files raise their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise OptionError(
                f"Can't load the base model {text}: this model brings code of its own ({_code(path, error)}): look at "
                "it, then --trust-remote-code (trust_remote_code=True) runs it."
            ) from error
        if path.exists():
            raise FileError(f"Can't load the base model {text}: {_first_line(error)}.") from error
        raise FileError(
            f"Can't load the base model {text}: there is no directory {text}, and no model of that name could be had from "
            f"the Hub ({_first_line(error.__cause__ or error)}). Check the name, the network, and HF_TOKEN for a gated one."
        ) from error


def _check(text: str, path: Path) -> None:
    if path.is_file():
        raise OptionError(
            f"{text} is a single file; wanted a directory that diffusers saved, or a name on the Hub. Way out: "
            "StableDiffusionXLPipeline.from_single_file(…).save_pretrained(DIRECTORY)."
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        raise FileError(f"{text} holds no model_index.json, so it isn't a model that diffusers saved.")
    if not path.exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise FileError(f"Can't load the base model {text}: there is no directory {text}.")


def _code(path: Path, error: Exception) -> str:
    """Name the files of code that a model brings, or what the error says of them."""
    files = [file.relative_to(path).as_posix() for file in sorted(path.glob("**/*.py"))] if path.is_dir() else []
    return ", ".join(files) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return first_line(error).partition(" (Request ID")[0].rstrip(".")


def name_of(pipe: Any) -> str:
    """Return the name or path that a pipeline was loaded by; its class's name if it has none."""
    return str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
