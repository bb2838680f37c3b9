"""Measure what averages of factors lose beside averages of ΔW: the table of docs/how-to/average.md.

A LoRA of rank 8 learns a noisy 128 × 96 matrix, by gradient descent or Adam, and every 40th step is a checkpoint, as a
trainer's are.  Their mean is formed in float64; beside it are the best fit of the run's own rank, which `average` gives, and
the product of the factors' means, which other tools save.

    python benchmarks/averages.py
"""

import math

import numpy as np

import loramerge as lm
from loramerge.layers import low_rank
from loramerge.testing import relative_error

OUT, IN, RANK, EVERY, COUNT = 128, 96, 8, 40, 8
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
RUNS = (
    ("gradient descent, 0.01", 0.01, 1),
    ("Adam, 0.003", 0.003, 1),
    ("Adam, 0.01", 0.01, 1),
    ("Adam, 0.01, more noise", 0.01, 5),
)

Factors = tuple[np.ndarray, np.ndarray]


def main() -> None:
    print("| training, learning rate | checkpoints | `average`, rank 8 | mean of factors | rank for 1 % |")
    print("|---|---|---:|---:|---:|")
    for title, rate, noise in RUNS:
        for which, chosen in (("all 8", slice(0, COUNT)), ("last 4", slice(COUNT // 2, COUNT))):
            rows = [losses(trained(title.startswith("Adam"), rate, noise, seed)[chosen]) for seed in range(3)]
            cut, factors, rank = np.mean(rows, 0)
            print(f"| {title} | {which} | {100 * cut:.2g} % | {100 * factors:.2g} % | {rank:.0f} |")


def trained(adam: bool, rate: float, noise: float, seed: int) -> list[Factors]:
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((OUT, 12)) @ rng.standard_normal((12, IN)) / 12
    factors = [np.zeros((OUT, RANK)), rng.standard_normal((RANK, IN)) / math.sqrt(IN)]
    means, squares, found = [0.0, 0.0], [0.0, 0.0], []
    for step in range(1, COUNT * EVERY + 1):
        up, down = factors
        error = up @ down - target - noise * rng.standard_normal((OUT, IN))
        for i, gradient in enumerate((error @ down.T, up.T @ error)):
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            scaled = means[i] / (1 - 0.9**step) / (np.sqrt(squares[i] / (1 - 0.999**step)) + 1e-8)
            factors[i] = factors[i] - rate * (scaled if adam else gradient)
        if step % EVERY == 0:
            found.append((factors[0], factors[1]))
    return found


def losses(run: list[Factors]) -> tuple[float, float, int]:
    """Return the relative errors of both averages, and the rank at which ours has an error of 1 %."""
    exact = sum(up @ down for up, down in run) / len(run)
    factors = sum(up for up, _ in run) @ sum(down for _, down in run) / len(run) ** 2
    layers = [low_rank(up.astype(np.float32), down.astype(np.float32), (OUT, IN)) for up, down in run]
    loras = [
        lm.LoRA(name=str(i), architecture=None, dialect="kohya", layouts={MODULE: x}) for i, x in enumerate(layers)
    ]
    ours, nearer = lm.average(loras)[MODULE], lm.average(loras, max_error=0.01)[MODULE]
    assert ours.rank == RANK
    return relative_error(ours.delta(), exact), relative_error(factors, exact), nearer.rank or 0


if __name__ == "__main__":
    main()
