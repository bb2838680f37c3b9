"""Extraction: the LoRA nearest to the difference of two models, D = W_tuned − W_base.

The best factors of a rank are made of D's largest singular values and their vectors.  Differences that
a LoRA can't hold (biases, norms, embeddings) are listed, never approximated.
"""

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import linalg
from ..errors import MergeError, NumberError, OptionError, check_callable, counted
from ..files.architectures import ARCHITECTURES
from ..files.architectures.labels import ARCHITECTURE
from ..files.lora import LoRA
from ..files.metadata import RECIPE
from ..files.storage.texts import as_json
from ..files.storage.writer import Progress
from ..layers import LowRank, low_rank
from ..layers.base import dense_norm, matrix
from ..linalg import whole_number
from ..tensors import (
    FLOATS,
    Array,
    Spec,
    cast,
    check_finite,
    computed,
    float32,
    largest_rank,
    rows_per_block,
    same_weight,
    written_dtype,
)
from .models import BLOCK, Checkpoint, Place, open_checkpoint, widened

Rank = int | Literal["full"]

EMBEDDING = re.compile(r"embed_tokens$|\.(token|position)_embedding$|\.shared$|relative_attention_bias$")
"""Tables of vectors: they are looked up, not multiplied, so a LoRA doesn't apply to them."""


@dataclass(frozen=True)
class Fit:
    """The rank and the error of one module's factors."""

    module: str
    rank: int
    norm: float
    """‖D‖."""
    error: float
    """‖D − up·down‖, with the factors in the dtype that they are saved in."""

    @property
    def relative(self) -> float:
        """The error in units of the norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class NotHeld:
    """A difference that a LoRA can't hold."""

    tensor: str
    norm: float
    relative: float
    """‖D‖ / ‖W_base‖."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Extraction:
    """A planned extraction.  `lora` is its result, computed when its layers are asked for."""

    tuned: Checkpoint
    base: Checkpoint
    ranks: Mapping[str, int]
    """The rank of every module that differs."""
    dtype: str
    rank: Rank
    not_held: tuple[NotHeld, ...] = ()
    notes: tuple[str, ...] = ()
    fits: dict[str, Fit] = field(default_factory=dict)
    """The fit of each module, added when it is computed."""

    def layer(self, module: str) -> LowRank:
        """Compute a module's factors, in the dtype of the result."""
        delta = difference(self.tuned, self.base, module)
        flat = matrix(delta)
        try:
            up, down = (cast(factor, self.dtype) for factor in linalg.fit_dense(flat, self.ranks[module]))
        except NumberError as error:
            raise NumberError(f"{module}: {error}") from None
        energy, lost = linalg.energies(flat, float32(up), float32(down))
        self.fits[module] = Fit(module, up.shape[1], math.sqrt(energy), math.sqrt(lost))
        return low_rank(up, down, delta.shape)

    def lora(self) -> LoRA:
        """Return the result, whose layers are computed when they are asked for: saving it streams."""
        family = self.family
        return LoRA(
            name=f"{self.tuned.name} − {self.base.name}",
            architecture=family,
            dialect="kohya" if family else "diffusers-peft",
            layouts={module: self._layout(module, rank) for module, rank in self.ranks.items()},
            compute=self.layer,
            no_fork=True,
            metadata={RECIPE: as_json(self.recipe)}
            | ({ARCHITECTURE: self.base.architecture} if self.base.architecture else {}),
            notes=self.notes,
        )

    @property
    def family(self) -> str | None:
        """The base's family; None if the model has other widths, because dialects only know the family's fused weights."""
        if self.base.architecture is None:
            return None
        a = ARCHITECTURES[self.base.architecture]
        same = all(self.base[m].shape[0] in [shape[0] for shape in a.sizes(m)] for m in self.ranks)
        return self.base.architecture if same else None

    def _layout(self, module: str, rank: int) -> LowRank:
        shape = self.base[module].shape
        up, down = Spec((shape[0], rank), self.dtype), Spec((rank, math.prod(shape[1:])), self.dtype)
        return low_rank(up, down, shape)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that the saved file keeps."""
        from .._version import __version__

        return {
            "loramerge": __version__,
            "method": "extract",
            "rank": self.rank,
            "tuned": self.tuned.name,
            "base": self.base.name,
        }

    @property
    def relative_error(self) -> float:
        """‖D − LoRA‖ / ‖D‖ over all modules computed so far."""
        norm = math.sqrt(sum(fit.norm**2 for fit in self.fits.values()))
        return math.sqrt(sum(fit.error**2 for fit in self.fits.values())) / norm if norm else 0.0


def plan_extraction(
    tuned: Checkpoint | str | Path,
    base: Checkpoint | str | Path,
    *,
    rank: Rank = 32,
    ranks: Mapping[str, int] | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    architecture: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Find what differs between two models; the arguments are those of `extract`.

    A weight is read up to the first rows that differ, and whole when the extraction computes it, which is also when NaN
    and infinity behind those rows are refused.

    Args:
        progress: Called with the number of tensors compared and of all.

    Raises:
        MergeError: The models have different modules or shapes, or don't differ.
        OptionError: A rank or the dtype is wrong.
        FileError: A model can't be read.
    """
    _check_rank(rank)
    check_callable(progress=progress)
    with ExitStack() as opened:
        first, second = (
            m
            if isinstance(m, Checkpoint)
            else opened.enter_context(open_checkpoint(m, architecture=architecture, variant=variant))
            for m in (tuned, base)
        )
        found = _planned(first, second, rank, ranks or {}, dtype, progress)
        opened.pop_all()  # the extraction reads on
    return found


