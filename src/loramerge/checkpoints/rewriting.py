"""Rewriting a base model: some tensors get an update, the others are copied, one in memory at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError, computing, within
from ..files.metadata import HASHES
from ..files.storage import scratch
from ..files.storage.reader import SafetensorsFile
from ..files.storage.writer import COPIED, Progress, write, write_text
from ..layers import DeltaRows
from ..linalg import energy
from ..tensors import (
    FLOATS,
    Array,
    Spec,
    Stored,
    check_finite,
    check_not_faint,
    check_not_large,
    largest_of,
    nbytes,
    rounded,
    rows_per_block,
)
from .folders import shard_indexes
from .models import BLOCK, Checkpoint, Place, cut, widened

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
"""Ends of the names of files that hold weights."""


@dataclass(frozen=True)
class Change:
    """The change that a bake made to a tensor of a module."""

    tensor: str
    """The module's name, for its weight; with ``.bias`` appended, for its bias."""
    norm: float
    """‖ΔW‖ before rounding."""
    change: float
    """‖W' − W‖ as stored."""
    error: float
    """‖(W' − W) − ΔW‖, the rounding error."""
    lost: float
    """Share of the values with ΔW ≠ 0 that did not change, because ΔW is below the dtype's resolution there."""
    dtype: str

    @property
    def loss(self) -> float:
        """The relative rounding loss, ‖(W' − W) − ΔW‖ / ‖ΔW‖."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Update:
    """An update of a module's weight or bias."""

    name: str
    place: Place
    delta: Callable[[], DeltaRows]
    """Prepares Σ wᵢ ΔWᵢ, and returns a function that computes some rows of it."""


@dataclass(frozen=True)
class _Copy:
    """A tensor that is copied, whatever its values."""

    key: str
    stored: Stored

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {self.key: self.stored}

    def arrays(self) -> Mapping[str, Iterator[Array]]:
        import numpy as np

        begin, end, source = self.stored.begin, self.stored.end, self.stored.source
        parts = (source(at, min(at + COPIED, end)) for at in range(begin, end, COPIED))
        return {self.key: (np.frombuffer(part, np.uint8) for part in parts)}


@dataclass(frozen=True)
class _Rounded:
    """A stored tensor with the updates of the modules in it, if there are any, rounded to a dtype."""

    key: str
    stored: Stored
    dtype: str
    updates: Sequence[Update]
    report: Callable[[Change], None]
    scale: Array | None
    """The factor on float8 numbers; None if there is none."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {self.key: Spec(self.stored.shape, self.dtype)}

    def arrays(self) -> Mapping[str, Iterator[Array]]:
        return {self.key: self._blocks()}

    def _blocks(self) -> Iterator[Array]:
        """Read, change, round and measure some rows at a time: they stay in the processor's cache."""
        largest = 0.0
        with within(", ".join(update.name for update in self.updates) or self.key):
            parts = [_Part(update, self.dtype) for update in self.updates]
            for part, rows, own in self._spans(parts):
                old = cut(self.stored, rows.start, rows.stop).read()
                check_finite(old)  # before the cast, which turns float16's infinity and NaN into numbers
                exact = before = self._values(old, rows)
                if part:
                    delta = part.rows(own).reshape(before.shape)
                    exact = before + delta
                exact = exact if self.scale is None else exact / self._scale(rows)
                largest = max(largest, _checked_size(exact, self.dtype))
                new = rounded(exact, self.dtype)
                if part:
                    part.measure(delta, before, self._values(new, rows))
                yield new
            check_not_faint(largest, self.dtype)
        for part in parts:
            self.report(part.change())

    def _spans(self, parts: Sequence["_Part"]) -> Iterator[tuple["_Part | None", slice, slice]]:
        """Yield blocks of rows, with the part that they belong to, if any, and which rows of its module they are."""
        shape = self.stored.shape or (1,)
        count, step = shape[0], rows_per_block(shape, BLOCK)
        owned = sorted((*span, i) for i, part in enumerate(parts) for span in part.spans(count))
        spans: list[tuple[int, int, int, _Part | None]] = []
        done = 0
        for start, stop, before, owner in owned:
            spans += [(done, start, 0, None), (start, stop, before, parts[owner])]
            done = stop
        spans.append((done, count, 0, None))
        for start, stop, before, part in spans if math.prod(shape) else []:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                yield part, slice(first, last), slice(first - before, last - before)

    def _values(self, stored: Array, rows: slice) -> Array:
        """Return numbers in float32, float64 ones as they are, times their scale."""
        return widened(stored) if self.scale is None else widened(stored) * self._scale(rows)

    def _scale(self, rows: slice) -> Array:
        assert self.scale is not None
        return self.scale if self.scale.size == 1 else self.scale[rows]


