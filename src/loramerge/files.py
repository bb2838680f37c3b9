"""Loading, opening and saving LoRAs: by path, directory or Hub name; atomically."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

from .architectures.names import COMPONENTS
from .dialects import written_dialect
from .errors import DialectError, FileError, OptionError
from .layers import direction_of
from .lora import LoRA, from_tensors
from .storage.pickles import PICKLES, pickled
from .storage.reader import SafetensorsFile, read_text
from .tensors import Array, Held, Stored, Tensor, is_known, nbytes
from .wording import first_line, size

if TYPE_CHECKING:
    from pathlib import Path

    from .dialects.write import Group, Spelling
    from .storage.writer import Progress

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_FILES = (PEFT_FILE, "adapter_model.bin")


class Readable(Protocol):
    """A binary file object: what ``open(path, "rb")``, `io.BytesIO` and the uploads of web frameworks are."""

    def read(self) -> bytes:
        """All that is left of it."""
        ...


Source = str | os.PathLike[str] | Mapping[str, Array] | bytes | bytearray | memoryview | Readable


def is_list(loras: object) -> TypeGuard[Sequence[Any]]:
    """Whether several LoRAs are given: text and bytes are sequences too, and stand for one."""
    return isinstance(loras, Sequence) and not isinstance(loras, str | bytes | bytearray | memoryview)


def open(
    source: Source,
    *,
    architecture: str | None = None,
    dialect: str | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    adapter: str | None = None,
    allow_pickle: bool = False,
) -> LoRA:
    """Open a LoRA; tensors are read when a layer is asked for.

    Args:
        source: A file, a directory with one adapter (PEFT's or diffusers'), ``org/repo``,
            ``org/repo/file.safetensors`` or ``hf://org/repo@revision`` on the Hugging Face
            Hub; a state dict of numpy arrays or torch tensors; or a ``.safetensors`` file in memory,
            its bytes or a binary file object, which is read whole.
        architecture: The model family, where the file leaves it open.
        dialect: The dialect, where the file leaves it open.
        config: PEFT's configuration, where it is not beside the file: it has the scale.
        metadata: The strings of the header, for a state dict.
        adapter: Which one, where the keys name several adapters, as PEFT does.
        allow_pickle: Whether to read ``.pt``, ``.bin`` and ``.ckpt``, tensors only
            (``torch.load(weights_only=True)``).

    Raises:
        FileError: The file is missing, broken or hostile.
        NotALoRAError: It holds no LoRA.
        LayerError: A layer is incomplete or its shapes disagree.
        OptionError: The source is something else than these.
    """
    options: dict[str, Any] = {"architecture": architecture, "dialect": dialect, "adapter": adapter}
    if config is not None:
        options["config"] = {"": _object(dict(config), "The config")}
    if isinstance(source, Mapping):
        held = {key: _held(key, value) for key, value in source.items()}
        return from_tensors(held, metadata or {}, "state dict", **options)
    if not isinstance(source, str | os.PathLike):
        stored = SafetensorsFile(IN_MEMORY, _bytes_of(source))
        return from_tensors(stored, stored.metadata, IN_MEMORY, **options)
    path, name = _found(source)
    lora = _open_path(path, options, allow_pickle)
    return _from(name, lora, architecture=architecture, dialect=dialect, adapter=adapter)


IN_MEMORY = "file in memory"
"""What messages call a file whose bytes were given."""


def _bytes_of(source: object) -> bytes:
    """The file in memory that bytes or a file object are; what may change is copied."""
    try:
        data = source.read() if hasattr(source, "read") else source
    except (OSError, ValueError) as error:
        raise FileError(f"Can't read the file object {source!r}: {first_line(error)}.") from error
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    what = f"an object of the type {type(source).__name__}"
    given = "" if data is source else f", whose read() gives the type {type(data).__name__}"
    raise OptionError(
        f"Can't read a LoRA from {what}{given}. Wanted a path, a name on the Hub, a state dict, or a .safetensors file in "
        "memory: its bytes, or a file object that is open as binary."
    )


def _from(name: str, lora: LoRA, **forced: str | None) -> LoRA:
    """The LoRA with a note of where it was read, and of what was said about it."""
    assert lora.origin
    given = {key: value for key, value in forced.items() if value is not None}
    return replace(lora, origin=replace(lora.origin, source=name, forced=given))


def _open_path(path: str, options: dict[str, Any], allow_pickle: bool) -> LoRA:
    if os.path.isdir(path):
        return _open_folder(path, options, allow_pickle)
    tensors, metadata, notes = _tensors(path, allow_pickle)
    if "config" not in options and any("base_model.model." in key for key in tensors):
        options["config"] = _config_beside(path)
    return from_tensors(tensors, metadata, os.path.basename(path), notes=notes, **options)


def _tensors(path: str, allow_pickle: bool) -> tuple[Mapping[str, Tensor], Mapping[str, str], list[str]]:
    """What a file holds: its tensors, the strings in its header, and what is unusual about it."""
    if path.endswith(PICKLES):
        tensors, inside = pickled(path, allow_pickle)
        return tensors, {}, [f"the tensors of its dictionary {inside!r}"] if inside else []
    file = SafetensorsFile(path)
    return file, file.metadata, []


def load(
    source: Source,
    *,
    architecture: str | None = None,
    dialect: str | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    adapter: str | None = None,
    allow_pickle: bool = False,
) -> LoRA:
    """Read a LoRA into memory; the arguments are those of `open`.

    Raises:
        FileError: The file is missing, broken or hostile.
        NotALoRAError: It holds no LoRA.
        LayerError: A layer is incomplete or its shapes disagree.
        NumberError: A value is NaN or infinite.
    """
    if isinstance(source, Mapping):
        source = {key: _copied(value) for key, value in source.items()}
    with open(
        source,
        architecture=architecture,
        dialect=dialect,
        config=config,
        metadata=metadata,
        adapter=adapter,
        allow_pickle=allow_pickle,
    ) as lora:
        if isinstance(source, Mapping) or lora.origin is None:
            return lora.in_memory()
        held = {key: Held(t.read()) if isinstance(t, Stored) else t for key, t in lora.origin.tensors.items()}
        loaded = from_tensors(
            held,
            lora.metadata,
            lora.name,
            config=lora.origin.config,
            architecture=lora.architecture,
            dialect=dialect,
        )
        assert loaded.origin
        origin = replace(loaded.origin, source=lora.origin.source, forced=lora.origin.forced)
        return replace(loaded, notes=lora.notes, origin=origin).in_memory()


def _held(key: str, value: Any) -> Held:
    """A state dict's value: a dense numpy array or torch tensor, without its gradient."""
    value = value.detach() if hasattr(value, "detach") else value
    known = type(value).__module__.partition(".")[0] in ("numpy", "torch")
    if not known or not hasattr(value, "dtype") or getattr(value, "is_sparse", False):
        raise OptionError(f"The state dict's {key!r} is a {type(value).__name__}, wanted a dense tensor or array.")
    if not is_known(value):
        raise OptionError(f"The state dict's {key!r} has the dtype {value.dtype}, which loramerge does not know.")
    return Held(value)


