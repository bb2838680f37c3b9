"""``loramerge average``: the mean or the EMA of one run's checkpoints, which is a merge with computed weights."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import OptionError
from .merge import Making, make
from .options import files_of, opened
from .output import say
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options(Making):
    """The options of ``loramerge average``."""

    files: Annotated[list[str], typer.Argument(help="The checkpoints of one run, in any order, or their folder.")]
    ema: Annotated[
        str | None,
        typer.Option(
            "--ema",
            help="sigma=0.1, a width as a share of the run (Karras et al., up to 0.288); or beta=0.999, a decay per step.",
            show_default="the mean",
        ),
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps", help="The step of each file, such as 500,1000,1500, where metadata and names don't say."
        ),
    ] = None
    allow_resumed: Annotated[
        bool,
        typer.Option(
            "--allow-resumed", help="Take files whose metadata are of several runs: of one that was resumed, say."
        ),
    ] = False
    rank: Annotated[
        str | None, typer.Option("--rank", "-r", help="sum (exact), max, or a number.", show_default="the run's own")
    ] = None


@command
def run(given: Options) -> None:
    """Average the checkpoints of one training run: their mean, or a moving average (EMA) made after training.

    Example: loramerge average run/*.safetensors -o average.safetensors --ema sigma=0.1
    """
    from ..merging.averaging import averaged, rank_for

    files, steps = files_of(given.files), _steps(given.steps)
    with opened(files, architecture=given.architecture, allow_pickle=given.allow_pickle) as loras:
        found = averaged(files, loras, given.ema, steps, given.allow_resumed)
        if not given.quiet:
            say(str(found), *(f"  note: {note}" for note in found.notes))
        budgets = {"max_error": given.max_error, "energy": given.energy, "max_size": given.max_size}
        changes = {"weights": [repr(weight) for weight in found.weights], "rank": given.rank or rank_for(budgets)}
        make(files, changes, given, opened=loras)


def _steps(text: str | None) -> list[int] | None:
    """Read the steps as they were typed."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise OptionError(f"Can't read the steps {text!r}: wanted whole numbers, such as 500,1000,1500.") from None
