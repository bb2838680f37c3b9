"""A sweep: one recipe, merged with every combination of some settings, and what each merge is like."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import linalg
from ..errors import LoRAMergeError, MergeError, OptionError, did_you_mean
from ..files.lora import LoRA, in_one_library
from ..files.metadata import RECIPE
from ..files.reading import open
from ..files.storage.scratch import make_folder
from ..files.writing import check_target
from ..layers import Layer
from ..layers.base import dense_norm, matrix
from ..registry import code_of
from ..tensors import Array, namespace
from .methods import Method, check_options, find
from .plans import Plan
from .ranks import BUDGETS
from .recipe import Recipe, check
from .running import Kept

if TYPE_CHECKING:
    from ..files.storage.writer import Progress

Score = Callable[[LoRA], Mapping[str, float]]
"""Figures of the caller's own for a merged LoRA, by column."""

SETTINGS = ("method", "rank", *BUDGETS, "weights", "scope", "to", "dtype")
"""What a grid may set beside the methods' options."""


@dataclass(frozen=True)
class Point:
    """One combination of a grid."""

    name: str
    settings: Mapping[str, Any]
    """Those that apply: an option that the method doesn't have is not among them."""
    recipe: Recipe


@dataclass(frozen=True)
class Row:
    """One merge of a sweep."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    figures: Mapping[str, float | None]
    """``size`` in bytes; ``rank_min``, ``rank_max``; ``error``, that of cutting to the rank, ‖ΔW − kept‖ / ‖ΔW‖;
    ``kept:NAME`` of each LoRA and ``interference``, see `measure`; and the score's own."""
    reused: bool = False
    """Whether an earlier sweep had merged it."""
    failed: str | None = None
    """Why there is no merge, or none of its figures, or no score."""

    def __getitem__(self, column: str) -> Any:
        return {"name": self.name, **self.settings, **self.figures}.get(column)


def sweep(
    recipe: Recipe | str | os.PathLike[str],
    grid: Mapping[str, Sequence[Any]],
    output: str | os.PathLike[str],
    *,
    score: Score | None = None,
    allow_changed: bool = False,
    allow_pickle: bool = False,
    workers: int = 1,
    progress: "Progress | None" = None,
) -> list[Row]:
    """Merge a recipe with every combination of settings, and measure each merge.

    Every merge goes to ``output/NAME.safetensors``, the table to ``sweep.json`` and ``sweep.csv``
    beside them.  A merge that is there already, with the same recipe, is not made again.  One that
    fails doesn't end the sweep: its row says why, and the next sweep tries it again.

    Args:
        recipe: What all merges have in common, or the file with it.
        grid: Values by setting: ``{"method": ["ties", "dare"], "density": [0.1, 0.3]}``.  Settings are
            ``method``, ``rank``, ``max_error``, ``energy``, ``max_size``, ``weights``, ``scope``, ``to``,
            ``dtype``, and the options of the methods.  An option is left out where the method doesn't
            have it, and combinations that are then the same are merged once.
        output: A directory; it is made where it is missing.
        score: Called with every merged LoRA; what it returns joins the table.  It is not called again
            for a merge that is there already, unless the file that defines it has changed.
        allow_changed: Whether to take LoRAs with other tensors than the recipe was made with.
        allow_pickle: Whether to read pickles, tensors only.
        workers: Processes or threads for each merge, as in `loramerge.save`.
        progress: Called with the number of merges done and of all.

    Returns:
        One row a merge, in the grid's order; `Row.failed` of those that failed.

    Raises:
        OptionError: A setting is unknown or a value is wrong; nothing is merged.
        LoRAMergeError: Every merge failed; the first's error, as from `Recipe.plan` and `loramerge.save`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    todo = points(recipe, grid)
    folder = Path(output).expanduser()
    make_folder(folder)
    for point in todo:
        check_target(folder / _file(point), point.recipe.output.to or "kohya")
    loras = recipe.open(allow_pickle=allow_pickle)
    ledger = _Ledger(folder, _name(score))
    rows: list[Row] = []
    errors: list[LoRAMergeError] = []
    for done, point in enumerate(todo, start=1):
        row, error = _tried(point, loras, ledger, score, allow_changed, workers)
        rows.append(row)
        errors += [error] if error else []
        if progress:
            progress(done, len(todo))
    ledger.close(rows, list(grid))
    if len(errors) == len(todo):
        raise errors[0]
    return rows


def points(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The combinations of a grid that differ, each with its recipe.

    Raises:
        OptionError: A setting is unknown, or a value is wrong.
    """
    _check(recipe, grid)
    found: list[Point] = []
    for values in product(*grid.values()):
        asked = dict(zip(grid, values, strict=True))
        method = find(asked.get("method", recipe.method))
        known = method.options
        settings = {name: value for name, value in asked.items() if name in SETTINGS or name in known}
        options = {name: settings[name] for name in settings if name not in SETTINGS}
        changes = {name: settings[name] for name in settings if name in SETTINGS}
        changed = recipe.override(**changes, options=options)
        check(changed)
        check_options(method, changed.options)
        if all(changed != point.recipe for point in found):
            settings = {name: _plain(value) for name, value in settings.items()}
            found.append(Point(_unique(_readable(settings), [p.name for p in found]), settings, changed))
    return found