def _copied(value: Any) -> Any:
    copy = getattr(value, "clone", None) or getattr(value, "copy", None)
    return copy() if copy else value


def _found(source: str | os.PathLike[str]) -> tuple[str, str]:
    """The file or directory, and its name for others: without the directories above it, or the Hub's."""
    text = os.fspath(source)
    path = os.path.expanduser(text)
    if path.endswith(".toml") and os.path.isfile(path):
        raise FileError(
            f"{path} is a recipe, not a LoRA. Ways out: 'loramerge merge {path}' merges as it says, and with --dry-run "
            "shows what that would be; in Python, loramerge.Recipe.read."
        )
    if not text.startswith("hf://") and os.path.exists(path):
        return path, os.path.basename(path.rstrip(os.sep)) or os.path.basename(os.path.realpath(path))
    from . import hub

    if text.startswith(("http://", "https://")):
        raise FileError(f"URLs are not fetched: {text}. Way out: {hub.named_by(text)}.")
    reference = hub.parse(text)
    looks_local = not text.startswith("hf://") and (
        (path.endswith((".safetensors", *PICKLES)) and text.count("/") != 2) or os.path.isdir(text.partition("/")[0])
    )
    if reference is None or looks_local:
        number = text.lstrip("-").replace(".", "", 1).isdigit()
        hint = " Weights are given one by one: -w 0.7 -w 0.5." if number else _near(path)
        raise FileError(f"No such file or directory: {path}.{hint}")
    fetched = hub.download(reference)
    return os.fspath(fetched), hub.pinned(reference, fetched)


def _near(path: str) -> str:
    """A question for the file or directory beside the missing one whose name is most like its name."""
    from difflib import get_close_matches

    folder, name = os.path.split(path)
    try:
        names = [entry for entry in os.listdir(folder or ".") if not entry.startswith(".")]
    except OSError:
        return ""
    near = [n for n in names if os.path.splitext(n)[0] == name] or get_close_matches(name, names, n=1)
    return f" Did you mean {os.path.join(folder, near[0])}?" if near else ""


