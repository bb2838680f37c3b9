"""``loramerge convert``: a LoRA under another tool's names."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import size
from .options import (
    Adapter,
    Arch,
    Dtype,
    Exclude,
    File,
    Growth,
    Lossy,
    Output,
    Pickle,
    Quiet,
    Workers,
    workers_or_cores,
)
from .output import as_directory, print_notes, progress, say
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge convert``."""

    file: File
    output: Output
    to: Annotated[str, typer.Option("--to", "--dialect", "-t", help="Dialect of the output; see 'loramerge dialects'.")]
    exclude: Exclude = None
    dtype: Dtype = None
    architecture: Arch = None
    adapter: Adapter = None
    map: Annotated[
        list[str] | None,
        typer.Option("--map", help="Other numbers for a list of blocks, such as 'blocks.{i}=blocks.{i+12}'."),
    ] = None
    allow_lossy: Lossy = False
    allow_growth: Growth = False
    allow_pickle: Pickle = False
    workers: Workers = None
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Write a LoRA under another tool's names; what it does to the model stays the same.

    Example: loramerge convert person.safetensors -o person-diffusers.safetensors --to diffusers
    """
    from ..files.dialects import written_dialect
    from ..files.reading import open
    from ..files.renumbering import pairs, renumbered
    from ..files.writing import check_apart, check_growth, check_target, save, saved_size

    target = check_target(given.output, given.to)
    with (
        open(
            given.file, architecture=given.architecture, adapter=given.adapter, allow_pickle=given.allow_pickle
        ) as opened,
        progress("Converting", given.quiet) as report,
    ):
        check_apart([given.file, *opened.paths], target)
        lora = renumbered(opened, pairs(given.map), given.to) if given.map else opened
        kept = lora.exclude(*given.exclude) if given.exclude else lora
        dialect = written_dialect(given.to).name
        length = saved_size(kept, given.to, given.dtype, allow_lossy=given.allow_lossy)
        if not given.allow_growth:
            check_growth(kept, length, dialect)
        if not given.quiet:
            family = " or ".join(lora.families) or "unknown family"
            say(f"{lora.name} ({lora.dialect}, {family}) → {target} ({dialect}, {size(length)})")
        lost: list[str] = []
        noted: list[str] = []
        path = save(
            kept,
            given.output,
            dialect=given.to,
            dtype=given.dtype,
            allow_lossy=given.allow_lossy,
            allow_growth=given.allow_growth,
            workers=workers_or_cores(given.workers),
            progress=report,
            lost=lost.append,
            noted=noted.append,
        )
        if not given.quiet:
            print_notes((*lora.notes, *as_directory(given.output, path), *noted), lost)
