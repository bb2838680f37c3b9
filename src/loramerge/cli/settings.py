"""Turns a dataclass of options into the parameters of a typer command, so that each option is declared once.

Its fields are annotated as typer's parameters are: ``Annotated[T, typer.Option(…)]``, or ``typer.Argument``.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, get_annotations
from pathlib import Path
from typing import Any, get_args

from ..files.storage.paths import path_of
from .output import replacing

OUTPUTS = ("output", "save_recipe", "coefficients", "plot", "heatmap")
"""The options of all commands that name what is written."""


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Return a command for typer from a function of one dataclass of options.

    ``--help`` lists the options that the class declares itself, then those of each class that it inherits from.
    """
    ((name, options),) = ((name, kind) for name, kind in get_annotations(run).items() if name != "return")
    declared = {field.name: field for field in fields(options)}
    for field in declared.values():
        kind, given = get_args(field.type)
        if Path in (kind, *get_args(kind)):
            given.parser = path  # from the text as it was typed: ./~/x is not ~/x
    order = [name for kind in options.__mro__ for name in get_annotations(kind) if name in declared]

    def typed(**values: Any) -> None:
        outputs = [values[each] for each in OUTPUTS if values.get(each)]
        with replacing(outputs, values.get("quiet", False)):
            run(**{name: options(**values)})

    typed.__doc__ = run.__doc__
    typed.__module__, typed.__qualname__ = run.__module__, run.__qualname__
    typed.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(
                each,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if declared[each].default is MISSING else declared[each].default,
                annotation=declared[each].type,
            )
            for each in dict.fromkeys(order)
        ]
    )
    return typed


def path(text: str) -> Path:
    """Read a path; typer shows this function's name in ``--help``."""
    return path_of(text)
