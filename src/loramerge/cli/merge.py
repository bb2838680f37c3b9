"""``loramerge merge``: a recipe, typed or read, and what it gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, size
from ..files.writing import check_growth, check_target, outgrows, saved_size
from ..merging.methods import Method, check_options, find
from ..merging.plans import Plan
from ..merging.recipe import Recipe
from ..merging.recipe_text import Input
from ..merging.running import Kept
from ..merging.weights import parse
from ..tensors import SIZES, code
from .options import method_of, named, rank_of, workers_or_cores
from .output import as_directory, print_notes, progress, table, written


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
    if "method" in changes:
        changes["method"] = method_of(changes["method"])
    method = changes.get("method", recipe.method)
    if "option" in changes:
        changes["options"] = _options(method, changes.pop("option"))
    changed = recipe.override(**changes)
    for name in recipe.options:
        if name not in changed.options and not quiet:
            print(f"note: the recipe's option {name} is left out: {find(method).name} doesn't have it")
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
    made = planned.lora()
    length = planned.size  # which needs no values, as the size of the file may
    if not outgrows(made, length):
        length = saved_size(made, allow_lossy=recipe.output.allow_lossy)
    if not quiet:
        print(_plan_table(planned, length))
    check_growth(made, length, made.dialect)
    if advice:
        from ..comparing import advice as advised, compare

        with progress("Comparing", quiet) as report:
            print(advised(compare(planned.loras, base=planned.base, progress=report)))
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
        _print_kept(kept, planned)
        print_notes([*as_directory(target, path), *noted], lost)


def _options(method: Method | str, given: list[str]) -> dict[str, Any]:
    """A method's options from NAME=VALUE, in the types of its parameters."""
    chosen = find(method)
    options: dict[str, Any] = {}
    for name, value in named("option", given):
        if name not in chosen.options:
            check_options(chosen, {name: value})
        options[name] = chosen.options[name].parse(value)
    return options


def _plan_table(planned: Plan, length: int) -> str:
    rows = [
        [lora.name, lora.dialect, str(len(lora)), lora.summary("rank").removeprefix("rank "), label]
        for lora, label in zip(planned.loras, planned.weights.label, strict=True)
    ]
    steps = planned.steps.values()
    shared = sum(all(module in lora for lora in planned.loras if lora) for module in planned.steps)
    cut = sum(map(planned.is_cut, planned.steps))
    notes = [f"  note: {lora.name}: {note}" for lora in planned.loras for note in lora.notes]
    return "\n".join(
        [
            table(["file", "dialect", "modules", "rank", "weight"], rows),
            f"{planned.method.name}: {len(steps)} modules of {' or '.join(planned.lora().families) or 'an unknown family'} "
            f"({shared} of them in every file), {_ranks(planned)}"
            f"{f'{cut} modules cut to a smaller rank' if cut else _exactness(planned)}, {size(length)} in {planned.dtype}",
            *_wider(planned),
            *notes,
        ]
    )


def _ranks(planned: Plan) -> str:
    """The ranks of the result; and how many modules have none."""
    ranks = [planned.rank_of(module) for module, step in planned.steps.items() if not step.rankless]
    without = len(planned.steps) - len(ranks)
    told = f", {without} without a rank" if without and ranks else ""
    return f"rank {span(ranks)}{told}, " if ranks else ""


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


ROUNDING = {"BF16": "0.2 %", "F16": "0.02 %"}
"""What rounding takes of ‖ΔW‖ at most, about: both factors, each value by up to 2⁻⁹ or 2⁻¹² of it."""


def _exactness(planned: Plan) -> str:
    """Whether what is written is the method's own result."""
    exact = "exact" if planned.method.linear else "nothing is cut"
    if planned.dtype not in ROUNDING:
        return exact
    return f"{exact} but for the rounding to {planned.dtype} (up to about {ROUNDING[planned.dtype]})"


LARGE = 0.3
"""A relative error from which a merge is another one."""


def _print_kept(kept: Kept, planned: Plan) -> None:
    if not kept.errors:
        return
    worst = max(kept.errors, key=kept.errors.__getitem__)
    print(
        f"  kept {100 * kept.share:.4g} % of the energy: relative error {100 * kept.error:.3g} %, "
        f"largest {100 * kept.errors[worst]:.3g} % in {worst}"
    )
    for note in _keeps_more(kept, planned):
        print(f"  note: {note}")


def _keeps_more(kept: Kept, planned: Plan) -> list[str]:
    """What would keep more of a merge that was cut."""
    sized = planned.budget is not None and planned.budget.kind == "max_size"
    larger = "--max-size" if sized else "--rank or budget"
    wide = ["--dtype float16 has room for twice the rank in this size"] * (sized and SIZES[planned.dtype] > 2)
    return [*wide, *[f"more than 30 % of ‖ΔW‖ is lost; a larger {larger} keeps more"] * (kept.error > LARGE)]


def _wider(planned: Plan) -> list[str]:
    """A note where the result has more bits than every input."""
    tensors = [t for lora in planned.loras for layout in lora.layouts.values() for t in layout.tensors().values()]
    widest = max(SIZES[code(tensor)] for tensor in tensors)
    if SIZES[planned.dtype] <= widest:
        return []
    why = "sums of float8 values need its digits" if widest == 1 else "--dtype float16 would take half of the room"
    return [f"  note: {planned.dtype} has more bits than every input: {why}"]
