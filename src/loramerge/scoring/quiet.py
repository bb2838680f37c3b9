"""Silence irrelevant log lines of diffusers and transformers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Literal

LIBRARIES = ("diffusers", "transformers")
BESIDE = ("requires torchvision", "Expected types for ", "Couldn't connect to the Hub")
"""Log lines that are irrelevant while a model loads: a missing package that isn't needed, a component of another class
than the pipeline's own, an unreachable Hub although there is a local copy; without a copy, the error says so."""


def silence(*libraries: Literal["diffusers", "transformers"]) -> None:
    """Show only errors and no progress bars of these libraries for the rest of the process."""
    for name in libraries:
        log = import_module(f"{name}.utils.logging")
        log.set_verbosity_error()
        log.disable_progress_bar()


@contextmanager
def hushed() -> Iterator[None]:
    """Drop the irrelevant log lines, and no others, inside the block."""
    handlers = [handler for name in LIBRARIES for handler in _logger(name).handlers]
    for handler in handlers:
        handler.addFilter(_to_the_point)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_to_the_point)


def _logger(library: str) -> logging.Logger:
    """Return a library's own logger; the first call adds its handler."""
    found: logging.Logger = import_module(f"{library}.utils.logging").get_logger(library)
    return found


def _to_the_point(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in BESIDE)
