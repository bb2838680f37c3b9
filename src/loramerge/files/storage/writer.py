"""Writing safetensors: whole or not at all, one tensor in memory at a time."""

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ...errors import FileError, size
from ...tensors import Array, Spec, Stored, Tensor, is_torch, keep_freed_memory, nbytes
from . import scratch, workers as processes
from .header import Awaited, draft
from .reader import MAX_HEADER, SafetensorsFile, pread, pwrite

Progress = Callable[[int, int], None]
"""Called with the number of modules done and of all."""


class Group(Protocol):
    """Tensors that are written together."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shapes and dtypes, by key."""

    def arrays(self) -> Mapping[str, Array | Iterator[Array]]:
        """The values, in the dtypes of `specs`; those of a large tensor may come in parts, in order."""


def write(
    path: Path,
    groups: Sequence[Group],
    metadata: Mapping[str, str],
    *,
    workers: int = 1,
    progress: Progress | None = None,
    hashes: bool = False,
    fork: bool = True,
) -> None:
    """Write a safetensors file: whole, or not at all.

    The file appears under its name by a rename, once every byte is written.  Its bytes are
    those that the reference implementation writes, and the same for any number of workers.

    Args:
        groups: The tensors; each group is computed when its turn comes.
        metadata: Strings for the header; the slow entry of an `Awaited` is computed while the tensors are written.
        workers: The most processes that compute groups; threads if it is not safe to fork.
        hashes: Whether to fill in ``sshs_model_hash`` and ``sshs_legacy_hash``.
        fork: Whether workers may be processes.

    Raises:
        FileError: The disk is full, the directory is missing or not writable.
    """
    specs = {key: spec for group in groups for key, spec in group.specs.items()}
    if len(specs) != sum(len(group.specs) for group in groups):
        raise FileError(f"Can't write {path}: two tensors have the same key.")
    keep_freed_memory()
    layout = _Layout(specs)
    header = layout.header({**draft(metadata), **_PLACEHOLDERS} if hashes else draft(metadata))
    start = len(header)
    _check_space(path, start + layout.size)
    with _replacing(path) as fd:
        _check_header(path, start)
        _reserve(fd, start + layout.size)
        _write_at(fd, header, 0)
        # Closed before the file is: a thread still at work would write into whatever is opened next.
        with closing(_each(groups, lambda group: _write_group(fd, group, layout, start), workers, fork)) as written:
            for done, _ in enumerate(written, start=1):
                if done == 1 and isinstance(metadata, Awaited):
                    metadata.begin()  # it starts a thread, and workers must be forked before that
                if progress:
                    progress(done, len(groups))
        if hashes or isinstance(metadata, Awaited):
            late = _hashes(fd, layout, start, metadata) if hashes else {}
            header = layout.header({**metadata, **late})
            if len(header) != start:
                raise FileError(f"Can't write {path}: the header became {len(header)} bytes long, not {start}.")
            _write_at(fd, header, 0)


def write_metadata(file: SafetensorsFile, metadata: Mapping[str, str]) -> None:
    """Replace a file by one with other metadata, whole or not at all; its tensors' bytes are copied as they lie.

    Raises:
        FileError: The disk is full, the file is read-only, or another process has just replaced it.
    """
    path, start = Path(file.path), file.opened.start
    entries = {
        key: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [tensor.begin, tensor.end]}
        for key, tensor in file.items()
    }
    header = _header(metadata, _members(entries).encode())
    _check_header(path, len(header))
    total = len(header) - start + file.opened.size
    _check_space(path, total)
    with _replacing(path) as fd:
        _reserve(fd, total)
        _write_at(fd, header, 0)
        for at in range(start, file.opened.size, COPIED):
            data = file.opened.read(at, min(COPIED, file.opened.size - at))
            _write_at(fd, data, at - start + len(header))
        if not file.in_place():
            raise FileError(f"{path} was replaced while it was edited; nothing is written. Way out: edit it again.")


