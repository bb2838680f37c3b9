"""``loramerge merge``: a recipe, typed or read, and the LoRA that comes out; ``resize`` runs it too."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, size, span
from .options import (
    Arch,
    Base,
    Changed,
    Device,
    DryRun,
    Dtype,
    Energy,
    Exclude,
    Growth,
    Lossy,
    MaxError,
    MaxSize,
    Pickle,
    Quiet,
    Scope,
    To,
    WeightRule,
    Workers,
    method_of,
    named,
    rank_of,
    weights_of,
    workers_or_cores,
)
from .output import Block, as_directory, joined, print_notes, progress, say, table, written
from .settings import command

if TYPE_CHECKING:
    from ..merging import Plan, Recipe
    from ..merging.methods import Method
    from ..merging.running import Kept

ROUNDING = {"BF16": "0.2 %", "F16": "0.02 %"}
"""About how much of ‖ΔW‖ rounding takes at most: both factors are rounded, each value by up to 2⁻⁹ or 2⁻¹² of it."""

LARGE = 0.3
"""Relative error above which a note says that much is lost."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """The options that ``merge`` and ``resize`` share."""

    max_error: MaxError = None
    energy: Energy = None
    max_size: MaxSize = None
    base: Base = None
    exclude: Exclude = None
    to: To = None
    dtype: Dtype = None
    device: Device = None
    architecture: Arch = None
    allow_lossy: Lossy = False
    allow_growth: Growth = False
    allow_pickle: Pickle = False
    dry_run: DryRun = False
    workers: Workers = None
    quiet: Quiet = False


HOW = ("allow_pickle", "dry_run", "workers", "quiet")
"""The shared options that say how a merge is run; the others have entries of the same name in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Options(Making):
    """The options of ``loramerge merge``."""

    files: Annotated[
        list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub; or one recipe.toml.")
    ]
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; for peft a directory.")] = (
        None
    )
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            help="One per file: 0.8, or '0.8;text_encoder=0;OUT*=0.5', or 'lbw:1,0,0,…'. Default 1/N.",
        ),
    ] = None
    weights: WeightRule = None
    scope: Annotated[Scope | None, typer.Option("--scope", help="What l2, equal and energy take norms over.")] = None
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="See 'loramerge methods', or package.module:name; default linear."),
    ] = None
    rank: Annotated[str | None, typer.Option("--rank", "-r", help="sum (exact, the default), max, or a number.")] = None
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="NAME=VALUE of the method.")] = None
    allow_changed: Changed = False
    advice: Annotated[bool, typer.Option("--advice", help="Compare the LoRAs too, and say what to make of it.")] = False


@command
def run(given: Options) -> None:
    """Merge LoRAs into one: the exact weighted sum, or its best fit at a smaller rank; or as a recipe says.

    With a recipe, every other option overrides what it says.

    Example: loramerge merge person.safetensors jersey.safetensors -o both.safetensors -w 0.7 -w 0.5
    """
    changes = {
        "weights": weights_of(given.weight, given.weights),
        "scope": given.scope.value if given.scope else None,
        "method": given.method,
        "rank": given.rank,
        "option": given.option,
    }
    make(given.files, changes, given.output, given, allow_changed=given.allow_changed, advice=given.advice)


