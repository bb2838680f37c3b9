"""An ordered table of named values, which answers a wrong name with the right ones."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from .errors import OptionError
from .wording import did_you_mean


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """What users type."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Values by name, in the order in which they were listed.

    Args:
        noun: What the values are, for the error message: ``"dialect"``.
        values: The values; their names must differ.
        aliases: Other names that people type, each with the name that it stands for.
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
        """The value of a name, whatever its case, with ``_`` for ``-`` or the other way round.

        Args:
            name: What was typed.
            offered: What the error for an unknown name lists.
            also: Names of what is not in the table, which the error lists too.

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
    """A name as it is compared: in lower case, with ``-`` for ``_``."""
    return name.lower().replace("_", "-")
