"""The commands and their options."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .. import __version__
from ..errors import OptionError
from .bake import bake
from .extract import extract
from .run import progress, size, table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Scope(StrEnum):
    """What "l2" takes the norms over."""

    module = "module"
    component = "component"
    whole = "whole"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Workers = Annotated[
    int, typer.Option("--workers", "-j", min=1, help="Processes, at most; the bytes are the same for any number.")
]
Arch = Annotated[str | None, typer.Option("--architecture", help="The model family, where the file leaves it open.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt, tensors only.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the inputs' by default.")]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Leave out what the dialect can't hold.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Modules to leave out: patterns as in --weight.")]
MaxError = Annotated[
    str | None, typer.Option("--max-error", help="Ranks by budget: the error of all modules together, such as 1%.")
]
Energy = Annotated[str | None, typer.Option("--energy", help="Ranks by budget: the share that stays, such as 0.999.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", help="Ranks by budget: the size of the file: 150MB.")]
To = Annotated[str | None, typer.Option("--to", "-t", help="Dialect of the output; see 'loramerge dialects'.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"loramerge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge LoRAs of diffusion models: any dialect in, an exact merge, any dialect out."""


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A file, a directory, or a name on the Hugging Face Hub.")],
    norms: Annotated[
        bool, typer.Option("--norms", help="Read the tensors too: norms by block, as a bar chart.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs: every module, all metadata.")] = False,
    architecture: Arch = None,
    allow_pickle: Pickle = False,
) -> None:
    """Say what a LoRA is: its dialect, family, ranks, alphas, kinds, blocks.

    Example: loramerge inspect person.safetensors --norms
    """
    from .inspect import show

    show(file, norms=norms, as_json=json, architecture=architecture, pickle=allow_pickle)


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="A file, a directory, or a name on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; for peft a directory.")],
    to: Annotated[str, typer.Option("--to", "-t", help="Dialect of the output; see 'loramerge dialects'.")],
    exclude: Exclude = None,
    dtype: Dtype = None,
    architecture: Arch = None,
    allow_lossy: Lossy = False,
    allow_pickle: Pickle = False,
    workers: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA under another tool's names; what it does to the model stays the same.

    Example: loramerge convert person.safetensors -o person-diffusers.safetensors --to diffusers
    """
    from ..files import check_target, open, save

    check_target(output, to)
    with (
        open(file, architecture=architecture, allow_pickle=allow_pickle) as lora,
        progress("Converting", quiet) as report,
    ):
        kept = lora.exclude(*exclude) if exclude else lora
        lost: list[str] = []
        path = save(
            kept,
            output,
            dialect=to,
            dtype=dtype,
            allow_lossy=allow_lossy,
            workers=workers,
            progress=report,
            lost=lost.append,
        )
        if not quiet:
            print(f"{lora.name} ({lora.dialect}, {lora.architecture or 'unknown family'}) → {path} ({to})")
            _print_notes(lora.notes, lost)


def _print_notes(notes: Sequence[str], lost: Sequence[str]) -> None:
    for note in notes:
        print(f"  note: {note}")
    for line in lost:
        print(f"  left out: {line}")


@app.command()
def merge(
    files: Annotated[list[str], typer.Argument(help="Files, directories, or names on the Hugging Face Hub.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; for peft a directory.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", "-w", help="One a file: 0.8, or '0.8;text_encoder=0;OUT*=0.5', or 'lbw:1,0,0,…'. Default 1/N."
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="uniform, or l2: shares of the norms.")] = None,
    scope: Annotated[Scope, typer.Option("--scope", help="What l2 takes the norms over.")] = Scope.module,
    method: Annotated[str, typer.Option("--method", "-m", help="See 'loramerge methods'.")] = "linear",
    rank: Annotated[str, typer.Option("--rank", "-r", help="sum (exact), max, or a number.")] = "sum",
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="NAME=VALUE of the method.")] = None,
    max_error: MaxError = None,
    energy: Energy = None,
    max_size: MaxSize = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model, for DoRA layers: a directory or file.")
    ] = None,
    exclude: Exclude = None,
    to: To = None,
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda; default CPU.")] = None,
    architecture: Arch = None,
    allow_lossy: Lossy = False,
    allow_pickle: Pickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, read and write nothing else.")] = False,
    workers: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs into one: the exact weighted sum, or its best fit at a smaller rank.

    Example: loramerge merge person.safetensors jersey.safetensors -o both.safetensors -w 0.7 -w 0.5
    """
    from dataclasses import replace

    from ..dialects.write import check_writable
    from ..files import check_target, open, save
    from ..merging import Kept, plan
    from ..ranks import budget
    from ..tensors import parse_dtype

    if output is None and not dry_run:
        raise OptionError("Where should the merged LoRA go? Give --output FILE, or --dry-run to see the plan.")
    if weight and weights:
        raise OptionError("Give either --weight once a file, or --weights, not both.")
    loras = [open(file, architecture=architecture, allow_pickle=allow_pickle) for file in files]
    planned = plan(
        loras,
        weights=cast(Any, weight or weights),
        method=method,
        rank=_rank(rank),
        scope=scope.value,
        exclude=exclude or (),
        device=device,
        base=base,
        **_options(method, option or []),
    )
    check_writable(to or planned.dialect, planned.dialect)
    if output is not None:
        check_target(output, to or planned.dialect)
    # A budget is spent on what will be written: in that dialect and dtype.
    planned = replace(planned, dialect=to or planned.dialect, dtype=parse_dtype(dtype) if dtype else planned.dtype)
    limit = budget(max_error, energy, max_size)
    if limit:
        with progress("Measuring", quiet) as report:
            planned = planned.within(limit, report)
    if not quiet:
        print(_plan_table(planned))
    if dry_run or output is None:
        return
    lost: list[str] = []
    kept = Kept()
    with progress("Merging", quiet) as report:
        path = save(
            planned.lora(kept.add if planned.cuts else None),
            output,
            dialect=to,
            dtype=dtype,
            allow_lossy=allow_lossy,
            workers=workers,
            progress=report,
            lost=lost.append,
        )
    if not quiet:
        written = path if path.is_file() else path / "adapter_model.safetensors"
        where = f", {size(written.stat().st_size)}" if written.exists() else ""
        print(f"→ {path} ({to or planned.dialect}{where})")
        _print_kept(kept)
        _print_notes((), lost)


