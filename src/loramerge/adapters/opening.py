"""Pipelines of diffusers by name, and what keeps one from opening, in the user's words."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import FileError, MissingExtraError, OptionError
from ..wording import first_line
from .noise import hushed


def need(what: str, *packages: str) -> None:
    """Refuse work that lacks a package, before anything slow is done.

    Raises:
        MissingExtraError: One is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(f"{what} needs {package}: pip install 'loramerge[diffusers]'.")


def opened(
    source: str | os.PathLike[str], *, dtype: Any, variant: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A pipeline of diffusers.

    Args:
        source: A directory that one was saved in, or its name on the Hugging Face Hub.
        dtype: torch's.
        variant: Which of its files, such as ``"fp16"``.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        FileError: The model is missing or can't be read, or the Hub can't be reached.
        OptionError: It is a single file, or brings code that nobody has allowed to run.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
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
        raise FileError(f"{text} holds no model_index.json, so it is no model that diffusers saved.")
    if not path.exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise FileError(f"Can't load the base model {text}: there is no directory {text}.")


def _code(path: Path, error: Exception) -> str:
    """Which code, for one who wants to look at it."""
    files = [file.relative_to(path).as_posix() for file in sorted(path.glob("**/*.py"))] if path.is_dir() else []
    return ", ".join(files) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return first_line(error).partition(" (Request ID")[0].rstrip(".")
