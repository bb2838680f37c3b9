"""Reading safetensors: the header is checked, then tensors are read one at a time.

The format is https://github.com/huggingface/safetensors#format: eight bytes of header length,
a JSON header, then the tensors' bytes without gaps.  This reader accepts what the reference
implementation accepts.  It exists because that one maps the whole file into memory, and needs
numpy even to look at a header.
"""

import json
import math
import os
import re
import struct
import threading
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from ...errors import FileError
from ...tensors import SIZES, Stored
from .texts import HALF, open_regular, too_large

MAX_HEADER = 100_000_000
"""The reference implementation's limit, in bytes."""

INTEGERS = {int}
"""The types of a shape's and an offset's numbers."""

MAX_AXES, MAX_BYTES = 64, 2**63
"""numpy's limit of a shape's axes, and the file system's limit of a tensor's bytes, counting sizes of 0 as 1."""

NUMBER, AHEAD = 8, 4096
"""Tensors of up to this many bytes (alphas) are stored side by side, so a block of the second size is read at once."""


class OpenFile:
    """The bytes of an open file, or of one in memory; it is closed when nothing refers to it, as its tensors do.

    Args:
        path: The file; if its bytes are given, their name in messages.
        data: The file's bytes, if it is in memory.

    Raises:
        FileError: The file can't be opened.
    """

    _release = staticmethod(os.close)
    """Kept by the class: when Python ends, this module's names may be gone before its last file is closed."""

    def __init__(self, path: str | os.PathLike[str], data: bytes | None = None, start: int = 0) -> None:
        self.path = path
        self.start = start
        """Where tensors' bytes begin."""
        self._data = data
        self._ahead = 0, b""
        self._fd = -1  # should opening fail
        self._fd = -1 if data is not None else open_regular(path)
        self.size = os.fstat(self._fd).st_size if data is None else len(data)

    def __deepcopy__(self, memo: object) -> "OpenFile":
        return self  # the file is read only, and its descriptor must be closed once

    def __reduce__(self) -> tuple[type["OpenFile"], tuple[str | os.PathLike[str], bytes | None, int]]:
        return OpenFile, (self.path, self._data, self.start)

    def close(self) -> None:
        """Close the file; reading is an error from then on."""
        self._data, self._ahead = None, (0, b"")
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._release(fd)

    def __del__(self) -> None:
        self.close()

    def in_place(self) -> bool:
        """Return whether the path still leads to this file."""
        return self._data is not None or (
            os.path.exists(self.path) and os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        )

    def tensor(self, begin: int, end: int) -> bytes:
        """Read bytes of tensors; those of small ones beside them are kept."""
        if end - begin > NUMBER:
            return self.read(self.start + begin, end - begin)
        first, block = self._ahead
        if begin < first or end > first + len(block):
            size = min(AHEAD, self.size - self.start - begin)
            first, block = self._ahead = begin, self.read(self.start + begin, size)
        return block[begin - first : end - first]

    def read(self, offset: int, size: int) -> bytes:
        """Read some bytes.

        Raises:
            FileError: They can't be read, or the file is closed.
        """
        if self._data is not None:
            return self._data[offset : offset + size]
        if self._fd < 0:
            raise FileError(f"{self.path} is closed.")
        try:
            data = pread(self._fd, size, offset)
            while len(data) < size:
                more = pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise FileError(f"{self.path} ended at byte {offset + len(data)}; it changed while it was read.")
                data += more
        except OSError as error:
            raise FileError(f"Can't read {self.path}: {error.strerror}.") from error
        return data


