"""Time the BLAS and LAPACK calls that a task needs on the modules of a LoRA, on arrays that are there already.

    python benchmarks/arithmetic.py cut FILE --total 128 --rank 64

Nothing is read, converted, checked or written, so this is what no program with the same algorithm can go below.  Each
shape is computed three times at most, and counted as often as the LoRA has it.  The algorithms are those of
`loramerge.linalg`, with its precisions:

cut      the best fit of a rank to a sum of factors: Gram products, Cholesky, an eigenproblem, two products
compare  two halves of the factors: Gram products, the SVDs of both and the singular values of their sum, inner products
         of columns, and the signs of 64 rows
qr       the distance of two LoRAs: the triangles of both sides' QR, and the norm of their product
dense    ΔW of every module
fit      the best fit of a rank to a dense ΔW: the randomised range finder with three iterations
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

import loramerge as lm
from loramerge.layers import Layer
from loramerge.tensors import Array

REPEATS = 3
Work = Callable[[], object]


def cut(rows: int, columns: int, total: int, rank: int) -> Work:
    up, down = _normal(rows, total), _normal(total, columns)
    wide_up, wide_down = up.astype(np.float64), down.astype(np.float64)

    def work() -> None:
        gram_up, gram_down = wide_up.T @ wide_up, wide_down @ wide_down.T
        lower = np.linalg.cholesky(gram_down + 1e-9 * np.trace(gram_down) * np.eye(total))
        half = gram_up @ lower
        vectors = np.linalg.eigh(lower.T @ half)[1][:, -rank:]
        up @ (lower @ vectors).astype(np.float32)
        (half @ vectors).astype(np.float32).T @ down

    return work


def compare(rows: int, columns: int, total: int, rank: int) -> Work:
    narrow = _normal(rows, total), _normal(total, columns)
    up, down = (factor.astype(np.float64) for factor in narrow)
    halves = slice(0, total // 2), slice(total // 2, total)

    def root(gram: Array) -> Array:
        return np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))

    def work() -> None:
        gram_up, gram_down = up.T @ up, down @ down.T
        for own in halves:
            np.linalg.svd(root(gram_up[own, own]).T @ root(gram_down[own, own]), full_matrices=False)
        np.linalg.svd(root(gram_up).T @ root(gram_down), compute_uv=False)
        for i, j in ((0, 0), (0, 1), (1, 1)):
            (down[halves[i]] * (gram_up[halves[i], halves[j]] @ down[halves[j]])).sum(axis=0)
        first, second = (narrow[0][:ROWS, own] @ narrow[1][own] for own in halves)
        sizes = np.abs(first) + np.abs(second)
        (sizes * (first * np.sign(second) < 0)).sum()

    return work


ROWS = 64
"""Rows of ΔW whose signs are compared."""


def qr(rows: int, columns: int, total: int, rank: int) -> Work:
    up, down = _normal(rows, total).astype(np.float64), _normal(total, columns).astype(np.float64)
    return lambda: np.linalg.norm(_triangle(up) @ _triangle(down.T).T)


def _triangle(matrix: Array) -> Array:
    return np.linalg.qr(matrix, mode="r")


def dense(rows: int, columns: int, total: int, rank: int) -> Work:
    up, down = _normal(rows, total), _normal(total, columns)
    return lambda: up @ down


def fit(rows: int, columns: int, total: int, rank: int) -> Work:
    delta, size = _normal(rows, columns), min(rank + max(16, rank // 2), rows, columns)
    start = _normal(columns, size)

    def work() -> None:
        basis = delta @ start
        for _ in range(3):
            basis = delta @ (delta.T @ np.linalg.qr(basis)[0])
        basis = np.linalg.qr(basis)[0]
        core = basis.T @ delta
        vectors = np.linalg.eigh((core @ core.T).astype(np.float64))[1][:, -rank:].astype(np.float32)
        (basis @ vectors) @ (vectors.T @ core)  # the error that is reported is that of this product

    return work


TASKS = {task.__name__: task for task in (cut, compare, qr, dense, fit)}


def _normal(rows: int, columns: int) -> Array:
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the time of a task's arithmetic.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("file")
    parser.add_argument("--total", type=int, required=True, help="the sum of the ranks")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--times", type=int, default=1, help="how often the task is done")
    parser.add_argument("--architecture")
    given = parser.parse_args()
    with lm.open(given.file, architecture=given.architecture) as lora:
        shapes = Counter(_matrix(layout) for layout in lora.layouts.values())
    wall = cpu = 0.0
    for (rows, columns), count in shapes.items():
        work = TASKS[given.task](rows, columns, given.total, given.rank)
        repeats = min(count, REPEATS)
        work()
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            work()
        wall += (time.perf_counter() - began) * count / repeats
        cpu += (time.process_time() - began_cpu) * count / repeats
    report = {"run": given.times * wall, "run_cpu": given.times * cpu, "modules": sum(shapes.values())}
    print("BENCH " + json.dumps(report))


def _matrix(layout: Layer) -> tuple[int, int]:
    return layout.shape[0], math.prod(layout.shape[1:])


if __name__ == "__main__":
    main()
