"""Serving the page until it is stopped; whatever it stored is deleted then."""

import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from ...errors import FileError, OptionError, first_line, need
from ...files.storage.paths import path_of
from ...merging.ranks import bytes_of
from .style import CSS, FONT, HOSTS, MONO, POLICY

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Settings of gradio and huggingface_hub, which they read when they are imported."""


def serve(
    folders: Sequence[str | Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    upload_limit: str = "4GB",
    browser: bool = False,
    announce: Callable[[str], object] = print,
) -> None:
    """Serve the page until Ctrl-C or a signal ends the program.

    Args:
        folders: The folders of which the page reads files by name.
        host: The address to listen at; other machines reach any but 127.0.0.1.
        port: The port, or 0 for a free one.
        upload_limit: The largest file that may be uploaded.
        browser: True to open a browser.
        announce: Called with the address of the page, once it is served.

    Raises:
        FileError: A path isn't that of a folder.
        MissingExtraError: gradio isn't installed.
        OptionError: The address can't be listened at, or the limit isn't a size.
    """
    need("The page", "gradio")
    limit = bytes_of("--max-upload", upload_limit)
    paths = [path_of(folder) for folder in folders]
    for folder in paths:
        if not folder.is_dir():
            raise FileError(
                f"{folder} is not a folder. Way out: loramerge ui FOLDER, or without one, and drop files there."
            )
    _check_free(host, port)
    root = Path(tempfile.mkdtemp(prefix="loramerge-ui-"))
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(root))
    before, tempfile.tempdir = tempfile.tempdir, str(root)  # what gradio unpacks an upload in
    try:
        _serve(root, paths, host, port, limit, browser, announce)
    finally:
        tempfile.tempdir = before
        shutil.rmtree(root, ignore_errors=True)


def _check_free(host: str, port: int) -> None:
    """Refuse an address that can't be listened at; gradio would say that its ports are taken, whatever the reason.

    Raises:
        OptionError: The host has no such address, or the port is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OptionError(_CANT_LISTEN.format(host, port, error.strerror)) from None


_CANT_LISTEN = "Can't listen at {}, port {}: {}. Ways out: another --port, or another --host."


def _serve(
    root: Path,
    folders: Sequence[Path],
    host: str,
    port: int,
    upload_limit: int,
    browser: bool,
    announce: Callable[[str], object],
) -> None:
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .layout import Page

    page = Page(root, folders).blocks
    local = [Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))] * (host in HOSTS)
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=browser,
            footer_links=[],
            max_file_size=upload_limit,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gradio.themes.Base(primary_hue="blue", font=FONT, font_mono=MONO),
            css=CSS,
            app_kwargs={"middleware": [*local, Middleware(Guarded)], "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        raise OptionError(_CANT_LISTEN.format(host, port, first_line(error))) from None
    try:
        announce(address)
        Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


class Guarded:
    """Adds the content security policy to every answer of an app."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, guarded)
