"""``loramerge diff``: whether two files are the same LoRA."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import counted
from .options import Arch, Pickle, Quiet, opened
from .output import more, progress, say, table
from .settings import command

if TYPE_CHECKING:
    from ..comparing import Difference


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge diff``."""

    first: Annotated[str, typer.Argument(help="A LoRA.")]
    second: Annotated[str, typer.Argument(help="Another, in any dialect.")]
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative difference of ΔW that counts as equal.")] = (
        1e-6
    )
    most: Annotated[int, typer.Option("--most", min=0, help="Rows to print.")] = 20
    architecture: Arch = None
    allow_pickle: Pickle = False
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Say whether two files are the same LoRA: the difference of ΔW, module by module. Exit code 1 if not.

    Example: loramerge diff person.safetensors person-diffusers.safetensors
    """
    from ..comparing.diffs import apart, differences
    from ..files.families import spelled_alike

    files = (given.first, given.second)
    with (
        opened(files, architecture=given.architecture, allow_pickle=given.allow_pickle) as loras,
        progress("Comparing", given.quiet) as report,
    ):
        a, b = spelled_alike(loras, loras[0].architecture)
        if reason := apart(a, b):
            if not given.quiet:
                say(f"Not the same LoRA: {reason}.")
            raise typer.Exit(1)
        total = len({*a, *b})
        found = []
        for done, difference in enumerate(differences(a, b), start=1):
            found.append(difference)
            report(done, total)
    found.sort(key=lambda d: -d.relative)
    same = found[0].relative <= given.tolerance
    if not given.quiet:
        _print(found, same, given.most)
    raise typer.Exit(0 if same else 1)


def _print(found: "list[Difference]", same: bool, most: int) -> None:
    rows = [[d.module, f"{d.norm:.4g}", f"{d.distance:.3g}", f"{d.relative:.3g}"] for d in found[:most]]
    say(table(["module", "‖ΔW‖", "‖difference‖", "relative"], rows))
    say(more(len(found) - len(rows), "none larger"))
    answer = "The same LoRA" if same else "Not the same LoRA"
    say(f"{answer}: the largest relative difference is {found[0].relative:.3g}, of {counted(len(found), 'module')}.")
