"""The steps of a merge, one per module, and the check that the LoRAs can be merged: from headers alone."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MergeError, an, within
from ..files.lora import LoRA
from ..layers import Layer
from ..layers.full import LEAVE_OUT
from ..tensors import FLOATS, Shape, Tensor, largest_rank
from .methods import Method
from .ranks import Rank, rule

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint


@dataclass(frozen=True)
class Step:
    """One module's merge."""

    module: str
    shape: Shape
    inputs: tuple[int, ...]
    """Indices of the LoRAs that change the module: those that have it, with a weight other than 0."""
    ranks: tuple[int, ...]
    """Their ranks."""
    full_rank: int
    """Rank of the method's own result, before it is cut; 0 if it has no rank."""
    rank: int
    """Rank of the result."""
    alone: bool = False
    """True if the result is one layer times its weight, which keeps its form unless it is cut."""
    dense: bool = False
    """True if an input has no factors, so that the result has none."""
    sought: int = 0
    """With a budget the rank that it chose within, so that the cut loses just what was counted; else 0."""

    @property
    def cut(self) -> bool:
        """True if the result is cut to a smaller rank than the method's result has."""
        return self.rank < self.full_rank and self.rank < largest_rank(self.shape)

    @property
    def kept(self) -> bool:
        """True if the result is the one input's own layer, times its weight."""
        return self.alone and not self.cut

    @property
    def rankless(self) -> bool:
        """True if there is no rank to choose: for biases, norms, tables, and layers that are handed on as they are."""
        return self.full_rank == 0


Weigh = Callable[[str], Sequence[Any]]


def steps_of(
    loras: Sequence[LoRA],
    method: Method,
    options: Mapping[str, Any],
    rank: Rank,
    base: "Checkpoint | None",
    weights: Weigh | None = None,
) -> dict[str, Step]:
    """Plan the merge of every module, in order.

    Args:
        loras: The LoRAs that are merged.
        method: The merge method.
        options: All options of the method.
        rank: The rule that gives each module's rank.
        base: The base model, for layers whose ΔW depends on it.
        weights: Gives the weights of a module; None if they depend on the tensors.

    Returns:
        The steps of the modules in which a LoRA has a weight other than 0.

    Raises:
        MergeError: A layer has no low-rank form, or shapes differ.
        OptionError: The rank is wrong.
    """
    ranked = rule(rank)
    takes_dense = method.dense and options.get("space", "delta") == "delta"
    merged: dict[str, tuple[int, ...]] = {}
    given: dict[str, Sequence[Any] | None] = {}
    shapes: dict[str, Shape] = {}
    for module in dict.fromkeys(module for lora in loras for module in lora):
        present = [i for i, lora in enumerate(loras) if module in lora.layouts]
        found = given[module] = None if weights is None else weights(module)
        inputs = tuple(i for i in present if found is None or found[i])
        if method.of_first:
            inputs = _of_first(loras[0], module, inputs)
        if inputs:
            merged[module] = inputs
        shapes[module] = _common_shape([loras[i] for i in present], module)
        if inputs and len(inputs) < len(present):  # perhaps those that are left change the bias only
            shapes[module] = _common_shape([loras[i] for i in inputs], module)
    single = len({i for inputs in merged.values() for i in inputs}) == 1
    maker = _Maker(loras, method, options, rank, ranked, base, takes_dense, isinstance(rank, str), single)
    return {module: maker.step(module, shapes[module], inputs, given[module]) for module, inputs in merged.items()}


