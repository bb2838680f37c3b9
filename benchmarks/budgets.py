"""What one budget for all modules saves: the tables of docs/how-to/resize.md.

Every module is cut to the least rank at which its own error, ‖ΔW − kept‖ / ‖ΔW‖, is at most a given
one, as tools with a share of energy a layer do; then one budget for all modules has to meet the same
total error.  The second table asks for 1 % and for half of the size, and measures what was written.
The synthetic LoRAs are those of loras.py; name files of your own for real ones.

    python benchmarks/budgets.py [FILE …]
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

import loramerge as lm
import loras
from loramerge import linalg
from loramerge.comparison import differences

ERRORS = (0.5, 0.3, 0.1, 0.03, 0.01)
Ranks = Mapping[str, int]


def main(files: list[str]) -> None:
    found = [*given(files), *synthetic()]
    print("| LoRA | error of each module | error of all | its size / whole | one budget / its size |")
    print("|---|---:|---:|---:|---:|")
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
        yield lm.load(file)


def synthetic() -> Iterator[lm.LoRA]:
    for rank in (8, 32):
        layers = {name: loras.layer(name, shape, rank, 1) for name, shape in loras.modules("attn").items()}
        name = f"synthetic, SDXL, rank {rank}"
        yield lm.LoRA(name=name, architecture="sdxl", dialect="kohya", layouts=layers, dtype="F16")


def shares(lora: lm.LoRA) -> Iterator[list[str]]:
    """Sizes at the same total error, for each error of the modules."""
    squares = spectra(lora)
    whole = {module: len(values) for module, values in squares.items()}
    for error in ERRORS:
        each = by_module(squares, error)
        total = error_of(squares, each)
        if not total:
            yield [f"{error:.2f}", "0", f"{size(lora, each) / size(lora, whole):.3f}", "1.000"]
            continue
        ranks = lm.plan([lora], weights=[1], max_error=total).ranks
        assert ranks is not None
        one = size(lora, {module: min(rank, ranks[module]) for module, rank in whole.items()})
        own = size(lora, each)
        yield [f"{error:.2f}", f"{total:.2g}", f"{own / size(lora, whole):.3f}", f"{one / own:.3f}"]


def spectra(lora: lm.LoRA) -> dict[str, np.ndarray]:
    """Squared singular values of every module that is not zero."""
    found = {module: linalg.squares(*layer.factors()) for module, layer in lora.items()}
    return {module: values for module, values in found.items() if len(values)}


def by_module(squares: Mapping[str, np.ndarray], error: float) -> Ranks:
    """The least rank of every module at which its own error is met."""
    return {
        module: 1 + int((values.sum() - np.cumsum(values) > (error**2 + 1e-12) * values.sum()).sum())
        for module, values in squares.items()
    }


def error_of(squares: Mapping[str, np.ndarray], ranks: Ranks) -> float:
    """‖ΔW − kept‖ / ‖ΔW‖ over all modules."""
    lost = sum(float(values[ranks[module] :].sum()) for module, values in squares.items())
    return math.sqrt(lost / sum(float(values.sum()) for values in squares.values()))


def size(lora: lm.LoRA, ranks: Ranks) -> int:
    """How many numbers the factors take."""
    shapes = {module: lora.layout(module).shape for module in ranks}
    return sum(rank * (shapes[module][0] + math.prod(shapes[module][1:])) for module, rank in ranks.items())


def met(lora: lm.LoRA) -> list[str]:
    """What budgets of 1 % and of half of the size give, measured."""
    squares = spectra(lora)
    full = sum(rank == len(squares[module]) for module, rank in by_module(squares, 0.01).items())
    small = lm.resize(lora, max_error="1%")
    apart = list(differences(lora, small))
    error = math.sqrt(sum(d.distance**2 for d in apart) / sum(d.norm**2 for d in apart))
    with tempfile.TemporaryDirectory() as folder:
        whole, kept, half = Path(folder, "whole"), Path(folder, "kept"), Path(folder, "half")
        before = written(lora, whole)
        asked = before // 2
        sizes = written(small, kept) / before, written(lm.resize(lora, max_size=asked), half) / asked
    return [f"{full} of {len(lora)}", f"{error:.4%}", f"{sizes[0]:.3f}", f"{sizes[1]:.4f}"]


def written(lora: lm.LoRA, path: Path) -> int:
    return lm.save(lora, path.with_suffix(".safetensors"), dialect="kohya", dtype="float16").stat().st_size


if __name__ == "__main__":
    main(sys.argv[1:])
