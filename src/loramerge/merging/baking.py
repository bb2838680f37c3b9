"""Baking: LoRAs added to the weights of a base model, W' = W + Σ wᵢ ΔWᵢ(W).

Every kind of layer can be baked, including those whose ΔW depends on W (DoRA).  Sums are made in
float32 and rounded once, to the weight's own dtype; the rounding loss is reported.
"""

import functools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.models import Checkpoint, beside, delta_on, open_checkpoint
from ..checkpoints.rewriting import Change, Job, Update, write_folder
from ..errors import FileError, MergeError, OptionError, check_callable
from ..files.families import common
from ..files.lora import LoRA, checked, without
from ..files.metadata import RECIPE
from ..files.reading import Source, is_list, open
from ..files.storage.paths import path_of, same
from ..files.storage.texts import as_json
from ..files.storage.writer import Progress
from ..files.writing import check_apart
from ..layers import DeltaRows, Layer, Rows
from ..linalg import as_numpy
from ..tensors import Array, float32, parse_dtype, put_rows, take_rows
from .rules import Scope
from .weights import ModuleWeights, Weights, resolve


@dataclass(frozen=True)
class Baked:
    """The result of a bake: what was written, and the rounding loss of every ΔW."""

    path: Path
    changes: Mapping[str, Change]
    left_out: tuple[str, ...] = ()
    """Tensors and files that were not carried over: a LoRA's tensors of no layer, other copies of the old weights."""

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all tensors."""
        return math.sqrt(sum(c.norm**2 for c in self.changes.values()))

    @property
    def loss(self) -> float:
        """The relative rounding loss over all tensors."""
        return math.sqrt(sum(c.error**2 for c in self.changes.values())) / self.norm if self.norm else 0.0

    def worst(self) -> list[Change]:
        """Sort the changes by relative rounding loss, the largest first."""
        return sorted(self.changes.values(), key=lambda change: -change.loss)


def bake(
    loras: Sequence[LoRA | Source] | LoRA | str | Path,
    base: Checkpoint | str | Path,
    output: str | Path,
    *,
    weights: Weights = None,
    scope: Scope | None = None,
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    variant: str | None = None,
    allow_lossy: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> Baked:
    """Add LoRAs to a base model and write the result in the base's own layout.

    Each thread has one weight in memory at a time, at most.  A file is written under a temporary name, and renamed when it is complete.

    Args:
        loras: LoRAs, or what `open` takes.
        base: A checkpoint, or what `open_checkpoint` takes.
        output: For a base that is a file, a ``.safetensors`` file; for a directory, a new one:
            files that change are rewritten, the others copied.
        weights: As in `merge`: the strength of each LoRA's whole ΔW.  A new value for a weight is put in at any but 0.
        scope: As in `merge`.
        exclude: Patterns of modules to leave as they are.
        dtype: Dtype of every float tensor in the files that are rewritten; by default each
            tensor keeps its own.
        variant: Variant of the base's files, if a directory has several.
        allow_lossy: Leave out a LoRA's tensors that belong to no layer (embeddings).
        workers: Number of threads.
        progress: Called with the number of tensors done and of all.

    Returns:
        The path, and for every tensor the size of its change and its rounding loss.

    Raises:
        MergeError: A module is not in the base, has another shape there, can't be applied, or is replaced by a LoRA
            and changed by another.
        OptionError: A weight, the dtype or the output's name is wrong, or the output is the base or a LoRA.
        NumberError: A value or a result is NaN, infinite, or too large for the dtype.
        FileError: A file can't be read or written; the output is then as it was.
    """
    check_callable(progress=progress)
    listed: Sequence[LoRA | Source] = loras if is_list(loras) else [loras]  # type: ignore[list-item]
    opened = [lora if isinstance(lora, LoRA) else open(lora) for lora in listed]
    if not opened:
        raise OptionError("Nothing to bake: give at least one LoRA.")
    kept = without(opened, (exclude,) if isinstance(exclude, str) else exclude)
    model = base if isinstance(base, Checkpoint) else open_checkpoint(base, variant=variant, likely=common(kept))
    target = _checked_target(path_of(output), model)
    for lora, source in zip(opened, listed, strict=True):
        given = [source] if isinstance(source, str | os.PathLike) else []
        check_apart([*given, *lora.paths], target, "one of the LoRAs that are baked")
    left_out = _strays(kept, allow_lossy)
    resolved = resolve(kept, weights, scope, base=model, learned=False)
    if resolved.columns:
        raise OptionError(
            "bake takes numbers as weights, not one per column. Way out: merge with the learned weights, and bake the result."
        )
    job = Job(model, _updates(kept, model, resolved), parse_dtype(dtype) if dtype else None, workers, progress)
    metadata = {RECIPE: as_json(_recipe(kept, model, resolved))}
    if model.path.is_file():
        job.write(model.path, target, metadata)
    else:
        left_out += write_folder(job, target, metadata)
    changes = {name: job.changes[name] for name in job.names if name in job.changes}
    return Baked(target, changes, tuple(left_out))


def _strays(loras: Sequence[LoRA], allow_lossy: bool) -> list[str]:
    """Return the tensors that belong to no layer.

    Raises:
        MergeError: There are some, and they may not be left out.
    """
    strays = [f"{lora.name}: {key}" for lora in loras for key in lora.extras]
    if strays and not allow_lossy:
        raise MergeError(
            f"These tensors belong to no layer, and a base model has no place for them: {', '.join(strays)}. "
            "Way out: leave them out (allow_lossy)."
        )
    return strays


def _checked_target(target: Path, model: Checkpoint) -> Path:
    """Return the target, if the base can be written there.

    Raises:
        OptionError: It is the base itself, or its name doesn't fit a base that is one file.
        FileError: Its directory is missing, or it is a directory that isn't empty or lies in the base.
    """
    if not target.parent.is_dir():
        raise FileError(f"Can't write {target}: no such directory: {target.parent}.")
    if same(model.path, target):
        raise OptionError(f"Can't write {target}: it is the base itself, which would be lost. Way out: another output.")
    if model.path.is_file():
        if target.suffix != ".safetensors" or target.is_dir():
            raise OptionError(f"Can't write {target}: the base is one file, so the path must end in .safetensors.")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileError(f"Can't write {target}: it exists. The base is a directory, so give a new one.")
    elif model.path.resolve() in target.resolve().parents:
        raise FileError(f"Can't write {target}: it is inside of the base.")
    return target


def _recipe(loras: Sequence[LoRA], model: Checkpoint, weights: ModuleWeights) -> dict[str, Any]:
    from .._version import __version__

    inputs = [{"name": lora.name, "weight": label} for lora, label in zip(loras, weights.label, strict=True)]
    return {"loramerge": __version__, "method": "bake", "base": model.name, "inputs": inputs}


def _updates(loras: Sequence[LoRA], model: Checkpoint, weights: ModuleWeights) -> list[Update]:
    """List the updates of all weights and biases; every module is checked before any update is computed."""
    found: list[Update] = []
    for module in dict.fromkeys(module for lora in loras for module in lora):
        shares = weights.of(module)
        used = [(lora, w) for lora, w in zip(loras, shares, strict=True) if module in lora and w]
        for lora, _ in used:
            _check(lora, module, model)
            _check_alone(lora, module, len(used))
        adding = [(lora, _strength(lora.layout(module), w)) for lora, w in used if not lora.layout(module).bias_only]
        biased = [(lora, w) for lora, w in used if lora.layout(module).delta_bias() is not None]
        if adding:
            found.append(Update(module, model.weights[module], _Sum(module, model, adding).weight))
        if biased and module in model.biases:
            found.append(Update(f"{module}.bias", model.biases[module], _Sum(module, model, biased).bias))
    return found


def _check(lora: LoRA, module: str, model: Checkpoint) -> None:
    """Check that a layer can be added to the base.

    Raises:
        MergeError: The base lacks the module, or the layer can't be applied to it.
    """
    layout = lora.layout(module)
    where = f"{lora.name}: {module} can't be baked"
    if not layout.computable:
        raise MergeError(f"{where}: {layout.inner.no_factors}.")
    if module not in model:
        component = module.partition(".")[0]
        if not any(name.startswith(f"{component}.") for name in model):
            raise MergeError(
                f"{where}: {model.name} has no such weight, as {component} isn't in it. Way out: exclude {component!r}."
            )
        known = f"its family is {model.architecture or 'unknown'}, the LoRA's {lora.architecture or 'unknown'}"
        raise MergeError(f"{where}: {model.name} has no such weight ({known}). Way out: exclude the module.")
    has = model.weights[module].shape
    if not layout.fits(has):
        raise MergeError(f"{where}: its shape is {layout.shape}, the weight in {model.name} has the shape {has}.")
    if layout.delta_bias() is not None and module not in model.biases and _has_bias(lora[module]):
        raise MergeError(f"{where}: it changes the bias, and the module has none in {model.name}.")
    model.check(model.weights[module])


def _has_bias(layer: Layer) -> bool:
    """Return whether a layer changes the bias: a file may have zeros there, see `files.dialects.write`."""
    bias: Array | None = layer.delta_bias()
    return bias is not None and bool((bias != 0).any())


def _check_alone(lora: LoRA, module: str, count: int) -> None:
    """Check that a layer which replaces the weight is the only one of its module.

    Raises:
        MergeError: There are others.
    """
    layout = lora.layout(module)
    if layout.replaces and count > 1:
        raise MergeError(f"{lora.name}: {module} can't be baked with others: {layout.no_factors}.")


def _strength(layout: Layer, weight: float) -> float:
    """Return how much of a layer's ΔW is added at a weight: a new value replaces the whole of the old at any."""
    return 1.0 if layout.replaces else weight


