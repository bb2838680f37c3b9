"""Base models: a mapping of modules to the places where their weights are stored.

A checkpoint is a diffusers directory, or one file under the names of the model's own code
(ldm, sgm, Black Forest Labs'), whole or a denoiser alone.  Tensors are recognised by their names;
shapes are taken from the file.  Headers are read when it is opened, a weight when it is asked for.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..devices import to_torch
from ..errors import FileError, MergeError, NumberError
from ..files.architectures import ARCHITECTURES, Architecture, openclip
from ..files.architectures.names import Part, Parts, whole
from ..files.storage import digests
from ..files.storage.paths import path_of, printable
from ..files.storage.reader import SafetensorsFile
from ..layers import Full, Layer
from ..linalg import as_numpy
from ..tensors import (
    FLOATS,
    Array,
    Ranges,
    Shape,
    Stored,
    check_finite,
    code,
    float32,
    is_torch,
    namespace,
    same_weight,
    take_rows,
)
from .encoders import family_of, hosts, prefixes
from .folders import files_of, shard_indexes

DENOISERS = ("model.diffusion_model.", "diffusion_model.", "")
"""Prefixes of a denoiser's own names in single files."""

WEIGHT_ENDS = (".weight", ".scale", "_weight", "")
"""Ends of a weight's key: ``.scale`` is Black Forest Labs' for norms, the last two are bare parameters'."""

BIAS_ENDS = (".bias", "_bias")

QUANTISED = (".scale_weight", ".weight_scale", ".weight.absmax", ".weight.quant_state", ".qweight")
"""Ends of the keys of scales: with one of them, a weight's stored numbers are not its values."""

SCALES = (".scale_weight", ".weight_scale")
"""Ends of the keys by which ComfyUI's float8 files scale a weight: by one number, or one for each row."""

BLOCK = 1 << 17
"""Numbers of a weight that are read and computed with at once: in 16 and 32 bits they stay in the processor's cache."""


