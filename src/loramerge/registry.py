"""An ordered table of named values, whose errors for a wrong name list the right ones."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from .errors import OptionError, did_you_mean, first_line, needed


class Named(Protocol):
    """An entry of a registry: anything with a name."""

    @property
    def name(self) -> str:
        """The name that users type."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Values by name, in the order in which they were listed.

    Args:
        noun: The word for a value in error messages: ``"dialect"``.
        values: The values; their names must differ.
        aliases: Other names that users type, each with the name that it stands for.
    """

    def __init__(self, noun: str, values: Iterable[T], aliases: Mapping[str, str] | None = None) -> None:
        self.noun: str = noun
        self.aliases: dict[str, str] = dict(aliases or {})
        self._values: dict[str, T] = {}
        for value in values:
            if value.name in self._values:
                raise ValueError(f"{noun} {value.name!r} is listed twice.")
            self._values[value.name] = value
        names = {name: name for name in self._values} | self.aliases
        self._spelled = {plain(spelled): name for spelled, name in names.items()}

    def __getitem__(self, name: str) -> T:
        return self.find(name, self._values)

    def find(self, name: str, offered: Iterable[str], also: Iterable[str] = ()) -> T:
        """Return the value with this name, ignoring case and the difference between ``_`` and ``-``.

        Args:
            name: The name as typed.
            offered: The names that the error for an unknown name lists.
            also: Further names to list there, of values that are not in the table.

        Raises:
            OptionError: Nothing has that name.
        """
        key = self._spelled.get(plain(name))
        if key not in self._values:
            raise OptionError(self._unknown(name, offered, list(also)))
        return self._values[key]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._spelled.get(plain(name)) in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _unknown(self, name: str, offered: Iterable[str], also: Iterable[str]) -> str:
        hint = did_you_mean(name, [*self._values, *self.aliases, *also])
        return f"Unknown {self.noun} {name!r}.{hint} Available: {', '.join([*offered, *also])}."


def plain(name: str) -> str:
    """Normalise a name for comparison: lower case, with ``-`` for ``_``."""
    return name.lower().replace("_", "-")


def referenced(text: str, noun: str) -> Any:
    """Import the object that a reference names.

    Args:
        text: ``package.module:name``.
        noun: The word for the object in error messages: ``"method"``.

    Raises:
        OptionError: The module can't be imported, or has no such name.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise OptionError(f"Can't read the {noun} {text!r}: wanted package.module:name.")
    if module.endswith(".py"):
        raise OptionError(
            f"Can't find the {noun} {text!r}: a module is named without .py. Way out: {module.removesuffix('.py')}:{name}, where "
            "the file is in the working directory."
        )
    found = _imported(module, f"the {noun} {text!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"Can't find the {noun} {text!r}: the module {module} has no {part!r}.")
        found = getattr(found, part)
    return found


def _imported(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        missing = isinstance(error, ModuleNotFoundError)
        reason = first_line(error) if missing else f"{module} raised {type(error).__name__}: {first_line(error)}"
        way_out = "install it, or set PYTHONPATH to the folder that holds it" if missing else f"mend or update {module}"
        raise OptionError(f"Can't import {what}: {reason.rstrip('.')}. Way out: {way_out}.") from error


def reference_of(value: object, module: str) -> str | None:
    """Return ``module:name`` for an object, or None if the module doesn't hold it under any name."""
    home = sys.modules.get(module)
    if home is None or home.__spec__ is None or module == "__main__":
        return None
    return next((f"{module}:{name}" for name, held in vars(home).items() if held is value), None)


@contextmanager
def from_here() -> Iterator[None]:
    """Let modules be imported from the current directory, as a script imports those next to it."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def code_of(function: Callable[..., Any]) -> str | None:
    """Return the SHA-256 of the file that defines a function, or None if there is no file."""
    import hashlib
    import inspect
    from pathlib import Path

    try:
        text = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text).hexdigest()


def face(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package's ``__getattr__``, ``__dir__`` and ``__all__``, which import public names at their first use.

    Args:
        package: Name of the package.
        homes: The modules of the package, each with the public names that it defines.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with needed(f"{package}.{name}"):
            value = getattr(importlib.import_module(f".{home[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(home), sorted(home)