class _Sum:
    """Σ wᵢ ΔWᵢ of a module, over the LoRAs that have it."""

    def __init__(self, module: str, model: Checkpoint, inputs: Sequence[tuple[LoRA, float]]) -> None:
        self.module = module
        self.model = model
        self.inputs = inputs

    def weight(self) -> DeltaRows:
        return self._sum([self._delta(lora) for lora, _ in self.inputs])

    def bias(self) -> DeltaRows:
        return self._sum([float32(checked(lora, self.module).delta_bias()).__getitem__ for lora, _ in self.inputs])

    def _sum(self, terms: Sequence[DeltaRows]) -> DeltaRows:
        shares = [share for _, share in self.inputs]

        def rows_of(rows: slice) -> Array:
            parts = (as_numpy(term(rows)) for term in terms)
            scaled = (part if share == 1 else share * part for part, share in zip(parts, shares, strict=True))
            return functools.reduce(operator.add, scaled)

        return rows_of

    def _delta(self, lora: LoRA) -> DeltaRows:
        layer = checked(lora, self.module)
        if isinstance(layer, Rows) and not layer.by_rows:
            fused: Array = take_rows(delta_on(layer.whole, self._fused(lora, layer)), layer.ranges)
            return lambda rows: fused[rows]
        return layer.delta_rows(lambda: beside(layer, self.model.finite_weight(self.module)))

    def _fused(self, lora: LoRA, layer: Rows) -> Array:
        """Read the base's fused weight that the layer is a part of, because its norms run over the whole of it."""
        import numpy as np

        fused = np.zeros(layer.whole.shape, np.float32)
        missing = layer.whole.shape[0]
        for module, other in lora.layouts.items():
            if isinstance(other, Rows) and other.source == layer.source and module in self.model:
                put_rows(fused, other.ranges, self.model.finite_weight(module).reshape(other.shape))
                missing -= other.shape[0]
        if missing:
            raise MergeError(
                "it is a part of a fused DoRA layer, whose norms run over the whole weight, and other parts of that "
                "are missing or excluded"
            )
        return fused
