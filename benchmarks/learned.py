"""Measure how well merges keep what their LoRAs do, on a toy world where the right answer is known.

    python benchmarks/learned.py [--seeds 3] [--markdown FILE]

For each seed a base model and two LoRAs are trained (about ten minutes on a core), merged by every
method, and compared on held-out data:

fit     mean over the LoRAs of ‖ε_merge − ε_LoRA‖² / ‖ε_base − ε_LoRA‖² on its own data; 0 is best, 1 the base
joint   noise error on true pictures of the subject in the style
known   noise error on what the base knew
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

import loramerge as lm
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.columns import settings, ziplora
from loramerge.learned.least_squares import lsq
from toy_world import STYLE, SUBJECT, Pictures, pictures, predict, train_base, train_lora

GOALS = {
    "ZipLoRA, paper": 0.40,
    "least squares, core": 0.45,
    "least squares, column": 0.45,
    "ZipLoRA, default": 0.30,
    "ZipLoRA, down": 0.15,
}
Rows: TypeAlias = dict[str, list[dict[str, float]]]
"""The figures of every seed, by merge."""
ROUNDS = 3
"""Held-out passes, each with its own noise."""


class World:
    """One seed: a base, its LoRAs, and how merges are measured on it."""

    def __init__(self, seed: int, base_steps: int, lora_steps: int) -> None:
        self.seed = seed
        self.unet = train_base(100 * seed, base_steps)
        self.data = [pictures(48, 100 * seed + 11, shape=SUBJECT), pictures(24, 100 * seed + 12, kind=STYLE)]
        self.loras = [
            train_lora(self.unet, data, name, 8, 100 * seed + i, lora_steps)
            for i, (name, data) in enumerate(zip(("subject", "style"), self.data, strict=True))
        ]
        self.held_out = [pictures(64, 100 * seed + 21, shape=SUBJECT), pictures(64, 100 * seed + 22, kind=STYLE)]
        self.joint = pictures(64, 100 * seed + 23, shape=SUBJECT, kind=STYLE)
        self.known = pictures(64, 100 * seed + 24)
        pairs = list(zip(self.loras, self.held_out, strict=True))
        self.wanted = [self.outputs(lora, data)[0] for lora, data in pairs]
        self.effects = [
            F.mse_loss(self.outputs(None, data)[0], wanted)
            for (_, data), wanted in zip(pairs, self.wanted, strict=True)
        ]

    def predict(self, batch: Any) -> torch.Tensor:
        return predict(self.unet, batch)

    def draw(self, lora: int, generator: torch.Generator, count: int) -> Any:
        return self.data[lora].noised(generator, count)[0]

    @torch.no_grad()
    def outputs(self, lora: lm.LoRA | None, data: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's answer to held-out data with a LoRA, and the noise that was in the data."""
        generator = torch.Generator().manual_seed(self.seed)
        said, noises = [], []
        for _ in range(ROUNDS):
            batch, noise = data.noised(generator)
            noises.append(noise)
            if lora is None:
                said.append(self.predict(batch))
            else:
                with attach({"unet": self.unet}, [lora]):
                    said.append(self.predict(batch))
        return torch.cat(said), torch.cat(noises)

    def measure(self, merged: lm.LoRA | None) -> dict[str, float]:
        fits = [
            float(F.mse_loss(self.outputs(merged, data)[0], wanted) / effect)
            for data, wanted, effect in zip(self.held_out, self.wanted, self.effects, strict=True)
        ]
        joint, known = (float(F.mse_loss(*self.outputs(merged, data))) for data in (self.joint, self.known))
        return {"fit": sum(fits) / 2, "subject": fits[0], "style": fits[1], "joint": joint, "known": known}

    def methods(self) -> dict[str, Callable[[], lm.LoRA]]:
        moments: dict[str, Any] = {}

        def closed(granularity: str, rounds: int = 1) -> lm.LoRA:
            if "first" not in moments:
                moments["first"] = self.calibrated()
            found = lsq(self.loras, moments["first"], granularity=granularity)[0]  # type: ignore[arg-type]
            for _ in range(rounds - 1):
                again = moments["first"].averaged(self.calibrated(found))
                found = lsq(self.loras, again, granularity=granularity)[0]  # type: ignore[arg-type]
            return found

        def zipped(preset: str, **changes: Any) -> lm.LoRA:
            given = settings(preset, seed=self.seed, **changes)
            return ziplora(self.predict, {"unet": self.unet}, self.loras, self.draw, given).lora

        def merged(method: str, **options: Any) -> lm.LoRA:
            return lm.merge(self.loras, method=method, **options)

        return {
            "sum": lambda: merged("linear", weights=[1, 1]),
            "average": lambda: merged("linear", weights="uniform"),
            "l2": lambda: merged("linear", weights="l2"),
            "ties, core": lambda: merged("ties", weights=[1, 1], space="core"),
            "ties": lambda: merged("ties", weights=[1, 1]),
            "dare": lambda: merged("dare", weights=[1, 1]),
            "knots": lambda: merged("knots", weights=[1, 1]),
            "tsv": lambda: merged("tsv", weights=[1, 1]),
            "iso_c": lambda: merged("iso_c", weights=[1, 1]),
            "np_lora": lambda: merged("np_lora", weights=[1, 1]),
            "slerp": lambda: merged("slerp"),
            "model_stock": lambda: merged("model_stock", weights=[1, 1]),
            **{
                f"least squares, {g}": (lambda g=g: closed(g))
                for g in ("global", "layer", "rank", "core", "column", "full")
            },
            "least squares, full, two rounds": lambda: closed("full", 2),
            "ZipLoRA, mkshing": lambda: zipped("mkshing"),
            "ZipLoRA, paper": lambda: zipped("paper"),
            "ZipLoRA, default": lambda: zipped("default", batch_size=8),
            "ZipLoRA, 20 steps from the closed form": lambda: zipped("default", batch_size=8, steps=20),
            "ZipLoRA, 100 steps from ones": lambda: zipped("default", batch_size=8, steps=100, init="ones"),
            "ZipLoRA, 20 steps from ones": lambda: zipped("default", batch_size=8, steps=20, init="ones"),
            "ZipLoRA, down": lambda: zipped("default", batch_size=8, steps=100, parametrisation="down"),
        }

    def calibrated(self, merged: lm.LoRA | None = None) -> Any:
        return calibrate(
            self.predict,
            {"unet": self.unet},
            self.loras,
            self.draw,
            kind="gram",
            batches=16,
            batch_size=8,
            seed=self.seed,
            merged=merged,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=2500)
    parser.add_argument("--lora-steps", type=int, default=600)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: Rows = {}
    for seed in range(1, given.seeds + 1):
        world = World(seed, given.base_steps, given.lora_steps)
        print(f"seed {seed}: trained in {time.process_time():.0f} CPU s", flush=True)
        measure(rows, {"base": lambda: None, **world.methods()}, world.measure)
    publish(table(rows, ["fit", "subject", "style", "joint", "known", "CPU s"], "goal", _met), given.markdown)