def _planned(
    tuned: Checkpoint,
    base: Checkpoint,
    rank: Rank,
    ranks: Mapping[str, int],
    dtype: str | None,
    progress: Progress | None,
) -> Extraction:
    """Compare two open models tensor by tensor."""
    modules = _common(tuned, base)
    given = _checked_ranks(ranks, modules)
    found: dict[str, int] = {}
    lost: list[NotHeld] = []
    rounded: list[str] = []
    tensors = list(_tensors(tuned, base, modules))
    for done, tensor in enumerate(tensors, start=1):
        differs = tensor.differs()
        if differs and tensor.rounded_only:
            rounded.append(tensor.name)
        elif differs and tensor.fits_a_lora:
            found[tensor.name] = _rank_of(given.get(tensor.name, rank), tensor)
        elif differs:
            lost.append(tensor.not_held())
        if progress:
            progress(done, len(tensors))
    if not found:
        only = ", but for the rounding to another dtype" if rounded else ""
        raise MergeError(f"{tuned.name} and {base.name} differ in no weight that a LoRA can hold{only}.")
    codes = [tuned[module].dtype for module in found]
    return Extraction(
        tuned=tuned,
        base=base,
        ranks=found,
        dtype=written_dtype(dtype) if dtype else computed([code for code in codes if code in FLOATS]),
        rank=rank,
        not_held=tuple(lost),
        notes=_notes(tuned, base, found, rounded),
    )


def extract(
    tuned: Checkpoint | str | Path,
    base: Checkpoint | str | Path,
    *,
    rank: Rank = 32,
    ranks: Mapping[str, int] | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    architecture: str | None = None,
) -> LoRA:
    """Return the LoRA that comes nearest to the difference of two models.

    Every linear and convolution weight that differs gets the factors nearest to W_tuned −
    W_base in Frobenius norm.  `plan_extraction` also gives the error of each module and a list of
    what a LoRA can't hold; to stream the result to a file, save its ``lora()``.

    Args:
        tuned: A fine-tuned model: a checkpoint, or what `open_checkpoint` takes.
        base: The model that it was made from; in any layout.
        rank: Rank of every module, at most what its shape allows; ``"full"`` for the numerical
            rank of each, which keeps everything.
        ranks: Ranks of single modules, by name.
        dtype: Dtype of the factors; by default that of the tuned model.
        variant: The variant of the files, if a directory has several.
        architecture: The models' family, if names and shapes leave it open: a text encoder alone.

    Returns:
        The LoRA, in memory.

    Raises:
        MergeError: The models have different modules or shapes, or don't differ.
        OptionError: A rank or the dtype is wrong.
        FileError: A model can't be read.
        NumberError: A weight is NaN or infinite.
    """
    planned = plan_extraction(
        tuned, base, rank=rank, ranks=ranks, dtype=dtype, variant=variant, architecture=architecture
    )
    try:
        return planned.lora().in_memory()
    finally:
        for given, model in ((tuned, planned.tuned), (base, planned.base)):
            if model is not given:
                model.close()


def difference(tuned: Checkpoint, base: Checkpoint, module: str) -> Array:
    """Return W_tuned − W_base of a module, in float32."""
    return _Tensor(module, tuned, base, tuned[module], base[module]).difference()


@dataclass(frozen=True)
class _Tensor:
    """A weight or a bias that both models have."""

    name: str
    tuned: Checkpoint
    base: Checkpoint
    here: Place
    """Its place in the tuned model."""
    there: Place
    """Its place in the base."""

    @property
    def fits_a_lora(self) -> bool:
        """True for the weight of a linear layer or a convolution; a LoRA has no place for tables and norms."""
        named = self.there.key.endswith("weight") or self.there.transposed  # CLIP's projection has no such name
        return named and len(self.there.shape) >= 2 and not EMBEDDING.search(self.name)

    def difference(self) -> Array:
        """Return W_tuned − W_base in the base's shape, in float32."""
        import numpy as np

        wide = "F64" in (self.here.dtype, self.there.dtype)
        found, done = np.empty(math.prod(self.there.shape), np.float64 if wide else np.float32), 0
        for block in self._blocks():
            found[done : done + block.size] = block.reshape(-1)
            done += block.size
        return float32(found).reshape(self.there.shape)

    def differs(self) -> bool:
        """Return whether the models differ here; the rest of the rows isn't read once some of them do."""
        return any(block.any() for block in self._blocks())

    def _blocks(self) -> Iterator[Array]:
        """Yield W_tuned − W_base, some rows at a time: they stay in the processor's cache."""
        shape = self.there.shape or (1,)
        count, turned = shape[0], self.here.transposed or self.there.transposed
        step = max(1, count) if turned else rows_per_block(shape, BLOCK)
        for start in range(0, count, step):
            part = start, min(start + step, count)
            tuned, base = self._read(self.tuned, self.here.part(*part)), self._read(self.base, self.there.part(*part))
            yield tuned.reshape(base.shape) - base

    @property
    def rounded_only(self) -> bool:
        """True if one model's values are the other's, rounded to its dtype."""
        if self.here.dtype == self.there.dtype:
            return False
        tuned, base = (float32(self._read(*side)) for side in ((self.tuned, self.here), (self.base, self.there)))
        return _rounds_to(base.reshape(tuned.shape), tuned, self.here.dtype) or _rounds_to(
            tuned, base.reshape(tuned.shape), self.there.dtype
        )

    def _read(self, model: Checkpoint, place: Place) -> Array:
        values = model.read(place)
        try:
            check_finite(values)
        except NumberError as error:
            raise NumberError(f"{model.name}: {self.name}: {error}") from None
        return widened(values)

    def not_held(self) -> NotHeld:
        norm, size = dense_norm(self.difference()), dense_norm(self.base.read(self.there))
        return NotHeld(self.name, norm, norm / size if size else math.inf)


