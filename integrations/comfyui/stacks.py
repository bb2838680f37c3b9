"""A stack: LoRAs in order, each with the weight that it will be merged or applied at."""

from collections.abc import Iterator
from typing import NamedTuple

import loramerge as lm
from loramerge.errors import OptionError
from loramerge.merging import resolve


class Weighted(NamedTuple):
    """A LoRA and its weight."""

    lora: lm.LoRA
    weight: float | str
    """A number, or a text with weights by block."""

    def parts(self) -> Iterator[tuple[float, lm.LoRA]]:
        """Yield the parts of the LoRA whose modules have the same weight, each with that weight."""
        of = resolve([self.lora], [self.weight]).of
        modules: dict[float, list[str]] = {}
        for module in self.lora:
            modules.setdefault(of(module)[0], []).append(module)
        yield from ((weight, self.lora.part(held)) for weight, held in modules.items() if weight)


Stack = tuple[Weighted, ...]


def alone(lora: lm.LoRA) -> Stack:
    """Return a stack of one LoRA at its own strength."""
    return (Weighted(lora, 1.0),)


def weight_of(number: float, blocks: str) -> float | str:
    """Return the weight that two widgets mean: a number for all modules, and other numbers for some of them."""
    blocks = blocks.strip()
    if not blocks:
        return number
    return f"{number};{blocks}" if "=" in blocks else blocks


def only(stack: Stack, what: str) -> lm.LoRA:
    """Return the LoRA of a stack of one.

    Raises:
        OptionError: There are several, or its weight would be lost.
    """
    if len(stack) != 1 or stack[0].weight != 1:
        got = ", ".join(f"{each.lora.name} × {each.weight}" for each in stack)
        raise OptionError(f"{what} takes one LoRA at weight 1, got {got}. Way out: the node 'Merge' before it.")
    return stack[0].lora
