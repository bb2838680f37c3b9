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
        self.noun = noun
        self.aliases = dict(aliases or {})
        self._values: dict[str, T] = {}
        for value in values:
            if value.name in self._values:
                raise ValueError(f"{noun} {value.name!r} is listed twice.")
            self._values[value.name] = value

    def __getitem__(self, name: str) -> T:
        key = self.aliases.get(name, name)
        if key not in self._values:
            raise OptionError(self._unknown(name))
        return self._values[key]

    def __contains__(self, name: object) -> bool:
        return self.aliases.get(name, name) in self._values if isinstance(name, str) else False

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _unknown(self, name: str) -> str:
        hint = did_you_mean(name, [*self._values, *self.aliases])
        return f"Unknown {self.noun} {name!r}.{hint} Available: {', '.join(self._values)}."
