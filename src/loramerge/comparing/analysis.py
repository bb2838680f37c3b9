"""Comparing LoRAs before they are merged: norms, overlaps and conflicts, by module and by block.

A module's statistics are additive (`measures`): adding those of its modules gives a block's.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, TypeVar

from ..checkpoints.models import Checkpoint, on_base, open_checkpoint
from ..errors import MergeError, NoFactorsError, OptionError, check_callable, computing
from ..files.architectures import blocks
from ..files.families import common, spelled_alike
from ..files.lora import LoRA, checked, without
from ..files.reading import Source, is_list, open
from ..layers import Layer
from ..layers.base import in_one_library
from ..tensors import keep_freed_memory, same_weight
from .measures import Alone, Pair
from .pairs import Updates, chosen_rows

ROWS = 64
"""Number of a module's rows from which the sign conflict is estimated."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """All LoRAs in a module, or in several."""

    name: str
    component: str
    block: str
    modules: int
    alone: tuple[Alone, ...]
    """One per LoRA, in order."""
    pairs: Mapping[tuple[int, int], Pair]
    """By the numbers of the two LoRAs, the smaller first."""
    together: Alone
    """The sum of all LoRAs, each with weight 1."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as plain data."""
        return {
            "name": self.name,
            "component": self.component,
            "block": self.block,
            "modules": self.modules,
            "loras": [alone.to_dict() for alone in self.alone],
            "pairs": [{"loras": list(pair), **found.to_dict()} for pair, found in self.pairs.items()],
            "sum": self.together.to_dict(),
        }


@dataclass(frozen=True)
class Dense:
    """A layer that was compared as a dense matrix: a whole difference, or a DoRA layer on the base model."""

    lora: int
    module: str
    kind: str
    on_base: bool = False
    """True if its ΔW depends on the base model's weight."""


@dataclass(frozen=True)
class NotCompared:
    """A layer without a ΔW to compare, such as DoRA without its base model."""

    lora: int
    module: str
    kind: str
    on_base: bool = False
    """True if its ΔW could be compared with the base model."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """A comparison of LoRAs, module by module."""

    names: tuple[str, ...]
    architecture: str | None
    rows: tuple[Row, ...]
    """One per module that can be compared."""
    dense: tuple[Dense, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()
    conflict_rows: int | None = ROWS
    """Rows of each module that the sign conflict was estimated from; None for all of them."""
    seed: int = 0
    base: str | None = None
    """Name of the base model that DoRA layers were compared on."""

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.names)}; {len(self.rows)} modules of {self.architecture})"

    @property
    def letters(self) -> tuple[str, ...]:
        """A short name for each LoRA: a, b, c …"""
        return tuple(chr(ord("a") + i) if i < 26 else str(i + 1) for i in range(len(self.names)))

    @property
    def total(self) -> Row:
        """All modules together."""
        return _together("total", "", "", self.rows, len(self.names))

    def by_block(self) -> tuple[Row, ...]:
        """Return one row per block, in the order in which data passes the blocks."""
        found = self.grouped(lambda row: f"{row.component} {row.block}")
        return tuple(sorted(found, key=lambda row: blocks.position(row.component, row.block)))

    def grouped(self, key: Callable[[Row], str]) -> tuple[Row, ...]:
        """Return one row per name that a function gives to modules."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return tuple(
            _together(name, rows[0].component, rows[0].block, rows, len(self.names)) for name, rows in groups.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "loras": list(self.names),
            "architecture": self.architecture,
            "conflict_rows": self.conflict_rows,
            "seed": self.seed,
            "base": self.base,
            "total": self.total.to_dict(),
            "blocks": [row.to_dict() for row in self.by_block()],
            "modules": [row.to_dict() for row in self.rows],
            "dense": [self._said(found) for found in self.dense],
            "not_compared": [self._said(found) for found in self.not_compared],
        }

    def _said(self, found: Dense | NotCompared) -> dict[str, str]:
        return {"lora": self.names[found.lora], "module": found.module, "kind": found.kind}


