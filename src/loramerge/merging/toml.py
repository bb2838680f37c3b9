"""TOML: a small writer, and a strict reader whose errors name the place."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..errors import OptionError, did_you_mean
from ..files.storage.texts import check_plain, escaped, whole

BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a table"}

T = TypeVar("T")

PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
LONG_KEY = rf"(?<![\w-]){PART}(?:[ \t]*+\.[ \t]*+{PART}){{100}}"
"""Matches a key of more than 100 parts: tomllib's time grows with their square, so it may be an attack."""


def parse_toml(source: str) -> dict[str, Any]:
    """Parse a TOML document.

    Raises:
        ValueError: It isn't TOML, has a key of more than 100 parts, or is not plain (`check_plain`).
    """
    import tomllib

    if long := re.search(LONG_KEY, source):
        raise ValueError(f"the key {long[0][:40]}… has more than 100 parts")
    found = tomllib.loads(source)
    check_plain([found], infinite=True)
    return found


def text(value: Any) -> str:
    """Write a value as TOML; a mapping as an inline table.

    Raises:
        OptionError: TOML can't hold it.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float) and not math.isnan(value):
        return repr(float(value))
    if isinstance(value, str):
        if not whole(value):
            raise OptionError(
                f"TOML can't hold {value!r}: a byte of it is no character. Way out: if it is a file's name, another one."
            )
        return escaped(json.dumps(value, ensure_ascii=False), lambda c: f"\\U{ord(c):08X}")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key(k)} = {text(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text, value)) + "]"
    raise OptionError(f"TOML can't hold {value!r}, a {type(value).__name__}.")


def key(name: str) -> str:
    """Write a key, in quotes if it needs them."""
    return name if BARE.fullmatch(name) else text(name)


def lines(entries: Mapping[str, Any]) -> list[str]:
    """Write one line per entry; entries that are None are left out."""
    return [f"{key(name)} = {text(value)}" for name, value in entries.items() if value is not None]


class Table:
    """A table of a TOML file whose entries are asked for one by one.

    Args:
        data: The entries.
        where: Name of the table in messages: ``"recipe.toml: output"``.
        known: The keys that it may have.

    Raises:
        OptionError: It has another key, or isn't a table.
    """

    def __init__(self, data: Any, where: str, known: Iterable[str]) -> None:
        if not isinstance(data, dict):
            raise OptionError(f"{where}: got {_shown(data)}, wanted a table.")
        self.data = data
        self.where = where
        known = list(known)
        for name in data:
            if name not in known:
                hint = did_you_mean(name, known)
                raise OptionError(f"{where}: unknown key {name!r}.{hint} Known: {', '.join(known)}.")

    def get(self, name: str, *kinds: type, wanted: str = "", default: Any = None) -> Any:
        """Return an entry of one of the kinds, or the default if it is missing.

        Raises:
            OptionError: It is of another kind.
        """
        if name not in self.data:
            return default
        value = self.data[name]
        if type(value) not in kinds:
            wanted = wanted or " or ".join(KINDS[kind] for kind in kinds)
            raise OptionError(f"{self.where}: {name}: got {_shown(value)}, wanted {wanted}.")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts; an empty one if the entry is missing."""
        found = self.get(name, list, wanted="a list of texts", default=[])
        if not all(isinstance(item, str) for item in found):
            raise OptionError(f"{self.where}: {name}: got {_shown(found)}, wanted a list of texts.")
        return tuple(found)

    def numbers(self, name: str, *kinds: type) -> dict[str, Any] | None:
        """Return a table of numbers; None if the entry is missing."""
        found = self.get(name, dict)
        for entry, value in (found or {}).items():
            if type(value) not in kinds:
                raise OptionError(f"{self.where}: {name}: {entry}: got {_shown(value)}, wanted {KINDS[kinds[-1]]}.")
        return found  # type: ignore[no-any-return]


def _shown(value: Any) -> str:
    kind = KINDS.get(type(value), type(value).__name__)
    return f"{kind}" if isinstance(value, list | dict) else f"{value!r}, {kind}"
