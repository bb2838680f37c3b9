"""What model libraries say beside the point: for programs that speak for themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Literal

LIBRARIES = ("diffusers", "transformers")
BESIDE = ("requires torchvision", "Expected types for ", "Couldn't connect to the Hub")
"""Lines that say nothing of a model that loads: of a package that nothing here needs, of a component with another class
than the pipeline's own, of the Hub where a copy is at hand; where there is none, the error says so."""


def silence(*libraries: Literal["diffusers", "transformers"]) -> None:
    """Only errors, and no progress bars, from these libraries, for the rest of the process."""
    for name in libraries:
        log = import_module(f"{name}.utils.logging")
        log.set_verbosity_error()
        log.disable_progress_bar()


@contextmanager
def hushed() -> Iterator[None]:
    """Leave out the lines that say nothing of a model, and no others, while it is loaded."""
    handlers = [handler for name in LIBRARIES for handler in _logger(name).handlers]
    for handler in handlers:
        handler.addFilter(_to_the_point)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_to_the_point)


def _logger(library: str) -> logging.Logger:
    """A library's own logger, whose handler is there from the first time that it is asked for."""
    found: logging.Logger = import_module(f"{library}.utils.logging").get_logger(library)
    return found


def _to_the_point(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in BESIDE)
