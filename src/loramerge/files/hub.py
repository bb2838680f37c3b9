"""Fetching files from the Hugging Face Hub, and what repositories there say of themselves."""

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ..errors import FileError, did_you_mean, first_line
from .architectures.names import COMPONENTS
from .storage.pickles import PICKLES

SPECIAL = r"refs/(?:pr/\d+|convert/[\w.-]+)"
"""Revisions whose slashes are written as they are; in others a slash is ``%2F``."""

REFERENCE = re.compile(
    rf"(?P<repo>[\w.-]+/[\w.-]+)"
    rf"(?:@(?P<revision>{SPECIAL}(?=/|$)|[\w.%+-]+)(?:/(?P<file>.+))?"
    rf"|/(?P<older_file>[^@]+)(?:@(?P<older_revision>[\w./%+-]+))?)?",
    re.ASCII,
)
"""``org/repo@revision/file``, as huggingface_hub writes it, and our older ``org/repo/file@revision``.

Source: https://huggingface.co/docs/huggingface_hub/main/en/package_reference/hf_uris
"""

URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?",
    re.ASCII,
)
"""A repository, or a file in it, as a browser shows it."""

MOST = 6
"""The most names that a message lists."""

WEIGHTS = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
"""File names that diffusers and PEFT use, preferred if a repository has several files."""


ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
"""The files of a PEFT adapter; those of text encoders are in directories beside them."""


class Reference(NamedTuple):
    """A repository on the Hub, with a file in it and a revision if they were named."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        if not self.revision:
            return f"hf://{self.repo}{file}"
        if file and "@" not in file:  # the order in the recipes of merged files
            return f"hf://{self.repo}{file}@{self.revision}"
        revision = self.revision if re.fullmatch(SPECIAL, self.revision) else quote(self.revision, safe="+")
        return f"hf://{self.repo}@{revision}{file}"


def parse(text: str) -> Reference | None:
    """Read ``org/repo``, ``org/repo/file.safetensors``, ``hf://org/repo@revision`` …; None if it isn't such a name."""
    uri = text.startswith("hf://")
    match = REFERENCE.fullmatch(text.removeprefix("hf://").removeprefix("models/").strip("/") if uri else text)
    if not match or (not uri and text.startswith((".", "/", "~"))):
        return None
    revision = match["revision"] or match["older_revision"]
    return Reference(match["repo"], match["file"] or match["older_file"], unquote(revision) if revision else None)


def named_by(url: str) -> str:
    """Return what to write instead of a URL, which is not fetched."""
    match = URL.fullmatch(url)
    if not match:
        return "download the file first; of a repository on the Hub, org/repo/file.safetensors is fetched"
    file = f"/{match['file']}" if match["file"] else ""
    revision = "" if match["revision"] in (None, "main") else f"@{match['revision']}"
    return f"{match['repo']}{file}{revision}, which is fetched from the Hub"


def download(reference: Reference) -> Path:
    """Fetch the file, or a PEFT adapter's directories, unless they are in the Hub's cache; return the path on this disk.

    Raises:
        FileError: The repository, the revision or the file is missing, private or gated, or can't be reached.
    """
    if reference.file and posixpath.basename(reference.file) not in ADAPTER[:2]:
        return _fetch(reference, reference.file)
    there = _listing(reference)
    folder = posixpath.dirname(reference.file or "")
    inner = {posixpath.join(folder, component, name) for component in COMPONENTS for name in ADAPTER}
    beside = [file for file in there if file in inner]
    alone = reference.file or not beside or {*WEIGHTS} & {*there}
    file = reference.file or (choose(there, reference.repo) if alone else "")
    if file and posixpath.basename(file) not in ADAPTER[:2]:
        return _fetch(reference, file)
    own = [file, posixpath.join(folder, ADAPTER[2])] if file else []
    first, *_ = [_fetch(reference, each) for each in (*own, *beside)]
    return first.parent if file else first.parent.parent


def pinned(reference: Reference, path: Path) -> str:
    """Return the reference with the commit that was fetched, which the path in the Hub's cache names."""
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else reference.revision
    return str(reference._replace(revision=commit))


def address(reference: Reference) -> str:
    """Return the URL under which a browser shows a repository, or a file in it."""
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{reference.repo}"
    revision = quote(reference.revision or "main", safe="")
    if reference.file:
        return f"{page}/blob/{revision}/{quote(reference.file)}"
    return f"{page}/tree/{revision}" if reference.revision else page


class Facts(NamedTuple):
    """The facts that the card of a repository states."""

    licence: str
    """The licence's name; empty if the card names none."""
    bases: tuple[str, ...]
    """The repositories of its base models."""


