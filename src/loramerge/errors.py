"""Every error of loramerge, under one root.

Each message says what went wrong, where, what was found, what was expected and what to do next.

    LoRAMergeError
    ├── FileError           a file can't be read or written
    ├── NotALoRAError       readable tensors that aren't a LoRA
    ├── LayerError          one module's tensors don't fit together
    ├── FamilyError         the model family is contradictory or unclear
    ├── NoFactorsError      a layer without an exact low-rank form
    ├── NumberError         NaN, infinity, or a value too large for a dtype
    ├── DialectError        the dialect can't express the LoRA
    ├── MergeError          these LoRAs can't be merged as asked
    ├── OptionError         an unknown option, name or weight
    ├── MissingExtraError   an optional package is needed
    └── DeviceMemoryError   out of GPU or host memory
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self


class LoRAMergeError(Exception):
    """Base class of every error that loramerge raises on purpose."""

    placed = False
    """True if the message already names the module it came from."""

    def at(self, place: str) -> Self:
        """Return this error with its place in front of the message; one that has a place keeps it."""
        if self.placed:
            return self
        found = type(self)(f"{place}: {self}")
        found.placed = True
        return found


class FileError(LoRAMergeError):
    """A file can't be read or written: missing, truncated, hostile, not writable."""


class NotALoRAError(LoRAMergeError):
    """The tensors are readable, but they aren't a LoRA."""


class LayerError(LoRAMergeError):
    """The tensors of one module don't form an update of its weight."""


class FamilyError(LoRAMergeError):
    """The model family that a file names contradicts its layers, or several families fit."""


class NoFactorsError(LoRAMergeError):
    """A layer has no exact low-rank form, so it can't be merged as one."""


class NumberError(LoRAMergeError):
    """NaN or infinity was read, or a value doesn't fit the dtype asked for."""


class DialectError(LoRAMergeError):
    """A dialect can't express something that the LoRA has."""


class MergeError(LoRAMergeError):
    """These LoRAs can't be merged as asked."""


class OptionError(LoRAMergeError):
    """An option, a name or a weight is unknown or has a wrong value."""


class MissingExtraError(LoRAMergeError):
    """An optional package is needed."""


class DeviceMemoryError(LoRAMergeError):
    """Out of GPU or host memory."""


@contextmanager
def within(where: str) -> Iterator[None]:
    """Prefix errors of loramerge that are raised inside of the block with where they arose, unless they have a place."""
    try:
        yield
    except LoRAMergeError as error:
        raise error.at(where) from None


@contextmanager
def computing(where: str) -> Iterator[None]:
    """Do as `within` does, for a block that computes: memory that doesn't suffice is an error of loramerge, too.

    Raises:
        DeviceMemoryError: Memory ran out.
    """
    import numpy as np

    with within(where), np.errstate(over="ignore", invalid="ignore"):  # infinity is refused by name, not warned of
        try:
            yield
        except MemoryError as error:
            raise DeviceMemoryError(f"out of memory: {first_line(error)}") from error


EXTRAS = {
    "torch": "torch",
    "array_api_compat": "torch",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "peft": "diffusers",
    "accelerate": "diffusers",
    "PIL": "diffusers",
    "scipy": "diffusers",
    "matplotlib": "plots",
    "cma": "search",
    "gradio": "ui",
}
"""The extra of loramerge that installs each optional package."""


def need(what: str, *packages: str) -> None:
    """Check that packages are installed, before anything slow is done.

    Args:
        what: What needs them, as the subject of a sentence.
        packages: Names under which they are imported.

    Raises:
        MissingExtraError: One isn't installed.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(_missing(what, package))


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Name the extra to install where an import inside of the block fails.

    Raises:
        MissingExtraError: An optional package isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(_missing(what, package)) from None


def _missing(what: str, package: str) -> str:
    return f"{what} needs {package}: pip install 'loramerge[{EXTRAS[package]}]'."


def check_callable(**functions: object) -> None:
    """Refuse an argument that is to be called and can't be; None is none.

    Raises:
        OptionError: One can't be called.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise OptionError(f"{name} is {function!r}, wanted a function.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" for the most similar known name, or an empty string if none is similar."""
    import difflib

    lowered = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def counted(count: int, noun: str) -> str:
    """Put a number in front of a noun: ``1 module``, ``32 modules``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def an(noun: str) -> str:
    """Put the article in front of a noun: ``an oft``, ``a lora``."""
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def size(count: float) -> str:
    """Format a number of bytes: ``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def span(low: float, high: float) -> str:
    """Return the smallest and the largest of some numbers as people read them: ``4 to 16``, or ``4``."""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
