"""A ComfyUI server on the CPU, at loopback, in a folder of its own."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2] / "integrations/comfyui"
MEASURING = Path(__file__).parent / "measuring"
FOLDERS = ("input", "output", "temp", "user", "custom_nodes", "models/loras", "models/checkpoints", "models/vae_approx")
SECONDS = 1800
"""Longest time that a workflow may take."""

OLDER = f'''"""The nodes in the older API, as a ComfyUI without the V3 schema gets them."""
import importlib, sys
from pathlib import Path
pack = Path({str(PACK)!r})
spec = importlib.util.spec_from_file_location("loramerge_nodes", pack / "__init__.py", submodule_search_locations=[str(pack)])
sys.modules["loramerge_nodes"] = importlib.util.module_from_spec(spec)
mappings = importlib.import_module("loramerge_nodes.mappings")
NODE_CLASS_MAPPINGS = mappings.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = mappings.NODE_DISPLAY_NAME_MAPPINGS
'''


class WorkflowError(Exception):
    """A workflow that the server refused, or that ended with a node's error."""


class Server:
    """A running server."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder

    def ask(self, path: str, data: Any = None) -> Any:
        """Return the JSON that the server answers."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise WorkflowError(error.read().decode()) from None

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow in the API's format, and return what its output nodes show.

        Raises:
            WorkflowError: It was refused, or a node failed.
        """
        number = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self.ask(f"/history/{number}").get(number)
            if found:
                if found["status"]["status_str"] != "success":
                    failed = [data for name, data in found["status"]["messages"] if name == "execution_error"]
                    raise WorkflowError("; ".join(f"{e['node_type']}: {e['exception_message']}" for e in failed))
                return found["outputs"]  # type: ignore[no-any-return]
            time.sleep(0.3)
        raise WorkflowError(f"no result within {SECONDS} s")


@contextmanager
def server(checkout: Path, python: str, folder: Path, older: bool = False) -> Iterator[Server]:
    """Run a server with the pack installed.

    Args:
        checkout: ComfyUI's.
        python: The Python of the environment that has its requirements and loramerge.
        folder: An empty folder for models, nodes and pictures; the server's log goes there too.
        older: Whether the nodes are given by the older API.
    """
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if older:
        (folder / "custom_nodes/loramerge_older.py").write_text(OLDER)
    else:
        (folder / "custom_nodes/loramerge").symlink_to(PACK)
    (folder / "custom_nodes/measuring").symlink_to(MEASURING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        python,
        "main.py",
        "--cpu",
        "--force-fp32",
        "--fp32-text-enc",
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    words += ["--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            words, cwd=checkout, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            found = Server(port, folder)
            _wait(found, process)
            yield found
        finally:
            process.terminate()
            process.wait(30)


def _wait(found: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            found.ask("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise WorkflowError(f"ComfyUI did not start: {(found.folder / 'server.log').read_text()[-2000:]}")
