"""``loramerge merge``: a recipe, typed or read, and what it gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import check_target, saved_size
from ..merging import Kept, Plan
from ..methods import METHODS, check_options
from ..recipe import Recipe
from ..recipe_text import Input
from ..weights import parse
from .options import named, rank_of, workers_or_cores
from .run import as_directory, print_notes, progress, size, table, written


def recipe_of(files: Sequence[str]) -> Recipe:
    """The recipe in the one file that is given, or that of merging all that are.

    Raises:
        OptionError: A recipe is given beside other files.
    """
    recipes = [file for file in files if file.endswith(".toml")]
    if not recipes:
        return Recipe(loras=tuple(Input(path=file) for file in files))
    if len(files) > 1:
        raise OptionError(f"{recipes[0]} is a recipe, which names its LoRAs itself; got {len(files) - 1} more files.")
    return Recipe.read(recipes[0])


def overridden(recipe: Recipe, flags: Mapping[str, Any], quiet: bool = False) -> Recipe:
    """The recipe with what was typed in the place of what it says."""
    changes = dict(flags)
    if "weights" in changes:
        given = changes["weights"]
        changes["weights"] = given if isinstance(given, str) else tuple(map(parse, given))
    if "rank" in changes:
        changes["rank"] = rank_of(changes["rank"])
    if "exclude" in changes:
        changes["exclude"] = tuple(changes["exclude"])
    method = changes.get("method", recipe.method)
    if "option" in changes:
        changes["options"] = _options(method, changes.pop("option"))
    changed = recipe.override(**changes)
    for name in recipe.options:
        if name not in changed.options and not quiet:
            print(f"note: the recipe's option {name} is left out: {method} doesn't have it")
    return changed


def merge_by(
    recipe: Recipe,
    output: Path | None,
    *,
    dry_run: bool = False,
    advice: bool = False,
    allow_changed: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Run a recipe, and say what it does."""
    if output is None and recipe.output.path is None and not dry_run:
        raise OptionError("Where should the merged LoRA go? Give --output FILE, or --dry-run to see the plan.")
    loras = recipe.open(allow_pickle=allow_pickle)
    target = None if dry_run and output is None else recipe.target(output)
    if target is not None:
        check_target(target, recipe.output.to or loras[0].dialect)
    with progress("Measuring", quiet) as report:
        planned = recipe.plan(loras, allow_changed=allow_changed, progress=report)
    if not quiet:
        print(_plan_table(planned, recipe.output.allow_lossy))
    if advice:
        with progress("Comparing", quiet) as report:
            print(planned.advice(report))
    if target is not None and not dry_run:
        _write(recipe, planned, target, workers_or_cores(workers, planned.widest), quiet)


def _write(recipe: Recipe, planned: Plan, target: Path, workers: int, quiet: bool) -> None:
    lost: list[str] = []
    noted: list[str] = []
    kept = Kept(planned.steps)
    with progress("Merging", quiet) as report:
        path = recipe.write(
            planned,
            target,
            workers=workers,
            progress=report,
            kept=kept,
            lost=lost.append,
            noted=noted.append,
        )
    if not quiet:
        print(f"→ {written(path, planned.dialect)}")
        _print_kept(kept)
        print_notes([*as_directory(target, path), *noted], lost)


def _print_kept(kept: Kept) -> None:
    if not kept.errors:
        return
    worst = max(kept.errors, key=kept.errors.__getitem__)
    print(
        f"  kept {100 * kept.share:.4g} % of the energy: relative error {100 * kept.error:.3g} %, "
        f"largest {100 * kept.errors[worst]:.3g} % in {worst}"
    )


def _options(method: str, given: list[str]) -> dict[str, Any]:
    """A method's options from NAME=VALUE, in the types of its parameters."""
    chosen = METHODS[method]
    options: dict[str, Any] = {}
    for name, value in named("option", given):
        if name not in chosen.options:
            check_options(chosen, {name: value})
        options[name] = chosen.options[name].parse(value)
    return options


def _plan_table(planned: Plan, allow_lossy: bool) -> str:
    rows = [
        [lora.name, lora.dialect, str(len(lora)), lora.summary("rank").removeprefix("rank "), label]
        for lora, label in zip(planned.loras, planned.weights.label, strict=True)
    ]
    steps = planned.steps.values()
    shared = sum(len(step.inputs) == sum(map(bool, planned.loras)) for step in steps)
    ranks = list(map(planned.rank_of, planned.steps))
    low, high = min(ranks), max(ranks)
    cut = sum(map(planned.is_cut, planned.steps))
    exact = "exact" if planned.method.linear else "nothing is cut"
    notes = [f"  note: {lora.name}: {note}" for lora in planned.loras for note in lora.notes]
    return "\n".join(
        [
            table(["file", "dialect", "modules", "rank", "weight"], rows),
            f"{planned.method.name}: {len(steps)} modules of {planned.architecture or 'an unknown family'} "
            f"({shared} in all files), rank {low if low == high else f'{low} to {high}'}, "
            f"{f'{cut} modules cut to a smaller rank' if cut else exact}, {size(saved_size(planned.lora(), allow_lossy=allow_lossy))} in {planned.dtype}",
            *notes,
        ]
    )