class SafetensorsFile(dict[str, Stored]):
    """The tensors of an open file by key, in the file's order, and its metadata; the arguments are those of `OpenFile`.

    The tensors refer to the open file and not to this mapping, which would be a cycle.

    Raises:
        FileError: The file can't be opened, or its header is broken or hostile.
    """

    def __init__(self, path: str | os.PathLike[str], data: bytes | None = None) -> None:
        super().__init__()
        self.path = path
        self.opened = OpenFile(path, data)
        self.close, self.in_place = self.opened.close, self.opened.in_place
        try:
            self.metadata, tensors = self._header()
        except BaseException:
            self.close()
            raise
        self.update(tensors)

    def _header(self) -> tuple[dict[str, str], dict[str, Stored]]:
        size = self.opened.size
        if size < 8:
            raise self._refused(f"is no safetensors file: {size} bytes, wanted at least 8")
        (length,) = struct.unpack("<Q", self.opened.read(0, 8))
        if length > MAX_HEADER:
            raise self._refused(
                f"is no safetensors file, or a hostile one: its header claims {length} bytes, at most {MAX_HEADER} are allowed"
            )
        if 8 + length > size:
            raise self._refused(
                f"is truncated or no safetensors file: its header claims {length} bytes, {size - 8} are there"
            )
        header = self._json(self.opened.read(8, length))
        metadata = self._checked_metadata(header.pop("__metadata__", None))
        self.opened.start = 8 + length
        return metadata, self._tensors(header, size - 8 - length)

    def _refused(self, why: str) -> FileError:
        """Return the error that says what the file is instead, or else why it isn't one of safetensors."""
        start = self.opened.read(0, min(512, self.opened.size))
        what = next((what for beginning, what in INSTEAD if re.match(beginning, start, re.DOTALL)), None)
        return FileError(f"{self.path} is no safetensors file but {what}." if what else f"{self.path} {why}.")

    def _json(self, data: bytes) -> dict[str, Any]:
        if reason := too_large(data):
            raise FileError(f"{self.path} is no safetensors file, or a hostile one: its header {reason}.")
        try:
            text = data.decode("utf-8")
            header = json.loads(text, object_pairs_hook=_unique)
            _check_unicode(text, header)
        except (ValueError, RecursionError) as error:
            raise self._refused(f"is no safetensors file: its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise FileError(f"{self.path} is no safetensors file: its header is not a JSON object.")
        return header

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise FileError(f"{self.path}: the header's __metadata__ must map strings to strings.")
        return metadata

    def _tensors(self, header: Mapping[str, Any], size: int) -> dict[str, Stored]:
        source, entry = self.opened.tensor, self._entry
        tensors = {key: Stored(*entry(key, value), source) for key, value in header.items()}
        at = 0
        for tensor in sorted(tensors.values(), key=attrgetter("begin", "end")):
            if tensor.begin != at:
                key = next(key for key, t in tensors.items() if t is tensor)
                raise FileError(f"{self.path}: the tensor {key!r} begins at byte {tensor.begin}, wanted {at}.")
            at = tensor.end
        if at != size:
            what = "is truncated" if at > size else "has bytes that no tensor owns"
            raise FileError(f"{self.path} {what}: its tensors need {at} bytes, {size} are there.")
        return tensors

    def _entry(self, key: str, value: Any) -> tuple[tuple[int, ...], str, int, int]:
        try:
            dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = (*shape, begin, end)
            if {*map(type, numbers)} != INTEGERS or min(numbers) < 0 or max(numbers) >= 2**63:
                raise ValueError
            if len(value) != 3 or type(dtype) is not str or len(shape) > MAX_AXES:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise FileError(f"{self.path}: the header's entry for {key!r} is malformed.") from None
        if dtype not in SIZES:
            raise FileError(f"{self.path}: the tensor {key!r} has the dtype {dtype!r}, which loramerge does not know.")
        if end - begin != math.prod(shape) * SIZES[dtype]:
            raise FileError(
                f"{self.path}: the tensor {key!r} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes, "
                f"wanted {math.prod(shape) * SIZES[dtype]}."
            )
        if begin == end and math.prod(max(1, n) for n in shape) * SIZES[dtype] >= MAX_BYTES:
            raise FileError(f"{self.path}: the tensor {key!r} has the shape {list(shape)}, which no array can have.")
        return shape, dtype, begin, end


LENGTH = rb"(?!.{4}\0{4})"
"""Matches where no length of a header stands: the first eight bytes are a large number."""

INSTEAD = (
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a zip file or a pickle, such as torch.save writes. Way out: torch.load(…, weights_only=True) gives a state dict, "
        "which loramerge.load takes",
    ),
    (
        rb"PK(\x05\x06|\x07\x08)|7z\xbc\xaf|Rar!|\x1f\x8b\x08|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
        "an archive",
    ),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|.{4}ftyp(avif|heic|mif1)|II\*\0|MM\0\*|BM.{4}\0{4}", "a picture"),
    (rb"RIFF.{4}(AVI |WAVE)|.{4}ftyp|\x1aE\xdf\xa3|OggS|ID3", "a video or a sound"),
    (
        rb"GGUF|GGML|ggjt",
        "a GGUF file, whose weights are quantised. Way out: the LoRA as safetensors, from where it was made",
    ),
    (rb"\x93NUMPY|\x89HDF|SQLite format 3", "a file of other data: NumPy's, HDF5 or SQLite"),
    (rb"%PDF", "a PDF"),
    (rb"\x7fELF|MZ.{6}|\xcf\xfa\xed\xfe", "a program"),
    (LENGTH + rb"\s*<", "a web page, such as one that asks to log in. Way out: download the file itself"),
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file. Way out: git lfs pull"),
    (LENGTH + rb"\s*[\[{]", "a JSON file"),
    (LENGTH + rb"(\xef\xbb\xbf)?[\t\n\r -~]{8,}\Z", "a text file"),
)
"""Beginnings of other files that users take for safetensors files."""


def _check_unicode(source: str, header: Any) -> None:
    """Refuse an escaped half of a surrogate pair, which JSON can write and UTF-8 can't.

    Raises:
        ValueError: There is one.
    """
    if HALF.search(source) and isinstance(header, dict):
        metadata = header.get("__metadata__")
        values = metadata if isinstance(metadata, dict) else {}
        for text in (*header, *values, *(v for v in values.values() if isinstance(v, str))):
            text.encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


_lock = threading.Lock()


def read_there(fd: int, size: int, offset: int) -> bytes:
    """Do what ``os.pread`` does, which Windows lacks."""
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


def write_there(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Do what ``os.pwrite`` does, which Windows lacks."""
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


pread = getattr(os, "pread", read_there)
pwrite = getattr(os, "pwrite", write_there)