def left_out(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """The options that some methods of a grid don't have, with those methods; they are left out there."""
    methods = list(map(find, grid.get("method", [recipe.method])))
    options = [name for name in dict.fromkeys((*grid, *recipe.options)) if name not in SETTINGS]
    lacking = {name: [m.name for m in methods if name not in m.options] for name in options}
    return {name: without for name, without in lacking.items() if without}


def _check(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> None:
    methods = list(map(find, grid.get("method", [recipe.method])))
    options = list(dict.fromkeys(name for method in methods for name in method.options))
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise OptionError(f"The setting {name}: got {values!r}, wanted a list of values.")
        if name not in SETTINGS and name not in options:
            hint = did_you_mean(name, [*SETTINGS, *options])
            raise OptionError(
                f"Unknown setting {name!r}.{hint} Available: {', '.join(SETTINGS)}; options of the methods: "
                f"{', '.join(options) or 'none'}."
            )


def _plain(value: Any) -> Any:
    """A setting as tables and names of files show it."""
    return value.reference or value.name if isinstance(value, Method) else value


def _readable(settings: Mapping[str, Any]) -> str:
    """``ties_density=0.1``: a name for a file."""
    parts = [_word(value) if name == "method" else f"{name}={_word(value)}" for name, value in settings.items()]
    return "_".join(parts) or "merge"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{pattern}={number}" for pattern, number in value.items()]
    text = "+".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^\w.=+%-]+", "-", text)


def _unique(name: str, taken: Sequence[str]) -> str:
    names = [name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))]
    return next(n for n in names if n.lower() not in {t.lower() for t in taken})


def _file(point: Point) -> str:
    return f"{point.name}.safetensors"


def _tried(
    point: Point, loras: Sequence[LoRA], ledger: "_Ledger", score: Score | None, allow_changed: bool, workers: int
) -> tuple[Row, LoRAMergeError | None]:
    """A point's row; where it failed with what there is of it, and the error."""
    row = Row(point.name, ledger.folder / _file(point), point.settings, {})
    try:
        planned = point.recipe.plan(loras, allow_changed=allow_changed)
        row = _merged(point, planned, ledger, workers)
        return (_with_scores(row, planned, ledger, score) if score else row), None
    except LoRAMergeError as error:
        row = replace(row, failed=str(error))
        ledger.add(row)
        return row, type(error)(f"{point.name}: {error}")


def _merged(point: Point, planned: Plan, ledger: "_Ledger", workers: int) -> Row:
    """The merge that is there already, or a new one, and its figures."""
    target = check_target(ledger.folder / _file(point), planned.dialect)
    figures = ledger.figures(point.name) if _is_made(target, planned.recipe) else None
    row = Row(point.name, target, point.settings, figures or {}, figures is not None)
    if figures is not None:
        return row
    kept = Kept(planned.steps)
    ledger.forget(point.name)
    point.recipe.write(planned, target, workers=workers, kept=kept)
    with open(target, architecture=planned.architecture) as merged:
        row = replace(
            row, figures={"size": _size(target), **_ranks(merged), "error": kept.error, **measure(merged, planned)}
        )
    ledger.add(row)
    return row


def _with_scores(row: Row, planned: Plan, ledger: "_Ledger", score: Score) -> Row:
    scores = ledger.scores(row.name)
    if scores is None:
        with open(row.path, architecture=planned.architecture) as merged:
            scores = _scored(_asked(score, merged), row.figures)
        ledger.add(row, scores)
    return replace(row, figures={**row.figures, **scores})


