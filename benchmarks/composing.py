"""Measure what a picture costs with a composition, relative to the same LoRAs added up by PEFT, in one run.

    PYTHONPATH=. python benchmarks/composing.py [--rounds 3] [--markdown FILE]

The pipeline is the study's miniature (96 pixels, 20 steps, guidance 2, batches of 4), the LoRAs are of rank 8 with
random values in every module that the shipped ones have. Times are CPU seconds of one thread, medians of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from examples.virtual_tryon import model

import loramerge as lm
from learned import publish
from loramerge.diffusion import COMPOSITIONS, Use, applied, composed, use_scheduler
from loramerge.testing import random_layer

WEIGHTS = Path(model.__file__).parent / "weights"
NAMES = ["psq-person", "barca24_jersey", "rix52_scarf", "utw64_wall"]
NOUNS = ["person", "jersey", "scarf", "wall"]
COUNTS = (2, 3, 4)
PICTURES = 4


def loras(count: int) -> list[lm.LoRA]:
    like = lm.load(WEIGHTS / "loras" / "person.safetensors", architecture="sdxl")
    return [
        lm.LoRA(
            name=NAMES[i],
            architecture="sdxl",
            dialect="diffusers-peft",
            layouts={
                module: random_layer(like.layout(module).shape, rank=8, alpha=0.1, seed=31 * i + j)
                for j, module in enumerate(like)
            },
        )
        for i in range(count)
    ]


def uses(count: int, name: str) -> list[Use]:
    curve = [(0, 1.0), (1, 0.5)] if name == "schedule" else ()
    return [Use(lora, 1 / count, words=NAMES[i], noun=NOUNS[i], curve=curve) for i, lora in enumerate(loras(count))]


def draw(pipe: Any, count: int) -> None:
    prompt = f"A portrait of a {NAMES[0]} wearing a {', a '.join(NAMES[1:count])}."
    generators = [torch.Generator().manual_seed(seed) for seed in range(PICTURES)]
    pipe([prompt] * PICTURES, generator=generators, num_inference_steps=20, guidance_scale=2.0, output_type="latent")


def ways(pipe: Any, count: int) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    plain = [(use.lora, use.weight) for use in uses(count, "sum")]
    found: dict[str, Callable[[], AbstractContextManager[None]]] = {"sum, by PEFT": lambda: applied(pipe, plain)}
    for name in COMPOSITIONS:
        found[name] = lambda name=name: composed(pipe, uses(count, name), name)  # type: ignore[misc]
    found["clora, with descent"] = lambda: composed(pipe, uses(count, "clora"), "clora", step_size=20.0)
    return found


def measured(pipe: Any, way: Callable[[], AbstractContextManager[None]], count: int) -> float:
    with way():
        start = time.process_time()
        draw(pipe, count)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    given = parser.parse_args()
    model.quiet()
    torch.set_num_threads(1)
    pipe = model.load(WEIGHTS / "base")
    use_scheduler(pipe, "DPMSolverMultistepScheduler")
    pipe.set_progress_bar_config(disable=True)
    ratios: dict[str, list[str]] = {}
    for count in COUNTS:
        found = ways(pipe, count)
        times = {name: [measured(pipe, way, count) for _ in range(given.rounds)] for name, way in found.items()}
        plain = statistics.median(times["sum, by PEFT"])
        for name, seconds in times.items():
            ratios.setdefault(name, []).append(f"{statistics.median(seconds) / plain:.2f}")
        ratios["sum, by PEFT"][-1] = f"{plain / PICTURES:.2f} s"
        print(f"{count} LoRAs: done", flush=True)
    head = ["", *(f"{count} LoRAs" for count in COUNTS)]
    lines = [
        "| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *([n, *r] for n, r in ratios.items())]
    ]
    publish("\n".join(lines) + "\n", given.markdown)


if __name__ == "__main__":
    main()
