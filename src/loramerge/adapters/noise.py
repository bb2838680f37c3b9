"""What model libraries say beside the point: for programs that speak for themselves."""

from importlib import import_module
from typing import Literal


def silence(*libraries: Literal["diffusers", "transformers"]) -> None:
    """Only errors, and no progress bars, from these libraries, for the rest of the process."""
    for name in libraries:
        log = import_module(f"{name}.utils.logging")
        log.set_verbosity_error()
        log.disable_progress_bar()
