"""``loramerge merge``: a recipe, typed or read, and the LoRA that comes out; ``resize`` runs it too."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, counted, size, span
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
from .output import Block, as_directory, joined, print_notes, progress, replacing, say, table, written
from .settings import command

if TYPE_CHECKING:
    from ..files import LoRA
    from ..merging import Plan, Recipe
    from ..merging.methods import Method
    from ..merging.running import Kept

ROUNDING = {"BF16": 0.0024, "F16": 0.0003}
"""About the most of ‖ΔW‖ that rounding takes: both factors are rounded, each value by up to 2⁻⁸ or 2⁻¹¹ of it."""

LARGE = 0.3
"""Relative error above which a note says that much is lost."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """The options that ``merge``, ``average`` and ``resize`` share."""

    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; for peft a directory.")] = (
        None
    )
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


HOW = ("output", "allow_pickle", "dry_run", "workers", "quiet")
"""The shared options that say how a merge is run; the others have entries of the same name in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Options(Making):
    """The options of ``loramerge merge``."""

    files: Annotated[
        list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub; or one recipe.toml.")
    ]
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            help="One per file: 0.8, or '0.8;text_encoder=0;OUT*=0.5', or 'lbw:1,0,0,…'. Default: 1 each with linear and subtract, else 1/N.",
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
    save_recipe: Annotated[
        Path | None,
        typer.Option("--save-recipe", help="Write this merge as a recipe too, a .toml file, even with --dry-run."),
    ] = None
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
    make(
        given.files,
        changes,
        given,
        allow_changed=given.allow_changed,
        advice=given.advice,
        save_recipe=given.save_recipe,
    )


def make(
    files: Sequence[str],
    changes: Mapping[str, Any],
    given: Making,
    *,
    opened: Sequence["LoRA"] | None = None,
    allow_changed: bool = False,
    advice: bool = False,
    save_recipe: Path | None = None,
) -> None:
    """Merge files, or run the one recipe among them, and print what is done.

    Args:
        files: LoRAs, or one recipe.
        changes: What was typed for the entries of a recipe; None or empty where nothing was.
        given: The other options; without an output, the recipe says where the result goes.
        opened: The files' LoRAs, if they are open already.
        allow_changed: Whether files may differ from those that the recipe was made with.
        advice: Whether the LoRAs are compared too.
        save_recipe: The file to write the recipe to, if any.
    """
    shared = {field.name: getattr(given, field.name) for field in fields(Making) if field.name not in HOW}
    typed = {name: value for name, value in {**changes, **shared}.items() if value}
    recipe, output = overridden(recipe_of(files), typed, given.quiet), given.output
    if output is None and recipe.output.path is None and not given.dry_run:
        raise OptionError("Where should the merged LoRA go? Give --output FILE, or --dry-run to see the plan.")
    if save_recipe is not None and save_recipe.suffix != ".toml":
        raise OptionError(f"Can't save the recipe as {save_recipe}: wanted a name that ends in .toml.")
    with ExitStack() as stack:
        loras = opened or [stack.enter_context(lora) for lora in recipe.open(allow_pickle=given.allow_pickle)]
        target = None if given.dry_run and output is None else recipe.target(output)
        if target is not None:
            recipe.check_target(target, loras)
        with progress("Measuring", given.quiet) as report:
            planned = recipe.plan(loras, allow_changed=allow_changed, progress=report)
        _announce(recipe, planned, given.quiet)
        if advice:
            _print_advice(planned, given.quiet)
        text = "" if save_recipe is None else recipe.for_file(planned, save_recipe.parent, target).to_toml()
        if target is not None and not given.dry_run:
            with replacing([] if output else [target], given.quiet):
                _write(recipe, planned, target, workers_or_cores(given.workers, planned.widest), given.quiet)
        if save_recipe is not None:
            _save_recipe(text, save_recipe, given.quiet)


def _save_recipe(text: str, path: Path, quiet: bool) -> None:
    from ..files.storage.writer import write_text

    write_text(path, text)
    if not quiet:
        say(f"→ {path}")


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
        changes["options"] = options_of(method, changes.pop("option"))
    changed = recipe.override(**changes)
    for name in recipe.options:
        if name not in changed.options and not quiet:
            say(f"note: the recipe's option {name} is left out: {find(method).name} doesn't have it")
    return changed


