"""``loramerge inspect``: what a LoRA file is. ``inspection`` prints it, which needs no parser of options."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import OptionError
from .options import Adapter, Arch, File, Pickle
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge inspect``."""

    file: File
    norms: Annotated[bool, typer.Option("--norms", help="Read the tensors too: norms by block, as a bar chart.")] = (
        False
    )
    json: Annotated[bool, typer.Option("--json", help="For programs: every module, all metadata.")] = False
    recipe: Annotated[
        bool, typer.Option("--recipe", help="How it was merged, as a recipe that 'loramerge merge' runs again.")
    ] = False
    architecture: Arch = None
    adapter: Adapter = None
    allow_pickle: Pickle = False


@command
def run(given: Options) -> None:
    """Say what a LoRA is: its dialect, family, ranks, alphas, kinds, blocks.

    Example: loramerge inspect person.safetensors --norms
    """
    from .inspection import show, show_recipe

    if given.recipe and (given.json or given.norms):
        raise OptionError(
            "A recipe is TOML, and has no norms. Give --recipe alone, or --json, which has it in the metadata."
        )
    if given.recipe:
        show_recipe(given.file, architecture=given.architecture, adapter=given.adapter, pickle=given.allow_pickle)
        return
    show(
        given.file,
        norms=given.norms,
        as_json=given.json,
        architecture=given.architecture,
        adapter=given.adapter,
        pickle=given.allow_pickle,
    )