def compare(
    loras: Sequence[LoRA | Source],
    *,
    rows: int | None = ROWS,
    seed: int = 0,
    exclude: Sequence[str] = (),
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare LoRAs of one model: norms, cosines, overlaps, sign conflict, by module and by block.

    Args:
        loras: Two LoRAs or more, or what `open` takes.  Tensors are read one module at a time.
        rows: Random rows of every module that the sign conflict is estimated from; None for all rows, exact
            and slow.  Nothing else depends on it.
        seed: Chooses the rows, together with the module's name.
        exclude: Glob patterns of modules to leave out, as in `merge`.
        base: The base model, a checkpoint or its path.  With it DoRA layers are compared too: their ΔW is
            dense, one module at a time.  Whole differences of a weight need no base.
        progress: Called with the number of modules done and of all.

    Raises:
        MergeError: A module has different shapes: the LoRAs are for different models, or the base is.
        NoFactorsError: A LoRA has no layer that can be compared.
        OptionError: There are fewer than two LoRAs, or no rows, or no module matches a pattern.

    Example:
        >>> from loramerge.testing import random_lora
        >>> person, jersey = random_lora("sd15", seed=1), random_lora("sd15", seed=2)
        >>> round(abs(compare([person, jersey]).total.pairs[0, 1].cosine), 1)
        0.0
    """
    check_callable(progress=progress)
    if not is_list(loras) or len(loras) < 2:
        raise OptionError("Give a list of two LoRAs or more, such as [a, b].")
    if rows is not None and rows < 1:
        raise OptionError(f"The sign conflict needs at least one row of each module, got {rows}.")
    with ExitStack() as stack:
        opened = [lora if isinstance(lora, LoRA) else stack.enter_context(open(lora)) for lora in loras]
        opened = without(opened, (exclude,) if isinstance(exclude, str) else exclude)
        opened = spelled_alike(opened, next((lora.architecture for lora in opened if lora.architecture), None))
        model = (
            base
            if base is None or isinstance(base, Checkpoint)
            else open_checkpoint(os.fspath(base), likely=common(opened))
        )
        if model is not None and model is not base:
            stack.enter_context(model)
        architecture = _checked(opened, model)
        modules = list(dict.fromkeys(m for lora in opened for m in lora if _is_compared(lora.layout(m), model)))
        found = []
        keep_freed_memory()
        for module in modules:
            with computing(module):
                found.append(_row(_updates(opened, module, model), len(opened), module, architecture, rows, seed))
            if progress:
                progress(len(found), len(modules))
    layers = [(i, module, layout) for i, lora in enumerate(opened) for module, layout in lora.layouts.items()]
    return Comparison(
        names=tuple(lora.name for lora in opened),
        architecture=architecture,
        rows=tuple(found),
        dense=tuple(
            Dense(i, m, x.kind, x.needs_base) for i, m, x in layers if _is_compared(x, model) and not x.factored
        ),
        not_compared=tuple(NotCompared(i, m, x.kind, x.needs_base) for i, m, x in layers if not _is_compared(x, model)),
        conflict_rows=rows,
        seed=seed,
        base=None if model is None else model.name,
    )


def _is_compared(layout: Layer, base: Checkpoint | None) -> bool:
    """True if ΔW is a matrix that is known, maybe from the base model's weight."""
    return layout.factored or layout.dense or (base is not None and layout.needs_base)


def _checked(loras: Sequence[LoRA], base: Checkpoint | None) -> str | None:
    """Check that the LoRAs and the base are for one model; return its family, None if it is unknown."""
    for lora in loras:
        if not any(_is_compared(layout, base) for layout in lora.layouts.values()):
            why = next((_why(layout) for layout in lora.layouts.values()), "it has no layer")
            raise NoFactorsError(f"{lora.name} can't be compared: none of its layers has a low-rank form; {why}.")
        missing = [] if base is None else [m for m in lora if lora.layout(m).needs_base and m not in base]
        if base is not None and missing:
            raise MergeError(
                f"{lora.name}: {missing[0]} can't be compared: it is a {lora.layout(missing[0]).kind} layer, and the base "
                f"{base.name} has no such module."
            )
    for first, second in combinations(loras, 2):
        shared = [module for module in first if module in second]
        for module in shared:
            layouts = first.layout(module), second.layout(module)
            shapes = layouts[0].shape, layouts[1].shape
            if any(layout.bias_only for layout in layouts):
                shapes = shapes[0][:1], shapes[1][:1]
            if all(shapes) and not same_weight(*shapes):
                raise MergeError(
                    f"{module} has the shape {shapes[0]} in {first.name} and {shapes[1]} in {second.name}: "
                    "they were made for different models."
                )
        if not shared and _of_different_models(first, second):
            names = [lora.architecture or "an unknown architecture" for lora in (first, second)]
            raise MergeError(
                f"{first.name} is for {names[0]} and {second.name} for {names[1]}: there is nothing to compare. If they "
                "are for one model, say which: architecture= (--architecture)."
            )
    return next((lora.architecture for lora in loras if lora.architecture), None)


def _of_different_models(first: LoRA, second: LoRA) -> bool:
    """Return whether two LoRAs without a common module are for different models, or named by different tools."""
    if first.architecture is None and second.architecture is None:
        return first.dialect != second.dialect
    return not {*first.families} & {*second.families}


def _why(layout: Layer) -> str:
    """Say why a layer can't be compared, and the ways out."""
    return layout.no_factors + ("; or give the base model (--base, base=…)" if layout.needs_base else "")


def _updates(loras: Sequence[LoRA], module: str, base: Checkpoint | None) -> tuple[list[int], Updates]:
    """Return the numbers of the LoRAs whose layer of a module can be compared, and those updates."""
    present = [i for i, lora in enumerate(loras) if module in lora and _is_compared(lora.layout(module), base)]
    layers = [checked(loras[i], module) for i in present]
    whole = [on_base(x, module, base) if base and x.needs_base else x for x in layers]
    return present, Updates(in_one_library(whole))


def _row(
    found: tuple[list[int], Updates], count: int, module: str, architecture: str | None, rows: int | None, seed: int
) -> Row:
    present, updates = found
    signs = updates.signs(chosen_rows(updates.height, rows, seed, module))
    alone = [updates.alone((k,)) for k in range(len(present))]
    everyone = tuple(range(len(present)))
    return Row(
        name=module,
        component=module.partition(".")[0],
        block=blocks.block(module, architecture),
        modules=1,
        alone=tuple(alone[present.index(i)] if i in present else Alone() for i in range(count)),
        pairs={
            (i, j): updates.pair(present.index(i), present.index(j), signs) if {i, j} <= {*present} else Pair()
            for i, j in combinations(range(count), 2)
        },
        together=updates.alone(everyone),
    )


Sums = TypeVar("Sums", Alone, Pair)


def _added(kind: type[Sums], items: Iterable[Sums]) -> Sums:
    listed = list(items)
    return kind(**{field.name: sum(getattr(item, field.name) for item in listed) for field in fields(kind)})


def _together(name: str, component: str, block: str, rows: Sequence[Row], count: int) -> Row:
    return Row(
        name=name,
        component=component,
        block=block,
        modules=len(rows),
        alone=tuple(_added(Alone, (row.alone[i] for row in rows)) for i in range(count)),
        pairs={pair: _added(Pair, (row.pairs[pair] for row in rows)) for pair in combinations(range(count), 2)},
        together=_added(Alone, (row.together for row in rows)),
    )