@app.command()
def resize(
    file: Annotated[str, typer.Argument(help="A file, a directory, or a name on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; for peft a directory.")],
    rank: Annotated[str, typer.Option("--rank", "-r", help="The rank of every module, at most its own.")] = "sum",
    max_error: MaxError = None,
    energy: Energy = None,
    max_size: MaxSize = None,
    to: To = None,
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda; default CPU.")] = None,
    architecture: Arch = None,
    allow_pickle: Pickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    workers: Workers = 1,
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
        to=to,
        dtype=dtype,
        device=device,
        architecture=architecture,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        workers=workers,
        quiet=quiet,
    )


def _print_kept(kept: Any) -> None:
    if not kept.errors:
        return
    worst = max(kept.errors, key=kept.errors.get)
    print(
        f"  kept {100 * kept.share:.4g} % of the energy: relative error {100 * kept.error:.3g} %, "
        f"largest {100 * kept.errors[worst]:.3g} % in {worst}"
    )


def _rank(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _options(method: str, given: list[str]) -> dict[str, Any]:
    """A method's options from NAME=VALUE, in the types of its parameters."""
    from ..methods import METHODS

    chosen = METHODS[method]
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"Can't read the option {item!r}: wanted NAME=VALUE.")
        if name not in chosen.options:
            chosen.check({name: value})
        options[name] = chosen.options[name].parse(value)
    return options


def _plan_table(planned: Any) -> str:
    rows = [
        [lora.name, lora.dialect, str(len(lora)), lora.summary("rank").removeprefix("rank "), label]
        for lora, label in zip(planned.loras, planned.weights.label, strict=True)
    ]
    steps = planned.steps.values()
    shared = sum(len(step.inputs) == sum(map(bool, planned.loras)) for step in steps)
    low, high = min(s.rank for s in steps), max(s.rank for s in steps)
    cut = sum(step.cut for step in steps)
    exact = "exact" if planned.method.linear else "nothing is cut"
    notes = [f"  note: {lora.name}: {note}" for lora in planned.loras for note in lora.notes]
    return "\n".join(
        [
            table(["file", "dialect", "modules", "rank", "weight"], rows),
            f"{planned.method.name}: {len(steps)} modules of {planned.architecture or 'an unknown family'} "
            f"({shared} in all files), rank {low if low == high else f'{low} to {high}'}, "
            f"{f'{cut} modules cut to a smaller rank' if cut else exact}, {size(planned.size)} in {planned.dtype}",
            *notes,
        ]
    )


app.command()(bake)
app.command()(extract)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A LoRA.")],
    second: Annotated[str, typer.Argument(help="Another, in any dialect.")],
    tolerance: Annotated[float, typer.Option(help="Relative difference of ΔW that counts as none.")] = 1e-6,
    most: Annotated[int, typer.Option("--most", min=0, help="Rows to print.")] = 20,
    quiet: Quiet = False,
) -> None:
    """Say whether two files are the same LoRA: the difference of ΔW, module by module. Exit code 1 if not.

    Example: loramerge diff person.safetensors person-diffusers.safetensors
    """
    from ..comparison import differences
    from ..files import open

    with open(first) as a, open(second) as b, progress("Comparing", quiet) as report:
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
        left = len(found) - len(rows)
        print(f"… and {left} more, none larger" if left > 0 else "")
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
        architecture=architecture,
        pickle=allow_pickle,
        quiet=quiet,
    )


@app.command()
def dialects(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the dialects that are read and written.

    Example: loramerge dialects
    """
    from ..dialects import DIALECTS

    if json:
        _print_json(
            [{"name": d.name, "writes": d.writes, "title": d.title, "source": d.source} for d in DIALECTS.values()]
        )
        return
    rows = [[d.name, "read, write" if d.writes else "read", d.title] for d in DIALECTS.values()]
    print(table(["dialect", "", "tools"], rows))


@app.command()
def methods(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the merge methods and their options.

    Example: loramerge methods
    """
    from ..methods import METHODS

    if json:
        _print_json(
            [
                {"name": m.name, "title": m.title, "source": m.source, "options": list(m.options)}
                for m in METHODS.values()
            ]
        )
        return
    print(table(["method", "what it does"], [[m.name, m.title] for m in METHODS.values()]))


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2))
