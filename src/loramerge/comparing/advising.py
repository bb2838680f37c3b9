"""Advice on a comparison, in one sentence.

The rules are tried in order; the first one that applies gives the advice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import counted
from .analysis import Comparison, Row
from .measures import Pair

DUPLICATE = 0.95
"""Cosine above which two updates count as one: at most √(1 − 0.95²), a third, of either is its own."""

UNEQUAL = 3.0
"""Ratio of norms above which the weaker hardly shows: it has a tenth of the sum's energy."""

COLLISION = 0.25
"""Clash of a place above which updates collide: half of the spaces shared, and unrelated there (0.5 · 1/2)."""

AGREEMENT = 0.3
"""Cosine above which the sum is over an eighth longer than that of unrelated updates: √(1 + 0.3) = 1.14."""

TOUCH = 0.1
"""Clash over all modules above which the shared spaces are worth a look (0.2 · 1/2)."""

ALTERNATIVES = ("ties", "np_lora")
"""Methods made for updates that collide."""


@dataclass(frozen=True)
class Place:
    """Modules that do the same kind of work, such as the attn2 of the up blocks."""

    pattern: str
    """A pattern, as in weights, that matches these modules only: ``unet.up_blocks.*.attn2.*``."""
    words: str
    """The place in words: ``the up blocks' attn2``."""


CONTAINERS = ("attentions", "transformer_blocks", "text_model", "encoder", "layers", "block", "layer")
"""Parts of module names that are mere containers."""


def place(module: str) -> Place:
    """Return a module's place: a section of its model, and its function there."""
    component, *path = module.split(".")
    section, rest = path[0], path[1:]
    parts = [part for part in rest if not part.isdigit() and part not in CONTAINERS]
    owner = section.replace("_", " ") if component in ("unet", "transformer") else component.replace("_", " ")
    if not parts:
        return Place(f"{component}.{section}" + ".*" * bool(rest), f"the {section}")
    at = rest.index(parts[0])
    pattern = f"{component}.{section}" + ".*" * bool(at) + f".{parts[0]}" + ".*" * (at + 1 < len(rest))
    return Place(pattern, f"the {owner}'{'' if owner.endswith('s') else 's'} {parts[0]}")


def advice(comparison: Comparison) -> str:
    """Return one plain sentence of advice on merging these LoRAs."""
    total = comparison.total
    return next(said for rule in RULES if (said := rule(comparison, total)))


def _apart(comparison: Comparison, total: Row) -> str | None:
    if any(pair.modules for pair in total.pairs.values()):
        return None
    unread = {n.module for n in comparison.not_compared}
    if comparison.not_compared and any(_changed(comparison, module) > 1 for module in unread):
        return f"{_all(comparison)} meet only in layers that have no low-rank form, which can't be compared."
    return f"{_all(comparison)} change different modules: there is nothing to conflict, and a plain sum keeps {_each(comparison)}."


def _changed(comparison: Comparison, module: str) -> int:
    """Count the LoRAs that change a module."""
    rows = [row for row in comparison.rows if row.name == module]
    return sum(a.modules for row in rows for a in row.alone) + sum(n.module == module for n in comparison.not_compared)


def _silent(comparison: Comparison, total: Row) -> str | None:
    for i, (name, alone) in enumerate(zip(comparison.names, total.alone, strict=True)):
        if alone.square:
            continue
        unread = sum(each.lora == i for each in comparison.not_compared)
        if unread:
            return (
                f"{name} changes nothing in the modules that were compared; {counted(unread, 'other layer')} can't be."
            )
        return f"{name} changes nothing: its ΔW is zero in every module, and a merge needn't have it."
    return None


def _duplicates(comparison: Comparison, total: Row) -> str | None:
    (i, j), pair = max(total.pairs.items(), key=lambda item: item[1].cosine)
    if pair.cosine <= DUPLICATE:
        return None
    share = f"{1 / len(comparison.names):.2g}"
    return (
        f"{_both(comparison, i, j)} are nearly the same update (cosine {pair.cosine:z.2f}): merging them only makes it "
        f"stronger, so let the weights sum to one: {_weights([share] * len(comparison.names))}."
    )


