"""Every error of loramerge, under one root.

Each message says what went wrong, where, what was found, what was wanted and what to do next.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self


class LoRAMergeError(Exception):
    """The root of every error that loramerge raises on purpose."""

    placed = False
    """Whether the message says already in which module it arose."""

    def at(self, place: str) -> Self:
        """The same error with its place in front; an error that has one keeps it."""
        if self.placed:
            return self
        found = type(self)(f"{place}: {self}")
        found.placed = True
        return found


class FileError(LoRAMergeError):
    """A file can't be read or written: missing, truncated, hostile, not writable."""


class NotALoRAError(LoRAMergeError):
    """The tensors are readable, but they are not a LoRA."""


class LayerError(LoRAMergeError):
    """The tensors of one module don't form an update of its weight."""


class FamilyError(LoRAMergeError):
    """What a file says of its model family contradicts its layers, or doesn't tell which of several it is."""


class NoFactorsError(LoRAMergeError):
    """A layer has no exact low-rank form, so it can't be merged as one."""


class NumberError(LoRAMergeError):
    """NaN or infinity was read, or a value doesn't fit the dtype asked for."""


class DialectError(LoRAMergeError):
    """A dialect can't hold what the LoRA has."""


class MergeError(LoRAMergeError):
    """These LoRAs can't be merged as asked."""


class OptionError(LoRAMergeError):
    """An option, a name or a weight is not one that loramerge knows."""


class MissingExtraError(LoRAMergeError):
    """An optional package is needed."""


class DeviceMemoryError(LoRAMergeError):
    """The memory of the GPU, or of the machine, does not suffice."""


EXTRAS = {
    "torch": "torch",
    "array_api_compat": "torch",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "peft": "diffusers",
    "accelerate": "diffusers",
    "PIL": "diffusers",
    "matplotlib": "plots",
    "cma": "search",
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that names the nearest of the known names, after a space; empty where none is near."""
    import difflib

    lowered = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def an(noun: str) -> str:
    """The noun with its article: ``an oft``, ``a lora``."""
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the lines that follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def span(low: float, high: float) -> str:
    """Return the smallest and the largest of some numbers as people read them: ``4 to 16``, or ``4``."""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