def _of_first(first: LoRA, module: str, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Return the LoRAs that count if the result is the first one, changed: where it changes the bias only, it alone."""
    if inputs[:1] != (0,):
        return ()
    return inputs[:1] if first.layout(module).bias_only else inputs


@dataclass(frozen=True)
class _Maker:
    loras: Sequence[LoRA]
    method: Method
    options: Mapping[str, Any]
    rank: Rank
    ranked: Callable[[Sequence[int]], int]
    """The rule that the rank is."""
    base: "Checkpoint | None"
    takes_dense: bool
    whole: bool
    """True if a layer without factors may be handed on as it is."""
    single: bool
    """True if only one LoRA has a weight other than 0."""

    def step(self, module: str, shape: Shape, inputs: tuple[int, ...], weights: Sequence[Any] | None) -> Step:
        layouts = [self.loras[i].layout(module) for i in inputs]
        alone = weights is not None and self._alone(layouts, weights[inputs[0]])
        if entrywise(layouts) or (alone and not layouts[0].factored):
            return Step(module, shape, inputs, (0,) * len(inputs), 0, 0, alone)
        for i in inputs:
            self._check(self.loras[i], module)
        layouts = [layout for layout in layouts if not layout.bias_only]
        limit = largest_rank(shape)
        factored = [layout.factored for layout in layouts]
        ranks = tuple(layout.rank or 0 if has else limit for layout, has in zip(layouts, factored, strict=True))
        dense = not all(factored)
        with within(module):
            full = limit if dense else self.method.rank(layouts, **self.options)
        return Step(module, shape, inputs, ranks, full, max(1, min(self.ranked(ranks), full, limit)), alone, dense)

    def _alone(self, layouts: Sequence[Layer], weight: float) -> bool:
        """Return whether a module has one layer, which can be handed on times its weight."""
        layout = layouts[0]
        if len(layouts) == 1 and layout.replaces:
            return True  # a new value of the weight, which no method changes and no rank cuts
        if len(layouts) > 1 or not self.method.linear or layout.rankless or layout.times(weight) is None:
            return False
        if layout.kind == "lora":
            return (layout.rank or 0) <= largest_rank(layout.shape)
        if layout.factored:  # diffusers reads no file in which a LoHa or LoKr stands beside LoRAs
            return self.single or _as_lora(layout) > MAX_LORA_GROWTH * _numbers(layout)
        return self.whole and not layout.dense and layout.computable

    def _check(self, lora: LoRA, module: str) -> None:
        """Check that a module's layer can be merged with others.

        Raises:
            MergeError: It can't.
        """
        layout = lora.layout(module)
        if layout.factored or layout.bias_only:
            return
        where = f"{lora.name}: {module} can't be merged"
        if not (layout.dense or layout.needs_base):
            raise MergeError(f"{where}: {layout.no_factors}.")
        if not self.takes_dense:
            base = f" ({_a(layout.kind)} layer needs the base model too: --base, base=…)" * layout.needs_base
            raise MergeError(
                f"{where} by this method: its ΔW has no factors. Ways out: the method linear, or one on entries such as "
                f"ties with space=delta{base}, or {LEAVE_OUT}."
            )
        if layout.needs_base and self.base is not None and module not in self.base:
            raise MergeError(
                f"{where}: it is {_a(layout.kind)} layer, and the base {self.base.name} has no such module."
            )
        if layout.needs_base and (self.base is None or isinstance(self.rank, str)):
            raise MergeError(f"{where}: {needed_on_base(layout.kind, self.base is not None)}.")


def _a(kind: str) -> str:
    """Name a kind of layer whose ΔW depends on the base, with its article."""
    return an({"dora": "DoRA", "pissa": "PiSSA", "olora": "OLoRA"}.get(kind, kind))


def needed_on_base(kind: str, has_base: bool) -> str:
    """Say what is missing to merge a layer whose ΔW depends on the base, and the ways out."""
    base = "" if has_base else "the base model and "
    typed = "--rank 32, or rank=32" if has_base else "--base MODEL --rank 32, or base=…, rank=32"
    return (
        f"it is {_a(kind)} layer, whose ΔW depends on the base weight and has no rank of its own. Ways out: give {base}a number "
        f"as the rank ({typed}), bake it into the base model (loramerge bake), or {LEAVE_OUT}"
    )


MAX_LORA_GROWTH = 100
"""In a merge with other LoRAs, a LoHa or LoKr becomes a LoRA, unless that is more than this many times as large."""


def _as_lora(layout: Layer) -> int:
    """Count the numbers of the LoRA with the same ΔW."""
    return (layout.rank or 0) * (layout.shape[0] + math.prod(layout.shape[1:]))


def _numbers(layout: Layer) -> int:
    return sum(math.prod(tensor.shape) for tensor in layout.tensors().values())


def entrywise(layouts: Sequence[Layer]) -> bool:
    """Return whether a module's layers are summed entry by entry: none has a rank, or one is a table."""
    table = any(layout.kind == "table" for layout in layouts)
    return all(layout.rankless or (table and layout.dense) for layout in layouts)


def _common_shape(loras: Sequence[LoRA], module: str) -> Shape:
    """Return the shape of the weight that all layers change; a layer that is only a bias has the rows alone, a carried one none."""
    layouts = [lora.layout(module) for lora in loras]
    whole = next((k for k, layout in enumerate(layouts) if layout.shape and not layout.bias_only), 0)
    first = layouts[whole].shape
    for lora, layout in zip(loras, layouts, strict=True):
        if layout.shape and layout.shape != (first[:1] if layout.bias_only else first):
            raise MergeError(
                f"{module} has the shape {first} in {loras[whole].name} and {layout.shape} in {lora.name}: "
                "they were made for different models."
            )
    return first


def common_extras(loras: Sequence[LoRA], weights: Weigh | None) -> dict[str, Tensor]:
    """Collect the tensors that belong to no layer from all inputs; two of one name must be equal.

    A tensor that may change the model is taken only from a LoRA of weight 1, because its unknown layer
    can't be scaled.

    Raises:
        MergeError: Two differ, or one would have to be weighed.
    """
    found: dict[str, Tensor] = {}
    for i, lora in enumerate(loras):
        shares = {None if weights is None else weights(module)[i] for module in lora} if lora.extras else set()
        for key, tensor in lora.extras.items() if shares != {0} else ():
            changes = not harmless(key, tensor)
            if changes and (shares != {1} or key in found):
                raise MergeError(_unweighed(lora, key))
            if key in found and not _equal(found[key], tensor):
                raise MergeError(
                    f"Two of the LoRAs hold different tensors {key!r}, which belong to no layer and can't be merged. "
                    f"Way out: leave them out (exclude), such as --exclude '{key}'."
                )
            found[key] = tensor
    return found


EMBEDDING = re.compile(r"^(emb_params|string_to_param|bundle_emb|clip_[lgh]$|t5|<)")
"""Matches the names of trained embeddings: a prompt uses their new word, and the LoRA's weight doesn't scale them."""


def harmless(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor of no layer is independent of the weight: an embedding, a counter, a stray alpha."""
    number = key.endswith((".alpha", ".scale")) and math.prod(tensor.shape) == 1
    return number or tensor.dtype not in FLOATS or EMBEDDING.match(key) is not None


def _unweighed(lora: LoRA, key: str) -> str:
    leave = f"leave it out (exclude), such as --exclude '{key}'"
    ways = (
        f"Ways out: the weight 1 for this LoRA in every module, if no other has such a tensor; or {leave}"
        if lora
        else f"This LoRA has no module in the merge that it could be weighed with. Way out: {leave}"
    )
    return (
        f"{lora.name}: the tensor {key!r} belongs to no layer that loramerge knows. It may change the model, so it can't be "
        f"weighed, nor added to another's. {ways}."
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors, of numpy or torch, have the same dtype, shape and bytes."""
    from ..files.storage.writer import sha256

    return sha256({"": a}) == sha256({"": b})
