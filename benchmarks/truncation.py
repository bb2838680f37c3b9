"""Measure what is left of an elementwise merge that is cut to a LoRA: the table of docs/explanation/methods.md.

Two synthetic LoRAs (see loras.py) of real attention modules of SDXL, one of each weight shape, at
weights 1/2.  Every method's own result is cut to the inputs' rank and to the sum of the ranks.

    python benchmarks/truncation.py
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

import loras
from loramerge import linalg
from loramerge.layers import LowRank
from loramerge.layers.base import matrix
from loramerge.merging.methods import METHODS

MODULES = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)
CASES: tuple[tuple[str, dict[str, object]], ...] = (
    ("ties", {"density": 0.2}),
    ("magnitude_prune", {"density": 0.2}),
    ("breadcrumbs", {"density": 0.143}),
    ("sce", {"density": 0.1}),
    ("dare", {"density": 0.2}),
    ("dare", {"density": 0.7}),
    ("della", {"density": 0.7}),
)


def main() -> None:
    print("| method | rank | kept at the inputs' rank | kept at their sum | error to the weighted sum: whole, cut |")
    print("|---|---|---|---|---|")
    for name, options in CASES:
        for rank in (8, 32, 128):
            sums = np.sum([list(measured(pair, rank, name, options)) for pair in pairs(rank)], axis=0)
            energy, at_max, at_sum, whole, cut, plain = sums
            error = f"{math.sqrt(whole / plain):.2f}, {math.sqrt(cut / plain):.2f}"
            label = ", ".join([f"`{name}`", *(f"{key} {value}" for key, value in options.items())])
            print(f"| {label} | {rank} | {at_max / energy:.0%} | {at_sum / energy:.0%} | {error} |", flush=True)


def pairs(rank: int) -> Iterator[Sequence[LowRank]]:
    shapes = loras.modules("attn")
    for module in MODULES:
        yield [loras.layer(module, shapes[module], rank, seed) for seed in (1, 2)]


def measured(pair: Sequence[LowRank], rank: int, name: str, options: dict[str, object]) -> Iterator[float]:
    """Yield energies: the result's, those kept at both ranks, those of differences from the sum, the sum's."""
    merged = _dense(METHODS[name].merge(pair, [0.5, 0.5], **options))
    plain = sum(0.5 * _dense(layer) for layer in pair)
    cuts = [linalg.truncate_dense(merged, r) for r in (rank, 2 * rank)]
    yield cuts[0].energy
    yield from (cut.energy - cut.lost for cut in cuts)
    yield from (_energy(found - plain) for found in (merged, cuts[0].up @ cuts[0].down))
    yield _energy(plain)


def _dense(layer: object) -> NDArray[np.float32]:
    return np.asarray(matrix(layer.delta()), dtype=np.float32)  # type: ignore[attr-defined]


def _energy(values: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(values.astype(np.float64)) ** 2)


if __name__ == "__main__":
    main()