def make(
    files: Sequence[str],
    changes: Mapping[str, Any],
    output: Path | None,
    given: Making,
    *,
    allow_changed: bool = False,
    advice: bool = False,
) -> None:
    """Merge files, or run the one recipe among them, and print what is done.

    Args:
        files: LoRAs, or one recipe.
        changes: What was typed for the entries of a recipe; None or empty where nothing was.
        output: The file to write; None leaves it to the recipe.
        given: The other options.
        allow_changed: Whether files may differ from those that the recipe was made with.
        advice: Whether the LoRAs are compared too.
    """
    from ..files.writing import check_target

    shared = {field.name: getattr(given, field.name) for field in fields(Making) if field.name not in HOW}
    typed = {name: value for name, value in {**changes, **shared}.items() if value}
    recipe = overridden(recipe_of(files), typed, given.quiet)
    if output is None and recipe.output.path is None and not given.dry_run:
        raise OptionError("Where should the merged LoRA go? Give --output FILE, or --dry-run to see the plan.")
    with ExitStack() as stack:
        loras = [stack.enter_context(lora) for lora in recipe.open(allow_pickle=given.allow_pickle)]
        target = None if given.dry_run and output is None else recipe.target(output)
        if target is not None:
            check_target(target, recipe.output.to or loras[0].dialect)
        with progress("Measuring", given.quiet) as report:
            planned = recipe.plan(loras, allow_changed=allow_changed, progress=report)
        _announce(recipe, planned, given.quiet)
        if advice:
            _print_advice(planned, given.quiet)
        if target is not None and not given.dry_run:
            _write(recipe, planned, target, workers_or_cores(given.workers, planned.widest), given.quiet)


def recipe_of(files: Sequence[str]) -> "Recipe":
    """Return the recipe in the one file that is given, or else one that merges all files.

    Raises:
        OptionError: A recipe is given together with other files.
    """
    from ..merging import Input, Recipe

    recipes = [file for file in files if file.endswith(".toml")]
    if not recipes:
        return Recipe(loras=tuple(Input(path=file) for file in files))
    if len(files) > 1:
        raise OptionError(f"{recipes[0]} is a recipe, which names its LoRAs itself; got {len(files) - 1} more files.")
    return Recipe.read(recipes[0])


def overridden(recipe: "Recipe", flags: Mapping[str, Any], quiet: bool = False) -> "Recipe":
    """Return the recipe with what was typed instead of what it says."""
    from ..merging.methods import find
    from ..merging.weights import parse

    changes = dict(flags)
    if "weights" in changes:
        given = changes["weights"]
        changes["weights"] = given if isinstance(given, str) else tuple(map(parse, given))
    if "rank" in changes:
        changes["rank"] = rank_of(changes["rank"])
    if "exclude" in changes:
        changes["exclude"] = tuple(changes["exclude"])
    if "base" in changes:
        changes["base"] = str(changes["base"])
    if "method" in changes:
        changes["method"] = method_of(changes["method"])
    method = changes.get("method", recipe.method)
    if "option" in changes:
        changes["options"] = _options(method, changes.pop("option"))
    changed = recipe.override(**changes)
    for name in recipe.options:
        if name not in changed.options and not quiet:
            say(f"note: the recipe's option {name} is left out: {find(method).name} doesn't have it")
    return changed


def _announce(recipe: "Recipe", planned: "Plan", quiet: bool) -> None:
    """Print the plan; refuse it if the result would be far larger than the inputs."""
    from ..files.writing import check_growth, outgrows, saved_size

    made = planned.lora()
    length = planned.size  # which needs no values, as the size of the file may
    if not outgrows(made, length):
        length = saved_size(made, allow_lossy=recipe.output.allow_lossy)
    if not quiet:
        say(_plan_table(planned, made.families, length))
        number = len(planned.loras)
        if recipe.weights is None and planned.method.linear and number > 1:
            say(
                f"note: no weights were given, so each LoRA acts at 1/{number} of its strength; "
                "--weights sum does what loading all of them does"
            )
    check_growth(made, length, made.dialect)


def _print_advice(planned: "Plan", quiet: bool) -> None:
    from ..comparing import advice, compare

    with progress("Comparing", quiet) as report:
        say(advice(compare(planned.loras, base=planned.base, progress=report)))


def _write(recipe: "Recipe", planned: "Plan", target: Path, workers: int, quiet: bool) -> None:
    from ..merging.running import Kept

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
        say(f"→ {written(path, planned.dialect)}")
        _print_kept(kept, planned)
        print_notes([*as_directory(target, path), *noted], lost)


