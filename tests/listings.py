"""The key listings of tests/data, filled with seeded values."""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in (DATA / "listings").glob("*.json.gz"))
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@cache
def listing(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((DATA / "listings" / f"{name}.json.gz").read_bytes()))
    return found


@cache
def _pool(dtype: str) -> np.ndarray:
    return (0.1 * np.random.default_rng(7).standard_normal(4_000_000, dtype=np.float32)).astype(DTYPES[dtype])


def filled(name: str) -> dict[str, np.ndarray]:
    """Arrays for every key of a listing: slices of one pool of random numbers, alphas small integers."""
    data = listing(name)
    dtype = (data.get("dtypes") or ["F16"])[0]
    return {key: _values(key, tuple(shape), dtype) for key, shape in data["keys"].items()}


def _values(key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    seed = zlib.crc32(key.encode())
    if not shape:
        return np.array(1 + seed % 16, dtype=DTYPES[dtype])
    size = int(np.prod(shape))
    pool = _pool(dtype)
    start = seed % (len(pool) - size)
    return pool[start : start + size].reshape(shape)


def config(name: str) -> dict[str, Any]:
    """PEFT's configuration, as `from_tensors` takes it."""
    found = listing(name).get("adapter_config")
    return {"": found} if found else {}
