"""The entries of a recipe's TOML file, read strictly: every key is known, every value has the right kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from ..errors import OptionError
from ..files import hub
from ..files.storage.paths import path_of
from .rules import RULES
from .toml import Table
from .weights import PlainWeights, Weight, parse

ENTRIES: Mapping[str, tuple[type, ...]] = {
    "method": (str,),
    "options": (dict,),
    "rank": (int, str),
    "max_error": (int, float, str),
    "energy": (int, float, str),
    "max_size": (int, str),
    "weights": (str,),
    "weights_sha256": (str,),
    "scope": (str,),
    "exclude": (list,),
    "architecture": (str,),
    "device": (str,),
    "base": (str,),
    "base_sha256": (str,),
}
"""The entries of a recipe besides its tables, and the kinds that each may have; a list is one of texts."""

WEIGHT = (int, float, str, dict)
"""The kinds of a LoRA's weight; a table is one of numbers."""

KEYS = tuple(ENTRIES)


@dataclass(frozen=True, kw_only=True)
class Input:
    """A LoRA of a recipe: a path, or a repository on the Hugging Face Hub."""

    path: str | None = None
    """Path of a file or of an adapter's directory, relative to the recipe's own directory."""
    hub: str | None = None
    """``org/repo``."""
    revision: str | None = None
    filename: str | None = None
    sha256: str | None = None
    """`LoRA.sha256` of the tensors; a LoRA with another hash is refused, unless changes are allowed."""
    architecture: str | None = None
    """The model family, if the file leaves it open."""
    dialect: str | None = None
    """The dialect, if the file leaves it open."""
    adapter: str | None = None
    """Name of the adapter, if the file's keys name several."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise OptionError("A LoRA of a recipe has either a path or a name on the Hub.")
        if self.path is not None and (self.revision or self.filename):
            raise OptionError("A revision and a filename go with a name on the Hub, not with a path.")

    def source(self, folder: str) -> str | Path:
        """Return what `open` takes: a path, a Hub reference, or the text of either as it was typed."""
        if self.path is not None:
            return path_of(self.path, folder) if folder else self.path
        return str(hub.Reference(cast(str, self.hub), self.filename, self.revision))


@dataclass(frozen=True, kw_only=True)
class Output:
    """The output of a recipe."""

    path: str | None = None
    """Path of the file, inside the recipe's directory."""
    to: str | None = None
    """Name of the dialect; the first LoRA's by default."""
    dtype: str | None = None
    """Dtype of the tensors; the widest of the inputs' by default."""
    allow_lossy: bool = False
    """True to leave out what the dialect can't hold."""
    allow_growth: bool = False
    """True if the file may be more than ten times as large as the inputs."""
    cut_as: str | None = None
    """Name of the dialect whose joined weights are cut as one, where that isn't the one that is written."""


def entries(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a `Recipe`, except its folder, from parsed TOML.

    Raises:
        OptionError: A key is unknown, or a value is of the wrong kind.
    """
    if isinstance(data, Mapping) and "compose" in data:
        raise OptionError(
            f"{where} describes a composition, [compose], which no file can hold: a merge's recipe has none. Way out: "
            f"loramerge generate --lora {where}."
        )
    table = Table(data, where, [*KEYS, "loras", "output", "ranks"])
    tables = table.get("loras", list, wanted="[[loras]], a list of tables", default=[])
    if not tables:
        raise OptionError(f"{where}: no LoRA is named. Wanted: [[loras]] and a path, for each.")
    own = ("weights", "exclude", "method", "options", "rank")  # with a check or a default of their own
    given = [listed(entry, f"{where}: loras {i}") for i, entry in enumerate(tables, start=1)]
    return {
        "loras": tuple(lora for lora, _ in given),
        "weights": _weights(table, [weight for _, weight in given]),
        **{name: table.get(name, *ENTRIES[name]) for name in KEYS if name not in own},
        "method": table.get("method", *ENTRIES["method"], default="linear"),
        "options": table.get("options", *ENTRIES["options"], default={}),
        "rank": table.get("rank", *ENTRIES["rank"], wanted='a number from 1, "sum" or "max"', default="sum"),
        "exclude": table.texts("exclude"),
        "ranks": table.numbers("ranks", int),
        "output": _output(data.get("output", {}), f"{where}: output"),
    }


def listed(data: Any, where: str, others: Sequence[str] = ()) -> tuple[Input, Weight | None]:
    """Read a LoRA of a recipe, and its weight.

    Args:
        data: The entry of ``[[loras]]``.
        where: Its name in messages.
        others: Further keys that it may have, which are read elsewhere.

    Raises:
        OptionError: A key is unknown, or a value is of the wrong kind.
    """
    names = [f.name for f in fields(Input)]
    table = Table(data, where, [*names, "weight", *others])
    found = {name: table.get(name, str) for name in names}
    try:
        if found["hub"] is not None:
            found |= _on_the_hub(found["hub"], found["revision"], found["filename"])
        weight = table.get("weight", *WEIGHT, wanted='a number, a table of patterns, "a..b" or "lbw:…"')
        _check_table(weight, where) if isinstance(weight, dict) else None
        return Input(**found), parse(weight) if isinstance(weight, str) else weight
    except OptionError as error:
        raise error if str(error).startswith(where) else OptionError(f"{where}: {error}") from None


def _check_table(weights: dict[str, Any], where: str) -> None:
    """Refuse a table of patterns whose values are neither numbers nor ramps such as ``"0.3..1"``."""
    plain = {pattern: number for pattern, number in weights.items() if ".." not in str(number)}
    Table({"weight": plain}, where, ["weight"]).numbers("weight", int, float)


def _on_the_hub(text: str, revision: str | None, filename: str | None) -> dict[str, str | None]:
    """Split a name on the Hub: ``org/repo``, or all in one as typed: ``org/repo/file.safetensors@revision``."""
    parsed = hub.parse(f"hf://{text.removeprefix('hf://')}")
    if parsed is None or (parsed.revision and revision) or (parsed.file and filename):
        raise OptionError(f"hub: got {text!r}, wanted org/repo, with the revision and the filename named once.")
    return {"hub": parsed.repo, "revision": parsed.revision or revision, "filename": parsed.file or filename}


def _weights(table: Table, each: Sequence[Weight | None]) -> PlainWeights:
    weights = table.get(
        "weights", *ENTRIES["weights"], wanted='a rule such as "sqrt"; numbers go to each LoRA, as its weight'
    )
    given = [weight for weight in each if weight is not None]
    if weights is not None and given:
        raise OptionError(f"{table.where}: give either weights = {weights!r}, or each LoRA's weight, not both.")
    if weights is not None and not weights.endswith(".safetensors"):
        try:
            weights = RULES[weights].name
        except OptionError as error:
            raise OptionError(
                f"{table.where}: weights: {error} Or a file of learned coefficients (.safetensors); numbers go to each "
                "LoRA, as its weight."
            ) from None
    if weights is not None or not given:
        return cast(PlainWeights, weights)
    if len(given) != len(each):
        without = each.index(None) + 1
        raise OptionError(f"{table.where}: loras {without} has no weight, others have: wanted one each, or none.")
    return tuple(given)


def _output(data: Any, where: str) -> Output:
    table = Table(data, where, [f.name for f in fields(Output)])
    return Output(
        path=table.get("path", str),
        to=table.get("to", str),
        dtype=table.get("dtype", str),
        allow_lossy=table.get("allow_lossy", bool, default=False),
        allow_growth=table.get("allow_growth", bool, default=False),
        cut_as=table.get("cut_as", str),
    )