@dataclass(frozen=True)
class Place:
    """The location of a module's weight or bias in a file."""

    file: Path
    key: str
    shape: Shape
    """Shape in the module's own form."""
    dtype: str
    rows: Ranges | None = None
    """The rows of the stored tensor that belong to the module, in the module's order; None for all."""
    transposed: bool = False

    def part(self, start: int, stop: int) -> "Place":
        """Return the place of some of the module's rows; if it is stored transposed, only that of all of them."""
        if not self.shape or stop - start == self.shape[0]:
            return self
        assert not self.transposed
        rows, before = [], 0
        for first, last in self.rows or ((0, self.shape[0]),):
            low, high = max(first, first + start - before), min(last, first + stop - before)
            if low < high:
                rows.append((low, high))
            before += last - first
        return replace(self, shape=(stop - start, *self.shape[1:]), rows=tuple(rows))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Checkpoint(Mapping[str, Place]):
    """A base model: an ordered mapping of modules to the places of their weights.

    Modules have the names that a `LoRA` gives them.
    """

    path: Path
    architecture: str | None
    """Name of the model family; None when it is unknown."""
    files: Mapping[Path, SafetensorsFile]
    """The open files that hold weights of modules."""
    weights: Mapping[str, Place]
    biases: Mapping[str, Place]
    extras: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    """Keys of each file that belong to no module: a VAE, buffers, averaged weights."""

    def __getitem__(self, module: str) -> Place:
        return self.weights[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, module: object) -> bool:
        return module in self.weights

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Checkpoint({self.path.name!r}, {self.architecture or 'unknown architecture'}, {len(self)} modules)"

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    @property
    def name(self) -> str:
        """Its name in messages."""
        return printable(self.path.name)

    @property
    def sha256(self) -> str:
        """Content hash: of a file, the SHA-256 of its bytes.

        Of a directory, that of a listing of its files of weights and its indexes of shards, with the size
        of each and a hash of parts of it (`files.listing_digest`), which doesn't read gigabytes.
        """
        if self.path.is_file():
            return digests.file_digest(self.path)
        indexes = [index for folder in {file.parent for file in self.files} for index in shard_indexes(folder)]
        return digests.listing_digest(self.path, [*self.files, *indexes])

    def weight(self, module: str) -> Array:
        """Return a module's weight in its stored dtype; of a fused weight, read only the module's rows.

        Raises:
            FileError: The weight is quantised, or the file can't be read.
        """
        return self.read(self.weights[module])

    def finite_weight(self, module: str) -> Array:
        """Return a module's weight in float32.

        Raises:
            FileError: As `weight`.
            NumberError: A value is NaN or infinite.
        """
        weight = self.weight(module)
        try:
            check_finite(weight)  # before the cast, which turns float16's infinity and NaN into numbers
        except NumberError as error:
            raise NumberError(f"the weight in {self.name}: {error}") from None
        return float32(weight)

    def bias(self, module: str) -> Array | None:
        """Return a module's bias in its stored dtype; None if it has none."""
        return self.read(self.biases[module]) if module in self.biases else None

    def read(self, place: Place) -> Array:
        """Return the values at a place, in the module's shape."""
        self.check(place)
        stored = self.files[place.file][place.key]
        scale = self.scale(place.file, place.key)
        if place.rows is None:
            values = stored.read() if scale is None else float32(stored.read()) * scale
            return values.T if place.transposed else values
        cuts = [cut(stored, start, stop).read() for start, stop in place.rows]
        values = cuts[0] if len(cuts) == 1 else namespace(cuts[0]).concat(cuts)
        if scale is None:
            return values
        return float32(values) * (scale if scale.size == 1 else take_rows(scale, place.rows))

    def scale(self, file: Path, key: str) -> Array | None:
        """Return what a float8 tensor's stored numbers are multiplied by, in a shape for that; None if by nothing."""
        stored, found = self.files[file][key], self._scale_key(file, key)
        if found is None or not found.endswith(SCALES) or not _scales(self.files[file][found], stored):
            return None
        return as_numpy(float32(self.files[file][found].read())).reshape(-1, *[1] * (len(stored.shape) - 1))

    def _scale_key(self, file: Path, key: str) -> str | None:
        stem = key.removesuffix(".weight")
        return next((stem + end for end in QUANTISED if key != stem and stem + end in self.files[file]), None)

    def check(self, place: Place) -> None:
        """Refuse a tensor whose stored numbers aren't the weight's values.

        Raises:
            FileError: It is quantised.
        """
        scale = self._scale_key(place.file, place.key)
        if place.dtype not in FLOATS or (scale and self.scale(place.file, place.key) is None):
            why = f"its scale is {scale!r}" if scale else f"dtype {place.dtype}"
            raise FileError(
                f"{self.name}: {place.key} is quantised ({why}), and a LoRA can't be added to the stored numbers. "
                "Way out: the same model in float16, bfloat16 or float32."
            )


def _scales(scale: Stored, stored: Stored) -> bool:
    """Return whether a tensor scales a float8 weight as a whole or row by row."""
    known = stored.dtype.startswith("F8") and scale.dtype in FLOATS
    return known and math.prod(scale.shape) in (1, stored.shape[0])


def cut(stored: Stored, start: int, stop: int) -> Stored:
    """Return some rows of a stored tensor, as a stored tensor."""
    count, *columns = stored.shape or (1,)
    row = (stored.end - stored.begin) // count
    begin = stored.begin
    shape = (stop - start, *columns)
    return Stored(shape, stored.dtype, begin + start * row, begin + stop * row, stored.source)