def _announce(recipe: "Recipe", planned: "Plan", quiet: bool) -> None:
    """Print the plan; refuse it if the result would be far larger than the inputs."""
    from ..files.writing import check_growth

    made = planned.lora()
    length = planned_size(planned, made)
    if not quiet:
        say(*plan_lines(recipe, planned, made, length))
    check_growth(made, length, made.dialect)


def planned_size(planned: "Plan", made: "LoRA") -> int:
    """Return the bytes of the file of a plan, whose LoRA is ``made``."""
    from ..files.writing import outgrows, saved_size

    length = planned.size  # which needs no values, as the size of the file may
    return length if outgrows(made, length) else saved_size(made, allow_lossy=planned.allow_lossy)


def plan_lines(recipe: "Recipe", planned: "Plan", made: "LoRA", length: int) -> list[str]:
    """Return the printed lines of a plan, whose LoRA is ``made`` and takes ``length`` bytes as a file."""
    lines: list[str] = [_plan_table(planned, made.families, length)]
    if recipe.weights is None and not planned.method.of_first and len(planned.loras) > 1:
        lines.append(f"note: no weights were given, so each LoRA {_by_default(planned)}")
    if _asked_to_cut(planned) and not planned.cuts:
        lines.append("note: nothing is cut: the ranks that were asked for are no smaller than those there are")
    return lines


def _by_default(planned: "Plan") -> str:
    """Say what the default weights do; with weights N times as large, the result of every method of ours is N times as strong."""
    number = len(planned.loras)
    if planned.method.weights == "sum":
        return f"acts at full strength, as if all were loaded; --weights uniform gives it 1/{number}"
    stronger = "" if planned.method.reference else f", and the result is {number} times as strong"
    return f"has the weight 1/{number}; with --weights sum it has 1{stronger}"


def _asked_to_cut(planned: "Plan") -> bool:
    """Return whether a rank or a budget was given that could have cut something."""
    return planned.budget is not None or not isinstance(planned.rank, str)


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
        say(f"→ {written(path, planned.dialect)}", *kept_lines(kept, planned))
        print_notes([*as_directory(target, path), *noted], lost)


def options_of(method: "Method | str", given: list[str]) -> dict[str, Any]:
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
    told = f"{counted(cut, 'module')} cut to a smaller rank" if cut else _exactness(planned)
    notes = [f"  note: {lora.name}: {note}" for lora in planned.loras for note in lora.notes]
    return joined(
        [
            table(["file", "dialect", "modules", "rank", "weight"], rows),
            f"{planned.method.name}: {counted(len(steps), 'module')} of {' or '.join(families) or 'an unknown family'} "
            f"({shared} of them in every file), {_ranks(planned)}"
            f"{told}, {size(length)} in {planned.dtype}",
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
    return f"{exact} but for the rounding to {planned.dtype} (up to about {100 * ROUNDING[planned.dtype]:g} %)"


def kept_lines(kept: "Kept", planned: "Plan") -> list[str]:
    """Return the printed lines on the losses of a merge that was cut."""
    told = kept.told()
    return [f"  {told}", *(f"  note: {note}" for note in _keeps_more(kept, planned))] if told else []


def _keeps_more(kept: "Kept", planned: "Plan") -> list[str]:
    """Return notes on what would keep more of a merge that was cut."""
    from ..tensors import SIZES

    sized = planned.budget is not None and planned.budget.kind == "max_size"
    larger = "--max-size" if sized else "--rank or budget"
    wide = ["--dtype float16 has room for twice the rank in this size"] * (sized and SIZES[planned.dtype] > 2)
    lost = [f"more than 30 % of ‖ΔW‖ is lost; a larger {larger} keeps more"] * (kept.error > LARGE)
    rounded = ROUNDING.get(planned.dtype, 0.0)
    fine = [f"rounding to {planned.dtype} takes up to about {100 * rounded:g} % besides; --dtype float32 keeps it"]
    return [*wide, *lost, *fine * (kept.error < 3 * rounded)]


def _wider(planned: "Plan") -> list[str]:
    """Return a note if the result's dtype has more bits than those of all inputs."""
    from ..tensors import SIZES, code

    tensors = [t for lora in planned.loras for layout in lora.layouts.values() for t in layout.tensors().values()]
    widest = max(SIZES[code(tensor)] for tensor in tensors)
    if SIZES[planned.dtype] <= widest:
        return []
    why = "sums of float8 values need its digits" if widest == 1 else "--dtype float16 would take half of the room"
    return [f"  note: {planned.dtype} has more bits than every input: {why}"]
