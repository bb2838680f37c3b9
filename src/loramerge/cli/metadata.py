"""``loramerge metadata``: the strings in a file's header, shown or changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, named
from .output import Block, print_json, say, table
from .settings import command

LONGEST = 64
"""The most characters of a value in the table."""

COMFYUI_READS = 1 << 20
"""The most bytes of a header whose metadata ComfyUI shows (``/view_metadata`` of its server.py)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge metadata``."""

    file: Annotated[Path, typer.Argument(help="A .safetensors file, which is changed in place.")]
    set: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="KEY=VALUE, such as modelspec.trigger_phrase=woody; repeatable."),
    ] = None
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A key to remove; repeatable.")] = None
    thumbnail: Annotated[Path | None, typer.Option("--thumbnail", help="A picture that user interfaces show.")] = None
    json: Json = False


@command
def run(given: Options) -> None:
    """Show the strings in a file's header, or change them: trigger words, a title, a picture. The tensors stay.

    Example: loramerge metadata person.safetensors --set modelspec.trigger_phrase=woody --thumbnail woody.jpg
    """
    from ..files.editing import edit_metadata, read_metadata
    from ..files.triggers import unread

    entries = dict(named("entry", given.set or []))
    changes = given.set or given.remove or given.thumbnail
    if changes:
        found = edit_metadata(given.file, entries, remove=given.remove or [], thumbnail=given.thumbnail)
    else:
        found = read_metadata(given.file)
    if given.json:
        print_json(found)
        return
    say(_table(found) if found else "No metadata.")
    for note in filter(None, [*map(unread, entries), _too_large(given.file)]):
        say(f"  note: {note}")


def _table(found: dict[str, str]) -> Block:
    return table(["key", "value"], [[key, _shown(key, value)] for key, value in sorted(found.items())])


def _shown(key: str, value: str) -> str:
    """Shorten a value for the table."""
    from ..files.thumbnails import shown

    if picture := shown(key, value):
        return picture
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}… ({len(value)} characters)"


def _too_large(path: Path) -> str:
    """Say that ComfyUI won't show the metadata of a file with a large header; empty if it will."""
    from ..files.storage.reader import SafetensorsFile

    file = SafetensorsFile(path)
    file.close()
    if file.opened.start - 8 <= COMFYUI_READS:
        return ""
    return f"the header has {file.opened.start - 8} bytes, and ComfyUI shows metadata only up to {COMFYUI_READS}"
