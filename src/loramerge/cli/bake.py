"""``loramerge bake``: LoRAs added to a base model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import counted
from .options import ArchOfAll, Quiet, Scope, Threads, WeightRule, opened, weights_of
from .output import more, print_json, progress, say, table
from .settings import command

if TYPE_CHECKING:
    from ..merging.baking import Baked

SOME = 0.01
"""Share of unchanged values above which a tensor counts as hurt."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge bake``."""

    files: Annotated[list[str], typer.Argument(help="LoRAs: files, directories, or names on the Hugging Face Hub.")]
    base: Annotated[Path, typer.Option("--base", "-b", help="The model: a .safetensors file or a diffusers directory.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="A file or a new directory, as the base is.")]
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", help="One per file: 0.8, or '0.8;text_encoder=0;OUT*=0.5'. Default 1 each."),
    ] = None
    weights: WeightRule = None
    scope: Annotated[Scope | None, typer.Option("--scope", help="What l2, equal and energy take norms over.")] = None
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Modules to leave as they are: patterns as in --weight.")
    ] = None
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of every tensor in a rewritten file; each keeps its own by default.")
    ] = None
    variant: Annotated[str | None, typer.Option("--variant", help="Which of the base's files, such as fp16.")] = None
    architecture: ArchOfAll = None
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Leave out tensors of a LoRA that belong to no layer.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt LoRAs, tensors only.")
    ] = False
    most: Annotated[int, typer.Option("--most", min=0, help="Rows to print: the tensors that rounding hurt most.")] = 10
    json: Annotated[bool, typer.Option("--json", help="For programs: every tensor.")] = False
    workers: Threads = 1
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Add LoRAs to the weights of a base model, and say what rounding took away.

    Example: loramerge bake person.safetensors --base sd_xl_base_1.0.safetensors -w 0.8 -o person-xl.safetensors
    """
    from ..merging.baking import bake

    chosen = weights_of(given.weight, given.weights)
    with (
        opened(given.files, architecture=given.architecture, allow_pickle=given.allow_pickle) as loras,
        progress("Baking", given.quiet or given.json) as report,
    ):
        baked = bake(
            loras,
            given.base,
            given.output,
            weights=cast(Any, chosen),
            scope=given.scope.value if given.scope else None,
            exclude=given.exclude or (),
            dtype=given.dtype,
            variant=given.variant,
            allow_lossy=given.allow_lossy,
            workers=given.workers,
            progress=report,
        )
    if given.json:
        print_json(_as_data(baked))
    elif not given.quiet:
        _print(baked, given.most)


def _print(baked: "Baked", most: int) -> None:
    worst = baked.worst()
    rows = [
        [c.tensor, c.dtype, f"{c.norm:.4g}", f"{c.change:.4g}", f"{c.loss:.3g}", f"{100 * c.lost:.3g}"]
        for c in worst[:most]
    ]
    if rows:
        say(table(["tensor", "dtype", "‖ΔW‖", "‖change‖", "rounding loss", "% of values unchanged"], rows))
        say(more(len(worst) - len(rows), "none worse"))
    for line in baked.left_out:
        say(f"  left out: {line}")
    hurt = [c for c in worst if c.lost > SOME]
    say(
        f"→ {baked.path}: {counted(len(worst), 'tensor')} changed, ‖ΔW‖ {baked.norm:.4g}, rounding loss {baked.loss:.3g} of it."
    )
    if hurt:
        share = max(c.lost for c in hurt)
        say(
            f"  In {counted(len(hurt), 'tensor')} more than {SOME:.0%} of the values did not change, up to {share:.1%}: there the update "
            "is smaller than the dtype can hold beside the weight. Way out: --dtype float32, or the LoRA unbaked."
        )


def _as_data(baked: "Baked") -> dict[str, Any]:
    return {
        "output": str(baked.path),
        "norm": baked.norm,
        "rounding_loss": baked.loss,
        "left_out": list(baked.left_out),
        "tensors": {name: {**asdict(c), "rounding_loss": c.loss} for name, c in baked.changes.items()},
    }
