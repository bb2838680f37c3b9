"""Saving and converting LoRAs: each file or directory is written whole, or not at all."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..errors import DialectError, FileError, OptionError, check_callable, size
from ..tensors import NAMES, Array, nbytes
from .architectures.names import COMPONENTS
from .dialects import written_dialect
from .lora import LoRA
from .reading import PEFT_CONFIG, PEFT_FILE, PEFT_FILES, Source, open
from .storage.paths import path_of, same

if TYPE_CHECKING:
    from pathlib import Path

    from .dialects.write import Group, Spelling
    from .storage.writer import Progress


GROWTH, SMALL = 10, 20_000_000
"""A file that is larger than what it is made of by this factor is refused, unless it is as small as an ordinary LoRA."""


def save(
    lora: LoRA,
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    dtype: str | None = None,
    allow_lossy: bool = False,
    workers: int = 1,
    progress: "Progress | None" = None,
    lost: Callable[[str], object] | None = None,
    allow_growth: bool = False,
    noted: Callable[[str], object] | None = None,
) -> "Path":
    """Write a LoRA, whole or not at all.

    Args:
        lora: The LoRA.  A merge that is not computed yet (`Plan.lora`) is computed module
            by module on the way.
        path: A ``.safetensors`` file; for the dialect ``peft`` a directory, whose adapters (those of text encoders that
            the LoRA lacks too) are replaced.
        dialect: Name of a dialect that can be written; the LoRA's own by default.  In its own
            dialect a file keeps every key, shape, dtype and value.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``; by default each tensor's own, for a
            merge the widest of its inputs.
        allow_lossy: Whether to leave out what the dialect can't hold.
        workers: Processes, at most; the bytes are the same for any number.  They are forked, so on
            Linux only, and only while this process has one thread and has not imported torch;
            otherwise they are threads, which pay for large ranks only.
        progress: Called with the number of modules done and of all.
        lost: Called with a line for each thing that ``allow_lossy`` left out.
        allow_growth: Whether the file may be more than ten times as large as what it is made of.
        noted: Called with a line for each thing that one of the dialect's readers is known to leave out, and if a file in
            its own dialect is copied as it is.

    Returns:
        The path that was written.

    Raises:
        DialectError: The dialect can't hold a layer; nothing is written.
        NumberError: A value is NaN, infinite, or too large for the dtype.
        OptionError: The file would be too large (see ``allow_growth``).
        FileError: The path can't be written, or the disk has no room.
    """
    from .dialects.write import spell
    from .metadata import for_writing

    check_callable(progress=progress, lost=lost, noted=noted)
    target = check_target(path, dialect or lora.dialect)
    spelling = spell(lora, dialect, dtype, allow_lossy=allow_lossy)
    if not allow_growth:
        check_growth(lora, tensors_size(spelling), spelling.dialect.name)
    if lost:
        for line in spelling.left_out:
            lost(line)
    if noted:
        from .dialects.readers import said

        if spelling.verbatim:
            cast = f", in {NAMES[spelling.dtype]}" if spelling.dtype else ""
            noted(
                f"{spelling.dialect.name} is the dialect of the file itself: the tensors are those that were read{cast}"
            )
        for line in said(spelling.dialect.name, lora.architecture, spelling.layers):
            noted(line)
    if spelling.dialect.name == "peft":
        return _save_folder(lora, target, spelling, workers, progress)
    from .storage.writer import write

    metadata, hashes = for_writing(lora, spelling)
    write(target, spelling.groups, metadata, workers=workers, progress=progress, hashes=hashes, fork=not lora.no_fork)
    return target


def saved_size(lora: LoRA, dialect: str | None = None, dtype: str | None = None, *, allow_lossy: bool = False) -> int:
    """Return the size in bytes of the file that `save` would write, without configurations beside it."""
    from .dialects.write import spell
    from .metadata import for_writing
    from .storage.writer import file_size

    spelling = spell(lora, dialect, dtype, allow_lossy=allow_lossy)
    return file_size(spelling.groups, *for_writing(lora, spelling))


def outgrows(lora: LoRA, length: int) -> bool:
    """Return whether a file of ``length`` bytes is many times as large as what it is made of, and nobody chose that."""
    return lora.source_bytes is not None and length > max(SMALL, GROWTH * lora.source_bytes)


def check_growth(lora: LoRA, length: int, dialect: str) -> None:
    """Refuse a file that is many times as large as what it is made of, as LoHa and LoKr layers are when they are written as LoRAs.

    Args:
        lora: The LoRA to write.
        length: Bytes of the file.
        dialect: Name of its dialect.

    Raises:
        OptionError: The file would be too large.
    """
    if not outgrows(lora, length) or lora.source_bytes is None:
        return
    unheld = _unheld(lora, dialect)
    raise OptionError(
        f"{lora.name} would take {size(length)}, {length / lora.source_bytes:.0f} times the {size(lora.source_bytes)} that it is made "
        f"of: {unheld or 'an exact sum of LoHas or LoKrs is a LoRA of their large rank'}. Ways out: a smaller rank, the best "
        "fit (merge or resize with --rank 32, or rank=32), a size (max_size=200MB), "
        f"{'a dialect that holds them (kohya, comfyui), ' if unheld else ''}or take the size as it is "
        "(allow_growth)."
    )


def tensors_size(spelling: "Spelling") -> int:
    """Return the size in bytes of the tensors as they are written."""
    return sum(nbytes(tuple(t.shape), t.dtype) for group in spelling.groups for t in group.specs.values())


def _unheld(lora: LoRA, dialect: str) -> str:
    """Say which kinds of layers a dialect can hold only as a LoRA of a large rank; empty if there are none."""
    kinds = {layout.inner.kind for layout in lora.layouts.values()} - written_dialect(dialect).holds
    names = [title for kind, title in (("lokr", "LoKr"), ("loha", "LoHa")) if kind in kinds]
    return f"{dialect} can't hold {' and '.join(names)} layers but as a LoRA of their large rank" if names else ""


def check_target(path: str | os.PathLike[str], dialect: str) -> "Path":
    """Return the path that a LoRA will be written to, once it is sure that it can be.

    Raises:
        OptionError: The dialect is unknown, or the path is not of its kind.
        FileError: The directory is missing, or a file that would be replaced is read-only.
    """
    from .storage.writer import replaced_mode

    target = path_of(path)
    if written_dialect(dialect).name == "peft":
        folder = peft_folder(target)
        for file in _adapters(folder):
            replaced_mode(file)
        return folder
    if os.path.isdir(target) or target.suffix != ".safetensors":
        raise OptionError(f"Can't write {target}: wanted a path that ends in .safetensors.")
    if not os.path.isdir(target.parent):
        reason = "Not a directory" if os.path.exists(target.parent) else "No such file or directory"
        raise FileError(f"Can't write {target}: {reason}: {target.parent}.")
    replaced_mode(target)
    return target


def peft_folder(target: "Path") -> "Path":
    """Return the directory of a PEFT adapter, where a file was maybe asked for."""
    return target.with_suffix("") if target.suffix == ".safetensors" else target


def check_apart(read: Iterable[str | os.PathLike[str]], target: "Path", what: str = "the LoRA that is read") -> None:
    """Refuse to overwrite what is being read.

    Args:
        read: The files and directories that are read, and names on the Hub.
        target: The path that `check_target` returned.
        what: What is read there, for the error.

    Raises:
        OptionError: Saving would replace one of them.
    """
    places = [target] if target.suffix == ".safetensors" else [target, *_adapters(target)]
    if any(same(path_of(path), place) for path in read for place in places):
        raise OptionError(f"{target} is {what}. Way out: another output.")


def _adapters(folder: "Path") -> "list[Path]":
    """Return the files that a PEFT directory may hold, and that saving into it replaces."""
    folders = [folder / component for component in ("", *COMPONENTS)]
    return [place / name for place in folders for name in (*PEFT_FILES, PEFT_CONFIG)]


def _save_folder(lora: LoRA, path: "Path", spelling: "Spelling", workers: int, progress: "Progress | None") -> "Path":
    """Write PEFT's layout: the denoiser's adapter in the directory, each text encoder's in one of its own."""
    from .dialects.config import component_configs
    from .metadata import for_writing
    from .storage import scratch

    configs = cast(dict[str, Any], lora.origin.config) if spelling.verbatim and lora.origin else {}
    if not configs:
        written = component_configs(spelling.layers, lora.about)
        configs = {c if c.startswith("text_encoder") else "": config for c, config in written.items()}
        if len(configs) != len(written) or not configs.keys() <= {"", *COMPONENTS}:
            raise DialectError(f"{lora.name}: a PEFT directory has no place for all of {', '.join(written)}.")
    metadata, _ = for_writing(lora, spelling)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with scratch.folder(path, "loramerge") as made:
            _write_components(made, configs, spelling.groups, metadata, workers, progress, not lora.no_fork)
            with scratch.locked(path):  # two writers by turns could leave the tensors of one with the other's scale
                _take_places(made, path)
    except OSError as error:
        raise FileError(f"Can't write {path}: {error.strerror}.") from error
    return path