def facts(reference: Reference) -> Facts | None:
    """Read what a repository's card says at a revision; None if the Hub doesn't answer, or doesn't show it."""
    import huggingface_hub

    if unreachable():
        return None
    try:
        info = huggingface_hub.HfApi().model_info(reference.repo, revision=reference.revision)
    except Exception:  # as in `_asked`; the caller says that nothing is known
        return None
    card: Any = info.card_data or {}
    own = card.get("license")
    named = card.get("license_name") if own in (None, "other") else None
    bases = card.get("base_model") or []
    return Facts(str(named or own or ""), tuple(map(str, [bases] if isinstance(bases, str) else bases)))


def choose(files: list[str], where: str) -> str:
    """Choose the LoRA among the files of a repository or a directory; a pickle only if there is nothing else."""
    for ends in ((".safetensors",), PICKLES):
        weights = [f for f in files if f.endswith(ends)]
        for name in WEIGHTS:
            if name in weights:
                return name
        if len(weights) == 1:
            return weights[0]
        if weights:
            some = ", ".join(weights[:MOST]) + (", …" if len(weights) > MOST else "")
            several = f"{os.path.join(where, '*')}{ends[0]}"
            every = f"; or, for a command that takes several, {several}" if os.path.isdir(where) else ""
            raise FileError(f"{where} has {len(weights)} {'/'.join(ends)} files; name one: {some}{every}.")
    raise FileError(f"{where} has no .safetensors file, and no pickle either ({', '.join(PICKLES)}).")


def _listing(reference: Reference) -> list[str]:
    import huggingface_hub

    def cached() -> list[str]:
        folder = Path(
            huggingface_hub.snapshot_download(reference.repo, revision=reference.revision, local_files_only=True)
        )
        return [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]

    def online() -> list[str]:
        return huggingface_hub.HfApi().list_repo_files(reference.repo, revision=reference.revision)

    why = unreachable()
    found: list[str] = _asked(reference, cached if why else online, why)
    return found


def _fetch(reference: Reference, file: str) -> Path:
    import huggingface_hub

    why = unreachable()

    def fetch() -> str:
        return huggingface_hub.hf_hub_download(
            reference.repo, file, revision=reference.revision, local_files_only=bool(why)
        )

    return Path(_asked(reference, fetch, why, file))


def unreachable() -> str:
    """Say why the Hub can't be reached, if that is known without asking it: its client would retry for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE is set)"
    host = urlsplit(constants.ENDPOINT).hostname
    if {"http", "https", "all"} & getproxies().keys():  # a proxy looks the name up
        return ""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"there is no network, or no host {host}"
    return ""


def _asked(reference: Reference, ask: Callable[[], Any], unreachable: str, file: str = "") -> Any:
    what = f"{reference.repo}/{file}".rstrip("/") + (f" at {reference.revision}" if reference.revision else "")
    try:
        return ask()
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = f"{unreachable}, {_uncached(reference)}" if unreachable else _why(error, reference, file)
        raise FileError(f"Can't get {what} from the Hub: {reason}") from error


def _uncached(reference: Reference) -> str:
    return f"and it is not in the cache. {_local(reference)}"


def _local(reference: Reference) -> str:
    return f"If a local file was meant: there is none called {reference.repo}."


def _why(error: Exception, reference: Reference, file: str) -> str:
    """Return the cause, and the way out."""
    from huggingface_hub import constants, errors

    repo, log_in = reference.repo, "log in ('hf auth login') or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated. Way out: accept its terms at {constants.ENDPOINT}/{repo}, and {log_in}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {repo}, or it is private. Ways out: check the name; for a private one, {log_in}. "
            f"{_local(reference)}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {reference.revision!r}.{_named(reference.revision or '', _revisions(repo))}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} can't be reached, {_uncached(reference)}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no file {file!r}.{_named(file, _files(reference))}"
    return f"{first_line(error).rstrip('.')}. Ways out: check the name and the network; for a private repository, {log_in}."


def _named(name: str, there: list[str]) -> str:
    """List the names that there are, the most similar one first; empty if none is known."""
    if not there:
        return ""
    return f"{did_you_mean(name, there)} It has {', '.join(there[:MOST])}{', …' if len(there) > MOST else ''}."


def _revisions(repo: str) -> list[str]:
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repo)
    except Exception:  # the list only adds to the error that is being reported
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _files(reference: Reference) -> list[str]:
    """Return the repository's ``.safetensors`` files, or all of its files if it has none."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(reference.repo, revision=reference.revision)
    except Exception:  # as in `_revisions`
        return []
    return [name for name in names if name.endswith(".safetensors")] or names
