"""A sweep: one recipe, merged with every combination of some settings, and the table of these merges."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoRAMergeError, MergeError, OptionError, check_callable
from ..files.lora import LoRA
from ..files.metadata import RECIPE
from ..files.reading import open
from ..files.storage.paths import path_of
from ..files.storage.scratch import make_folder
from ..files.storage.texts import parsed
from ..files.writing import check_target
from ..registry import code_of
from .figures import Products, extent, measure
from .grid import SETTINGS, Point, points
from .ledger import Ledger, Row
from .plans import Plan
from .provenance import comparable
from .recipe import Recipe
from .running import Kept

if TYPE_CHECKING:
    from ..files.storage.writer import Progress

Score = Callable[[LoRA], Mapping[str, float]]
"""A function of the caller that returns figures of a merged LoRA, by column."""


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

    Every merge goes to ``output/NAME.safetensors``, the table to ``sweep.json`` and ``sweep.csv`` in
    the same directory.  A merge that is there already, with the same recipe, is not made again.  One
    that fails doesn't end the sweep: its row says why, and the next sweep tries it again.

    Args:
        recipe: What all merges have in common, or the file with it.
        grid: Values by setting: ``{"method": ["ties", "dare"], "density": [0.1, 0.3]}``.  Settings are
            ``method``, ``rank``, ``max_error``, ``energy``, ``max_size``, ``weights``, ``scope``, ``to``,
            ``dtype``, and the options of the methods.  An option is left out if the method doesn't
            have it, and combinations that become equal by that are merged once.
        output: A directory; it is made if it is missing.
        score: Called with every merged LoRA; what it returns becomes columns of the table.  It is not
            called again for a merge that is there already, unless the file that defines it has changed.
        allow_changed: Take LoRAs whose tensors have changed since the recipe was made.
        allow_pickle: Read pickles, tensors only.
        workers: Processes or threads for each merge, as in `loramerge.save`.
        progress: Called with the number of merges done and of all.

    Returns:
        One row per merge, in the grid's order; `Row.failed` says why a merge failed.

    Raises:
        OptionError: A setting is unknown or a value is wrong; nothing is merged.
        LoRAMergeError: Every merge failed; the first's error, as from `Recipe.plan` and `loramerge.save`.
    """
    check_callable(score=score, progress=progress)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    todo = points(recipe, grid)
    folder = make_folder(path_of(output))
    for point in todo:
        check_target(point.recipe.target(folder / point.file), point.recipe.output.to or "kohya")
    ledger = Ledger(folder, _name(score))
    rows: list[Row] = []
    errors: list[LoRAMergeError] = []
    products: Products = {}
    with ExitStack() as stack:
        loras = [stack.enter_context(lora) for lora in recipe.open(allow_pickle=allow_pickle)]
        for point in todo:
            point.recipe.check_target(folder / point.file, loras)
        for done, point in enumerate(todo, start=1):
            row, error = _tried(point, loras, products, ledger, score, allow_changed, workers)
            rows.append(row)
            errors += [error] if error else []
            if progress:
                progress(done, len(todo))
    ledger.close(rows, list(grid))
    if len(errors) == len(todo):
        raise errors[0]
    return rows


def _tried(
    point: Point,
    loras: Sequence[LoRA],
    products: Products,
    ledger: Ledger,
    score: Score | None,
    allow_changed: bool,
    workers: int,
) -> tuple[Row, LoRAMergeError | None]:
    """Merge a point and return its row; if it failed, the row says why, and the error is returned too."""
    row = Row(point.name, ledger.folder / point.file, point.settings, {})
    try:
        planned = point.recipe.plan(loras, allow_changed=allow_changed)
        row = _merged(point, planned, products, ledger, workers)
        return (_with_scores(row, planned, ledger, score) if score else row), None
    except LoRAMergeError as error:
        row = replace(row, failed=str(error))
        ledger.add(row)
        return row, type(error)(f"{point.name}: {error}")


def _merged(point: Point, planned: Plan, products: Products, ledger: Ledger, workers: int) -> Row:
    """Merge a point, unless its file is there already, and return its row."""
    target = point.recipe.check_target(ledger.folder / point.file, planned.given, planned.dialect)
    figures = ledger.figures(point.name) if _is_made(target, planned.recipe) else None
    row = Row(point.name, target, point.settings, figures or {}, figures is not None)
    if figures is not None:
        return row
    kept = Kept(planned.steps)
    ledger.forget(point.name)
    point.recipe.write(planned, target, workers=workers, kept=kept)
    with open(target, architecture=planned.architecture) as merged:
        measured = {**extent(merged, target), "error": kept.error, **measure(merged, planned, products)}
    row = replace(row, figures=measured)
    ledger.add(row)
    return row


def _with_scores(row: Row, planned: Plan, ledger: Ledger, score: Score) -> Row:
    scores = ledger.scores(row.name)
    if scores is None:
        with open(row.path, architecture=planned.architecture) as merged:
            scores = _scored(_asked(score, merged), row.figures)
        ledger.add(row, scores)
    return replace(row, figures={**row.figures, **scores})


def _asked(score: Score, merged: LoRA) -> Any:
    """Call the score; if it raises, only this merge fails."""
    try:
        return score(merged)
    except LoRAMergeError:
        raise
    except Exception as error:
        raise MergeError(f"the score raised {type(error).__name__}: {error}") from error


def _scored(found: Any, figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what a score gave as floats, by column; None for NaN and infinity, which leave a cell empty.

    Raises:
        OptionError: It gave no mapping of new columns to numbers.
    """
    if not isinstance(found, Mapping):
        raise OptionError(f"The score gave {found!r}, wanted a mapping of columns to numbers.")
    for column, value in found.items():
        if not isinstance(column, str) or column in (*figures, *SETTINGS, "name"):
            raise OptionError(f"The score's column {column!r} isn't text, or the sweep has a column of that name.")
        if isinstance(value, str | bool) or not hasattr(value, "__float__"):
            raise OptionError(f"The score's {column}: got {value!r}, wanted a number.")
    return {column: float(value) if math.isfinite(value) else None for column, value in found.items()}


def _name(score: Score | None) -> str | None:
    """Return a text that identifies a score, its name and a hash of its file; None for one that has no name or no file."""
    name = getattr(score, "__qualname__", "<")
    code = code_of(score) if score else None
    return f"{score.__module__}:{name} {code}" if code and "<" not in name else None


def _is_made(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Return whether a file is what a recipe would make; False if the code of its method can't be compared."""
    known = recipe.get("method_sha256", "") is not None
    return known and _recipe_in(path) == comparable(recipe)


def _recipe_in(path: Path) -> Any:
    """Return the recipe in the header of a merged file; None if there is no such file or recipe."""
    if not path.exists():
        return None
    try:
        with open(path) as lora:
            return comparable(parsed(lora.metadata[RECIPE], RECIPE))
    except (LoRAMergeError, KeyError, TypeError, AttributeError):
        return None
