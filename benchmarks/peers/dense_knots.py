"""Run KnOTS with TIES inside, as in its paper: a dense SVD of [ΔW₁ … ΔW_N], in float64.

    python benchmarks/peers/dense_knots.py OUT FILE FILE … --density 0.2 --modules 4

Stoica et al., 2024, section 4, https://arxiv.org/abs/2410.19735.  Weights are 1/N.
"""

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from sampling import modules

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with dense KnOTS and print the times.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--modules", type=int)
    given = parser.parse_args()
    chosen = modules(given.files[0], given.modules)
    began, began_cpu = time.perf_counter(), time.process_time()
    merged = {module: knots([delta(path, module) for path in given.files], given.density) for module in chosen}
    report = {
        "ms": 1e3 * (time.perf_counter() - began) / len(chosen),
        "cpu_ms": 1e3 * (time.process_time() - began_cpu) / len(chosen),
    }
    save_file(merged, given.out)
    print("BENCH " + json.dumps(report))


def delta(path: str, module: str) -> Array:
    with safe_open(path, "np") as file:
        up, down = (file.get_tensor(f"{module}.lora_{part}.weight").astype(np.float64) for part in "BA")
    return up @ down


def knots(deltas: list[Array], density: float) -> Array:
    """Return U · TIES(S V₁, …, S V_N), without the directions whose singular value is rounding noise."""
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > 1e-9 * s[0]
    return u[:, kept] @ ties(np.split(s[kept, None] * vt[kept], len(deltas), axis=1), density)


def ties(parts: list[Array], density: float) -> Array:
    """Trim, elect signs, and take the mean of those that agree."""
    trimmed = np.stack([trim(part, density) for part in parts])
    agree = np.sign(trimmed) == np.sign(trimmed.sum(axis=0))
    agree &= trimmed != 0
    return (trimmed * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def trim(part: Array, density: float) -> Array:
    magnitudes = np.abs(part)
    threshold = np.sort(magnitudes, axis=None)[-int(density * part.size)]
    return part * (magnitudes >= threshold)


if __name__ == "__main__":
    main()
