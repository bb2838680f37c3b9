"""``loramerge resize``: a LoRA at a smaller rank."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import OptionError
from .merge import Making, make
from .options import File
from .settings import command


@dataclass(frozen=True, kw_only=True)
class Options(Making):
    """The options of ``loramerge resize``."""

    file: File
    rank: Annotated[str, typer.Option("--rank", "-r", help="The rank of every module, at most its own.")] = "sum"


@command
def run(given: Options) -> None:
    """Make a LoRA smaller: the best fit at a rank, or ranks that spend one budget over all modules.

    Example: loramerge resize person.safetensors -o small.safetensors --max-error 1%
    """
    if given.rank in ("sum", "max") and not (given.max_error or given.energy or given.max_size):
        raise OptionError("How small? Give --rank, --max-error, --energy or --max-size.")
    make([given.file], {"weights": ["1"], "rank": given.rank}, given)