COPIED = 1 << 22
"""Bytes that are copied at once."""


def _check_header(path: Path, length: int) -> None:
    if length > MAX_HEADER:
        raise FileError(
            f"Can't write {path}: its header would have {length} bytes, of which readers take {MAX_HEADER}. "
            "Way out: shorter metadata."
        )


def file_size(groups: Iterable[Group], metadata: Mapping[str, str], hashes: bool = False) -> int:
    """Return the size in bytes of the file that `write` would make."""
    specs = {key: spec for group in groups for key, spec in group.specs.items()}
    layout = _Layout(specs)
    return len(layout.header({**draft(metadata), **_PLACEHOLDERS} if hashes else draft(metadata))) + layout.size


def sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of the file that `write` would make of these tensors: names, shapes, dtypes and bytes."""
    layout = _Layout(tensors)
    found = hashlib.sha256(layout.header(metadata or {}))
    for data in _data([tensors[key] for key in layout.begins]):
        found.update(data)
    return found.hexdigest()


def _data(tensors: Iterable[Tensor], most: int = 1 << 18) -> Iterator[bytes | memoryview]:
    """Yield the tensors' bytes; neighbours in a file are read together."""
    run: list[Stored] = []
    for tensor in tensors:
        follows = run and isinstance(tensor, Stored) and tensor.begin == run[-1].end and tensor.source == run[-1].source
        if run and not (follows and run[-1].end - run[0].begin < most):
            yield run[0].source(run[0].begin, run[-1].end)
            run = []
        if isinstance(tensor, Stored):
            run.append(tensor)
        else:
            yield _bytes(tensor.read())
    if run:
        yield run[0].source(run[0].begin, run[-1].end)


class _Layout:
    """File layout: tensors sorted by decreasing alignment, then name, like the reference implementation."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        entries: dict[str, Any] = {}
        self.begins: dict[str, int] = {}
        at = 0
        for key in sorted(specs, key=lambda key: (-DTYPE_ORDER[specs[key].dtype], key)):
            spec = specs[key]
            size = nbytes(tuple(spec.shape), spec.dtype)
            entries[key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + size]}
            self.begins[key] = at
            at += size
        self.size = at
        self._entries = _members(entries).encode()

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Return the file's beginning, up to the tensors' bytes."""
        return _header(metadata, self._entries)


def _header(metadata: Mapping[str, str], entries: bytes) -> bytes:
    own = _members({"__metadata__": dict(metadata)}).encode(errors="replace") if metadata else b""
    text = b"{" + b",".join(filter(None, (own, entries))) + b"}"
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _members(data: Mapping[str, Any]) -> str:
    """Return the JSON of an object, without the braces."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)[1:-1]


_ORDER = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
]
DTYPE_ORDER = {code: i for i, code in enumerate(_ORDER)}
"""Position in the reference implementation's order of dtypes, which it writes from last to first."""

_PLACEHOLDERS = {"sshs_legacy_hash": "0" * 8, "sshs_model_hash": "0" * 64}


def _write_group(fd: int, group: Group, layout: _Layout, start: int) -> None:
    for key, values in group.arrays().items():
        at = start + layout.begins[key]
        for part in values if isinstance(values, Iterator) else (values,):
            at = _write_at(fd, _bytes(part), at)


def _bytes(array: Array) -> memoryview:
    import numpy as np

    if is_torch(array):
        import torch

        flat: Any = array.detach().cpu().contiguous().reshape(-1)
        array = flat.view(torch.uint8).numpy()
    octets: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(octets)


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write some bytes at an offset; return the offset behind them."""
    view = memoryview(data)
    while len(view):
        count = pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
    return offset


def _check_space(path: Path, needed: int) -> None:
    """Refuse a file that the disk has no room for, before anything is written."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return
    if needed > free:
        raise FileError(
            f"Can't write {path}: it takes {size(needed)}, and its disk has {size(free)} free. Ways out: another disk, or a "
            "smaller rank or dtype."
        )