def widened(array: Array) -> Array:
    """Return float64 values as they are, others in float32."""
    return array if code(array) == "F64" else float32(array)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    variant: str | None = None,
    likely: Sequence[str] = (),
) -> Checkpoint:
    """Open a base model; weights are read when they are asked for.

    Args:
        path: A ``.safetensors`` file, a directory in diffusers' layout (or one of its components, ``unet``
            or ``transformer``), or one with ComfyUI's ``diffusion_models`` and ``text_encoders``, whole or in
            part: a missing module is an error only when it is asked for.
        architecture: The model family, if names and shapes leave it open.
        variant: ``"fp16"`` and the like, if a directory has files of several variants; by default those of none.
        likely: Families to take a text encoder for that is alone, which several have: those of the LoRAs.

    Raises:
        FileError: The path is missing, or holds no model that loramerge knows.
    """
    root = path_of(path)
    if not root.exists():
        raise FileError(
            f"No such file or directory: {root}. A base model must be on this disk; from the Hub: hf download REPO."
        )
    if root.is_file() and root.suffix != ".safetensors":
        raise FileError(f"{root} is no .safetensors file. Way out: convert the model to safetensors first.")
    found = files_of(root, variant) if root.is_dir() else {root: ""}
    files: dict[Path, SafetensorsFile] = {}
    try:
        for file in found:
            files[file] = SafetensorsFile(file)
        free = any(found.values())
        texts = {} if free else {path: kin for path, file in files.items() if (kin := hosts(_shapes_of([file])))}
        if texts:
            others = _shapes_of(file for path, file in files.items() if path not in texts)
            denoiser = _architecture(others) if others and not architecture else None
            architecture = family_of(root, texts, denoiser.name if denoiser else architecture, likely)
            found |= prefixes(architecture, texts, files)
        return _recognised(root, files, found, architecture, free=free)
    except BaseException:
        for opened in files.values():
            opened.close()
        raise


def _shapes_of(files: Iterable[SafetensorsFile]) -> dict[str, Shape]:
    return {key: stored.shape for file in files for key, stored in file.items()}


def _recognised(
    root: Path,
    files: Mapping[Path, SafetensorsFile],
    starts: Mapping[Path, str],
    architecture: str | None,
    *,
    free: bool,
) -> Checkpoint:
    keys = {starts[path] + key: (path, key) for path, file in files.items() for key in file}
    if len(keys) != sum(map(len, files.values())):
        raise FileError(f"{root}: two of its files hold the same tensor.")
    shapes = {name: files[path][key].shape for name, (path, key) in keys.items()}
    family = ARCHITECTURES[architecture] if architecture else _architecture(shapes)
    names = stored_names(family, shapes) if family else {}
    finder = _Finder(root, files, keys, names, family.shapes if family else {}, free=free)
    weights, biases = finder.places(WEIGHT_ENDS), finder.places(BIAS_ENDS)
    if not weights:
        some = ", ".join(list(keys)[:3])
        raise FileError(f"{root} holds no model that loramerge knows: its tensors are such as {some}.")
    order = {module: i for i, module in enumerate(family.shapes if family else ())}
    modules = sorted(weights, key=lambda module: order.get(module, len(order)))
    named = {(place.file, place.key) for place in (*weights.values(), *biases.values())}
    return Checkpoint(
        path=root,
        architecture=family.name if family else None,
        files=files,
        weights={module: weights[module] for module in modules},
        biases=biases,
        extras={path: tuple(key for key in file if (path, key) not in named) for path, file in files.items()},
    )


def stored_names(a: Architecture, keys: Iterable[str] | None = None) -> dict[str, Parts]:
    """Map every name that a checkpoint of a family may give a weight, without its end, to the modules in it.

    Args:
        a: The family.
        keys: The checkpoint's keys: prefixes that none of them has are left out.
    """
    names: dict[str, Parts] = {}
    for prefix, paths in _spellings(a):
        if keys is None or any(key.startswith(prefix) for key in keys):
            names |= {prefix + path: parts for path, parts in paths.items()}
    return names


