"""Measure how far a merged file is from the weighted sum of its inputs, and from the best fit of its rank.

    python benchmarks/accuracy.py MERGED --files FILE FILE … --weights 0.5 0.5

Files have PEFT's key suffixes.  QR of both factors leaves a small core with the same norm and
singular values as ΔW, so everything is computed in float64 and nothing dense is formed.
"""

import argparse
import json
import math

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[np.float64]
Factors = tuple[Array, Array]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the relative error of a merged file.")
    parser.add_argument("merged")
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--weights", type=float, nargs="+")
    parser.add_argument("--every", type=int, default=7, help="take every n-th module")
    given = parser.parse_args()
    weights = given.weights or [1 / len(given.files)] * len(given.files)
    print("BENCH " + json.dumps(errors(given.merged, given.files, weights, given.every)))


def errors(merged: str, files: list[str], weights: list[float], every: int) -> dict[str, float]:
    """Return two relative errors over the modules in Frobenius norm: the file's, and the least at its rank."""
    whole, off, best = 0.0, 0.0, 0.0
    for module in _modules(merged)[::every]:
        found = _factors(merged, module)
        wanted = _sum([_factors(path, module) for path in files], weights)
        squares = np.linalg.svd(_core(wanted), compute_uv=False) ** 2
        whole += squares.sum()
        best += squares[found[1].shape[0] :].sum()
        off += (_core(_difference(found, wanted)) ** 2).sum()
    return {"error": math.sqrt(off / whole), "optimum": math.sqrt(best / whole)}


def _modules(path: str) -> list[str]:
    with safe_open(path, "np") as file:
        keys = sorted(file.keys())
    names = [key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")]
    if not names:
        raise ValueError(f"{path} has no key that ends in .lora_A.weight.")
    return names


def _factors(path: str, module: str) -> Factors:
    with safe_open(path, "np") as file:
        up, down = (file.get_tensor(f"{module}.lora_{part}.weight").astype(np.float64) for part in "BA")
    return up, down


def _sum(factors: list[Factors], weights: list[float]) -> Factors:
    ups = [weight * up for (up, _), weight in zip(factors, weights, strict=True)]
    return np.concatenate(ups, axis=1), np.concatenate([down for _, down in factors])


def _difference(found: Factors, wanted: Factors) -> Factors:
    return np.concatenate([found[0], -wanted[0]], axis=1), np.concatenate([found[1], wanted[1]])


def _core(factors: Factors) -> Array:
    up, down = factors
    return np.linalg.qr(up, mode="r") @ np.linalg.qr(down.T, mode="r").T


if __name__ == "__main__":
    main()
