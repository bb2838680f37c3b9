"""``loramerge bake``: LoRAs into a base model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .options import Quiet, Scope, Threads, WeightRule, weights_of
from .output import more, print_json, progress, table

if TYPE_CHECKING:
    from ..merging.baking import Baked


def bake(
    files: Annotated[list[str], typer.Argument(help="LoRAs: files, directories, or names on the Hugging Face Hub.")],
    base: Annotated[
        Path, typer.Option("--base", "-b", help="The model: a .safetensors file or a diffusers directory.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file or a new directory, as the base is.")],
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", help="One a file: 0.8, or '0.8;text_encoder=0;OUT*=0.5'. Default 1/N."),
    ] = None,
    weights: WeightRule = None,
    scope: Annotated[Scope, typer.Option("--scope", help="What l2 takes the norms over.")] = Scope.module,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Modules to leave as they are: patterns as in --weight.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of every tensor in a rewritten file; each keeps its own by default.")
    ] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Of the base's files: fp16.")] = None,
    architecture: Annotated[
        str | None, typer.Option("--architecture", help="The LoRAs' family, where a file leaves it open.")
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Leave out tensors of a LoRA that belong to no layer.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt LoRAs, tensors only.")
    ] = False,
    most: Annotated[
        int, typer.Option("--most", min=0, help="Rows to print: the tensors that rounding hurt most.")
    ] = 10,
    json: Annotated[bool, typer.Option("--json", help="For programs: every tensor.")] = False,
    workers: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Add LoRAs to the weights of a base model, and say what rounding took away.

    Example: loramerge bake person.safetensors --base sd_xl_base_1.0.safetensors -w 0.8 -o person-xl.safetensors
    """
    from ..files.reading import open
    from ..merging import baking

    chosen = weights_of(weight, weights)
    loras = [open(file, architecture=architecture, allow_pickle=allow_pickle) for file in files]
    with progress("Baking", quiet or json) as report:
        baked = baking.bake(
            loras,
            base,
            output,
            weights=cast(Any, chosen),
            scope=scope.value,
            exclude=exclude or (),
            dtype=dtype,
            variant=variant,
            allow_lossy=allow_lossy,
            workers=workers,
            progress=report,
        )
    if json:
        print_json(_as_data(baked))
    elif not quiet:
        _print(baked, most)


def _print(baked: "Baked", most: int) -> None:
    worst = baked.worst()
    rows = [
        [c.tensor, c.dtype, f"{c.norm:.4g}", f"{c.change:.4g}", f"{c.loss:.3g}", f"{100 * c.lost:.3g}"]
        for c in worst[:most]
    ]
    if rows:
        print(table(["tensor", "dtype", "‖ΔW‖", "‖change‖", "rounding loss", "% of values unchanged"], rows))
        print(more(len(worst) - len(rows), "none worse"))
    for line in baked.left_out:
        print(f"  left out: {line}")
    hurt = [c for c in worst if c.lost > SOME]
    print(f"→ {baked.path}: {len(worst)} tensors changed, ‖ΔW‖ {baked.norm:.4g}, rounding loss {baked.loss:.3g} of it.")
    if hurt:
        share = max(c.lost for c in hurt)
        print(
            f"  In {len(hurt)} tensors more than {SOME:.0%} of the values did not change, up to {share:.1%}: there the update "
            "is smaller than the dtype can hold beside the weight. Way out: --dtype float32, or the LoRA unbaked."
        )


SOME = 0.01
"""Share of unchanged values from which a tensor is spoken of."""


def _as_data(baked: "Baked") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "output": str(baked.path),
        "norm": baked.norm,
        "rounding_loss": baked.loss,
        "left_out": list(baked.left_out),
        "tensors": {name: {**asdict(c), "rounding_loss": c.loss} for name, c in baked.changes.items()},
    }
