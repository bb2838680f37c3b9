"""The commands and their options."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from ..errors import OptionError, size
from .bake import bake
from .calibrate import calibrate
from .coefficients import coefficients
from .doctor import doctor
from .extract import extract
from .generate import generate
from .options import (
    Adapter,
    Arch,
    Base,
    Changed,
    Device,
    DryRun,
    Dtype,
    Energy,
    Exclude,
    File,
    Growth,
    Lossy,
    MaxError,
    MaxSize,
    Output,
    Pickle,
    Processes,
    Quiet,
    Scope,
    To,
    WeightRule,
    Workers,
    weights_of,
    workers_or_cores,
)
from .output import as_directory, more, print_json, print_notes, progress, table
from .score import score
from .train import train
from .zip import zip_loras

app = typer.Typer(
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTRODUCTION = """\
loramerge: any LoRA in, an exact merge, any tool's LoRA out.

  loramerge inspect a.safetensors                                   what is in a file
  loramerge convert a.safetensors -o b.safetensors --to comfyui     another tool's names
  loramerge compare a.safetensors b.safetensors                     what two share, before they are merged
  loramerge merge a.safetensors b.safetensors -o both.safetensors   the weighted sum, or -m ties, dare, …
  loramerge --help                                                  every command, and -h after each of them
  loramerge doctor                                                  is everything installed and right?"""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"loramerge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge LoRAs of diffusion models: any dialect in, an exact merge, any dialect out."""
    if context.invoked_subcommand is None:
        print(INTRODUCTION)


@app.command()
def inspect(
    file: File,
    norms: Annotated[
        bool, typer.Option("--norms", help="Read the tensors too: norms by block, as a bar chart.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs: every module, all metadata.")] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="How it was merged, as a recipe that 'loramerge merge' runs again.")
    ] = False,
    architecture: Arch = None,
    adapter: Adapter = None,
    allow_pickle: Pickle = False,
) -> None:
    """Say what a LoRA is: its dialect, family, ranks, alphas, kinds, blocks.

    Example: loramerge inspect person.safetensors --norms
    """
    from .inspect import show, show_recipe

    if recipe:
        show_recipe(file, architecture=architecture, pickle=allow_pickle)
        return
    show(file, norms=norms, as_json=json, architecture=architecture, adapter=adapter, pickle=allow_pickle)


