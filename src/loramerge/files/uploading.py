"""Uploading files to the Hugging Face Hub."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, LoRAMergeError, OptionError, did_you_mean, first_line
from . import hub
from .storage.digests import blob_digest, file_digest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "'hf auth login', or HF_TOKEN, with a token that may write"


def repository(text: str) -> str:
    """Return a repository's name, ``org/name``.

    Raises:
        OptionError: It is something else, or names a file or a revision too.
    """
    found = hub.parse(text)
    if found is None or found.file or found.revision:
        raise OptionError(
            f"Can't push to {text!r}: wanted the name of a repository alone, org/name, where org is you or an organisation."
        )
    return found.repo


def check_token(repo: str) -> None:
    """Check that there is a token at all, before anything slow is done.

    Raises:
        FileError: There is none.
    """
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise FileError(f"Can't push to {repo}: no token for the Hub was found. Way out: {LOG_IN}.")


def upload(
    repo: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    noted: Callable[[str], object] | None = None,
) -> str:
    """Commit files to a repository, which is created if it isn't there; files that are the same there stay.

    Args:
        repo: ``org/name``.
        files: The files, or their content, by path in the repository.
        message: The commit's message.
        private: Whether a new repository is private.
        overwrite: Whether files of the same names are replaced.
        noted: Called with a line on what others who load the repository may stumble over.

    Returns:
        The URL of the commit.

    Raises:
        FileError: The Hub can't be reached, or refuses; or a file of the same name has another content.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    if why := hub.unreachable():
        raise FileError(f"Can't push to {repo}: {why}. Way out: push again when there is a network.")
    with _pushing(api, repo):
        there = _files_there(api, repo)
    if there and not overwrite:
        _check_same(repo, files, there[1])
    if there and noted and (others := [name for name in there[1] if _is_another(name, files)]):
        noted(
            f"{repo} holds {len(others)} more .safetensors files, so readers must name this one: {repo}/{_main(files)}"
        )
    if not there:
        with _pushing(api, repo):
            api.create_repo(repo, private=private or None)
    with _pushing(api, repo, "" if there else f" The repository {repo} is there now, and is empty."):
        operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repo, operations, commit_message=message, parent_commit=there[0] if there else None)
    return str(done.commit_url)


def _main(files: Mapping[str, Path | bytes]) -> str:
    return next(name for name in files if name.endswith(".safetensors"))


def _is_another(name: str, files: Mapping[str, Path | bytes]) -> bool:
    return name.endswith(".safetensors") and name not in files


def _files_there(api: "HfApi", repo: str) -> tuple[str, dict[str, Any]] | None:
    """Return the newest commit of a repository and its files by name; None if the token shows no such repository."""
    from huggingface_hub import errors

    try:
        info = api.model_info(repo, files_metadata=True)
    except errors.RepositoryNotFoundError:
        return None
    return str(info.sha), {file.rfilename: file for file in info.siblings or ()}


def _check_same(repo: str, files: Mapping[str, Path | bytes], there: Mapping[str, Any]) -> None:
    """Refuse to replace a file by one with another content.

    Raises:
        FileError: There is such a file.
    """
    others = [name for name, content in files.items() if name in there and not _is_same(content, there[name])]
    if others:
        raise FileError(
            f"Can't push to {repo}: it has another {' and another '.join(others)}. Ways out: another repository, or "
            "replace what is there (--overwrite, or overwrite=True), which stays in the repository's history."
        )


def _is_same(content: Path | bytes, there: Any) -> bool:
    if there.lfs and isinstance(content, Path):
        return bool(there.lfs.sha256 == file_digest(content))
    return bool(there.blob_id == blob_digest(content))


@contextmanager
def _pushing(api: "HfApi", repo: str, then: str = "") -> Iterator[None]:
    """Say why the Hub doesn't take what is sent inside of the block, without the token, which some servers repeat."""
    import huggingface_hub

    try:
        yield
    except LoRAMergeError:
        raise
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = _why(error, api, repo)
        token = huggingface_hub.get_token()
        hidden = reason.replace(token, "…") if token else reason
        raise FileError(f"Can't push to {repo}: {hidden}{then}") from None


def _why(error: Exception, api: "HfApi", repo: str) -> str:
    """Return the cause, and the way out."""
    from huggingface_hub import errors

    if isinstance(error, ValueError):  # of the card's metadata, which the Hub checks first
        return f"{' '.join(str(error).split()).rstrip('.')}. Way out: another --license or --tag (license=, tags=)."
    if not isinstance(error, errors.HfHubHTTPError):
        return f"{first_line(error).rstrip('.')}. Way out: check the network, and {api.endpoint}."
    status, said = error.response.status_code, (error.server_message or first_line(error)).strip().rstrip(".")
    if status == 401:
        return f"the Hub doesn't know the token. Way out: {LOG_IN}."
    if status in (403, 404):
        return f"{_unwritable(api, repo)} The Hub says: {said}. Way out: another name, or {LOG_IN} there."
    if status == 409:
        return f"the name is taken, by a repository that the token doesn't show. The Hub says: {said}. Way out: another name."
    if status == 412:
        return f"{repo} was changed meanwhile. Way out: push again."
    return f"{said} (HTTP {status}). Way out: push again later, if {api.endpoint} has a fault."


def _unwritable(api: "HfApi", repo: str) -> str:
    """Say that an organisation is not among those of the token, or that the token only reads."""
    org = repo.partition("/")[0]
    names: list[str] = []
    with suppress(Exception):  # the list only adds to the error that is being reported
        user = api.whoami()
        names = [user["name"], *(each["name"] for each in user.get("orgs", []))]
    if not names or org in names:
        return f"the token may not write to {org}."
    return f"you have no organisation {org} to write to.{did_you_mean(org, names)} You are in {', '.join(names)}."
