"""Every tool's file that nobody changed is written back as it was: keys and their order, bits, and the header's strings.

With ``LORAMERGE_WHOLE=1`` in the environment the files have all their keys, some 6 GB in turn, instead of the first
blocks'.
"""

import json
import math
import os
import re
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loramerge as lm
from loramerge.tensors import SIZES, numpy_dtype
from test_families import FIRST, TOOLS

WHOLE = os.environ.get("LORAMERGE_WHOLE") == "1"
SAMPLE = 24
"""Keys of a listing without numbered blocks."""


def some(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of the first blocks, or the first ones of a listing without such, or all of them."""
    first = {key: value for key, value in keys.items() if re.search(FIRST, key)}
    return keys if WHOLE else first if 8 <= len(first) <= 200 else dict([*keys.items()][:SAMPLE])


@cache
def pool(dtype: str) -> bytes:
    numbers = np.random.default_rng(7).standard_normal(1 << 21, dtype=np.float32)
    return (0.1 * numbers).astype(numpy_dtype(dtype)).tobytes()


def values(key: str, dtype: str, shape: list[int]) -> bytes:
    """Random numbers of a key's own; an alpha that isn't a power of two."""
    if not shape:
        return np.asarray(3, numpy_dtype(dtype)).tobytes()
    size, numbers = math.prod(shape) * SIZES[dtype], pool(dtype)
    start = SIZES[dtype] * (zlib.crc32(key.encode()) % 100_000)
    return (numbers[start:] * (1 + size // (len(numbers) - start)))[:size]


def file_of(name: str) -> bytes:
    """A safetensors file of a listing, made without loramerge's writer."""
    header: dict[str, Any] = {"__metadata__": TOOLS[name]["metadata"]} if TOOLS[name]["metadata"] else {}
    data: list[bytes] = []
    at = 0
    for key, (dtype, shape) in some(TOOLS[name]["keys"]).items():
        data.append(values(key, dtype, shape))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data[-1])]}
        at += len(data[-1])
    text = json.dumps(header).encode()
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def content(file: bytes) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """A safetensors file's strings, and its tensors' dtypes, shapes and bytes, read without loramerge."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = memoryview(file)[8 + length :]
    return metadata, {
        key: (entry["dtype"], entry["shape"], bytes(data[slice(*entry["data_offsets"])]))
        for key, entry in header.items()
    }


@pytest.mark.parametrize("name", TOOLS)
def test_a_tools_file_is_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    before = file_of(name)
    lora = lm.load(before, architecture=TOOLS[name]["family"])
    assert not lora.extras

    target = lm.save(lora, tmp_path / ("again" if lora.dialect == "peft" else "again.safetensors"))

    strings, tensors = content((target / "adapter_model.safetensors" if target.is_dir() else target).read_bytes())
    assert tensors == content(before)[1]
    assert strings == content(before)[0] or (target.is_dir() and strings.items() >= content(before)[0].items())
