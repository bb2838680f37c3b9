"""A composition described in a TOML file, so that it can be drawn again.

[compose]
name = "regions"
options = { hard = true }

[[loras]]
path = "person.safetensors"
weight = 0.8
words = "psq-person"
noun = "person"

[[loras]]
hub = "someone/barca-lora-sdxl"
box = [0, 0.5, 1, 1]
curve = [[0, 1], [0.5, 0]]
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ...errors import FileError, LoRAMergeError, OptionError
from ...files.reading import open
from ...files.storage.paths import path_of
from ...files.storage.texts import read_text
from ...merging.recipe import MAX_RECIPE
from ...merging.recipe_text import listed
from ...merging.toml import Table, parse_toml
from ...scoring.pictures import Box
from . import COMPOSITIONS
from .base import Use
from .running import Composed

OWN = ("words", "noun", "box", "mask", "curve")
"""The keys of a LoRA that a merge's recipe doesn't have."""


def read_composed(path: str | os.PathLike[str], *, architecture: str | None = None) -> Composed:
    """Read the composition in a TOML file: a setting of `generate`; closing its LoRAs is the caller's.

    Args:
        path: The file; the paths in it are relative to its directory.
        architecture: The model family, where the LoRAs leave it open.

    Raises:
        FileError: The file or a LoRA can't be read.
        OptionError: A key is unknown, a value is wrong, or a LoRA isn't the one of the hash that is given.
    """
    file = path_of(path)
    try:
        data = parse_toml(read_text(file, MAX_RECIPE))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not TOML: {error}.") from None
    if "compose" not in data:
        raise OptionError(
            f"{file.name} has no [compose]: it describes no composition. Way out for a merge's recipe: 'loramerge merge', and "
            "its output for --lora."
        )
    table = Table(data, file.name, ["compose", "loras"])
    head = Table(data["compose"], f"{file.name}: compose", ["name", "options"])
    given = table.get("loras", list, wanted="[[loras]], a list of tables", default=[])
    name, options = head.get("name", str, default="blend"), head.get("options", dict, default={})
    with ExitStack() as opened:
        uses = []
        for i, entry in enumerate(given, 1):
            uses.append(_use(entry, f"{file.name}: loras {i}", str(file.parent), architecture))
            opened.enter_context(uses[-1].lora)
        if not uses:
            raise OptionError(f"{file.name}: no LoRA is named. Wanted: [[loras]] and a path, for each.")
        try:
            composition = COMPOSITIONS[name]
            options = options | {
                key: os.fspath(path_of(value, str(file.parent)))
                for key, value in options.items()
                if key in composition.files() and isinstance(value, str)
            }
            composition.check(options)
        except LoRAMergeError as error:
            raise type(error)(f"{head.where}: {error}") from None
        opened.pop_all()
    return Composed(uses, name, options)


def _use(data: Any, where: str, folder: str, architecture: str | None) -> Use:
    if not isinstance(data, Mapping):
        raise OptionError(f"{where}: wanted a table.")
    own = Table({key: value for key, value in data.items() if key in OWN}, where, OWN)
    source, weight = listed({key: value for key, value in data.items() if key not in OWN}, where, OWN)
    if weight is not None and not isinstance(weight, int | float):
        raise OptionError(f"{where}: weight: a composition takes one number per LoRA, got {weight!r}.")
    box, mask = _numbers(own, "box", own.get("box", list), 4), own.get("mask", str)
    curve = [
        (at, factor)
        for point in own.get("curve", list, default=[])
        for at, factor in [_numbers(own, "curve", point, 2)]
    ]
    try:
        edges = Box(*box) if box else None
    except OptionError as error:
        raise OptionError(f"{where}: box: {error}") from None
    lora = open(
        source.source(folder),
        architecture=source.architecture or architecture,
        dialect=source.dialect,
        adapter=source.adapter,
    )
    if source.sha256 is not None and source.sha256.lower() != lora.sha256:
        lora.close()
        raise OptionError(
            f"{where}: {lora.name} has changed: the sha256 of its tensors is {lora.sha256}, wanted {source.sha256}. Ways "
            "out: the original file, or no sha256."
        )
    try:
        return Use(
            lora,
            1.0 if weight is None else float(weight),
            own.get("words", str),
            own.get("noun", str),
            edges,
            None if mask is None else path_of(mask, folder),
            curve,
        )
    except OptionError as error:
        lora.close()
        raise OptionError(f"{where}: {error}") from None


def _numbers(table: Table, name: str, found: Any, count: int) -> list[float]:
    if found is None:
        return []
    if not isinstance(found, list) or len(found) != count or not all(type(value) in (int, float) for value in found):
        raise OptionError(f"{table.where}: {name}: got {found!r}, wanted {count} numbers.")
    return [float(value) for value in found]