def _reserve(fd: int, size: int) -> None:
    """Allocate the disk space now, so that a full disk is an error before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


SMALL = 100_000
"""Mean bytes per group below which threads don't pay: most of the work then holds the GIL."""


def _each(groups: Sequence[Group], work: Callable[[Group], None], workers: int, fork: bool) -> Generator[None]:
    """Work on every group: in processes, in threads, or one after the other, whichever pays."""
    if workers <= 1 or len(groups) <= 1:
        yield from map(work, groups)
    elif fork and processes.safe():
        yield from processes.each(groups, work, workers)
    else:
        size = sum(nbytes(tuple(spec.shape), spec.dtype) for group in groups for spec in group.specs.values())
        yield from (
            _by_threads(groups, work, min(workers, processes.cores()))
            if size >= SMALL * len(groups)
            else map(work, groups)
        )


def _by_threads(groups: Sequence[Group], work: Callable[[Group], None], workers: int) -> Generator[None]:
    """Work on every group in threads, with few groups in memory at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers) as pool:
        waiting = iter(groups)
        running = [pool.submit(work, group) for group in islice(waiting, 4 * workers)]
        try:
            while running:
                yield running.pop(0).result()
                running += [pool.submit(work, group) for group in islice(waiting, 1)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Yield the descriptor of a temporary file that is renamed to the path if no error is raised."""
    mode = replaced_mode(path)
    try:
        fd, name = scratch.file(path)
    except OSError as error:
        raise FileError(f"Can't write {path}: {error.strerror}.") from error
    try:
        with scratch.held(fd):
            try:
                if mode is not None:
                    os.chmod(fd if os.chmod in os.supports_fd else name, mode)
                yield fd
            finally:
                os.close(fd)
            os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise FileError(f"Can't write {path}: {error.strerror}.") from error
        raise


def replaced_mode(path: Path) -> int | None:
    """Return the permissions of the file that will be replaced; None if there is none.

    Raises:
        FileError: It is read-only.
    """
    try:
        found = os.stat(path)
        mode = stat.S_IMODE(found.st_mode)
        refused = not (mode & 0o222 and os.access(path, os.W_OK))  # os.access alone lets root write to read-only files
        if refused and not os.path.samestat(found, os.stat(path)):
            return replaced_mode(path)  # another process has just replaced it
    except OSError:
        return None
    if refused:
        raise FileError(f"Can't write {path}: it is there, and read-only. Ways out: another output, or chmod u+w.")
    return mode & 0o777


def write_text(path: Path, text: str) -> None:
    """Write a small text file: whole, or not at all."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file: whole, or not at all."""
    with _replacing(path) as fd:
        _write_at(fd, data, 0)


def _hashes(fd: int, layout: _Layout, start: int, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return kohya's hashes, by which the WebUI identifies a LoRA: of the tensors' bytes, and of 64 KiB at 1 MiB.

    The older of the two, the second, is that of a file whose header has the ``ss_`` entries only.

    Source: https://github.com/kohya-ss/sd-scripts, library/train_util.py, precalculate_safetensors_hashes
    """
    kept = layout.header({k: v for k, v in metadata.items() if k.startswith("ss_")})
    image = kept[0x100000:0x110000]
    rest = 0x110000 - max(0x100000, len(kept))
    if rest > 0:
        image += pread(fd, rest, start + max(0x100000 - len(kept), 0))
    whole = hashlib.sha256()
    for chunk in _chunks(fd, start, start + layout.size):
        whole.update(chunk)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": hashlib.sha256(image).hexdigest()[:8]}


def _chunks(fd: int, start: int, stop: int, size: int = 1 << 18) -> Iterable[bytes]:
    while start < stop:
        chunk = pread(fd, min(size, stop - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the file ended early")
        yield chunk
        start += len(chunk)