def _unequal(comparison: Comparison, total: Row) -> str | None:
    norms = [alone.norm for alone in total.alone]
    low, high = min(norms), max(norms)
    if high <= UNEQUAL * low:
        return None
    strong, weak = comparison.names[norms.index(high)], comparison.names[norms.index(low)]
    return (
        f"{strong} is {high / low:.1f} times as strong as {weak} and drowns it (weights 'l2' would widen the gap): "
        f"for equal shares give {_weights([f'{low / norm:.2g}' for norm in norms])}."
    )


def _collision(comparison: Comparison, total: Row) -> str | None:
    (i, j), where, pair = max(_places(comparison), key=lambda found: found[2].clashes)
    if pair.clash <= COLLISION:
        return None
    methods = " or ".join(ALTERNATIVES)
    lower = ["1"] * len(comparison.names)
    lower[i] = f"1;{where.pattern}=0.5"
    share = pair.weight / total.pairs[i, j].weight
    return (
        f"{_both(comparison, i, j)} mostly collide in {where.words} (overlap {pair.overlap:.2f}, cosine "
        f"{pair.cosine:z.2f} over {share:.0%} of the shared norm): consider "
        f"{f'the method {methods}, or ' if methods else ''}a lower weight there: {_weights(lower)}."
    )


def _places(comparison: Comparison) -> Iterator[tuple[tuple[int, int], Place, Pair]]:
    """Yield every pair of LoRAs at every place, measured over the modules there that both change."""
    for group in comparison.grouped(lambda row: place(row.name).pattern):
        where = next(found for row in comparison.rows if (found := place(row.name)).pattern == group.name)
        yield from ((pair, where, found) for pair, found in group.pairs.items())


def _agreement(comparison: Comparison, total: Row) -> str | None:
    (i, j), pair = max(total.pairs.items(), key=lambda item: item[1].cosine)
    if pair.cosine <= AGREEMENT:
        return None
    return (
        f"{_both(comparison, i, j)} agree in part (cosine {pair.cosine:z.2f}): a plain sum strengthens what they "
        "share, so begin with weights that sum to one."
    )


def _touching(comparison: Comparison, total: Row) -> str | None:
    (i, j), pair = max(total.pairs.items(), key=lambda item: item[1].clash)
    if pair.clash <= TOUCH:
        return None
    _, where, found = max((f for f in _places(comparison) if f[0] == (i, j)), key=lambda f: f[2].clashes)
    return (
        f"{_both(comparison, i, j)} share some of their space (overlap {pair.overlap:.2f}, cosine {pair.cosine:z.2f}), "
        f"most of it in {where.words} (overlap {found.overlap:.2f}): a plain weighted sum is a good start; if one "
        "fades, look there first."
    )


def _barely(comparison: Comparison, total: Row) -> str | None:
    return f"{_all(comparison)} barely touch: a plain weighted sum keeps {_each(comparison)}."


RULES: tuple[Callable[[Comparison, Row], str | None], ...] = (
    _apart,
    _silent,
    _duplicates,
    _unequal,
    _collision,
    _agreement,
    _touching,
    _barely,
)


def _all(comparison: Comparison) -> str:
    return "These two" if len(comparison.names) == 2 else "These LoRAs"


def _each(comparison: Comparison) -> str:
    return "both" if len(comparison.names) == 2 else "all"


def _both(comparison: Comparison, i: int, j: int) -> str:
    return "These two" if len(comparison.names) == 2 else f"{comparison.names[i]} and {comparison.names[j]}"


def _weights(weights: list[str]) -> str:
    """Return weights as they are typed on the command line."""
    return " ".join(f"-w '{weight}'" if ";" in weight else f"-w {weight}" for weight in weights)