def _spellings(a: Architecture) -> Iterator[tuple[str, Mapping[str, Parts]]]:
    for prefix in (f"{a.denoiser}.", ""):
        yield prefix, a.denoiser_paths
    for prefix in DENOISERS:
        yield prefix, a.native_paths
    for part in a.beside:
        yield f"{part.component}.", a.text_paths(part)
    for position, encoder in enumerate(a.text_encoders):
        paths = a.text_paths(encoder)
        # transformers 5 leaves a level out, and so did ldm's first text encoders.
        short = {**{path.removeprefix("text_model."): parts for path, parts in paths.items()}, **paths}
        holders = (f"conditioner.embedders.{position}.", *["cond_stage_model."] * (position == 0))
        yield f"{encoder.component}.", short
        yield f"text_encoders.{encoder.comfyui}.transformer.{encoder.inside}", paths
        for holder in holders:
            yield f"{holder}transformer.", short
            if encoder.model in openclip.MODELS:
                shapes = {path: a.shapes[f"{encoder.component}.{path}"] for path in paths}
                yield f"{holder}model.", openclip.native(shapes, encoder.component)


def _architecture(shapes: Mapping[str, Shape]) -> Architecture | None:
    """Return the family with the best `_score`; None if it names none of the weights."""
    listed = [key for key, shape in shapes.items() if len(shape) > 1 and key.endswith(".weight") and _denoises(key)]
    heads = Counter(map(_heads, listed))
    fitting = [a for a in ARCHITECTURES.values() if _named(a, heads) >= NAMED * len(listed)]
    scores = {a.name: _score(a, shapes, listed) for a in fitting}
    best = max(scores, key=scores.__getitem__, default=None)
    return ARCHITECTURES[best] if best and scores[best][0] else None


NAMED = 0.9
"""The share of a denoiser's weights that its family names, at least."""


def _heads(key: str) -> frozenset[str]:
    """Return the first names that a weight may have: its key's own, and those behind a prefix of denoisers."""
    starts = ("unet.", "transformer.", "prior.", *DENOISERS)
    return frozenset(key.removeprefix(start).partition(".")[0] for start in starts)


def _named(a: Architecture, heads: Mapping[frozenset[str], int]) -> int:
    """Count the weights that a family may name, as far as its outline says: to know it, few families' names are built."""
    known = {*a.outline.own, *a.outline.others, *(companion.component for companion in a.companions)}
    return sum(count for found, count in heads.items() if not found.isdisjoint(known))


def _score(a: Architecture, shapes: Mapping[str, Shape], listed: Sequence[str]) -> tuple[int, int, int, bool]:
    """Return how well a family fits, to compare by.

    Args:
        a: The family.
        shapes: The checkpoint's weights.
        listed: The denoiser's keys among them.

    Returns:
        The number of weights that the family names, of weights with as many axes as its own, of weights
        with its shapes, and whether the whole denoiser is there, with what its own code has in it.  All are 0 if
        the family doesn't name nine in ten of the denoiser's weights.
    """
    names = stored_names(a, shapes)
    modules = {
        parts[0].module: (shape, parts)
        for key, shape in shapes.items()
        if len(shape) > 1 and (parts := names.get(_stem(key), ()))
    }
    if sum(_stem(key) in names for key in listed) < NAMED * len(listed):
        return 0, 0, 0, False
    alike = sum(len(shape) == len(a.shapes[module]) for module, (shape, _) in modules.items())
    same = sum(
        shape == (sum(a.shapes[p.module][0] for p in parts), *a.shapes[module][1:]) or shape in a.sizes(module)
        for module, (shape, parts) in modules.items()
    )
    there = {part.module for _, parts in modules.values() for part in parts}
    inside = tuple(f"{component}." for component in (a.denoiser, *(other.component for other in a.beside)))
    whole_denoiser = all(module in there for module, s in a.shapes.items() if len(s) > 1 and module.startswith(inside))
    return len(modules), alike, same, whole_denoiser


def _denoises(key: str) -> bool:
    """Return whether a key is a denoiser's: it has a denoiser's prefix, or none of another part of a model."""
    return key.startswith(
        ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model.")
    ) or not key.startswith(("text_encoder", "cond", "first_stage_model.", "vae.", "model_ema."))


def _stem(key: str) -> str:
    return next(key.removesuffix(end) for end in WEIGHT_ENDS if key.endswith(end))


