"""``loramerge push``: a LoRA on the Hugging Face Hub, with a card that says what its file records."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Quiet
from .output import joined, print_notes, say
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge push``."""

    file: Annotated[str, typer.Argument(help="A .safetensors file, or the directory of a PEFT adapter.")]
    repo: Annotated[str, typer.Argument(help="The repository on the Hub: org/name.")]
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base model's repository, where the file doesn't name it.")
    ] = None
    license: Annotated[
        str | None, typer.Option("--license", help="The licence of this file, such as openrail++; see the parents'.")
    ] = None
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A further tag, such as text-to-image.")] = None
    picture: Annotated[list[Path] | None, typer.Option("--picture", help="A picture for the card.")] = None
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names, the card too.")] = (
        False
    )
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and upload nothing.")] = False
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Upload a LoRA to the Hugging Face Hub, with a model card of what its file records.

    Example: loramerge push both.safetensors me/both --license openrail++ --dry-run
    """
    from ..merging.publishing import model_card, push

    notes: list[str] = []
    facts: dict[str, Any] = {
        "base_model": given.base_model,
        "license": given.license,
        "tags": given.tag or (),
        "pictures": given.picture or (),
        "noted": notes.append,
    }
    if given.dry_run:
        say(joined(model_card(given.file, given.repo, **facts).splitlines()))
        for note in notes if not given.quiet else ():
            say(f"note: {note}", file=sys.stderr)
        return
    _show_no_bars(given.quiet)
    address = push(given.file, given.repo, private=given.private, overwrite=given.overwrite, **facts)
    if not given.quiet:
        say(f"→ {given.repo}: {address}")
        print_notes(notes, [])


def _show_no_bars(quiet: bool) -> None:
    """Keep huggingface_hub from drawing where nobody looks."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
