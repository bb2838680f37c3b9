"""Options that several commands have, and how what is typed for them is read."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError

Files = Annotated[list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write; for peft a directory.")]
To = Annotated[str | None, typer.Option("--to", "-t", help="Dialect of the output; see 'loramerge dialects'.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the inputs' by default.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda; default CPU.")]

Base = Annotated[Path | None, typer.Option("--base", help="The base model, for DoRA layers: a directory or file.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Modules to leave out: patterns as in --weight.")]


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


def rank_of(text: str) -> int | str:
    """The rank that a text means: a number, or a word."""
    return int(text) if text.lstrip("-").isdigit() else text
