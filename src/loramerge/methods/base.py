"""What a merge method is: a function of one module's layers and weights."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MergeError, OptionError
from ..layers import Layer, LowRank

Merge = Callable[..., LowRank]
"""``merge(layers, weights, **options) -> layer``, of one module; ``weights`` has one float a layer."""

Rank = Callable[[Sequence[Layer]], int]
"""Rank of the result, from the layers' layouts."""


@dataclass(frozen=True)
class Method:
    """A merge method and where it comes from."""

    name: str
    merge: Merge
    source: str
    rank: Rank
    """Rank that the method's own result has."""

    @property
    def title(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.merge) or "").splitlines()[0]

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The method's keyword-only parameters."""
        parameters = inspect.signature(self.merge).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse an option that the method doesn't have.

        Raises:
            OptionError: The option is unknown.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise OptionError(f"The method {self.name} has no option {name!r}. Its options: {known}.")


def method(name: str, *, source: str, rank: Rank) -> Callable[[Merge], Method]:
    """Name a merge function; its keyword-only parameters become its options, in Python and on the command line.

    Args:
        name: What users type.
        source: The paper with the equation, or the code.
        rank: Rank of the result, from the layers' layouts.
    """

    def named(merge: Merge) -> Method:
        found = Method(name, merge, source, rank)
        for option in found.options.values():
            if option.annotation not in (int, float, str, bool):
                raise TypeError(f"Option {option.name!r} of the method {name!r} must be an int, float, str or bool.")
        return found

    return named


def sum_of_ranks(layers: Sequence[Layer]) -> int:
    """The rank of a concatenation."""
    return sum(layer.rank or 0 for layer in layers)


def equal_rank(layers: Sequence[Layer]) -> int:
    """The rank that all layers have.

    Raises:
        MergeError: They differ.
    """
    ranks = [layer.rank or 0 for layer in layers]
    if len(set(ranks)) > 1:
        raise MergeError(f"this method needs equal ranks, got {', '.join(map(str, ranks))}; linear takes any")
    return ranks[0]
