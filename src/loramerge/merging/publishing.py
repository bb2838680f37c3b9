"""Pushing a LoRA to the Hugging Face Hub, with a model card of what its file records."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError, OptionError, check_callable
from ..files.architectures.names import COMPONENTS
from ..files.reading import PEFT_CONFIG, PEFT_FILE, open
from ..files.storage.digests import file_digest
from ..files.storage.paths import path_of
from ..files.storage.texts import open_regular, read_text
from ..files.uploading import check_token, repository, upload
from .cards import REPOSITORY, Card
from .licences import check_licence

if TYPE_CHECKING:
    from collections.abc import Iterator

CARD = "README.md"
PICTURES = "images"
"""The directory of a card's pictures in the repository."""

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""The kinds of pictures that browsers show."""


def model_card(
    source: str | os.PathLike[str],
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    tags: Sequence[str] = (),
    pictures: Sequence[str | os.PathLike[str]] = (),
    noted: Callable[[str], object] | None = None,
) -> str:
    """Return the card that `push` uploads; the arguments are the same.

    Raises:
        FileError: A file is missing, broken, or can't be pushed.
        NotALoRAError: It holds no LoRA.
        OptionError: A name has the wrong form.
    """
    check_callable(noted=noted)
    with _prepared(source, repository(repo), base_model, license, tags, pictures) as (card, _):
        _tell(card, noted)
        return card.text()


def push(
    source: str | os.PathLike[str],
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    tags: Sequence[str] = (),
    pictures: Sequence[str | os.PathLike[str]] = (),
    private: bool = False,
    overwrite: bool = False,
    noted: Callable[[str], object] | None = None,
) -> str:
    """Upload a LoRA to the Hugging Face Hub, with a model card.

    The card says what the file records, and what the repositories of its parents say: names, licences, hashes, weights,
    method, recipe, trigger words.  What nobody says is called unknown.

    Args:
        source: A ``.safetensors`` file, or the directory of a PEFT adapter.
        repo: ``org/name``, which is created if it isn't there.
        base_model: The base model's repository, if neither the file nor the parents' repositories name it.
        license: The licence of this file: a name of the Hub's, such as ``"openrail++"``, or another one, with a capital or a
            space in it.
        tags: Further tags, such as ``"text-to-image"``.
        pictures: Pictures for the card.
        private: Whether a new repository is private.
        overwrite: Whether files of the same names are replaced, the card too.
        noted: Called with a line for each thing that the card can't say.

    Returns:
        The URL of the commit.

    Raises:
        FileError: The file can't be read or pushed, the Hub can't be reached, or it refuses.
        NotALoRAError: The file holds no LoRA.
        OptionError: A name has the wrong form.
    """
    check_callable(noted=noted)
    name = repository(repo)
    check_token(name)
    with _prepared(source, name, base_model, license, tags, pictures) as (card, files):
        text = card.text()
        _tell(card, noted)
        content = {**files, CARD: text.encode()}
        return upload(name, content, f"Upload {card.file}", private=private, overwrite=overwrite, noted=noted)


def _tell(card: Card, noted: Callable[[str], object] | None) -> None:
    """Say what the card can't, if anyone listens."""
    if noted is not None:
        for note in card.notes():
            noted(note)


@contextmanager
def _prepared(
    source: str | os.PathLike[str],
    repo: str,
    base_model: str | None,
    licence: str | None,
    tags: Sequence[str],
    pictures: Sequence[str | os.PathLike[str]],
) -> "Iterator[tuple[Card, Mapping[str, Path | bytes]]]":
    """Open a LoRA; yield its card, and what is uploaded by its path in the repository."""
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise OptionError(f"The base model {base_model!r} is not a repository on the Hub: wanted org/name.")
    if licence is not None:
        check_licence(licence)
    shown = _pictures(pictures)
    path = path_of(source)
    with open(path) as lora:
        files = _files(path, bool(lora.origin and any(lora.origin.config.values())))
        sizes = {name: (file.stat().st_size, file_digest(file)) for name, file in files.items()}
        card = Card(
            repo=repo,
            lora=lora,
            files=sizes,
            base_model=base_model,
            licence=licence,
            tags=tuple(tags),
            pictures=tuple(shown),
        )
        yield card, {**{name: _content(file) for name, file in files.items()}, **shown}


def _content(file: Path) -> Path | bytes:
    """Return a file for uploading: a small text as it is now, a large file by its path."""
    return file if file.suffix == ".safetensors" else read_text(file).encode()


def _files(path: Path, configured: bool) -> dict[str, Path]:
    """Return the files of a LoRA by their paths in the repository, its own tensors first.

    Args:
        path: The file or directory that was opened.
        configured: Whether a configuration beside the file has its scale.
    """
    if path.is_file() and path.name == PEFT_FILE and configured:
        path = path.parent
    if path.is_dir():
        folders = ("", *COMPONENTS)
        adapters = [folder for folder in folders if (path / folder / PEFT_FILE).is_file()]
        names = [os.path.join(folder, name) for folder in adapters for name in (PEFT_FILE, PEFT_CONFIG)]
        if adapters:
            return {Path(name).as_posix(): path / name for name in names}
        raise FileError(f"Can't push the directory {path}: wanted a file, or a PEFT adapter with {PEFT_FILE} in it.")
    if path.suffix != ".safetensors":
        raise FileError(
            f"Can't push {path}: wanted a .safetensors file. Way out: write one, 'loramerge convert {path} -o …'."
        )
    if configured:
        raise FileError(
            f"Can't push {path} alone: its scale is in a configuration beside it. Way out: 'loramerge convert {path} -o … "
            "--to diffusers', or another dialect whose files hold the scale."
        )
    return {path.name: path}


def _pictures(given: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return pictures by their paths in the repository.

    Raises:
        FileError: One can't be read, or is of a kind that browsers don't show.
        OptionError: Two have the same name.
    """
    found: dict[str, Path] = {}
    for picture in given:
        path = path_of(picture)
        os.close(open_regular(path))
        if path.suffix.lower() not in KINDS:
            raise FileError(f"Can't show the picture {path}: wanted one of {', '.join(KINDS)}.")
        name = f"{PICTURES}/{path.name}"
        if name in found:
            raise OptionError(f"Two pictures are called {path.name}: {found[name]} and {path}. Way out: rename one.")
        found[name] = path
    return found
