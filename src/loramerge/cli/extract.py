"""``loramerge extract``: a LoRA from the difference of two models."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import counted
from .options import Arch, Quiet, Threads, rank_of
from .output import more, print_json, progress, say, table, written
from .settings import command

if TYPE_CHECKING:
    from ..checkpoints.extracting import Extraction


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge extract``."""

    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model: a .safetensors file or a diffusers directory.")]
    base: Annotated[Path, typer.Option("--base", "-b", help="The model that it was made from, in any layout.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The LoRA to write; for peft a directory.")]
    rank: Annotated[str, typer.Option("--rank", "-r", help="A number, or full: the whole difference.")] = "32"
    to: Annotated[
        str | None, typer.Option("--to", "-t", help="Dialect of the output; kohya where it has the names.")
    ] = None
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the model's by default.")
    ] = None
    variant: Annotated[str | None, typer.Option("--variant", help="Which of both models' files, such as fp16.")] = None
    architecture: Arch = None
    most: Annotated[
        int, typer.Option("--most", min=0, help="Rows to print: the modules with the largest relative errors.")
    ] = 10
    json: Annotated[bool, typer.Option("--json", help="For programs: every module.")] = False
    workers: Threads = 1
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Make a LoRA of the difference between a fine-tuned model and its base: the best fit at a rank.

    Example: loramerge extract tuned.safetensors --base sd_xl_base_1.0.safetensors -o tuned-lora.safetensors --rank 64
    """
    from ..checkpoints.extracting import plan_extraction
    from ..files.writing import check_apart, check_target, save

    target = check_target(given.output, given.to or "kohya")
    check_apart([given.tuned, given.base], target, "one of the models that are compared")
    silent = given.quiet or given.json
    with progress("Comparing", silent) as report:
        planned = plan_extraction(
            given.tuned,
            given.base,
            rank=cast(Any, rank_of(given.rank)),
            dtype=given.dtype,
            variant=given.variant,
            architecture=given.architecture,
            progress=report,
        )
    check_apart([*planned.tuned.files, *planned.base.files], target, "one of the models that are compared")
    with progress("Extracting", silent) as report:
        path = save(planned.lora(), given.output, dialect=given.to, workers=given.workers, progress=report)
    if given.json:
        print_json(_as_data(planned, path))
    elif not given.quiet:
        _print(planned, path, given.to or planned.lora().dialect, given.most)


def _print(planned: "Extraction", path: Path, dialect: str, most: int) -> None:
    worst = sorted(planned.fits.values(), key=lambda fit: -fit.relative)
    rows = [[f.module, str(f.rank), f"{f.norm:.4g}", f"{f.error:.4g}", f"{f.relative:.3g}"] for f in worst[:most]]
    say(table(["module", "rank", "‖D‖", "‖error‖", "relative"], rows))
    say(more(len(worst) - len(rows), "none worse"))
    if planned.not_held:
        rows = [[n.tensor, f"{n.norm:.4g}", f"{n.relative:.3g}"] for n in _largest(planned)[:most]]
        say(table(["not held by a LoRA", "‖D‖", "of ‖W‖"], rows))
        say(more(len(planned.not_held) - len(rows), "none larger"))
    for note in planned.notes:
        say(f"  note: {note}")
    compared = sum(module in planned.tuned for module in planned.base)
    same = compared - len(worst) - sum(n.tensor in planned.base for n in planned.not_held)
    say(
        f"→ {written(path, dialect)}: {counted(len(worst), 'module')}, {same} {'does' if same == 1 else 'do'} not differ; "
        f"error {planned.relative_error:.3g} of the difference."
    )


def _largest(planned: "Extraction") -> list[Any]:
    return sorted(planned.not_held, key=lambda n: -n.relative)


def _as_data(planned: "Extraction", path: Path) -> dict[str, Any]:
    return {
        "output": str(path),
        "relative_error": planned.relative_error,
        "modules": {name: {**asdict(fit), "relative": fit.relative} for name, fit in planned.fits.items()},
        "not_held": {n.tensor: {"norm": n.norm, "relative": n.relative} for n in planned.not_held},
        "notes": list(planned.notes),
    }