class _Part:
    """The rows of a stored tensor that an update changes, and sums that measure by how much."""

    def __init__(self, update: Update, dtype: str) -> None:
        import numpy as np

        self.update = update
        self.dtype = dtype
        self.sums = np.zeros(5)
        """‖ΔW‖², ‖W' − W‖², ‖(W' − W) − ΔW‖², the number of values with ΔW ≠ 0, and of those among them that stay."""
        with computing(update.name):
            self.delta = update.delta()
            if update.place.transposed:
                turned = self.delta(slice(None)).T
                self.delta = turned.__getitem__

    def spans(self, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield the first and the last of rows in the stored tensor, and how many rows before them aren't the module's."""
        at = 0
        for start, stop in self.update.place.rows or ((0, count),):
            yield start, stop, start - at
            at += stop - start

    def rows(self, rows: slice) -> Array:
        with computing(self.update.name):
            return self.delta(rows)

    def measure(self, delta: Array, old: Array, new: Array) -> None:
        """Measure a block: in float32 if what is written has fewer digits than that, else in float64."""
        import numpy as np

        wide = np.float64 if self.dtype in ("F32", "F64") else np.float32
        asked, before, after = (array.reshape(-1).astype(wide, copy=False) for array in (delta, old, new))
        moved, wanted = after - before, asked != 0
        counts = [int(np.count_nonzero(found)) for found in (wanted, wanted & (moved == 0))]
        self.sums += [energy(asked), energy(moved), energy(moved - asked), *counts]

    def change(self) -> Change:
        norm, change, error = (math.sqrt(square) for square in self.sums[:3])
        wanted, still = self.sums[3:]
        return Change(self.update.name, norm, change, error, float(still / wanted) if wanted else 0.0, self.dtype)


def _checked_size(values: Array, dtype: str) -> float:
    """Return the largest magnitude; refuse NaN, infinity, and what would become infinite in a dtype."""
    largest = largest_of(values)
    if not math.isfinite(largest):
        check_finite(values)
    check_not_large(largest, dtype)
    return largest


@dataclass(frozen=True)
class Job:
    """The files of a base to write, with their updates."""

    model: Checkpoint
    updates: Sequence[Update]
    dtype: str | None
    workers: int
    progress: Progress | None
    changes: dict[str, Change] = field(default_factory=dict)
    """The change of each tensor, added when it is written."""

    @property
    def names(self) -> list[str]:
        """The tensors that are changed, in order."""
        return [update.name for update in self.updates]

    def changed(self) -> list[Path]:
        """List the files to rewrite: those with an update; for a new dtype, all of their components."""
        touched = {update.place.file for update in self.updates}
        folders = {path.parent for path in touched} if self.dtype else set()
        return [path for path in self.model.files if path in touched or path.parent in folders]

    def write(self, file: Path, target: Path, metadata: Mapping[str, str], before: int = 0, total: int = 0) -> int:
        """Write one file of the base under a new name; return the number of its tensors."""
        source = self.model.files[file]
        own = {key: value for key, value in source.metadata.items() if key not in HASHES}
        groups = list(self._groups(file, source))
        progress = self.progress

        def report(done: int, _: int) -> None:
            if progress:
                progress(before + done, total or len(groups))

        write(target, groups, {"format": "pt", **own, **metadata}, workers=self.workers, progress=report, fork=False)
        return len(groups)

    def _groups(self, file: Path, source: SafetensorsFile) -> Iterator[_Copy | _Rounded]:
        updates: dict[str, list[Update]] = {}
        for update in self.updates:
            if update.place.file == file:
                updates.setdefault(update.place.key, []).append(update)
        for key, stored in source.items():
            dtype, scale = self.dtype_of(stored), self._scale(file, key)
            if key not in updates and dtype == stored.dtype:
                yield _Copy(key, stored)
            else:
                yield _Rounded(key, stored, dtype, updates.get(key, ()), self._report, scale)

    def _scale(self, file: Path, key: str) -> Array | None:
        """Return what a tensor's numbers are multiplied by.

        Raises:
            FileError: They are, and all tensors shall be of another dtype.
        """
        scale = self.model.scale(file, key)
        if self.dtype and scale is not None:
            raise FileError(
                f"{self.model.name}: {key} is float8 with a scale beside it, which another dtype has no place for. "
                "Way out: leave the dtype out (--dtype), and it stays float8."
            )
        return scale

    def dtype_of(self, stored: Stored) -> str:
        """Return a tensor's dtype as written."""
        return self.dtype if self.dtype and stored.dtype in FLOATS else stored.dtype

    def size(self, file: Path) -> int:
        """Return the size in bytes of a file's tensors as written."""
        return sum(nbytes(stored.shape, self.dtype_of(stored)) for stored in self.model.files[file].values())

    def _report(self, change: Change) -> None:
        self.changes[change.tensor] = change


def write_folder(job: Job, target: Path, metadata: Mapping[str, str]) -> list[str]:
    """Copy the base's directory with the changed files instead of the old; return a line for each file left out."""
    root = job.model.path
    changed = job.changed()
    stale = _other_weights(job.model, changed)
    total = sum(len(job.model.files[file]) for file in changed)
    _check_links(root, stale)
    try:
        with scratch.folder(target.parent, target.name) as made:
            new = made / "model"
            shutil.copytree(root, new, ignore=_skipping({*changed, *stale}))
            done = 0
            for file in changed:
                done += job.write(file, new / file.relative_to(root), metadata, done, total)
            if job.dtype:
                _update_indexes(job, changed, new)
            new.replace(target)
    except OSError as error:
        raise FileError(f"Can't write {target}: {error.strerror or error}.") from error
    return [f"{file.relative_to(root)}: it holds weights without the LoRA" for file in stale]


def _check_links(root: Path, left_out: Sequence[Path]) -> None:
    """Refuse links out of a model and its place in the Hub's cache: its copy would hold other files of this machine."""
    real = root.resolve()
    homes = [real, *(folder.parent / "blobs" for folder in real.parents if folder.name == "snapshots")]
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            link = path.is_symlink()
            apart = link and not any(home in path.resolve().parents for home in homes)
            if (apart or not (path.is_file() or (path.is_dir() and not link))) and path not in left_out:
                what = f"a link to {os.readlink(path)}" if link else "a pipe or a device"
                raise FileError(
                    f"Can't copy {path}: it is {what}, and only links to files of the model are followed. Way out: put the "
                    "file or the directory itself there, or remove it."
                )


def _other_weights(model: Checkpoint, changed: Sequence[Path]) -> list[Path]:
    """List other copies of the changed weights: variants, pickles, single files in the model's directory."""
    folders = sorted({file.parent for file in changed} | ({model.path} if changed else set()))
    found = [file for folder in folders for file in sorted(folder.iterdir())]
    stale = [file for file in found if file.suffix in WEIGHTS and file not in model.files]
    names = {file.name for file in stale}
    indexes = [
        path
        for folder in folders
        for path, index in shard_indexes(folder).items()
        if set(index["weight_map"].values()) & names
    ]
    return stale + indexes


def _skipping(paths: set[Path]) -> Callable[[str, list[str]], set[str]]:
    def skipped(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) / name in paths}

    return skipped


def _update_indexes(job: Job, changed: Sequence[Path], new: Path) -> None:
    """Correct the total sizes in indexes of shards, for a new dtype."""
    for folder in sorted({file.parent for file in changed}):
        sizes = {file.name: job.size(file) for file in changed if file.parent == folder}
        for path, index in shard_indexes(folder).items():
            if set(index["weight_map"].values()) <= set(sizes):
                entry = {**index, "metadata": {**index.get("metadata", {}), "total_size": sum(sizes.values())}}
                write_text(new / path.relative_to(job.model.path), json.dumps(entry, indent=2) + "\n")
