"""Options that several commands have, and how what is typed for them is read."""

import os
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError

if TYPE_CHECKING:
    from ..merging.methods import Method

File = Annotated[str, typer.Argument(help="A file, a directory, or a name on the Hugging Face Hub.")]
Files = Annotated[list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write; for peft a directory.")]
To = Annotated[
    str | None, typer.Option("--to", "--dialect", "-t", help="Dialect of the output; see 'loramerge dialects'.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the inputs' by default.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda; default CPU.")]
PROCESSES = "Processes, at most; the bytes are the same for any number."
Processes = Annotated[int, typer.Option("--workers", "-j", min=1, help=PROCESSES)]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help=PROCESSES, show_default="one a core, up to 4")
]
Arch = Annotated[str | None, typer.Option("--architecture", help="The model family, where the file leaves it open.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="Which one, where the file's keys name several adapters.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt, tensors only.")]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Leave out what the dialect can't hold.")]
Growth = Annotated[
    bool, typer.Option("--allow-growth", help="Write more than ten times what went in: exact LoKrs and LoHas.")
]
Changed = Annotated[
    bool, typer.Option("--allow-changed", help="Take files other than those that the recipe was made with.")
]
MaxError = Annotated[
    str | None, typer.Option("--max-error", help="Ranks by budget: the error of all modules together, such as 1%.")
]
Energy = Annotated[str | None, typer.Option("--energy", help="Ranks by budget: the share that stays, such as 0.999.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", help="Ranks by budget: the size of the file: 150MB.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Threads = Annotated[int, typer.Option("--workers", "-j", min=1, help="Threads, each with a weight in memory.")]
WeightRule = Annotated[str | None, typer.Option("--weights", help="uniform, or l2: shares of the norms.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings; look at it first.")
]
Base = Annotated[Path | None, typer.Option("--base", help="The base model, for DoRA layers: a directory or file.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Modules to leave out: patterns as in --weight.")]


MOST_WORKERS = 4
"""Unless told: more would wait for the reading and writing of one file."""

ROOM = 4 << 30
"""Bytes that workers together may hold of matrices of a ΔW's size, unless told."""

MATRICES = 10
"""How many of those a method on entries holds, about: benchmarks/results/methods-cpu.md."""


def workers_or_cores(given: int | None, widest: int = 0) -> int:
    """The number of workers that was given, or that of the cores that this process may use.

    Args:
        given: What was typed.
        widest: Bytes of the largest ΔW that is formed; 0 for none.
    """
    if given is not None:
        return given
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = ROOM // (MATRICES * widest) if widest else MOST_WORKERS
    return max(1, min(usable, MOST_WORKERS, room))


class Scope(StrEnum):
    """What "l2" takes the norms over."""

    module = "module"
    component = "component"
    whole = "whole"


def named(what: str, items: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names and values of what was typed as NAME=VALUE.

    Raises:
        OptionError: An item has no equals sign.
    """
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"Can't read the {what} {item!r}: wanted NAME=VALUE.")
        yield name, value


def weights_of(each: list[str] | None, rule: str | None) -> list[str] | str | None:
    """What was typed for the weights: one a file, or a rule for all.

    Raises:
        OptionError: Both were.
    """
    if each and rule:
        raise OptionError("Give either --weight once a file, or --weights, not both.")
    return each or rule


def method_of(text: str) -> "Method | str":
    """The method that was typed: ``package.module:name`` may be in a module beside where one stands."""
    from ..merging.methods import find
    from ..registry import from_here

    if ":" not in text:
        return text
    with from_here():
        return find(text)


def rank_of(text: str) -> int | str:
    """The rank that a text means: a number, or a word."""
    return int(text) if text.lstrip("-").isdigit() else text
