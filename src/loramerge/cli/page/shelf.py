"""The files of one visitor of the page: those that were uploaded or named, and the one that was made of them."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from ...errors import FileError, OptionError
from ...files import hub, open
from ...files.storage.paths import path_of
from ...files.storage.pickles import PICKLES
from ...files.storage.texts import whole
from ..inspection import Block, blocks_of, norms_of
from . import shown

MOST = 16
"""The most LoRAs that a page holds."""

SUFFIXES = (".safetensors", *PICKLES)
"""Ends of the names that are listed of a folder."""

LISTED = 1000
"""The most files of folders that are offered by name."""


@dataclass
class Entry:
    """A LoRA on the page, and how strong it is to act."""

    name: str
    """The name that is typed for it: a file's, a path, or a repository on the Hub at a commit."""
    path: str
    """The path or the name that is opened."""
    card: str
    """Its facts and blocks, as HTML."""
    blocks: tuple[str, ...]
    weight: float = 1.0
    of_blocks: dict[str, float] = field(default_factory=dict)

    def typed(self) -> str:
        """Return the weight as it is typed."""
        return ";".join([f"{self.weight:g}", *(f"{block}={weight:g}" for block, weight in self.of_blocks.items())])


class Shelf:
    """The LoRAs of one visitor, in the order of the page.

    Args:
        root: The folder in which everything is stored; gradio puts uploaded files there, too.
        folders: The only folders of which paths are read.
    """

    def __init__(self, root: Path, folders: Sequence[Path] = ()) -> None:
        self.root = root.resolve()
        self.folders = folders
        self.home = Path(mkdtemp(dir=self.root))
        self.entries: list[Entry] = []

    @property
    def paths(self) -> list[str]:
        """The paths or names of the LoRAs that are opened."""
        return [entry.path for entry in self.entries]

    def take(self, uploaded: str, name: str) -> None:
        """Add an uploaded file under its own name; one that is refused is deleted.

        Raises:
            LoRAMergeError: It isn't a LoRA, or the page has one of that name.
        """
        source = Path(uploaded).resolve()
        if source.parent.parent != self.root or not source.is_file():
            raise FileError(f"{Path(uploaded).name} was not uploaded here.")
        folder = Path(mkdtemp(dir=self.home))
        try:
            target = folder / _last(name)
            shutil.move(source, target)
            self._add(("./" if target.name.startswith(("-", "~")) else "") + target.name, str(target))
        except BaseException as error:
            shutil.rmtree(folder)
            if isinstance(error, OSError):
                raise FileError(f"Can't store {name!r}: {error.strerror}.") from None
            raise
        finally:
            source.unlink(missing_ok=True)
            with suppress(OSError):  # gradio makes a folder for every file
                source.parent.rmdir()

    def find(self, text: str) -> None:
        """Add a file or an adapter's directory below the given folders, or a repository on the Hub.

        Raises:
            LoRAMergeError: It isn't a LoRA, or it is elsewhere.
        """
        text = text.strip()
        path = self.allowed(text)
        if path is not None:
            return self._add(text, str(path))
        reference = hub.parse(text)
        if reference is None or ".." in text.split("/"):
            raise self._refused(text)
        with open(str(reference)) as lora:
            pinned = str(lora.origin.source if lora.origin else reference)  # the commit, so that it stays what it is
        return self._add(pinned, pinned)

    def allowed(self, text: str) -> Path | None:
        """Return the path that a text means, if it exists below one of the given folders."""
        try:
            path = path_of(text).resolve()
            inside = any(path == folder or folder in path.parents for folder in map(Path.resolve, self.folders))
            return path if inside and path.exists() else None
        except (FileError, OSError, RuntimeError):
            return None

    def base(self, text: str) -> str | None:
        """Return a base model's path as it was typed; None for an empty text.

        Raises:
            OptionError: It isn't below one of the given folders.
        """
        text = text.strip()
        if text and self.allowed(text) is None:
            raise OptionError(
                f"Can't read the base model {text!r}: there is no such file or directory in {self._given()} given on the command "
                "line. Way out: loramerge ui FOLDER, with the folder that holds it."
            )
        return text or None

    def remove(self, name: str) -> None:
        """Take a LoRA off the page; an uploaded file is deleted."""
        for entry in [entry for entry in self.entries if entry.name == name]:
            self.entries.remove(entry)
            if self.home in Path(entry.path).parents:
                shutil.rmtree(Path(entry.path).parent)

    def output(self, name: str) -> Path:
        """Return where to write a result; results before it are deleted."""
        folder = self.home / "made"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / name

    def without_places(self, message: str) -> str:
        """Return a message with the names of files as they were uploaded, without the folders in which they are stored."""
        first, *others = message.split(f"{self.home}{os.sep}")
        parted = [other.partition(os.sep) for other in others]
        return first + "".join(
            rest if folder.replace("_", "").isalnum() else f"{folder}{sep}{rest}" for folder, sep, rest in parted
        )

    def clear(self) -> None:
        """Delete everything that is stored."""
        self.entries.clear()
        shutil.rmtree(self.home, ignore_errors=True)

    def _add(self, name: str, path: str) -> None:
        if len(self.entries) == MOST:
            raise OptionError(f"The page holds {MOST} LoRAs at most. Way out: remove one.")
        if any(entry.name == name for entry in self.entries):
            raise OptionError(f"{name} is on the page already. Way out: remove it there, or rename one of the two.")
        with open(path) as lora:
            blocks = blocks_of(lora, norms_of(lora))
            self.entries.append(Entry(name, path, shown.card(lora, name, blocks), _patterns(blocks)))

    def _given(self) -> str:
        return f"{', '.join(map(str, self.folders))}, which were" if self.folders else "what is"

    def _refused(self, text: str) -> OptionError:
        return OptionError(
            f"Can't read {text!r}: there is no such file in {self._given()} given on the command line, and it isn't the name of a "
            "repository on the Hub. Way out: drop the file here, or loramerge ui FOLDER."
        )


def listed(folders: Sequence[Path]) -> list[str]:
    """Return the paths of files in folders that may be LoRAs; one that isn't text can't be sent to a browser."""
    found = [
        os.path.join(place, name)
        for folder in folders
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(SUFFIXES)
    ]
    return sorted(filter(whole, found))[:LISTED]


def _patterns(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Return the names under which the blocks of a LoRA get weights: a text encoder is one block."""
    named = (b.component if b.component.startswith("text") else b.name for b in blocks if b.name != "-")
    return tuple(dict.fromkeys(named))


def _last(name: str) -> str:
    """Return the last part of an uploaded file's name, for any system's slashes.

    Raises:
        FileError: The name has no last part.
    """
    last = name.replace("\\", "/").rpartition("/")[2].replace("\0", "")
    if last in ("", ".", ".."):
        raise FileError(f"A file without a name can't be stored, got {name!r}.")
    return last