def _open_folder(folder: "str | Path", options: dict[str, Any], allow_pickle: bool) -> LoRA:
    from pathlib import Path

    from .hub import WEIGHTS, choose

    path = Path(folder)
    folders = [path, *(path / component for component in COMPONENTS)]
    adapters = {each: found for each in folders if (found := _adapter_in(each))}
    if not adapters:
        entries = sorted(path.iterdir())
        others = [inner for entry in entries if entry.is_dir() and (inner := _adapter_in(entry))]
        names = [entry.name for entry in entries if entry.suffix == ".safetensors"]
        names = names or [entry.name for entry in entries if entry.suffix in PICKLES and not others]
        if len(others) == 1 and not names:
            return _open_folder(others[0].parent, options, allow_pickle)
        if others and not set(WEIGHTS) & set(names):
            listed = [*(str(other.parent) for other in others), *(str(path / name) for name in names)]
            raise FileError(f"{path} holds {len(listed)} adapters; name one: {', '.join(listed)}.")
        return _open_path(str(path / choose(names, str(path))), options, allow_pickle)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    for folder, file in adapters.items():
        prefix = "" if folder == path else f"{folder.name}/"
        held, strings, _ = _tensors(str(file), allow_pickle)
        tensors |= {prefix + key: tensor for key, tensor in held.items()}
        metadata |= strings
        config |= {folder.name if prefix else "": _config(folder / PEFT_CONFIG)}
    return from_tensors(tensors, metadata, path.name, **{"config": config, **options})


def _adapter_in(folder: "Path") -> "Path | None":
    """The file of a PEFT adapter in a directory, a safetensors file before a pickle."""
    return next((folder / name for name in PEFT_FILES if os.path.exists(folder / name)), None)


def _config_beside(path: str) -> dict[str, Any]:
    for beside in (os.path.join(os.path.dirname(path), PEFT_CONFIG), f"{os.path.splitext(path)[0]}.{PEFT_CONFIG}"):
        if os.path.exists(beside):
            return {"": _config(beside)}
    return {}


def _config(path: "str | Path") -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except FileError as error:
        raise FileError(f"{error} It holds the adapter's scale.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}.") from None
    return _object(config, str(path))


