"""Encoders: functions from pictures to vectors, with a cache on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..devices import memory_for
from ..errors import NumberError, OptionError
from ..files.storage.scratch import make_folder
from ..files.storage.writer import Progress, write_bytes
from ..tensors import Array, is_torch
from .pictures import Box, bytes_of, downscaled, read

if TYPE_CHECKING:
    from PIL.Image import Image

Embed: TypeAlias = Callable[[Sequence["Image"]], Array]
"""Pictures in RGB to one vector each: an array ``(n, d)``, numpy's or torch's."""
WAYS_OUT = "Ways out: fewer at a time (--batch), or the CPU (--device cpu)."
"""Advice when memory runs out."""


@dataclass(frozen=True)
class Encoder:
    """A function from pictures to vectors, with a name."""

    embed: Embed
    name: str
    """Its name in tables."""
    key: str | None = None
    """Identifies the encoder with its options in the cache; None turns the cache off."""
    batch: int = 16
    """Pictures per call."""


def encoder_of(given: Encoder | Embed) -> Encoder:
    """Return an encoder as it is, and a function as an encoder."""
    return given if isinstance(given, Encoder) else Encoder(given, getattr(given, "__name__", type(given).__name__))


def pixels(side: int = 32) -> Encoder:
    """Return the baseline encoder: the picture itself, reduced to ``side`` × ``side`` pixels, is the vector."""
    return Encoder(lambda images: downscaled(images, side), f"{side} × {side} pixels", f"pixels {side}")


def embed(
    encoder: Encoder,
    files: Sequence[Path],
    *,
    box: Box | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Array:
    """Return one vector per picture: ``(n, d)``, float64.

    Args:
        encoder: The encoder.
        files: Pictures.
        box: The part of each picture to encode; the whole by default.
        cache: A directory for vectors, by the hash of file, encoder and box; created if it is missing.
        progress: Called with the number of pictures done and of all.

    Raises:
        FileError: A picture can't be read.
        OptionError: The encoder doesn't give one vector per picture.
        NumberError: A vector holds NaN or infinity.
        DeviceMemoryError: Out of memory; the message says what to lower.
    """
    import numpy as np

    box = box or Box()
    store = _Store(cache, encoder.key, box)
    found = {file: vector for file in dict.fromkeys(files) if (vector := store.read(file)) is not None}
    missing = [file for file in dict.fromkeys(files) if file not in found]
    for part, vectors in _embedded(encoder, missing, box):
        for file, vector in zip(part, vectors, strict=True):
            found[file] = vector
            store.write(file, vector)
        if progress:
            progress(len(found), len(set(files)))
    return np.stack([found[file] for file in files]).astype(np.float64)


def _embedded(encoder: Encoder, files: Sequence[Path], box: Box) -> Iterator[tuple[Sequence[Path], Array]]:
    for start in range(0, len(files), encoder.batch):
        part = files[start : start + encoder.batch]
        images = [box.of(read(file)) for file in part]
        with memory_for(f"{len(part)} pictures at a time", WAYS_OUT):
            vectors = encoder.embed(images)
        yield part, _checked(vectors, part, encoder.name)


def _checked(vectors: Array, files: Sequence[Path], name: str) -> Array:
    import numpy as np

    if is_torch(vectors):
        vectors = vectors.detach().float().cpu()
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != len(files):
        raise OptionError(f"The encoder {name} gave the shape {array.shape} for {len(files)} pictures, wanted (n, d).")
    wrong = ~np.isfinite(array).all(1) | ~array.any(1)
    if wrong.any():
        bad = files[int(wrong.argmax())]
        raise NumberError(f"The encoder {name} gave {bad} a vector that is zero, NaN or infinite: it has no direction.")
    return array


class _Store:
    """A cache of vectors on disk, each in a file named by the hash of all that it depends on."""

    def __init__(self, folder: Path | None, key: str | None, box: Box) -> None:
        self.folder = folder if key else None
        self.rest = json.dumps([key, box.left, box.top, box.right, box.bottom])
        self.paths: dict[Path, Path] = {}

    def path(self, file: Path) -> Path | None:
        if self.folder is None:
            return None
        if file not in self.paths:
            content = hashlib.sha256(bytes_of(file)).hexdigest()
            name = hashlib.sha256(f"{content} {self.rest}".encode()).hexdigest()
            self.paths[file] = self.folder / name[:2] / f"{name}.f32"
        return self.paths[file]

    def read(self, file: Path) -> Array | None:
        import numpy as np

        path = self.path(file)
        if path is None or not path.is_file():
            return None
        data = path.read_bytes()
        body, check = data[:-32], data[-32:]
        if not body or hashlib.sha256(body).digest() != check:  # truncated, or not a file of this cache
            return None
        return np.frombuffer(body, "<f4")

    def write(self, file: Path, vector: Array) -> None:
        path = self.path(file)
        if path is not None:
            make_folder(path.parent)
            body = vector.astype("<f4").tobytes()
            write_bytes(path, body + hashlib.sha256(body).digest())
