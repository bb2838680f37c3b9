"""Rewriting a base model: some tensors get an update, the others are copied, one in memory at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError, NumberError, computing, within
from ..files.metadata import HASHES
from ..files.storage import scratch
from ..files.storage.reader import SafetensorsFile
from ..files.storage.writer import Progress, write, write_text
from ..tensors import FLOATS, Array, Spec, Stored, cast, check_finite, float32, nbytes, put_rows, take_rows
from .folders import shard_indexes
from .models import Checkpoint, Place, widened

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
    delta: Callable[[Array], Array]
    """Returns Σ wᵢ ΔWᵢ, given the weight in float32."""


@dataclass(frozen=True)
class _Copy:
    """A tensor that is copied, whatever its values."""

    key: str
    stored: Stored

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {self.key: self.stored}

    def arrays(self) -> Mapping[str, Array]:
        return {self.key: self.stored.read()}


@dataclass(frozen=True)
class _Rounded:
    """A tensor in another dtype."""

    key: str
    stored: Stored
    dtype: str

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {self.key: Spec(self.stored.shape, self.dtype)}

    def arrays(self) -> Mapping[str, Array]:
        try:
            return {self.key: cast(self.stored.read(), self.dtype)}
        except NumberError as error:
            raise NumberError(f"{self.key}: {error}") from None


@dataclass(frozen=True)
class _Sums:
    """A stored tensor with the updates of the modules in it."""

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

    def arrays(self) -> Mapping[str, Array]:
        old = self._values(self.stored.read())
        with within(", ".join(update.name for update in self.updates)):
            check_finite(old)  # before the cast, which turns float16's infinity and NaN into numbers
            exact = widened(old)
            exact = exact if exact.flags.writeable and exact is not old else exact.copy()
            deltas = [self._add(exact, update) for update in self.updates]
            check_finite(exact)
            new = cast(exact if self.scale is None else exact / self.scale, self.dtype)
        for update, delta in zip(self.updates, deltas, strict=True):
            before, after = _part(old, update.place), _part(self._values(new), update.place)
            self.report(_change(update, delta, before, after, self.dtype))
        return {self.key: new}

    def _values(self, stored: Array) -> Array:
        return stored if self.scale is None else float32(stored) * self.scale

    def _add(self, exact: Array, update: Update) -> Array:
        """Add an update to its rows, in place; return what was added."""
        weight = _part(exact, update.place)
        with computing(update.name):
            delta = update.delta(float32(weight))
        if update.place.rows is None:
            weight += delta
        else:
            put_rows(exact, update.place.rows, weight + delta)
        return delta


def _part(tensor: Array, place: Place) -> Array:
    """Return a module's part of a stored tensor, in the module's shape."""
    if place.transposed:
        return tensor.T
    return tensor if place.rows is None else take_rows(tensor, place.rows)


def _change(update: Update, delta: Array, old: Array, new: Array, dtype: str) -> Change:
    """Measure a change in float64, in chunks that fit into the processor's cache."""
    import numpy as np

    norm = change = error = 0.0
    wanted = still = 0
    flat = [array.reshape(-1) for array in (delta, old, new)]
    for start in range(0, flat[0].size, CHUNK):
        asked, before, after = (np.asarray(widened(array[start : start + CHUNK]), np.float64) for array in flat)
        moved = after - before
        norm, change = norm + float(asked @ asked), change + float(moved @ moved)
        wanted += int(np.count_nonzero(asked))
        still += int(np.count_nonzero((moved == 0) & (asked != 0)))
        moved -= asked
        error += float(moved @ moved)
    lost = still / wanted if wanted else 0.0
    return Change(update.name, math.sqrt(norm), math.sqrt(change), math.sqrt(error), lost, dtype)


CHUNK = 1 << 15
"""Values per chunk."""


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

    def _groups(self, file: Path, source: SafetensorsFile) -> Iterator[_Copy | _Rounded | _Sums]:
        updates: dict[str, list[Update]] = {}
        for update in self.updates:
            if update.place.file == file:
                updates.setdefault(update.place.key, []).append(update)
        for key, stored in source.items():
            dtype, scale = self.dtype_of(stored), self._scale(file, key)
            if key in updates:
                yield _Sums(key, stored, dtype, updates[key], self._report, scale)
            else:
                yield _Copy(key, stored) if dtype == stored.dtype else _Rounded(key, stored, dtype)

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
