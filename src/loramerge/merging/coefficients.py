"""Learned weights: one number per LoRA and input column of a module.

ΔW = Σᵢ upᵢ · (downᵢ · diag(mᵢ)) is an ordinary LoRA of rank Σrᵢ, so column coefficients, as ZipLoRA
learns them, are weights of the ordinary merge.  They are kept in a safetensors file with one matrix
``(N, in·kh·kw)`` per module, so that a merge can be made again.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import FileError, OptionError, within
from ..files.architectures.blocks import Selector
from ..files.dialects.write import Group
from ..files.lora import LoRA
from ..files.storage.paths import path_of, printable
from ..files.storage.reader import SafetensorsFile
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import sha256, write
from ..tensors import Array, Held, Spec, Stored, check_finite

KEY = "loramerge.coefficients"
"""Key of the metadata entry that names the LoRAs and says how the coefficients were learned."""


GATES = "loramerge.gates"
"""Key of the metadata entry of a file of gates, which has another use."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Column coefficients of a merge, and how they were learned."""

    columns: Mapping[str, Held]
    """By module: shape ``(N, in·kh·kw)``, float32.  Row i scales the columns of LoRA i's ΔW."""
    others: tuple[float, ...]
    """Each LoRA's weight in modules that have no coefficients."""
    names: tuple[str, ...] = ()
    """Names of the LoRAs, in order."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Method, settings and seeds that they were learned with."""
    source: str = "learned"
    """Name of the file that they were read from."""

    @classmethod
    def of(
        cls,
        columns: Mapping[str, Array],
        loras: Sequence[LoRA],
        others: Sequence[float],
        provenance: Mapping[str, Any] | None = None,
    ) -> "Coefficients":
        """Make coefficients for given LoRAs from arrays in memory."""
        held = {module: Held(array) for module, array in columns.items()}
        return cls(held, tuple(map(float, others)), tuple(lora.name for lora in loras), dict(provenance or {}))

    @cached_property
    def sha256(self) -> str:
        """Content hash: SHA-256 of a safetensors file holding only these numbers, without names and provenance."""
        return sha256(self.columns, {"others": as_json(self.others)})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Coefficients":
        """Coefficients from a file, which is read whole: one matrix ``(N, in·kh·kw)`` per module is a few megabytes.

        Raises:
            FileError: The file can't be read, or holds no coefficients.
        """
        path = path_of(path)
        with closing(SafetensorsFile(path)) as file:
            try:
                said = parsed(file.metadata[KEY], KEY)
                others, names = tuple(map(float, said["others"])), tuple(map(str, said["names"]))
                provenance = dict(said.get("provenance", {}))
            except (KeyError, TypeError, ValueError, FileError) as error:
                if GATES in file.metadata:
                    raise FileError(
                        f"{path} holds gates, which follow the picture, and not learned coefficients. Ways out: 'generate "
                        "--compose mole' takes them; 'zip --preset mole' without --set gates=input learns weights for a file."
                    ) from None
                raise FileError(
                    f"{path} holds no learned coefficients: its metadata lack {KEY!r}, or not all is there: {error}."
                ) from None
            if len(names) != len(others) or not names or not file or not all(map(math.isfinite, others)):
                raise FileError(
                    f"{path} holds coefficients of {len(file)} modules, names of {len(names)} LoRAs and weights of {len(others)}."
                )
            columns = {module: _column(path, module, tensor, len(names)) for module, tensor in file.items()}
        return cls(columns, others, names, provenance, printable(path.name))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the coefficients to a file, which takes its name when it is complete."""
        groups = [
            Group(module, {module: Spec(tuple(tensor.shape), "F32")}, lambda m=module, t=tensor: {m: t.read()})  # type: ignore[misc]
            for module, tensor in self.columns.items()
        ]
        said = {"others": self.others, "names": self.names, "provenance": dict(self.provenance)}
        target = path_of(path)
        write(target, groups, {"format": "pt", KEY: as_json(said)})
        return target

    def check(self, loras: Sequence[LoRA], exclude: Sequence[str] = ()) -> None:
        """Refuse LoRAs that the coefficients were not learned for.

        Args:
            loras: The LoRAs.
            exclude: Patterns of modules that were left out of them.

        Raises:
            OptionError: Their number or order differs, or the columns of a module do.  Other names are no reason: files
                may have been renamed.
        """
        if len(loras) != len(self.others):
            raise OptionError(f"The coefficients are for {len(self.others)} LoRAs, got {len(loras)}.")
        given = tuple(lora.name for lora in loras)
        if given != self.names and sorted(given) == sorted(self.names):
            raise OptionError(
                f"The coefficients are for {', '.join(self.names)} in this order, got {', '.join(given)}."
            )
        left_out = Selector(exclude, loras[0].architecture)
        for module, tensor in self.columns.items():
            shapes = [lora.layout(module).shape for lora in loras if module in lora]
            if not shapes and left_out.matching(module):
                continue
            if not shapes:
                raise OptionError(f"The coefficients have the module {module}, which none of the LoRAs has.")
            count = math.prod(shapes[0][1:])
            if tuple(tensor.shape) != (len(loras), count):
                raise OptionError(
                    f"{module}: the coefficients have the shape {tuple(tensor.shape)}, wanted {(len(loras), count)}."
                )

    def of_module(self, module: str) -> list[Any]:
        """Return one weight per LoRA: an array ``(in·kh·kw,)``, or a number if nothing was learned for the module."""
        if module not in self.columns:
            return list(self.others)
        import numpy as np

        array = np.array(self.columns[module].read())
        check_finite(array)
        return list(array)


def _column(path: str | os.PathLike[str], module: str, tensor: Stored, count: int) -> Held:
    """Read the coefficients of one module, one row per LoRA."""
    if len(tensor.shape) != 2 or tensor.shape[0] != count or not tensor.shape[1] or tensor.dtype != "F32":
        raise FileError(
            f"{path}: {module} has the shape {list(tensor.shape)} and the dtype {tensor.dtype}, wanted one row of F32 "
            f"for each of {count} LoRAs."
        )
    array = tensor.read()
    with within(f"{path}: {module}"):
        check_finite(array)
    return Held(array)