class _Finder:
    """Finds the places of modules among the keys of a checkpoint."""

    def __init__(
        self,
        root: Path,
        files: Mapping[Path, SafetensorsFile],
        keys: Mapping[str, tuple[Path, str]],
        names: Mapping[str, Parts],
        shapes: Mapping[str, Shape],
        *,
        free: bool,
    ) -> None:
        self.root = root
        self.files = files
        self.keys = keys
        self.names = names
        self.shapes = shapes
        """The family's shapes by module; empty if it is unknown."""
        self.free = free
        """True in a diffusers directory: a key that the family doesn't list names its module itself."""

    def places(self, ends: tuple[str, ...]) -> dict[str, Place]:
        """Return the place of every module's tensor with one of the ends."""
        found: dict[str, Place] = {}
        for name, (path, key) in self.keys.items():
            end = next((end for end in ends if name.endswith(end) and self._parts(name.removesuffix(end), end)), None)
            if end is None:
                continue
            stem = name.removesuffix(end)
            for part in self._parts(stem, end):
                if part.module in found:
                    raise FileError(f"{self.root}: both {found[part.module].key!r} and {key!r} hold {part.module}.")
                found[part.module] = self._place(part, stem, path, key)
        return found

    def _parts(self, stem: str, end: str) -> Parts:
        if stem in self.names or not self.free or end not in (".weight", ".bias"):
            return self.names.get(stem, ())
        return whole(stem)

    def _place(self, part: Part, stem: str, path: Path, key: str) -> Place:
        stored = self.files[path][key]
        if part.rows is None:
            turned = key.endswith(openclip.TRANSPOSED) and len(stored.shape) == 2
            return Place(path, key, stored.shape[::-1] if turned else stored.shape, stored.dtype, transposed=turned)
        rows = self._scaled(part, part.rows, stem, stored)
        shape = (sum(stop - start for start, stop in rows), *stored.shape[1:])
        return Place(path, key, shape, stored.dtype, rows)

    def _scaled(self, part: Part, rows: Ranges, stem: str, stored: Stored) -> Ranges:
        """Scale the rows of a module in a fused weight to the model's width, if it is in proportion to the family's."""
        known = sum(self.shapes[other.module][0] for other in self.names[stem])
        inner = self.shapes[part.module][1]
        same = stored.shape[0] == known or len(stored.shape) == 1
        in_proportion = same or known * stored.shape[1] == inner * stored.shape[0]
        bounds = [bound * stored.shape[0] for pair in rows for bound in pair]
        if not in_proportion or any(bound % known for bound in bounds):
            raise FileError(
                f"{self.root}: {stem} has the shape {list(stored.shape)}; its parts are known in ({known}, {inner})."
            )
        return tuple((start * stored.shape[0] // known, stop * stored.shape[0] // known) for start, stop in rows)


def on_base(layer: Layer, module: str, base: Checkpoint) -> Full:
    """Return the dense ΔW of a layer that depends on the base's weight.

    Args:
        layer: The layer.
        module: Its name.
        base: The base model, which has the module.

    Raises:
        MergeError: The base's weight has another shape.
        NumberError: A value of the base's weight is NaN or infinite.
    """
    weight = base.finite_weight(module)
    if not same_weight(tuple(weight.shape), layer.shape):
        raise MergeError(
            f"the {layer.kind} layer has the shape {tuple(layer.shape)}, the weight in the base {base.name} "
            f"{tuple(weight.shape)}: they are of different models."
        )
    return Full(diff=delta_on(layer, weight), diff_b=layer.delta_bias())


def delta_on(layer: Layer, weight: Array) -> Array:
    """Compute ΔW for a base's weight, a float32 array of numpy, in the library and on the device of the layer."""
    return layer.delta_on(beside(layer, weight))


def beside(layer: Layer, weight: Array) -> Array:
    """Return a base's weight, a float32 array of numpy, in the library, on the device and in the shape of a layer."""
    like: Array = next(iter(layer.tensors().values()))
    weight = weight.reshape(layer.shape)
    return to_torch(weight).to(like.device) if is_torch(like) else weight
