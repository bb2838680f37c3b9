"""Measure what one budget for all modules saves: the tables of docs/how-to/resize.md.

Every module is cut to the least rank at which its own error, ‖ΔW − kept‖ / ‖ΔW‖, is at most a given
one, as tools with a share of energy per layer do; then one budget for all modules has to meet the same
total error.  The last column is for directions that could be kept in part, at the error of the first
column: they show whether the coarse steps between ranks matter.  The second table asks for 1 % and for half of
the size, and measures what was written.  The synthetic LoRAs are those of loras.py; name your own files for real ones.

    python benchmarks/budgets.py [FILE …]
"""

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import loramerge as lm
import loras
from loramerge import linalg
from loramerge.comparing.diffs import differences

ERRORS = (0.5, 0.3, 0.1, 0.03, 0.01)
Ranks = Mapping[str, int]


def main(files: list[str]) -> None:
    found = [*given(files), *synthetic()]
    print("| LoRA | error of each module | error of all | its size / whole | one budget / its size | in parts |")
    print("|---|---:|---:|---:|---:|---:|")
    for lora in found:
        for row in shares(lora):
            print(f"| {lora.name} | {' | '.join(row)} |", flush=True)
    print(
        "\n| LoRA | modules that need their whole rank at 1 % | error at 1 % | size / whole | size / half, asked for |"
    )
    print("|---|---:|---:|---:|---:|")
    for lora in found:
        print(f"| {lora.name} | {' | '.join(met(lora))} |", flush=True)


def given(files: list[str]) -> Iterator[lm.LoRA]:
    for file in files:
        yield replace(lm.load(file), dialect="kohya")


def synthetic() -> Iterator[lm.LoRA]:
    for rank in (8, 32):
        layers = {name: loras.layer(name, shape, rank, 1) for name, shape in loras.modules("attn").items()}
        name = f"synthetic, SDXL, rank {rank}"
        yield lm.LoRA(name=name, architecture="sdxl", dialect="kohya", layouts=layers, dtype="F16")


def shares(lora: lm.LoRA) -> Iterator[list[str]]:
    """Return sizes at the same total error, for each error of the modules."""
    squares = spectra(lora)
    whole = {module: len(values) for module, values in squares.items()}
    for error in ERRORS:
        parts = f"{in_parts(squares, costs(lora, squares), error):.3f}"
        each = by_module(squares, error)
        total = error_of(squares, each)
        if not total:
            yield [f"{error:.2f}", "0", f"{size(lora, each) / size(lora, whole):.3f}", "1.000", parts]
            continue
        ranks = lm.plan([lora], weights=[1], max_error=total).ranks
        assert ranks is not None
        one = size(lora, {module: min(rank, ranks[module]) for module, rank in whole.items()})
        own = size(lora, each)
        yield [f"{error:.2f}", f"{total:.2g}", f"{own / size(lora, whole):.3f}", f"{one / own:.3f}", parts]


def spectra(lora: lm.LoRA) -> dict[str, np.ndarray]:
    """Return the squared singular values of every module that is not zero."""
    found = {module: linalg.squares(*layer.factors()) for module, layer in lora.items()}
    return {module: values for module, values in found.items() if len(values)}


def by_module(squares: Mapping[str, np.ndarray], error: float) -> Ranks:
    """Return the least rank of every module at which its own error is met."""
    return {
        module: 1 + int((values.sum() - np.cumsum(values) > (error**2 + 1e-12) * values.sum()).sum())
        for module, values in squares.items()
    }


def error_of(squares: Mapping[str, np.ndarray], ranks: Ranks) -> float:
    """Return ‖ΔW − kept‖ / ‖ΔW‖ over all modules."""
    lost = sum(float(values[ranks[module] :].sum()) for module, values in squares.items())
    return math.sqrt(lost / sum(float(values.sum()) for values in squares.values()))


def size(lora: lm.LoRA, ranks: Ranks) -> int:
    """Count the numbers in the factors."""
    return sum(rank * cost for rank, cost in zip(ranks.values(), costs(lora, ranks).values(), strict=True))


def costs(lora: lm.LoRA, modules: Iterable[str]) -> dict[str, int]:
    """Return how many numbers one direction of each module takes."""
    shapes = {module: lora.layout(module).shape for module in modules}
    return {module: shape[0] + math.prod(shape[1:]) for module, shape in shapes.items()}


def in_parts(squares: Mapping[str, np.ndarray], costs: Mapping[str, int], error: float) -> float:
    """Divide one budget's size by that of the same error in every module, if directions could be kept in part."""
    directions = [(values / costs[m], values, np.full(len(values), costs[m])) for m, values in squares.items()]
    allowed = [error**2 * values.sum() for values in squares.values()]
    each = sum(_left(*which, lost) for which, lost in zip(directions, allowed, strict=True))
    value, energy, cost = map(np.concatenate, zip(*directions, strict=True))
    return _left(value, energy, cost, sum(allowed)) / each


def _left(value: np.ndarray, squares: np.ndarray, costs: np.ndarray, allowed: float) -> float:
    """Count the numbers that stay when the least valuable directions are dropped until so much energy is lost."""
    order = np.argsort(value)
    before = np.cumsum(squares[order]) - squares[order]
    gone = np.clip((allowed - before) / squares[order], 0.0, 1.0)
    return float(((1 - gone) * costs[order]).sum())


def met(lora: lm.LoRA) -> list[str]:
    """Measure what budgets of 1 % and of half of the size give."""
    squares = spectra(lora)
    full = sum(rank == len(squares[module]) for module, rank in by_module(squares, 0.01).items())
    small = lm.resize(lora, max_error="1%")
    apart = list(differences(lora, small))
    error = math.sqrt(sum(d.distance**2 for d in apart) / sum(d.norm**2 for d in apart))
    with tempfile.TemporaryDirectory() as folder:
        whole, kept, half = Path(folder, "whole"), Path(folder, "kept"), Path(folder, "half")
        before = written(lm.merge([lora], weights=[1]), whole)
        asked = before // 2
        sizes = written(small, kept) / before, written(lm.resize(lora, max_size=asked), half) / asked
    return [f"{full} of {len(lora)}", f"{error:.4%}", f"{sizes[0]:.3f}", f"{sizes[1]:.4f}"]


def written(lora: lm.LoRA, path: Path) -> int:
    return lm.save(lora, path.with_suffix(".safetensors")).stat().st_size


if __name__ == "__main__":
    main(sys.argv[1:])