def measure(merged: LoRA, planned: Plan) -> dict[str, float | None]:
    """What a merged LoRA has of its parents, from factors, over all modules that are merged.

    Args:
        merged: As it was written.
        planned: How.

    Returns:
        ``kept:NAME`` of each parent i, ⟨ΔW, ΔWᵢ⟩ / ⟨ΔWᵢ, ΔWᵢ⟩: how much of it is in the merge, along its own
        direction (its weight, and what the others have in that direction).  ``interference``,
        ‖ΔW − Σ wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖: how far the merge is from the weighted sum.  None where the denominator is 0.
    """
    inner, own = [0.0] * len(planned.loras), [0.0] * len(planned.loras)
    apart, whole = 0.0, 0.0
    for module, step in planned.steps.items():
        if step.rankless:
            continue
        inputs = [i for i in step.inputs if not planned.loras[i].layout(module).bias_only]
        given = [layer for layer in planned.merger.inputs(module) if not layer.bias_only]
        weights = planned.weights.of(module)
        layers = in_one_library([*given, merged[module]] if module in merged else given)
        parents = _products(layers[: len(given)])
        total = _weighted(parents, [weights[i] for i in inputs])
        result = _products(layers[len(given) :], like=parents)
        for i, parent in zip(inputs, parents, strict=True):
            inner[i] += _inner(result[0], parent) if result else 0.0
            own[i] += _inner(parent, parent)
        apart += _distance(result[0], total) ** 2 if result else _inner(total, total)
        whole += _inner(total, total)
    names = [_unique(lora.name, [other.name for other in planned.loras[:i]]) for i, lora in enumerate(planned.loras)]
    kept = {f"kept:{name}": a / b if b else None for name, a, b in zip(names, inner, own, strict=True)}
    return {**kept, "interference": math.sqrt(apart / whole) if whole else None}


Factors = tuple[Array, Array]
Update: TypeAlias = Factors | Array
"""A ΔW in float64: its factors, or the dense matrix where one of the module's parents has none."""


def _products(layers: Sequence[Layer], like: Sequence[Update] = ()) -> list[Update]:
    """The ΔWs of layers, all in one form."""
    factored = isinstance(like[0], tuple) if like else all(layer.factored for layer in layers)
    return [_factors(layer) if factored else _wide(matrix(layer.delta())) for layer in layers]


def _factors(layer: Layer) -> Factors:
    """In float64, so that the sums lose nothing."""
    up, down = layer.factors()
    return _wide(up), _wide(down)


def _wide(array: Array) -> Array:
    xp = namespace(array)
    return xp.astype(array, xp.float64)


def _weighted(parents: Sequence[Update], weights: Sequence[float]) -> Update:
    if not isinstance(parents[0], tuple):
        dense: list[Array] = list(parents)
        return sum(weight * parent for weight, parent in zip(weights, dense, strict=True))
    xp = namespace(parents[0][0])
    ups = [weight * up for weight, (up, _) in zip(weights, parents, strict=True)]
    return xp.concat(ups, axis=1), xp.concat([down for _, down in parents], axis=0)


