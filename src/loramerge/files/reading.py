"""Loading and opening LoRAs: by path, directory or Hub name."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

from ..errors import FileError, OptionError, first_line
from ..tensors import Array, Held, Tensor, is_known
from .architectures.names import COMPONENTS
from .lora import LoRA, from_tensors
from .storage.paths import located, printable
from .storage.pickles import PICKLES, pickled
from .storage.reader import SafetensorsFile
from .storage.texts import read_json

if TYPE_CHECKING:
    from pathlib import Path


PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_FILES = (PEFT_FILE, "adapter_model.bin")


@runtime_checkable
class Readable(Protocol):
    """A binary file object: what ``open(path, "rb")``, `io.BytesIO` and the uploads of web frameworks are."""

    def read(self) -> bytes:
        """Return all that is left of it."""
        ...


Source = str | os.PathLike[str] | Mapping[str, Array] | bytes | bytearray | memoryview | Readable


def is_list(loras: object) -> TypeGuard[Sequence[Any]]:
    """Return whether several LoRAs are given: text and bytes are sequences too, and stand for one."""
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
        config: PEFT's configuration, which has the scale, if it isn't in the file's directory.
        metadata: The strings of the header, for a state dict.
        adapter: Which one, where the keys name several adapters, as PEFT does.
        allow_pickle: Whether to read ``.pt``, ``.bin`` and ``.ckpt``, tensors only
            (``torch.load(weights_only=True)``).

    Raises:
        FileError: The file is missing, broken or hostile.
        NotALoRAError: It holds no LoRA.
        LayerError: A layer is incomplete or its shapes disagree.
        OptionError: The source is none of these.
    """
    options: dict[str, Any] = {"architecture": architecture, "dialect": dialect, "adapter": adapter}
    if config is not None:
        options["config"] = {"": dict(config)}
    if isinstance(source, Mapping):
        held = {key: _held(key, value) for key, value in source.items()}
        return from_tensors(held, metadata or {}, "state dict", **options)
    if metadata is not None:
        raise OptionError("metadata= is for a state dict; a file has its own. Way out: leave it out.")
    if not isinstance(source, str | os.PathLike):
        stored = SafetensorsFile(IN_MEMORY, _bytes_of(source))
        return from_tensors(stored, stored.metadata, IN_MEMORY, files=(stored,), **options)
    path, options["source"] = _found(source)
    files: list[SafetensorsFile] = []
    try:
        return _open_path(path, options, allow_pickle, files)
    except BaseException:
        for file in files:
            file.close()
        raise


IN_MEMORY = "file in memory"
"""The name in messages of a file whose bytes were given."""


def _bytes_of(source: object) -> bytes:
    """Return the bytes of a file in memory or of a file object; what may change is copied."""
    try:
        data = source.read() if isinstance(source, Readable) else source
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


def _open_path(path: str, options: dict[str, Any], allow_pickle: bool, files: list[SafetensorsFile]) -> LoRA:
    """Open a file or a directory, and list the files that are open from then on."""
    if os.path.isdir(path):
        return _open_folder(path, options, allow_pickle, files)
    tensors, metadata, notes = _tensors(path, allow_pickle, files)
    if "config" not in options and any("base_model.model." in key for key in tensors):
        options["config"] = _config_beside(path)
        if not all(file.in_place() for file in files):
            raise FileError(REPLACED.format(path))
    return from_tensors(tensors, metadata, os.path.basename(path), notes=notes, files=files, **options)


def _tensors(
    path: str, allow_pickle: bool, files: list[SafetensorsFile]
) -> tuple[Mapping[str, Tensor], Mapping[str, str], list[str]]:
    """Return a file's tensors, the strings in its header, and notes on anything unusual."""
    if path.endswith(PICKLES):
        tensors, inside = pickled(path, allow_pickle)
        return tensors, {}, [f"the tensors of its dictionary {inside!r}"] if inside else []
    file = SafetensorsFile(path)
    files.append(file)
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
    with open(
        own(source),
        architecture=architecture,
        dialect=dialect,
        config=config,
        metadata=metadata,
        adapter=adapter,
        allow_pickle=allow_pickle,
    ) as lora:
        return lora.in_memory()


def _held(key: str, value: Any) -> Held:
    """Check a state dict's value, a dense numpy array or torch tensor, and drop its gradient."""
    value = value.detach() if hasattr(value, "detach") else value
    known = type(value).__module__.partition(".")[0] in ("numpy", "torch")
    if not known or not hasattr(value, "dtype") or getattr(value, "is_sparse", False):
        raise OptionError(f"The state dict's {key!r} is a {type(value).__name__}, wanted a dense tensor or array.")
    if not is_known(value):
        raise OptionError(f"The state dict's {key!r} has the dtype {value.dtype}, which loramerge does not know.")
    return Held(value)


def own(source: Source) -> Source:
    """Return a state dict with copies of its tensors, which the caller may change later; any other source as it is."""
    return {key: _copied(value) for key, value in source.items()} if isinstance(source, Mapping) else source


def _copied(value: Any) -> Any:
    copy = getattr(value, "clone", None) or getattr(value, "copy", None)
    return copy() if copy else value