def _write_components(
    folder: "Path",
    configs: Mapping[str, Any],
    groups: "list[Group]",
    metadata: Mapping[str, str],
    workers: int,
    progress: "Progress | None",
    fork: bool,
) -> None:
    """Write each component's adapter and configuration into a directory of its own."""
    from .storage.writer import write, write_text

    done = 0
    for component, config in configs.items():
        prefix = f"{component}/" if component else ""
        mine = [g for g in groups if g.name.startswith(prefix) and ("/" in g.name) == bool(prefix)]
        stripped = [
            replace(
                g, specs={k.removeprefix(prefix): s for k, s in g.specs.items()}, make=partial(_stripped, g, prefix)
            )
            for g in mine
        ]
        (folder / component).mkdir(exist_ok=True)
        report = partial(_shifted, progress, done, len(groups)) if progress else None
        write(folder / component / PEFT_FILE, stripped, metadata, workers=workers, progress=report, fork=fork)
        write_text(folder / component / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        done += len(mine)
    if done != len(groups):
        raise DialectError(f"a PEFT directory has no place for {len(groups) - done} of {len(groups)} layers.")


def _shifted(progress: "Progress", before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _take_places(made: "Path", target: "Path") -> None:
    """Replace the old files by the new ones; a component that the new LoRA lacks is deleted."""
    folders = ("", *COMPONENTS)
    for component in folders:  # without its configurations, readers refuse the directory instead of mixing old and new
        (target / component / PEFT_CONFIG).unlink(missing_ok=True)
    for name in (*PEFT_FILES, PEFT_CONFIG):
        for component in folders:
            _take_place(made / component / name, target / component / name)


def _take_place(made: "Path", target: "Path") -> None:
    if made.exists():
        target.parent.mkdir(exist_ok=True)
        os.replace(made, target)
    else:
        target.unlink(missing_ok=True)


def _stripped(group: "Group", prefix: str) -> dict[str, Array]:
    return {key.removeprefix(prefix): array for key, array in group.make().items()}


def convert(
    source: Source,
    path: str | os.PathLike[str],
    dialect: str,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    adapter: str | None = None,
    allow_lossy: bool = False,
    allow_pickle: bool = False,
    workers: int = 1,
    progress: "Progress | None" = None,
    allow_growth: bool = False,
    block_map: Mapping[str, str] | None = None,
) -> "Path":
    """Write a LoRA in another dialect; ΔW stays what it is.

    Args:
        source: What `open` takes.
        path: What `save` takes.
        dialect: Name of a dialect that can be written.
        dtype: A dtype for the tensors; their own by default.
        architecture: The model family, where the file leaves it open.
        adapter: Which one, where the keys name several adapters, as PEFT does.
        allow_lossy: Whether to leave out what the dialect can't hold.
        allow_pickle: Whether to read pickles, tensors only.
        workers: Processes or threads, as in `save`.
        progress: Called with the number of modules done and of all.
        allow_growth: As in `save`.
        block_map: New numbers for the blocks, for a model that was pruned or stretched: ``{"blocks.{i}":
            "blocks.{i+12}"}``, the names as the file has them. Blocks of such a list without a number are left out.

    Returns:
        The path that was written.

    Raises:
        DialectError: The dialect can't hold a layer; nothing is written.
        OptionError: The file would be too large (see ``allow_growth``).
        FileError: The source can't be read or the path can't be written.
        NotALoRAError: The source isn't a LoRA.
    """
    with open(source, architecture=architecture, adapter=adapter, allow_pickle=allow_pickle) as lora:
        return save(
            _renumbered(lora, block_map, dialect) if block_map else lora,
            path,
            dialect=dialect,
            dtype=dtype,
            allow_lossy=allow_lossy,
            workers=workers,
            progress=progress,
            allow_growth=allow_growth,
        )


def _renumbered(lora: LoRA, block_map: Mapping[str, str], dialect: str) -> LoRA:
    from .renumbering import renumbered

    return renumbered(lora, block_map, dialect)