def _inner(a: Update, b: Update) -> float:
    """⟨ΔW₁, ΔW₂⟩, of factors without either product."""
    if isinstance(a, tuple):
        return float(((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum())
    return float((a * b).sum())


def _distance(a: Update, b: Update) -> float:
    """‖ΔW₁ − ΔW₂‖."""
    return linalg.distance(a, b) if isinstance(a, tuple) else dense_norm(a - b)


def _ranks(merged: LoRA) -> dict[str, float | None]:
    ranks = [layer.rank for layer in merged.layouts.values() if layer.rank is not None]
    return {"rank_min": min(ranks), "rank_max": max(ranks)}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _asked(score: Score, merged: LoRA) -> Any:
    """What a score says; what it raises is a failure of this merge alone."""
    try:
        return score(merged)
    except LoRAMergeError:
        raise
    except Exception as error:
        raise MergeError(f"the score raised {type(error).__name__}: {error}") from error


def _scored(found: Any, figures: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise OptionError(f"The score gave {found!r}, wanted a mapping of columns to numbers.")
    for column, value in found.items():
        if not isinstance(column, str) or column in (*figures, *SETTINGS, "name"):
            raise OptionError(f"The score's column {column!r} is no text, or the sweep has one of that name.")
        if isinstance(value, str | bool) or not hasattr(value, "__float__"):
            raise OptionError(f"The score's {column}: got {value!r}, wanted a number.")
    return {column: float(value) for column, value in found.items()}


def _name(score: Score | None) -> str | None:
    """What a score is known by: its name and the text of its file; None where it has none."""
    name = getattr(score, "__qualname__", "<")
    code = code_of(score) if score else None
    return f"{score.__module__}:{name} {code}" if code and "<" not in name else None


def _is_made(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a file is what a recipe would make; of a method whose code can't be compared nobody knows."""
    known = recipe.get("method_sha256", "") is not None
    return known and _recipe_in(path) == _comparable(recipe)


def _recipe_in(path: Path) -> Any:
    """The recipe in the header of a merged file; None where there is no such file."""
    if not path.exists():
        return None
    try:
        with open(path) as lora:
            return _comparable(json.loads(lora.metadata[RECIPE]))
    except (LoRAMergeError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _comparable(recipe: Mapping[str, Any]) -> Any:
    """A recipe without what says nothing of the tensors: the inputs' own metadata, and what was allowed."""
    kept: Any = json.loads(json.dumps(recipe))
    kept["output"].pop("allow_lossy", None)
    for entry in kept["inputs"]:
        entry.pop("metadata", None)
    return kept


class _Ledger:
    """The table on the disk: brought up to date after every merge, so that a sweep can go on where it stopped."""

    def __init__(self, folder: Path, score: str | None) -> None:
        self.folder = folder
        self.score = score
        self.entries: dict[str, dict[str, Any]] = {}
        try:
            rows = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["rows"]
            self.entries = {row["name"]: row for row in rows if isinstance(row["figures"], dict) and row["figures"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def figures(self, name: str) -> dict[str, Any] | None:
        return self.entries.get(name, {}).get("figures")

    def scores(self, name: str) -> dict[str, Any] | None:
        entry = self.entries.get(name, {})
        return entry.get("scores") if self.score and entry.get("score") == self.score else None

    def add(self, row: Row, scores: Mapping[str, float] | None = None) -> None:
        entry: dict[str, Any] = {
            "name": row.name,
            "file": row.path.name,
            "settings": row.settings,
            "figures": row.figures,
        }
        entry |= {"failed": row.failed} if row.failed else {}
        self.entries[row.name] = {**entry, **({"score": self.score, "scores": scores} if scores is not None else {})}
        self._write(self.entries)

    def forget(self, name: str) -> None:
        """Drop the figures of a file that is about to be replaced: a run that ends in between has none for the new one."""
        if self.entries.pop(name, None):
            self._write(self.entries)

    def close(self, rows: Sequence[Row], settings: Sequence[str]) -> None:
        """The table of this sweep alone, in its order, and the same for spreadsheets."""
        from ..files.storage.writer import write_text

        self._write([row.name for row in rows])
        write_text(self.folder / "sweep.csv", _csv(rows, settings))

    def _write(self, names: Iterable[str]) -> None:
        from .._version import __version__
        from ..files.storage.writer import write_text

        data = {"loramerge": __version__, "rows": [self.entries[name] for name in names]}
        write_text(self.folder / "sweep.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _csv(rows: Sequence[Row], settings: Sequence[str]) -> str:
    import csv
    import io

    text = io.StringIO()
    figures = dict.fromkeys(column for row in rows for column in row.figures)
    writer = csv.writer(text, lineterminator="\n")
    failed = ["failed"] if any(row.failed for row in rows) else []
    writer.writerow(["name", "file", *settings, *figures, *failed])
    for row in rows:
        values = [*(row[column] for column in (*settings, *figures)), *(row.failed for _ in failed)]
        writer.writerow([row.name, row.path.name, *("" if v is None else v for v in values)])
    return text.getvalue()


def ordered(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows by a column, rising; falling where the column's name has a minus in front.  Empty cells come last.

    Raises:
        OptionError: No row has the column.
    """
    name = column.removeprefix("-")
    known = dict.fromkeys(c for row in rows for c in ("name", *row.settings, *row.figures))
    if name not in known:
        raise OptionError(f"Can't sort by {name!r}.{did_you_mean(name, known)} Columns: {', '.join(known)}.")
    filled = [row for row in rows if row[name] is not None]
    filled.sort(key=lambda row: _key(row[name]), reverse=column.startswith("-"))
    return filled + [row for row in rows if row[name] is None]


def _key(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, "" if number else str(value)
