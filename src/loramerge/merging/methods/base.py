"""Merge methods: functions of one module's layers and weights, with a name, a source and options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ...errors import LoRAMergeError, MergeError, NumberError, first_line
from ...layers import Full, Layer, LowRank
from ...tensors import Array, check_finite, flatten, float32, times
from .options import Option, checked, options_of, title_of
from .spaces import InSpace

Merged = LowRank | Full | InSpace
"""The result for one module: factors, a dense ΔW that is then cut to a rank, or a matrix in the LoRAs' common space."""

Weights = Sequence[float]

Merge = Callable[..., Merged]
"""``merge(layers, weights, **options) -> layer``, for one module; ``weights`` has one float per layer."""

Rank = Callable[..., int]
"""``rank(layouts, **options)``: the rank of the result before it is cut."""


@dataclass(frozen=True)
class Method:
    """A merge method, with its source and its properties."""

    name: str
    function: Callable[..., Any]
    """The formula, with the documentation and the options."""
    merge: Merge
    """The same as a function of layers."""
    source: str
    rank: Rank
    options: Mapping[str, Option] = field(default_factory=dict)
    weights: str = "uniform"
    """The rule for the LoRAs' weights unless they are given."""
    count: int | None = None
    """The number of LoRAs it takes; None for any number."""
    dense: bool = False
    """True if a layer may be a dense ΔW without factors (with the option ``space``: only in the space of ΔW)."""
    linear: bool = False
    """True if the result is a weighted sum of the inputs, so that equal ``down`` factors stay equal."""
    allows: Callable[[Sequence[float]], None] | None = None
    """Raises a MergeError for weights of one module that the method can't use."""
    ranked: bool = False
    """True if it gets the rank of the result as ``most=``, because a cut afterwards would be arbitrary."""
    of_first: bool = False
    """True if the result is the first LoRA, changed: modules and biases that the first lacks aren't in it."""
    reference: str | None = None
    """``package.module:name`` of a method that isn't in the index; None if no module holds it under a name."""

    @property
    def title(self) -> str:
        """The first line of the function's docstring."""
        return title_of(self.function, self.name)

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of the method: those given, and the defaults of the others.

        Raises:
            OptionError: An option is unknown, or its value is out of range.
        """
        return checked(f"The method {self.name}", self.options, options)


def method(
    name: str,
    *,
    source: str,
    rank: Rank,
    weights: str = "uniform",
    linear: bool = False,
    dense: bool = False,
) -> Callable[[Merge], Method]:
    """Name a merge function; its keyword-only parameters become its options, in Python and on the command line.

    Args:
        name: The name that users type.
        source: The paper with the equation, or the code.
        rank: Rank of the result, from the layers' layouts.
        weights: The rule for the LoRAs' weights unless they are given.
        linear: True if the result is a weighted sum of the inputs.
        dense: True if a layer may be a dense ΔW without factors.
    """

    def named(merge: Merge) -> Method:
        return Method(name, merge, merge, source, rank, options_of(merge), weights, linear=linear, dense=dense)

    return named


def applied(
    method: Method, layers: Sequence[Layer], weights: Sequence[Any], options: Mapping[str, Any], rank: int
) -> Merged:
    """Run a method on one module and check its result.

    Args:
        method: The method, loramerge's own or another package's.
        layers: The module's layers, all of one shape.
        weights: One weight per layer.
        options: All options of the method.
        rank: The rank of the result, as the method announced it.

    Raises:
        MergeError: The method fails, or its result isn't what it announced.
    """
    try:
        merged = method.merge(layers, weights, **options)
    except (LoRAMergeError, MemoryError):
        raise
    except Exception as error:
        raise MergeError(f"the method {method.name} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(merged, Merged):
        raise MergeError(f"the method {method.name} gave a {type(merged).__name__}, wanted a LowRank or Full layer")
    if tuple(merged.shape) != tuple(layers[0].shape):
        raise MergeError(
            f"the method {method.name} gave a layer of the shape {tuple(merged.shape)}, wanted {tuple(layers[0].shape)}"
        )
    if not isinstance(merged, Full):
        _check_factors(method, merged, layers, rank)
    try:
        for tensor in merged.tensors().values():
            check_finite(tensor)
    except NumberError as error:
        raise NumberError(f"{error}. Way out: a smaller weight or alpha") from None
    return merged.as_product() if isinstance(merged, LowRank) else merged


def _check_factors(method: Method, merged: LowRank | InSpace, layers: Sequence[Layer], rank: int) -> None:
    """Refuse factors that differ from the plan, by which the file's header is written."""
    if merged.rank > rank:
        raise MergeError(f"the method {method.name} gave the rank {merged.rank}, and its rank= announced {rank}")
    shared = shared_down(layers) if method.linear else None
    if shared is not None and merged.down_key != shared:
        raise MergeError(
            f"the method {method.name} is said to be linear, and doesn't keep the down that modules share: "
            "wanted low_rank(…, shared_down(layers)), or linear=False"
        )


def shared_down(layers: Sequence[Layer]) -> object:
    """Return an identity of the concatenated ``down``, or None unless every layer knows that of its own."""
    ids = tuple(layer.down_key for layer in layers)
    return ids if None not in ids else None


def alive(layers: Sequence[Layer], weights: Weights) -> tuple[Sequence[Layer], Weights, Sequence[int]]:
    """Drop layers that count as absent, those of weight 0 and those whose ΔW is zero; keep at least one.

    Returns:
        The other layers, their weights, and their places among all.
    """
    kept = [i for i, weight in enumerate(weights) if weight and not _is_zero(layers[i])] or [0]
    return [layers[i] for i in kept], [weights[i] for i in kept], kept


def _is_zero(layer: Layer) -> bool:
    if isinstance(layer, LowRank) and layer.mid is None:  # one entry that isn't zero says it for less than the norm
        entry = float32(flatten(layer.up)[:1]) @ float32(flatten(layer.down)[:, :1])
        if layer.scale and float(entry[0, 0]):
            return False
    return not layer.norm()


def sum_of_ranks(layers: Sequence[Layer], **_: Any) -> int:
    """Return the rank of a concatenation."""
    return sum(layer.rank or 0 for layer in layers)


def equal_rank(layers: Sequence[Layer], **_: Any) -> int:
    """Return the rank that all layers have.

    Raises:
        MergeError: They differ.
    """
    ranks = [layer.rank or 0 for layer in layers]
    if len(set(ranks)) > 1:
        raise MergeError(f"this method needs equal ranks, got {', '.join(map(str, ranks))}; linear takes any")
    return ranks[0]


L = TypeVar("L", bound=Merged)


def with_bias(merged: L, layers: Sequence[Layer], weights: Sequence[float]) -> L:
    """Add the weighted sum of the biases' updates to a merged layer; it is the same for every method."""
    total: Array | None = None
    for layer, weight in zip(layers, weights, strict=True):
        bias: Array | None = layer.delta_bias()
        if bias is not None:
            scale = weight if isinstance(weight, float | int) else 1.0  # learned weights are per column of ΔW
            part = times(float32(bias), scale)
            total = part if total is None else total + part
    return merged if total is None else replace(merged, diff_b=total)