def _rounds_to(wide: Array, narrow: Array, dtype: str) -> bool:
    try:
        return bool((float32(cast(wide, dtype)) == narrow).all())
    except NumberError:
        return False


def _tensors(tuned: Checkpoint, base: Checkpoint, modules: list[str]) -> Iterator[_Tensor]:
    """Yield the weights of the modules, then all biases that both models have."""
    for module in modules:
        yield _Tensor(module, tuned, base, tuned[module], base[module])
    for module, bias in base.biases.items():
        if module in tuned.biases:
            yield _Tensor(f"{module}.bias", tuned, base, tuned.biases[module], bias)


def _common(tuned: Checkpoint, base: Checkpoint) -> list[str]:
    """Return the modules of both models; refuse models whose components have different modules or shapes."""
    for one, other in ((tuned, base), (base, tuned)):
        shared = _components(other)
        absent = [m for m in one if m not in other and m.partition(".")[0] in shared]
        # T5 stores its table of tokens under either of two names.
        missing = [module for module in absent if not EMBEDDING.search(module)]
        if missing:
            raise MergeError(
                f"{other.name} lacks {counted(len(missing), 'module')} of {one.name}, such as {missing[0]}: they are different models."
            )
    both = [module for module in base if module in tuned]
    if not both:
        raise MergeError(f"{tuned.name} and {base.name} have no module in common.")
    for module in both:
        shapes = tuned[module].shape, base[module].shape
        if not same_weight(*shapes):
            raise MergeError(f"{module} has the shape {shapes[0]} in {tuned.name} and {shapes[1]} in {base.name}.")
    return both


def _components(model: Checkpoint) -> set[str]:
    return {module.partition(".")[0] for module in model}


def _check_rank(rank: object) -> None:
    if rank != "full" and whole_number(rank) < 1:
        raise OptionError(f"rank must be a positive integer or 'full', got {rank!r}.")


def _checked_ranks(ranks: Mapping[str, int], modules: list[str]) -> Mapping[str, int]:
    for module, rank in ranks.items():
        _check_rank(rank)
        if module not in modules:
            raise OptionError(f"A rank is given for {module}, which isn't a module of both models.")
    return ranks


def _rank_of(rank: Rank, tensor: _Tensor) -> int:
    if rank == "full":
        return linalg.numerical_rank(matrix(tensor.difference()))
    return min(operator.index(rank), largest_rank(tensor.there.shape))


def _notes(tuned: Checkpoint, base: Checkpoint, modules: Mapping[str, int], rounded: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if rounded:
        notes.append(
            f"{counted(len(rounded), 'weight')} differ{'s' * (len(rounded) == 1)} by rounding alone, such as {rounded[0]}: nothing is extracted of them"
        )
    if any(tuned[module].dtype != base[module].dtype for module in modules):
        notes.append(
            "the models are stored in different dtypes: rounding differences are included in the extracted LoRA"
        )
    alone = (_components(tuned) | _components(base)) - (_components(tuned) & _components(base))
    if alone:
        notes.append(f"only one of the models has {', '.join(sorted(alone))}: nothing is extracted for it")
    return (*notes, *_other_tensors(tuned, base))


def _other_tensors(tuned: Checkpoint, base: Checkpoint) -> list[str]:
    """Return a note on tensors outside of every module (a VAE) that differ, if each model is one file."""
    if len(tuned.files) != 1 or len(base.files) != 1:
        return []
    (first,), (second,) = tuned.files.values(), base.files.values()
    keys = [key for path in tuned.extras for key in tuned.extras[path] if key in second]
    differ = [key for key in keys if first[key].dtype != second[key].dtype or first[key].raw() != second[key].raw()]
    if not differ:
        return []
    return [f"{len(differ)} other tensors differ, such as {differ[0]}: a LoRA has no place for them"]