def _found(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Find the file or directory; return its path, and the name for recipes: the Hub's, or without parent directories."""
    text = os.fspath(source)
    uri = isinstance(source, str) and text.startswith("hf://")
    path = "" if uri else located(source)
    if path.endswith(".toml") and os.path.isfile(path):
        raise FileError(
            f"{path} is a recipe, not a LoRA. Ways out: 'loramerge merge {path}' merges as it says, and with --dry-run "
            "shows what that would be (in Python, loramerge.Recipe.read); one with [compose] is drawn, 'loramerge generate "
            f"--lora {path}'."
        )
    if os.path.exists(path):
        return path, printable(os.path.basename(os.path.abspath(path)))
    from . import hub

    if text.startswith(("http://", "https://")):
        raise FileError(f"URLs are not fetched: {text}. Way out: {hub.named_by(text)}.")
    if os.path.islink(path):
        raise FileError(f"{path} is a link to {os.readlink(path)}, which isn't there. Way out: the file itself.")
    reference = hub.parse(text) if isinstance(source, str) else None  # a path object is never a name on the Hub
    looks_local = not uri and (
        (path.endswith((".safetensors", *PICKLES)) and text.count("/") != 2) or os.path.isdir(text.partition("/")[0])
    )
    if reference is None or looks_local:
        number = text.lstrip("-").replace(".", "", 1).isdigit()
        hint = " Weights are given one by one: -w 0.7 -w 0.5." if number else _near(path)
        raise FileError(f"No such file or directory: {path}.{hint}")
    fetched = hub.download(reference)
    return os.fspath(fetched), hub.pinned(reference, fetched)


def _near(path: str) -> str:
    """Return "Did you mean …?" for the most similar name in the same directory; empty if none is similar."""
    from difflib import get_close_matches

    folder, name = os.path.split(path)
    try:
        names = [entry for entry in os.listdir(folder or ".") if not entry.startswith(".")]
    except OSError:
        return ""
    near = [n for n in names if os.path.splitext(n)[0] == name] or get_close_matches(name, names, n=1)
    return f" Did you mean {os.path.join(folder, near[0])}?" if near else ""


def _open_folder(
    folder: "str | Path", options: dict[str, Any], allow_pickle: bool, files: list[SafetensorsFile]
) -> LoRA:
    from pathlib import Path

    from .hub import WEIGHTS, choose

    path = Path(folder)
    adapters = _adapters_in(path)
    if not adapters:
        entries = sorted(path.iterdir())
        others = [inner for entry in entries if entry.is_dir() and (inner := _adapter_in(entry))]
        names = [entry.name for entry in entries if entry.suffix == ".safetensors"]
        names = names or [entry.name for entry in entries if entry.suffix in PICKLES and not others]
        if len(others) == 1 and not names:
            return _open_folder(others[0].parent, options, allow_pickle, files)
        if others and not set(WEIGHTS) & set(names):
            listed = [*(str(other.parent) for other in others), *(str(path / name) for name in names)]
            raise FileError(f"{path} holds {len(listed)} adapters; name one: {', '.join(listed)}.")
        return _open_path(str(path / choose(names, str(path))), options, allow_pickle, files)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    for folder, file in adapters.items():
        prefix = "" if folder == path else f"{folder.name}/"
        held, strings, _ = _tensors(str(file), allow_pickle, files)
        tensors |= {prefix + key: tensor for key, tensor in held.items()}
        metadata |= strings
        config |= {folder.name if prefix else "": _config(folder / PEFT_CONFIG)}
    if adapters != _adapters_in(path) or not all(file.in_place() for file in files):
        raise FileError(REPLACED.format(path))
    # A configuration that is given replaces the directory's own, not those of the text encoders' directories.
    options = {**options, "config": config | options.get("config", {})}
    return from_tensors(tensors, metadata, os.path.basename(os.path.abspath(path)), files=files, **options)


REPLACED = "{} was replaced while it was read. Way out: read it again when the process that writes it is done."
"""The message if an adapter of several files was read while they were replaced: some were old, and some new."""


def _adapters_in(folder: "Path") -> "dict[Path, Path]":
    """Return the files of an adapter by the directory of each: its own, and those of text encoders."""
    folders = [folder, *(folder / component for component in COMPONENTS)]
    return {each: found for each in folders if (found := _adapter_in(each))}


def _adapter_in(folder: "Path") -> "Path | None":
    """Return the file of a PEFT adapter in a directory, preferring safetensors to a pickle."""
    return next((folder / name for name in PEFT_FILES if os.path.exists(folder / name)), None)


def _config_beside(path: str) -> dict[str, Any]:
    for beside in (os.path.join(os.path.dirname(path), PEFT_CONFIG), f"{os.path.splitext(path)[0]}.{PEFT_CONFIG}"):
        if os.path.exists(beside):
            return {"": _config(beside)}
    return {}


def _config(path: "str | Path") -> dict[str, Any]:
    try:
        return read_json(path)
    except FileError as error:
        raise FileError(f"{error} It holds the adapter's scale.") from error