def _object(config: Any, name: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise FileError(f"{name} is not a configuration: {str(config)[:80]}. Wanted a JSON object.")
    return config


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
        lora: What to write.  A merge that is not computed yet (`Plan.lora`) is computed module
            by module on the way.
        path: A ``.safetensors`` file; for the dialect ``peft`` a directory.
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
        allow_growth: Whether the file may take more than ten times the room of what it is made of.
        noted: Called with a line for each thing that one of the dialect's readers is known to leave out.

    Returns:
        The path that was written.

    Raises:
        DialectError: The dialect can't hold a layer; nothing is written.
        NumberError: A value is NaN, infinite, or too large for the dtype.
        OptionError: The file would grow beyond measure.
        FileError: The path can't be written, or the disk has no room.
    """
    from .dialects.readers import said
    from .dialects.write import spell
    from .metadata import for_writing

    target = check_target(path, dialect or lora.dialect)
    spelling = spell(lora, dialect, dtype, allow_lossy=allow_lossy)
    if not allow_growth:
        check_growth(lora, tensors_size(spelling), spelling.dialect.name)
    if lost:
        for line in spelling.left_out:
            lost(line)
    if noted:
        for line in said(spelling.dialect.name, lora.architecture, spelling.layers):
            noted(line)
    if spelling.dialect.name == "peft":
        return _save_folder(lora, target, spelling, workers, progress)
    from .storage.writer import write

    metadata, hashes = for_writing(lora, spelling)
    write(target, spelling.groups, metadata, workers=workers, progress=progress, hashes=hashes, fork=not lora.here)
    return target


def saved_size(lora: LoRA, dialect: str | None = None, dtype: str | None = None, *, allow_lossy: bool = False) -> int:
    """Bytes of the file that `save` would write, configurations beside it apart."""
    from .dialects.write import spell
    from .metadata import for_writing
    from .storage.writer import file_size

    spelling = spell(lora, dialect, dtype, allow_lossy=allow_lossy)
    return file_size(spelling.groups, *for_writing(lora, spelling))


GROWTH, SMALL = 10, 20_000_000
"""A file that is larger than what it is made of by this factor is refused, unless it is as small as an ordinary LoRA."""


def outgrows(lora: LoRA, length: int) -> bool:
    """Whether a file of some bytes takes many times the room of what it is made of, and nobody chose that."""
    return lora.made_of is not None and length > max(SMALL, GROWTH * lora.made_of)


def check_growth(lora: LoRA, length: int, dialect: str) -> None:
    """Refuse a file that takes many times the room of what it is made of: LoHas and LoKrs are LoRAs of large ranks.

    Args:
        lora: What would be written.
        length: Bytes of the file.
        dialect: Name of its dialect.

    Raises:
        OptionError: The file would grow beyond measure.
    """
    if not outgrows(lora, length) or lora.made_of is None:
        return
    unheld = _unheld(lora, dialect)
    raise OptionError(
        f"{lora.name} would take {size(length)}, {length / lora.made_of:.0f} times the {size(lora.made_of)} that it is made "
        f"of: {unheld or 'an exact sum of LoHas or LoKrs is a LoRA of their large rank'}. Ways out: a smaller rank, the best "
        "fit (merge or resize with --rank 32, or rank=32), a size (max_size=200MB), "
        f"{'a dialect that holds them (kohya, kohya-diffusers, comfyui), ' if unheld else ''}or take the size as it is "
        "(allow_growth)."
    )


def tensors_size(spelling: "Spelling") -> int:
    """Bytes of the tensors as they are written."""
    return sum(nbytes(tuple(t.shape), t.dtype) for group in spelling.groups for t in group.specs.values())


def _unheld(lora: LoRA, dialect: str) -> str:
    """What a dialect can't hold of a LoRA but as one of a large rank; empty where it is nothing."""
    kinds = {direction_of(layout).kind for layout in lora.layouts.values()} - written_dialect(dialect).holds
    names = [title for kind, title in (("lokr", "LoKr"), ("loha", "LoHa")) if kind in kinds]
    return f"{dialect} can't hold {' and '.join(names)} layers but as a LoRA of their large rank" if names else ""


def check_target(path: str | os.PathLike[str], dialect: str) -> "Path":
    """The path that a LoRA will be written to, if it can be.

    Raises:
        OptionError: The dialect is unknown, or the path is not of its kind.
        FileError: The directory is missing, or a file that would be replaced is read-only.
    """
    from pathlib import Path

    from .storage.writer import replaced_mode

    target = Path(path).expanduser()
    if written_dialect(dialect).name == "peft":
        folder = target.with_suffix("") if target.suffix == ".safetensors" else target
        for component in ("", *COMPONENTS):
            for name in (PEFT_FILE, PEFT_CONFIG):
                replaced_mode(folder / component / name)
        return folder
    if os.path.isdir(target) or target.suffix != ".safetensors":
        raise OptionError(f"Can't write {target}: wanted a path that ends in .safetensors.")
    if not os.path.isdir(target.parent):
        reason = "Not a directory" if os.path.exists(target.parent) else "No such file or directory"
        raise FileError(f"Can't write {target}: {reason}: {target.parent}.")
    replaced_mode(target)
    return target


def check_apart(source: str | os.PathLike[str], target: "Path") -> None:
    """Refuse to write a LoRA in the place of the one that it is made of.

    Raises:
        OptionError: They are one file or directory.
    """
    path = os.path.expanduser(source)
    if os.path.exists(path) and target.exists() and os.path.samefile(path, target):
        raise OptionError(f"{target} is the LoRA that is read. Way out: another output.")


def _save_folder(lora: LoRA, path: "Path", spelling: "Spelling", workers: int, progress: "Progress | None") -> "Path":
    """PEFT's layout: the denoiser's adapter in the directory, each text encoder's in one of its own."""
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
            _write_components(made, configs, spelling.groups, metadata, workers, progress, not lora.here)
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
    """Each component's adapter and configuration, in a directory of its own."""
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


def _shifted(progress: "Progress", before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _take_places(made: "Path", target: "Path") -> None:
    """Put the new files in the place of the old; a component that is not there any more goes."""
    folders = ("", *COMPONENTS)
    for component in folders:  # until the last is back, readers refuse the directory instead of mixing old and new
        (target / component / PEFT_CONFIG).unlink(missing_ok=True)
    for name in (PEFT_FILE, PEFT_CONFIG):
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

    Returns:
        The path that was written.

    Raises:
        DialectError: The dialect can't hold a layer; nothing is written.
        OptionError: The file would grow beyond measure.
        FileError: The source can't be read or the path can't be written.
        NotALoRAError: The source is no LoRA.
    """
    with open(source, architecture=architecture, adapter=adapter, allow_pickle=allow_pickle) as lora:
        return save(
            lora,
            path,
            dialect=dialect,
            dtype=dtype,
            allow_lossy=allow_lossy,
            workers=workers,
            progress=progress,
            allow_growth=allow_growth,
        )
