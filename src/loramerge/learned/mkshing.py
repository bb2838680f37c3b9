"""Import of ZipLoRA files of mkshing/ziplora-pytorch: dense updates, which no other program reads, become a LoRA.

A file holds one dense ΔW per module, under ``unet.unet.<module>.lora.weight``.

Source: https://github.com/mkshing/ziplora-pytorch, ziplora_pytorch/utils.py, ``unet_ziplora_state_dict``.
"""

import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from ..errors import LoRAMergeError, NotALoRAError, NumberError, OptionError
from ..files.architectures import ARCHITECTURES
from ..files.lora import LoRA
from ..files.storage.paths import path_of, printable
from ..files.storage.reader import SafetensorsFile
from ..layers import LowRank, low_rank
from ..linalg import truncate_dense, whole_number
from ..merging.running import relative_error
from ..tensors import Array, Shape, check_finite, flatten, float32

KEY = re.compile(r"(?:unet\.)+(?P<path>.+)\.lora\.weight")


@dataclass(frozen=True)
class Imported:
    """A dense ZipLoRA as a LoRA, and the error of its rank."""

    lora: LoRA
    errors: Mapping[str, float]
    """‖ΔW − kept‖ / ‖ΔW‖ by module."""


def load(path: str | os.PathLike[str], rank: int) -> Imported:
    """Read a dense ZipLoRA and fit a LoRA of a given rank to it.

    Args:
        path: A safetensors file of ``train_ziplora``.
        rank: Rank of every module, at most what its shape allows.  The sum of the ranks of the two
            LoRAs that were merged loses nothing but rounding.

    Raises:
        FileError: The file can't be read.
        NotALoRAError: It isn't a dense ZipLoRA.
        NumberError: A value is NaN or infinite.
        OptionError: The rank is not a whole number from 1.
    """
    if whole_number(rank) < 1:
        raise OptionError(f"The rank must be a whole number from 1, got {rank!r}.")
    path = path_of(path)
    with closing(SafetensorsFile(path)) as file:
        modules = {key: _module(key) for key in file}
        strange = [key for key, module in modules.items() if module is None or len(file[key].shape) not in (2, 4)]
        if strange or not modules:
            raise NotALoRAError(
                f"{path} isn't a dense ZipLoRA: wanted keys such as 'unet.unet.….to_q.lora.weight' with a matrix each, "
                f"got {strange[0] if strange else 'none'}. Way out: loramerge.load, if it is an ordinary LoRA."
            )
        layers: dict[str, LowRank] = {}
        errors: dict[str, float] = {}
        for key, module in modules.items():
            assert module is not None
            try:
                layers[module], errors[module] = _fitted(file[key].read(), rank)
            except LoRAMergeError as error:
                raise type(error)(f"{path}: {module}: {error}") from None
        metadata = dict(file.metadata)
    name = _architecture({module: layer.shape for module, layer in layers.items()})
    lora = LoRA(name=printable(path.stem), architecture=name, dialect="diffusers", layouts=layers, metadata=metadata)
    return Imported(lora, errors)


def _module(key: str) -> str | None:
    found = KEY.fullmatch(key)
    return f"unet.{found['path']}" if found else None


def _fitted(delta: Array, rank: int) -> tuple[LowRank, float]:
    check_finite(delta)
    dense = flatten(float32(delta))
    if not dense.size:
        raise NumberError(f"the update of shape {delta.shape} is empty")
    cut = truncate_dense(dense, min(rank, *dense.shape))
    return low_rank(cut.up, cut.down, delta.shape), relative_error(cut.energy, cut.lost)


def _architecture(shapes: Mapping[str, Shape]) -> str | None:
    """Return the first family that has all the modules in these shapes."""
    for name, architecture in ARCHITECTURES.items():
        if all(architecture.shapes.get(module) == shape for module, shape in shapes.items()):
            return name
    return None
