"""The choices on the page, as a recipe, as the command and as the Python that do the same."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError
from ...merging import RULES, Input, Recipe
from ...merging.methods import METHODS
from ...merging.ranks import BUDGETS
from ...merging.weights import parse
from ..merge import overridden

EXACT = "exact"
FITS = {
    EXACT: "",
    "largest rank": "rank",
    "rank": "rank",
    "size": "max_size",
    "error": "max_error",
    "energy": "energy",
}
"""The ways to choose the rank, each with the option of a merge that its limit is for."""

ALLOW = {
    "leave out what the dialect can't hold": "allow_lossy",
    "a file over ten times as large as its inputs": "allow_growth",
}
"""Words for what may be allowed, and the options that allow it."""

WIDTH = 60
"""The most characters of a line of a command, as far as they fit: those of a column of the page."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The state of the page."""

    names: tuple[str, ...]
    """The LoRAs as they are typed."""
    weights: tuple[str, ...] = ()
    """Their weights as they are typed."""
    rule: str = ""
    """A rule for weights, instead of these."""
    method: str = "linear"
    options: str = ""
    """The method's options, ``NAME=VALUE …``."""
    fit: str = EXACT
    limit: str = ""
    to: str = ""
    dtype: str = ""
    exclude: str = ""
    """Patterns of modules, with blanks between them."""
    base: str | None = None
    allow: Sequence[str] = ()

    @property
    def output(self) -> str:
        """The name of the merged file, which none of the LoRAs has."""
        name = "merged.safetensors"
        while name in self.names:
            name = f"re{name}"
        return name

    @property
    def flags(self) -> dict[str, Any]:
        """The options as they are typed: `overridden` takes them.

        Raises:
            OptionError: A name is unknown; a page, unlike a command, runs loramerge's own methods alone.
        """
        if self.fit not in FITS:
            raise OptionError(f"Unknown way to choose the rank {self.fit!r}. Available: {', '.join(FITS)}.")
        if FITS[self.fit] and self.fit != "largest rank" and not self.limit.strip():
            raise OptionError(
                f"How much? Give a limit for the {self.fit}: {'16' if self.fit == 'rank' else '150MB or 1%'}."
            )
        flags: dict[str, Any] = {
            "weights": RULES[self.rule].name if self.rule else list(self.weights),
            "method": METHODS[self.method].name if self.method != "linear" else None,
            "option": self.options.split(),
            **({FITS[self.fit]: "max" if self.fit == "largest rank" else self.limit.strip()} if FITS[self.fit] else {}),
            "to": self.to,
            "dtype": self.dtype,
            "exclude": self.exclude.split(),
            "base": self.base,
            **{ALLOW[each]: True for each in self.allow if each in ALLOW},
        }
        return {name: value for name, value in flags.items() if value}

    def recipe(self, paths: Sequence[str] = ()) -> Recipe:
        """Return the recipe that is run, with the paths at which the LoRAs are stored."""
        return overridden(Recipe(loras=tuple(Input(path=path) for path in paths or self.names)), self.flags, quiet=True)

    @property
    def budgeted(self) -> bool:
        """True if the ranks are chosen from what every module keeps, which takes as long as the merge."""
        return FITS.get(self.fit) in BUDGETS

    @property
    def command(self) -> str:
        """The command that makes the same file."""
        flags = self.flags
        words = [[name] for name in self.names] + [["-o", self.output]]
        weights = flags.pop("weights")
        words += [["--weights", weights]] if isinstance(weights, str) else [["-w", weight] for weight in weights]
        for name, value in flags.items():
            flag = f"--{name.replace('_', '-')}"
            each = value if isinstance(value, list) else [value]
            words += [[flag] if one is True else [flag, str(one)] for one in each]
        return _wrapped("loramerge merge", map(shlex.join, words))

    @property
    def python(self) -> str:
        """The Python that makes the same file."""
        flags = self.flags
        written = {"dialect": flags.get("to"), "dtype": flags.get("dtype"), "allow_lossy": flags.get("allow_lossy")}
        written = {name: value for name, value in written.items() if value}
        if self.budgeted and written:  # the budget is spent on the file as it is written, which merge doesn't know
            text = self.recipe().to_toml().replace("\\", "\\\\").replace('"""', '\\"""')
            return f'import loramerge as lm\n\nrecipe = lm.Recipe.parse("""\n{text}""")\nrecipe.run({_literal(self.output)})\n'
        recipe = self.recipe()
        given = flags["weights"]
        arguments: dict[str, Any] = {"weights": given if isinstance(given, str) else list(map(parse, given))}
        arguments |= {
            name: flags[name] for name in ("method", *BUDGETS, "base", "exclude", "allow_growth") if name in flags
        }
        arguments |= {"rank": recipe.rank} if "rank" in flags else {}
        arguments |= recipe.options
        lines = [_literal(self.names), *(f"{name}={_literal(value)}" for name, value in arguments.items())]
        save = ", ".join(
            ["both", _literal(self.output), *(f"{name}={_literal(value)}" for name, value in written.items())]
        )
        merge = "".join(f"    {line},\n" for line in lines)
        return f"import loramerge as lm\n\nboth = lm.merge(\n{merge})\nlm.save({save})\n"


def _literal(value: Any) -> str:
    """Return a value as Python, with the double quotes that people type."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, str):
        return repr(value) if '"' in value or "'" in value or "\\" in repr(value) else f'"{value}"'
    return 'float("inf")' if value == float("inf") else repr(value)


def _wrapped(line: str, words: Any) -> str:
    """Return a command over several lines of a shell."""
    lines = [line]
    for word in words:
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append(f"   {' ' + word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)