@app.command()
def convert(
    file: File,
    output: Output,
    to: Annotated[
        str, typer.Option("--to", "--dialect", "-t", help="Dialect of the output; see 'loramerge dialects'.")
    ],
    exclude: Exclude = None,
    dtype: Dtype = None,
    architecture: Arch = None,
    adapter: Adapter = None,
    allow_lossy: Lossy = False,
    allow_growth: Growth = False,
    allow_pickle: Pickle = False,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA under another tool's names; what it does to the model stays the same.

    Example: loramerge convert person.safetensors -o person-diffusers.safetensors --to diffusers
    """
    from ..files.dialects import written_dialect
    from ..files.reading import open
    from ..files.writing import check_apart, check_growth, check_target, save, saved_size

    target = check_target(output, to)
    check_apart(file, target)
    with (
        open(file, architecture=architecture, adapter=adapter, allow_pickle=allow_pickle) as lora,
        progress("Converting", quiet) as report,
    ):
        kept = lora.exclude(*exclude) if exclude else lora
        length = saved_size(kept, to, dtype, allow_lossy=allow_lossy)
        if not allow_growth:
            check_growth(kept, length, written_dialect(to).name)
        if not quiet:
            family = " or ".join(lora.families) or "unknown family"
            print(f"{lora.name} ({lora.dialect}, {family}) → {target} ({written_dialect(to).name}, {size(length)})")
        lost: list[str] = []
        noted: list[str] = []
        path = save(
            kept,
            output,
            dialect=to,
            dtype=dtype,
            allow_lossy=allow_lossy,
            allow_growth=allow_growth,
            workers=workers_or_cores(workers),
            progress=report,
            lost=lost.append,
            noted=noted.append,
        )
        if not quiet:
            print_notes((*lora.notes, *as_directory(output, path), *noted), lost)


@app.command()
def merge(
    files: Annotated[
        list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub; or one recipe.toml.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; for peft a directory.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", "-w", help="One a file: 0.8, or '0.8;text_encoder=0;OUT*=0.5', or 'lbw:1,0,0,…'. Default 1/N."
        ),
    ] = None,
    weights: WeightRule = None,
    scope: Annotated[
        Scope | None, typer.Option("--scope", help="What l2 takes the norms over; default module.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="See 'loramerge methods', or package.module:name; default linear."),
    ] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", "-r", help="sum (exact, the default), max, or a number.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="NAME=VALUE of the method.")] = None,
    max_error: MaxError = None,
    energy: Energy = None,
    max_size: MaxSize = None,
    base: Base = None,
    exclude: Exclude = None,
    to: To = None,
    dtype: Dtype = None,
    device: Device = None,
    architecture: Arch = None,
    allow_lossy: Lossy = False,
    allow_growth: Growth = False,
    allow_pickle: Pickle = False,
    allow_changed: Changed = False,
    dry_run: DryRun = False,
    advice: Annotated[
        bool, typer.Option("--advice", help="Compare the LoRAs too, and say what to make of it.")
    ] = False,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs into one: the exact weighted sum, or its best fit at a smaller rank; or as a recipe says.

    With a recipe, every other option overrides what it says.

    Example: loramerge merge person.safetensors jersey.safetensors -o both.safetensors -w 0.7 -w 0.5
    """
    from .merge import merge_by, overridden, recipe_of

    flags = {
        "weights": weights_of(weight, weights),
        "scope": scope.value if scope else None,
        "method": method,
        "rank": rank,
        "option": option,
        "max_error": max_error,
        "energy": energy,
        "max_size": max_size,
        "exclude": exclude,
        "to": to,
        "dtype": dtype,
        "device": device,
        "base": None if base is None else str(base),
        "architecture": architecture,
        "allow_lossy": allow_lossy,
        "allow_growth": allow_growth,
    }
    merge_by(
        overridden(recipe_of(files), {name: value for name, value in flags.items() if value}, quiet),
        output,
        dry_run=dry_run,
        advice=advice,
        allow_changed=allow_changed,
        allow_pickle=allow_pickle,
        workers=workers,
        quiet=quiet,
    )


app.command()(train)
app.command("zip")(zip_loras)
app.command()(calibrate)
app.command()(coefficients)


@app.command()
def resize(
    file: File,
    output: Output,
    rank: Annotated[str, typer.Option("--rank", "-r", help="The rank of every module, at most its own.")] = "sum",
    max_error: MaxError = None,
    energy: Energy = None,
    max_size: MaxSize = None,
    base: Base = None,
    exclude: Exclude = None,
    to: To = None,
    dtype: Dtype = None,
    device: Device = None,
    architecture: Arch = None,
    allow_lossy: Lossy = False,
    allow_growth: Growth = False,
    allow_pickle: Pickle = False,
    dry_run: DryRun = False,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA smaller: the best fit at a rank, or ranks that spend one budget over all modules.

    Example: loramerge resize person.safetensors -o small.safetensors --max-error 1%
    """
    if rank == "sum" and not (max_error or energy or max_size):
        raise OptionError("How small? Give --rank, --max-error, --energy or --max-size.")
    merge(
        [file],
        output,
        weight=["1"],
        rank=rank,
        max_error=max_error,
        energy=energy,
        max_size=max_size,
        base=base,
        exclude=exclude,
        to=to,
        dtype=dtype,
        device=device,
        architecture=architecture,
        allow_lossy=allow_lossy,
        allow_growth=allow_growth,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        workers=workers,
        quiet=quiet,
    )


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="What all merges have in common: recipe.toml.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for the merges and their table.")],
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", "-s", help="NAME=VALUE,VALUE,…: method, rank, max_error, an option …; weights as 0.7/0.5,l2."
        ),
    ],
    score: Annotated[
        str | None, typer.Option("--score", help="package.module:function, which gives a LoRA's own figures.")
    ] = None,
    sort: Annotated[str | None, typer.Option("--sort", help="Column of the table; -COLUMN for falling.")] = None,
    allow_changed: Changed = False,
    allow_pickle: Pickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the names of the merges, make none.")] = False,
    workers: Processes = 1,
    quiet: Quiet = False,
) -> None:
    """Merge a recipe with every combination of settings, and compare what comes out.

    What is there already is kept: an interrupted sweep goes on where it stopped.

    Example: loramerge sweep recipe.toml --set method=ties,dare --set density=0.1,0.3 -o out/
    """
    from .sweep import sweep_by

    sweep_by(
        recipe,
        set_,
        output,
        score=score,
        sort=sort,
        dry_run=dry_run,
        allow_changed=allow_changed,
        allow_pickle=allow_pickle,
        workers=workers,
        quiet=quiet,
    )


app.command()(bake)
app.command()(extract)
app.command()(generate)
app.command()(score)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A LoRA.")],
    second: Annotated[str, typer.Argument(help="Another, in any dialect.")],
    tolerance: Annotated[float, typer.Option(help="Relative difference of ΔW that counts as none.")] = 1e-6,
    most: Annotated[int, typer.Option("--most", min=0, help="Rows to print.")] = 20,
    architecture: Arch = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Say whether two files are the same LoRA: the difference of ΔW, module by module. Exit code 1 if not.

    Example: loramerge diff person.safetensors person-diffusers.safetensors
    """
    from ..comparing.diffs import apart, differences
    from ..files.families import spelled_alike
    from ..files.reading import open

    opened = partial(open, architecture=architecture, allow_pickle=allow_pickle)
    with opened(first) as a, opened(second) as b, progress("Comparing", quiet) as report:
        a, b = spelled_alike([a, b], a.architecture)
        if reason := apart(a, b):
            if not quiet:
                print(f"Not the same LoRA: {reason}.")
            raise typer.Exit(1)
        total = len({*a, *b})
        found = []
        for done, difference in enumerate(differences(a, b), start=1):
            found.append(difference)
            report(done, total)
    found.sort(key=lambda d: -d.relative)
    same = found[0].relative <= tolerance
    if not quiet:
        rows = [[d.module, f"{d.norm:.4g}", f"{d.distance:.3g}", f"{d.relative:.3g}"] for d in found[:most]]
        print(table(["module", "‖ΔW‖", "‖difference‖", "relative"], rows))
        print(more(len(found) - len(rows), "none larger"))
        answer = "The same LoRA" if same else "Not the same LoRA"
        print(f"{answer}: the largest relative difference is {found[0].relative:.3g}, of {len(found)} modules.")
    raise typer.Exit(0 if same else 1)


@app.command()
def compare(
    files: Annotated[list[str], typer.Argument(help="Two LoRAs or more, in any dialects.")],
    modules: Annotated[
        bool, typer.Option("--modules", help="By module instead of by block, most conflict first.")
    ] = False,
    most: Annotated[int, typer.Option("--most", min=0, help="Modules to print.")] = 20,
    heatmap: Annotated[Path | None, typer.Option("--heatmap", help="Draw the blocks into a .png or .svg file.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Random rows a module for the sign conflict.")] = 64,
    exact: Annotated[bool, typer.Option("--exact", help="The sign conflict of all rows: slower.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Chooses the rows.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For programs: every module and block.")] = False,
    base: Base = None,
    exclude: Exclude = None,
    architecture: Arch = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Say what LoRAs share and where they fight, before they are merged.

    Example: loramerge compare person.safetensors jersey.safetensors --heatmap shared.png
    """
    from .compare import show

    show(
        files,
        rows=None if exact else rows,
        seed=seed,
        modules=modules,
        most=most,
        as_json=json,
        heatmap=heatmap,
        base=base,
        exclude=exclude or (),
        architecture=architecture,
        pickle=allow_pickle,
        quiet=quiet,
    )


@app.command()
def dialects(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the dialects that are read and written.

    Example: loramerge dialects
    """
    from ..files.dialects import DIALECTS

    if json:
        print_json(
            [{"name": d.name, "writes": d.writes, "title": d.title, "source": d.source} for d in DIALECTS.values()]
        )
        return
    rows = [[d.name, "read, write" if d.writes else "read", d.title] for d in DIALECTS.values()]
    print(table(["dialect", "", "tools"], rows))


@app.command()
def methods(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the merge methods and their options: loramerge's own, and those that installed packages publish.

    Example: loramerge methods
    """
    from .methods import show

    show(json)


app.command()(doctor)
