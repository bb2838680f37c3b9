"""``loramerge ui``: a page in the browser that merges LoRAs, on this machine alone."""

import gc
from dataclasses import dataclass
from typing import Annotated

import typer

from .options import Quiet
from .output import say
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge ui``."""

    folders: Annotated[
        list[str] | None, typer.Argument(help="Folders whose files the page offers; it reads no others by name.")
    ] = None
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 for a free one.")] = 7860
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at; other machines reach any but this one.")
    ] = "127.0.0.1"
    max_upload: Annotated[str, typer.Option("--max-upload", help="The largest file that the page takes.")] = "4GB"
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in a browser.")] = False
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Open a page in the browser: drop LoRAs, see and compare them, merge them, download the result.

    It listens on this machine alone, asks no other host for anything but what is named on the Hugging Face Hub, and
    deletes what it stored when it ends.

    Example: loramerge ui loras/ --browser
    """
    from .page.serving import serve

    gc.enable()  # commands are short; this one isn't
    serve(
        given.folders or (),
        host=given.host,
        port=given.port,
        upload_limit=given.max_upload,
        browser=given.browser,
        announce=lambda address: None if given.quiet else say(f"The page is at {address} until Ctrl-C."),
    )
