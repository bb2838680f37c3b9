"""Choice of entries of an array, by magnitude or at random, which the array API standard lacks.

No function here sorts a whole array: thresholds come from a partition.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...tensors import Array, Bool, Float, Float32, is_torch, namespace

ROWS = 256
"""Rows that are sorted at a time: the indices take twice the memory of the values."""


def count(size: int, share: float) -> int:
    """Return how many of ``size`` entries make up a share: rounded down, at least one."""
    return max(1, int(share * size))


def kth_largest(values: Float[Array, "*shape"], k: int) -> Float[Array, ""]:
    """Return the k-th largest of all values, as an array without axes.

    Args:
        values: The values.
        k: From 1 (the largest) to the number of values.
    """
    flat = values.reshape((-1,))
    place = flat.shape[0] - k
    if is_torch(flat):
        return flat.kthvalue(place + 1).values
    import numpy as np

    return np.partition(flat, place)[place]


def largest(values: Float[Array, "*shape"], share: float) -> Bool[Array, "*shape"]:
    """Return a mask of the share of entries with the largest magnitudes; ties with the last of them are kept, too."""
    xp = namespace(values)
    k = count(math.prod(values.shape), share)
    magnitudes = xp.abs(values)
    return magnitudes >= kth_largest(magnitudes, k)


def between(values: Float[Array, "*shape"], share: float, top: float) -> Bool[Array, "*shape"]:
    """Return a mask of the ``share`` of entries whose magnitudes come next after the ``top`` share of the largest.

    If fewer entries than the share are left below those, fewer of the largest are left out.  Ties with the first or the last
    entry that is kept are kept, too.
    """
    xp = namespace(values)
    size = math.prod(values.shape)
    kept = count(size, share)
    above = min(int(top * size), size - kept)
    magnitudes = xp.abs(values)
    mask = magnitudes >= kth_largest(magnitudes, above + kept)
    return mask & (magnitudes <= kth_largest(magnitudes, above + 1)) if above else mask


def ranks_in_rows(values: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """Rank each entry's magnitude in its row, from 0 (the smallest) to 1 (the largest)."""
    columns = values.shape[1]
    places = namespace(values).linspace(0.0, 1.0, columns, dtype=values.dtype, device=values.device)
    if is_torch(values):
        import torch

        return torch.empty_like(values).scatter_(1, values.abs().argsort(dim=1), places.expand(values.shape))
    import numpy as np

    ranks = np.empty_like(values)
    for start in range(0, values.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        np.put_along_axis(ranks[rows], np.argsort(np.abs(values[rows]), axis=1), places[None], axis=1)
    return ranks


@dataclass(frozen=True)
class Streams:
    """Random streams of one module, one per LoRA; a stream depends on the LoRA's place in the list of all LoRAs."""

    seed: int
    """The module's seed, see `module_seed`."""
    places: tuple[int, ...]
    """The place of each LoRA that is merged."""

    def some(self, kept: Sequence[int]) -> "Streams":
        """Return the streams of a subset of the LoRAs; each LoRA keeps its own numbers."""
        return replace(self, places=tuple(self.places[i] for i in kept))


def chance(like: Float[Array, "*shape"], seed: int | Streams, which: int) -> Float32[Array, "*shape"]:
    """Draw uniform random numbers in [0, 1), of another array's shape and on its device.

    They are drawn on the CPU, so a seed gives the same numbers on every device.

    Args:
        like: The array.
        seed: The module's seed, see `module_seed`, with LoRAs numbered from 0; or the streams of the LoRAs.
        which: Number of the LoRA.
    """
    import numpy as np

    key = [seed.seed, seed.places[which]] if isinstance(seed, Streams) else [seed, which]
    drawn: np.ndarray = np.random.default_rng(key).random(tuple(like.shape), dtype=np.float32)
    return namespace(like).asarray(drawn, device=like.device)


def module_seed(seed: int, module: str) -> int:
    """Return a module's own seed, independent of the order in which modules are merged."""
    return (seed << 32) | zlib.crc32(module.encode())