def _options(method: "Method | str", given: list[str]) -> dict[str, Any]:
    """Read a method's options from NAME=VALUE, in the types of its parameters."""
    from ..merging.methods import check_options, find

    chosen = find(method)
    options: dict[str, Any] = {}
    for name, value in named("option", given):
        if name not in chosen.options:
            check_options(chosen, {name: value})
        options[name] = chosen.options[name].parse(value)
    return options


def _plan_table(planned: "Plan", families: Sequence[str], length: int) -> Block:
    rows = [
        [lora.name, lora.dialect, str(len(lora)), lora.summary("rank").removeprefix("rank "), label]
        for lora, label in zip(planned.loras, planned.weights.label, strict=True)
    ]
    steps = planned.steps.values()
    shared = sum(all(module in lora for lora in planned.loras if lora) for module in planned.steps)
    cut = sum(map(planned.is_cut, planned.steps))
    notes = [f"  note: {lora.name}: {note}" for lora in planned.loras for note in lora.notes]
    return joined(
        [
            table(["file", "dialect", "modules", "rank", "weight"], rows),
            f"{planned.method.name}: {len(steps)} modules of {' or '.join(families) or 'an unknown family'} "
            f"({shared} of them in every file), {_ranks(planned)}"
            f"{f'{cut} modules cut to a smaller rank' if cut else _exactness(planned)}, {size(length)} in {planned.dtype}",
            *_wider(planned),
            *notes,
        ]
    )


def _ranks(planned: "Plan") -> str:
    """Describe the ranks of the result, and how many modules have none."""
    ranks = [planned.rank_of(module) for module, step in planned.steps.items() if not step.rankless]
    without = len(planned.steps) - len(ranks)
    told = f", {without} without a rank" if without and ranks else ""
    return f"rank {span(min(ranks), max(ranks))}{told}, " if ranks else ""


def _exactness(planned: "Plan") -> str:
    """Say whether the file holds the method's own result, or a rounded one."""
    exact = "exact" if planned.method.linear else "nothing is cut"
    if planned.dtype not in ROUNDING:
        return exact
    return f"{exact} but for the rounding to {planned.dtype} (up to about {ROUNDING[planned.dtype]})"


def _print_kept(kept: "Kept", planned: "Plan") -> None:
    if not kept.errors:
        return
    worst = max(kept.errors, key=kept.errors.__getitem__)
    say(
        f"  kept {100 * kept.share:.4g} % of the energy: relative error {100 * kept.error:.3g} %, "
        f"largest {100 * kept.errors[worst]:.3g} % in {worst}"
    )
    for note in _keeps_more(kept, planned):
        say(f"  note: {note}")


def _keeps_more(kept: "Kept", planned: "Plan") -> list[str]:
    """Return notes on what would keep more of a merge that was cut."""
    from ..tensors import SIZES

    sized = planned.budget is not None and planned.budget.kind == "max_size"
    larger = "--max-size" if sized else "--rank or budget"
    wide = ["--dtype float16 has room for twice the rank in this size"] * (sized and SIZES[planned.dtype] > 2)
    return [*wide, *[f"more than 30 % of ‖ΔW‖ is lost; a larger {larger} keeps more"] * (kept.error > LARGE)]


def _wider(planned: "Plan") -> list[str]:
    """Return a note if the result's dtype has more bits than those of all inputs."""
    from ..tensors import SIZES, code

    tensors = [t for lora in planned.loras for layout in lora.layouts.values() for t in layout.tensors().values()]
    widest = max(SIZES[code(tensor)] for tensor in tensors)
    if SIZES[planned.dtype] <= widest:
        return []
    why = "sums of float8 values need its digits" if widest == 1 else "--dtype float16 would take half of the room"
    return [f"  note: {planned.dtype} has more bits than every input: {why}"]
