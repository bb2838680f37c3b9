"""Measure how well merges keep what their LoRAs do, on the miniature of the study.

    PYTHONPATH=. python benchmarks/miniature.py [--seeds 3] [--markdown FILE]

For each seed a person's and a jersey's LoRA are trained on the shipped base as the study trains them,
merged, and compared on pictures that nothing was trained or calibrated with:

fit     mean over the LoRAs of ‖ε_merge − ε_LoRA‖² / ‖ε_base − ε_LoRA‖² on its own data; 0 is best, 1 the base
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from examples.virtual_tryon import make_sets, model
from examples.virtual_tryon.world import CONCEPTS, concept_set

import loramerge as lm
from learned import GOALS, Rows, measure, publish, table
from loramerge.diffusion import Images, TrainSettings, from_images, load, train_lora
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.columns import settings, ziplora
from loramerge.learned.least_squares import lsq

BASE = Path(model.__file__).parent / "weights" / "base"
NAMES = ("profile", "barca")
TRAINED, HELD_OUT = 12, 48
ROUNDS = 3
"""Held-out passes, each with its own noise."""
HELD_OUT_SEED = 1_000


class Miniature:
    """One seed: two trained LoRAs, and how merges are measured."""

    def __init__(self, seed: int, steps: int, folder: Path) -> None:
        self.seed = seed
        self.denoiser = load(model.load(BASE))
        own, held = ([folder / f"{seed}-{part}-{name}" for name in NAMES] for part in ("trained", "held-out"))
        for name, mine, other in zip(NAMES, own, held, strict=True):
            make_sets.write(concept_set(CONCEPTS[name], TRAINED, seed=seed), mine, model.RESOLUTION)
            make_sets.write(concept_set(CONCEPTS[name], HELD_OUT, seed=HELD_OUT_SEED + seed), other, model.RESOLUTION)
        chosen = TrainSettings(rank=8, steps=steps, learning_rate=6e-4, seed=seed, flip=False)
        self.loras = [train_lora(self.denoiser, mine, settings=chosen) for mine in own]
        self.draw: Images = from_images(self.denoiser, own)
        self.held: Images = from_images(self.denoiser, held)
        self.wanted = [self.outputs(lora, i) for i, lora in enumerate(self.loras)]
        self.effects = [F.mse_loss(self.outputs(None, i), wanted) for i, wanted in enumerate(self.wanted)]

    @torch.no_grad()
    def outputs(self, lora: lm.LoRA | None, data: int) -> torch.Tensor:
        """Return the model's answer to one LoRA's held-out data."""
        generator = torch.Generator().manual_seed(self.seed)
        batches = [self.held(data, generator, HELD_OUT) for _ in range(ROUNDS)]
        if lora is None:
            return torch.cat([self.denoiser.predict(batch) for batch in batches])
        with attach(self.denoiser.models, [lora]):
            return torch.cat([self.denoiser.predict(batch) for batch in batches])

    def measure(self, merged: lm.LoRA | None) -> dict[str, float]:
        fits = [
            float(F.mse_loss(self.outputs(merged, i), wanted) / effect)
            for i, (wanted, effect) in enumerate(zip(self.wanted, self.effects, strict=True))
        ]
        return {"fit": sum(fits) / 2, "person": fits[0], "jersey": fits[1]}

    def methods(self) -> dict[str, Callable[[], lm.LoRA | None]]:
        def closed(granularity: str) -> lm.LoRA:
            found = calibrate(
                self.denoiser.predict,
                self.denoiser.models,
                self.loras,
                self.draw,
                kind="gram",
                batches=16,
                batch_size=8,
                seed=self.seed,
            )
            return lsq(self.loras, found, granularity=granularity)[0]  # type: ignore[arg-type]

        def zipped(preset: str, **changes: Any) -> lm.LoRA:
            given = settings(preset, seed=self.seed, **changes)
            return ziplora(self.denoiser.predict, self.denoiser.models, self.loras, self.draw, given).lora

        return {
            "base": lambda: None,
            "sum": lambda: lm.merge(self.loras, weights=[1, 1]),
            "average": lambda: lm.merge(self.loras, weights="uniform"),
            "least squares, core": lambda: closed("core"),
            "least squares, column": lambda: closed("column"),
            "ZipLoRA, paper": lambda: zipped("paper"),
            "ZipLoRA, default": lambda: zipped("default", batch_size=8),
            "ZipLoRA, 20 steps from the closed form": lambda: zipped("default", batch_size=8, steps=20),
            "ZipLoRA, 100 steps from ones": lambda: zipped("default", batch_size=8, steps=100, init="ones"),
            "ZipLoRA, down": lambda: zipped("default", batch_size=8, steps=100, parametrisation="down"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of training each LoRA (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    given = parser.parse_args()
    model.quiet()
    torch.set_num_threads(1)
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, given.seeds + 1):
            world = Miniature(seed, given.steps, Path(folder))
            measure(rows, world.methods(), world.measure, f"{seed}")
    text = table(
        rows,
        ["fit", "person", "jersey", "CPU s"],
        "toy's goal",
        lambda name, _: f"≤ {GOALS[name]}" if name in GOALS else "",
    )
    publish(text, given.markdown)


if __name__ == "__main__":
    main()
