"""The strings in a file's header, read and changed; every byte of its tensors stays as it is."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import FamilyError, FileError, LoRAMergeError, OptionError, did_you_mean
from .architectures import ARCHITECTURES, titles
from .architectures.labels import ARCHITECTURE, SPECIFICATION, VERSION
from .metadata import NUMBERED
from .storage.paths import path_of
from .storage.reader import SafetensorsFile
from .storage.texts import parsed
from .thumbnails import THUMBNAIL, thumbnail as entries_of
from .triggers import TAGS

READ_BY = ("lora_adapter_metadata",)
"""Entries that say the scale of layers: with others the file would be another LoRA."""

FAMILY = (ARCHITECTURE, SPECIFICATION, VERSION)
"""Entries that name the model family."""

LEGACY_HASH = "sshs_legacy_hash"
"""kohya's older hash, that of a file with the ``ss_`` entries only."""


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the strings in a ``.safetensors`` file's header.

    Raises:
        FileError: The file is missing, broken or no safetensors file.
    """
    file = SafetensorsFile(path_of(path))
    file.close()
    return dict(file.metadata)


def edit_metadata(
    path: str | os.PathLike[str],
    entries: Mapping[str, str] | None = None,
    *,
    remove: Sequence[str] = (),
    thumbnail: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """Change the strings in a ``.safetensors`` file's header, in place: all changes at once, or none.

    The tensors' bytes and their order stay.  `sshs_legacy_hash` is dropped if an ``ss_`` entry changes, as it is then wrong.

    Args:
        path: The file: a LoRA, or any other.
        entries: The values to set, by key: ``{"modelspec.trigger_phrase": "woody"}``.
        remove: The keys to remove.
        thumbnail: A picture for the user interfaces that show one.  A JPEG, PNG or WebP of at most 100 kB is
            taken as it is; others are scaled down, which needs Pillow.

    Returns:
        All entries of the file, as they are now.

    Raises:
        FileError: The file or the picture can't be read, or the file can't be written, or the path is a link.
        OptionError: A key to remove isn't there, an entry's readers would stop at the value, the entry holds the scale, or
            it names another model family than the layers are of.
        MissingExtraError: The picture must be scaled down, and Pillow is not installed.
    """
    from .storage.writer import write_metadata

    wanted = {**(entries_of(thumbnail) if thumbnail is not None else {}), **(entries or {})}
    for key, value in wanted.items():
        _check(key, value)
    file = SafetensorsFile(path_of(path))
    try:
        before = dict(file.metadata)
        for key in remove:
            if key not in before:
                raise OptionError(
                    f"{path} has no entry {key!r}.{did_you_mean(key, before)} 'loramerge metadata' lists all."
                )
        after = {key: value for key, value in before.items() if key not in remove} | wanted
        changed = {key for key in {**before, **after} if before.get(key) != after.get(key)}
        for key in changed:
            _check_free(key)
        for key in FAMILY:
            if key in changed and key in wanted:
                _check_family(file, path, key, wanted[key])
        if any(key.startswith("ss_") for key in changed) and LEGACY_HASH not in wanted:
            after.pop(LEGACY_HASH, None)
        if after != before:
            _check_no_link(path_of(path))
            write_metadata(file, after)
        return after
    finally:
        file.close()


def _check_no_link(path: Path) -> None:
    """Refuse a link: it would be replaced by a changed copy of the file that it leads to, which would stay as it is."""
    if path.is_symlink():
        raise FileError(
            f"{path} is a link to {os.readlink(path)}, whose file stays as it is. Ways out: the file itself, or a copy of one in "
            "the Hub's cache, which is shared."
        )


def _is_tags(text: str) -> bool:
    try:
        folders = parsed(text, TAGS).values()
    except FileError:
        return False
    return all(isinstance(f, dict) and all(isinstance(n, int) for n in f.values()) for f in folders)


CHECKS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    TAGS: (_is_tags, 'JSON such as {"10_woody": {"woody": 9, "hat": 2}}; A1111 and Forge stop at anything else'),
    THUMBNAIL: (
        lambda text: text.startswith("data:image/"),
        "a data URI such as data:image/jpeg;base64,…; see --thumbnail",
    ),
    "modelspec.resolution": (
        lambda text: re.fullmatch(r"\d{1,6}x\d{1,6}", text) is not None,
        "two numbers such as 1024x1024; SwarmUI stops at anything else",
    ),
}
"""Entries whose readers stop at other values: the test, and what they want."""


def _check(key: object, value: object) -> None:
    if key == "":
        raise OptionError("An entry has an empty key. Wanted a name, such as modelspec.title.")
    if not isinstance(key, str) or not isinstance(value, str):
        raise OptionError(
            f"An entry is a text under a key, got {key!r} and a {type(value).__name__}. Way out: str(value)."
        )
    holds, wanted = CHECKS.get(key, (None, ""))
    if holds is not None and not holds(value):
        raise OptionError(f"Can't set {key} to {value[:80]!r}: wanted {wanted}.")


def _check_free(key: str) -> None:
    if key in READ_BY or NUMBERED.fullmatch(key):
        raise OptionError(
            f"{key} is a part of the LoRA: the scale or the ranks of its layers are in it. Way out: 'loramerge convert' to "
            "another dialect, which writes it anew."
        )


def _check_family(file: SafetensorsFile, path: str | os.PathLike[str], key: str, value: str) -> None:
    """Refuse an entry that names another model family than the layers of a LoRA are of; other files have no layers."""
    fits = _families(file, {})
    if fits is None:
        if key == ARCHITECTURE:
            ARCHITECTURES[value]
        return
    read = _families(file, {key: value}) or ()
    meant = ARCHITECTURES[value].name if value in ARCHITECTURES else value
    if meant in read if key == ARCHITECTURE else read or not fits:
        return
    if fits:
        raise OptionError(
            f"Can't set {key} to {value[:80]!r}: the names and shapes of all layers of {path} are those of "
            f"{titles(fits[:3])}. Wanted {' or '.join(fits[:3])}."
        )
    raise OptionError(
        f"Can't set {key} to {value[:80]!r}: no family that loramerge knows has the names of the layers of {path}. Way out: "
        f"leave it out; {SPECIFICATION} names a model for other tools."
    )


def _families(file: SafetensorsFile, metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the families that a file may be for, none if its metadata contradicts its layers; None if it isn't a LoRA."""
    from .lora import from_tensors

    try:
        return from_tensors(file, metadata, "").families
    except FamilyError:
        return ()
    except LoRAMergeError:
        return None
