"""Options that several commands have, and functions that read what was typed for them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from ..files.storage.workers import cores

if TYPE_CHECKING:
    from ..files import LoRA
    from ..merging.methods import Method

File = Annotated[str, typer.Argument(help="A file, a directory, or a name on the Hugging Face Hub.")]
Files = Annotated[list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write; for peft a directory.")]
To = Annotated[
    str | None, typer.Option("--to", "--dialect", "-t", help="Dialect of the output; see 'loramerge dialects'.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the inputs' by default.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda; default CPU.")]
PROCESSES = "Number of processes, at most; the bytes are the same for any number."
Processes = Annotated[int, typer.Option("--workers", "-j", min=1, help=PROCESSES)]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help=PROCESSES, show_default="one per core, up to 4")
]
Arch = Annotated[str | None, typer.Option("--architecture", help="The model family, where the files leave it open.")]
ArchOfAll = Annotated[
    str | None, typer.Option("--architecture", help="The LoRAs' family, where the files leave it open.")
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="Which adapter, where the file's keys name several of them.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt, tensors only.")]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Leave out what the dialect can't hold.")]
Growth = Annotated[
    bool,
    typer.Option("--allow-growth", help="Write more than ten times the size of the inputs: exact LoKrs and LoHas."),
]
Changed = Annotated[
    bool, typer.Option("--allow-changed", help="Take files other than those that the recipe was made with.")
]
MaxError = Annotated[
    str | None, typer.Option("--max-error", help="Ranks by budget: the error of all modules together, such as 1%.")
]
Energy = Annotated[
    str | None, typer.Option("--energy", help="Ranks by budget: the share of the energy that stays, such as 0.999.")
]
MaxSize = Annotated[
    str | None, typer.Option("--max-size", help="Ranks by budget: the size of the file, such as 150MB.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Threads = Annotated[int, typer.Option("--workers", "-j", min=1, help="Threads; each holds a weight in memory.")]
WeightRule = Annotated[
    str | None,
    typer.Option("--weights", help="A rule: sum (1), uniform (1/N), sqrt (1/√N), l2, equal, energy, energy-sum."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; look at it first.")
]
Base = Annotated[Path | None, typer.Option("--base", help="The base model, for DoRA layers: a directory or file.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Modules to leave out: patterns as in --weight.")]


MOST_WORKERS = 4
"""Default number of workers, at most: more would wait for the reading and writing of one file."""

ROOM = 4 << 30
"""Bytes that workers together may hold in matrices of a ΔW's size, by default."""

MATRICES = 10
"""About how many of those a method on entries holds: benchmarks/results/methods-cpu.md."""


def workers_or_cores(given: int | None, widest: int = 0) -> int:
    """Return the number of workers that was given, or else that of the cores that this process may use.

    Args:
        given: The number as it was typed; None if it wasn't.
        widest: Bytes of the largest ΔW that is formed; 0 for none.
    """
    if given is not None:
        return given
    room = ROOM // (MATRICES * widest) if widest else MOST_WORKERS
    return max(1, min(cores(), MOST_WORKERS, room))


class Scope(StrEnum):
    """The modules over which a rule for weights takes norms."""

    module = "module"
    component = "component"
    whole = "whole"


def named(what: str, items: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of items that were typed as NAME=VALUE.

    Raises:
        OptionError: An item has no equals sign.
    """
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"Can't read the {what} {item!r}: wanted NAME=VALUE.")
        yield name, value


def weights_of(each: list[str] | None, rule: str | None) -> list[str] | str | None:
    """Return the weights as they were typed: one per file, or a rule for all.

    Raises:
        OptionError: Both were given.
    """
    if each and rule:
        raise OptionError("Give either --weight once per file, or --weights, not both.")
    return each or rule


def method_of(text: str) -> "Method | str":
    """Return the method that was typed; the module of ``package.module:name`` may be in the working directory."""
    from ..merging.methods import find
    from ..registry import from_here

    if ":" not in text:
        return text
    with from_here():
        return find(text)


def rank_of(text: str) -> int | str:
    """Return the rank that a text means: a number, or a word."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text


def files_of(given: Sequence[str]) -> list[str]:
    """Return the files that were typed; a folder of several LoRAs stands for all of them, in the order of their numbers."""
    return [file for each in given for file in _files_in(each) or [each]]


def _files_in(folder: str) -> list[str]:
    """Return the LoRAs' files in a folder; none if it isn't one, or if it is the folder of one adapter."""
    from ..files.hub import WEIGHTS

    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if len(found) < 2 or {*WEIGHTS} & {*names}:
        return []
    return [os.path.join(folder, name) for name in sorted(found, key=_numbered)]


def _numbered(name: str) -> list[str | tuple[int, str]]:
    """Return a key that sorts ``step-500`` before ``step-1000``."""
    return [(int(part), part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


@contextmanager
def opened(files: Sequence[str], *, architecture: str | None, allow_pickle: bool = False) -> "Iterator[list[LoRA]]":
    """Open LoRAs, and close them in the end."""
    from ..files.reading import open

    with ExitStack() as stack:
        yield [stack.enter_context(open(file, architecture=architecture, allow_pickle=allow_pickle)) for file in files]