def measure(
    rows: Rows, methods: Mapping[str, Callable[[], Any]], figures: Callable[[Any], dict[str, float]], label: str = " "
) -> None:
    """Make each merge of a seed, and add its figures and its CPU time to its row."""
    for name, make in methods.items():
        began = time.process_time()
        merged = make()
        took = time.process_time() - began
        rows.setdefault(name, []).append({**figures(merged), "CPU s": took})
        said = "  ".join(f"{k} {v:.3f}" for k, v in rows[name][-1].items())
        print(f"{label} {name:42s}{said}", flush=True)


def table(rows: Rows, columns: Sequence[str], last: str, goal: Callable[[str, list[dict[str, float]]], str]) -> str:
    """Tabulate means over the seeds with half the width of the 95 % interval; the last column has the goals."""
    lines = ["| merge | " + " | ".join(columns) + f" | {last} |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, found in rows.items():
        cells = [interval([f[c] for f in found]) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {goal(name, found)} |")
    return "\n".join(lines) + "\n"


def publish(text: str, path: Path | None) -> None:
    """Print a table, and write it to the file given, if any."""
    print(text)
    if path:
        path.write_text(text)


def _met(name: str, found: list[dict[str, float]]) -> str:
    goal = GOALS.get(name)
    if goal is None:
        return ""
    return f"≤ {goal}: {'met' if statistics.mean(f['fit'] for f in found) <= goal else 'missed'}"


def interval(values: Sequence[float]) -> str:
    """Return the mean ± t · s/√n as text."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    return f"{mean:.3f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
