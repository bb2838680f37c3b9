"""Compare a merge method's results with dense float64 algebra, on a few modules.

    python benchmarks/exactness.py cut dare --files FILE FILE … --rank 8 --option density=0.2
    python benchmarks/exactness.py same knots --files FILE FILE … --against DENSE

``cut`` compares the result at a rank with the best fit of that rank to the same merged ΔW, by its
dense SVD.  ``same`` compares the uncut result with dense ones in a file, by module.
"""

import argparse
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loramerge as lm
from loramerge.layers import LowRank
from loramerge.merging.methods import METHODS
from loramerge.merging.methods.base import Merged
from loramerge.merging.methods.selection import module_seed
from one_method import parsed
from peers.sampling import modules

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how exact a merge method's results are.")
    parser.add_argument("question", choices=["cut", "same"])
    parser.add_argument("method")
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--against")
    given = parser.parse_args()
    options = METHODS[given.method].check(parsed(given.method, given.option))
    if given.question == "same":
        report = same(given.files, given.method, options, load_file(given.against))
    else:
        report = cut(given.files, given.method, options, given.rank, given.modules)
    print("BENCH " + json.dumps(report))


def same(files: list[str], method: str, options: dict[str, Any], wanted: dict[str, Array]) -> dict[str, float]:
    """Return the largest relative difference from dense results."""
    loras = [lm.open(path) for path in files]
    found = ((merged(loras, module, method, options), dense) for module, dense in wanted.items())
    return {"difference": max(math.sqrt(_square(ours - dense) / _square(dense)) for ours, dense in found)}


def cut(files: list[str], method: str, options: dict[str, Any], rank: int, count: int) -> dict[str, float]:
    """Return the cut's largest excess over the optimum, and what it keeps.

    ``noise`` is the distance from the weighted sum over that sum's norm, before the cut and after it.
    """
    loras = [lm.open(path) for path in files]
    planned = lm.plan(loras, weights="uniform", method=method, rank=rank, **options)
    excess, energy, lost, noise, noise_after, signal = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for module in modules(files[0], count):
        whole, linear = merged(loras, module, method, options), merged(loras, module, "linear", {})
        kept = _delta(planned.merger.outcome(module).layer)
        squares = np.linalg.svd(whole, compute_uv=False) ** 2
        error = _square(whole - kept)
        excess = max(excess, math.sqrt(error / squares[rank:].sum()) - 1)
        energy, lost, signal = energy + squares.sum(), lost + error, signal + _square(linear)
        noise, noise_after = noise + _square(whole - linear), noise_after + _square(kept - linear)
    return {
        "excess": excess,
        "kept": 1 - lost / energy,
        "noise": math.sqrt(noise / signal),
        "noise_after": math.sqrt(noise_after / signal),
    }


def merged(loras: list[lm.LoRA], module: str, method: str, options: dict[str, Any]) -> Array:
    """Return a method's own result of a module, before any cut."""
    seeded = {"seed": module_seed(options["seed"], module)} if "seed" in options else {}
    layers, weights = [lora[module] for lora in loras], [1 / len(loras)] * len(loras)
    return _delta(METHODS[method].merge(layers, weights, **{**options, **seeded}))


def _delta(layer: Merged) -> Array:
    if isinstance(layer, LowRank):
        up, down = layer.factors()
        return up.astype(np.float64) @ down.astype(np.float64)
    return layer.delta().astype(np.float64)


def _square(matrix: Array) -> float:
    return float((matrix**2).sum())


if __name__ == "__main__":
    main()
