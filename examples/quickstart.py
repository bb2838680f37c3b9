"""Merge two LoRAs that different tools wrote, and check the result against the dense sum.

Needs nothing but loramerge.  The two are LoRAs of the miniature in ``virtual_tryon``, a person's and a jersey's.
Files go to ``demo_output/``.

    python examples/quickstart.py
"""

import math
import sys
from pathlib import Path

import loramerge as lm
from loramerge.files import block
from loramerge.testing import relative_error, weighted_sum

INPUTS = Path(__file__).parent / "virtual_tryon" / "weights" / "loras"
OUTPUT = Path("demo_output")
WEIGHTS = [1.0, 0.8]
DIALECTS = ["kohya", "diffusers", "comfyui"]
TOLERANCE = 1e-6


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    loras = [lm.load(INPUTS / name) for name in ("person.safetensors", "jersey.safetensors")]
    print("Two LoRAs, from two tools:\n")
    print("  file                dialect         modules  rank    alpha     norm")
    for lora in loras:
        rank, alpha = lora.summary("rank"), lora.summary("alpha")
        print(f"  {lora.name:19s} {lora.dialect:15s} {len(lora):7d}  {rank:7s} {alpha:9s} {lora.norm():.1f}")

    both = lm.merge(loras, weights=WEIGHTS)
    print(f"\nMerged, {WEIGHTS[0]:g} × person + {WEIGHTS[1]:g} × jersey: {both.summary('rank')} in every module.")

    # float32, so that only the merge's own error is seen: the inputs are in float16.
    paths = [
        lm.save(both, OUTPUT / f"both-{dialect}.safetensors", dialect=dialect, dtype="float32") for dialect in DIALECTS
    ]
    again = [lm.load(path) for path in paths]
    in_memory, *errors = largest_errors([both, *again], loras)
    print(f"Largest relative error of a module against the dense float64 sum: {in_memory:.1e}.")

    print("\nSaved in three dialects, read back, and compared again:\n")
    print("  dialect    file                            size  modules  largest relative error")
    for path, lora, error in zip(paths, again, errors, strict=True):
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        print(f"  {lora.dialect:10s} {path.name:27s} {size:>8s} {len(lora):8d}  {error:.1e}")

    print("\nNorm of the merged update, block by block:\n")
    print_norms(both)

    worst = max(in_memory, *errors)
    if not worst <= TOLERANCE:
        sys.exit(f"\nThe merge is off by {worst:.1e}, more than {TOLERANCE:.0e}.")
    print(f"\nEvery error is below {TOLERANCE:.0e}. The files are in {OUTPUT}/.")


def largest_errors(found: list[lm.LoRA], inputs: list[lm.LoRA]) -> list[float]:
    """Return the largest relative error of each LoRA found, over all modules, against Σ wᵢ ΔWᵢ as dense matrices."""
    worst = [0.0] * len(found)
    for module in inputs[0]:
        dense = weighted_sum(inputs, WEIGHTS, module)
        for i, lora in enumerate(found):
            worst[i] = max(worst[i], relative_error(lora[module].delta(), dense))
    return worst


def print_norms(lora: lm.LoRA) -> None:
    squares: dict[str, float] = {}
    for module, layer in lora.items():
        name = block(module, lora.architecture)
        squares[name] = squares.get(name, 0.0) + layer.norm() ** 2
    largest = math.sqrt(max(squares.values()))
    for name in sorted(squares):
        norm = math.sqrt(squares[name])
        print(f"  {name:5s} {norm:7.1f}  {'█' * round(40 * norm / largest)}")


if __name__ == "__main__":
    main()
