"""Measure what a picture costs with a composition, relative to the same LoRAs added up by PEFT, in one run.

    PYTHONPATH=. python benchmarks/composing.py [--rounds 3] [--markdown FILE]
    PYTHONPATH=. python benchmarks/composing.py --memory

With --memory: the peak that reading attention adds in one layer of the width that it has at 1024², random weights in
float32, two rows of one picture; each layer in a process of its own.

The pipeline is the study's miniature (96 pixels, 20 steps, guidance 2, batches of 4), the LoRAs are of rank 8 with
random values in every module that the shipped ones have. Times are CPU seconds of one thread, medians of the rounds.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from examples.virtual_tryon import model

import loramerge as lm
from learned import publish
from loramerge.diffusion import COMPOSITIONS, Use, applied, composed, from_prompts, load, use_scheduler
from loramerge.diffusion.composing.attention import looking
from loramerge.learned import mole, settings
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
    options = {"mole": {"gates": gates(pipe, count)}}
    for name in COMPOSITIONS:
        found[name] = lambda name=name: composed(pipe, uses(count, name), name, **options.get(name, {}))  # type: ignore[misc]
    found["clora, with descent"] = lambda: composed(pipe, uses(count, "clora"), "clora", step_size=20.0)
    return found


def gates(pipe: Any, count: int) -> str:
    """Gates of no step, which cost what learned ones do."""
    given = [use.lora for use in uses(count, "mole")]
    model = load(pipe, device="cpu")
    draw = from_prompts(model, given, [[name] for name in NAMES[:count]], steps=1, trajectories=1)
    found = mole(model.predict, model.models, given, draw, settings("mole", steps=0, loss="mse"))
    return str(found.save(Path(tempfile.mkdtemp()) / "gates.safetensors"))


LAYERS: Mapping[str, tuple[int, int, int, int]] = {
    "SDXL, 64 × 64 places, 77 tokens": (640, 10, 64, 77),
    "SDXL, 32 × 32 places, 77 tokens": (1280, 20, 32, 77),
    "FLUX, 64 × 64 places, 512 tokens": (3072, 24, 64, 512),
}
"""Width, heads, places per side and tokens of layers at 1024²."""


def peak(name: str, *, read: bool) -> int:
    """The highest memory of this process in bytes, after a pass of a layer."""
    width, heads, side, tokens = LAYERS[name]
    places, words = torch.randn(2, side**2, width), torch.randn(2, tokens, width)
    if name.startswith("SDXL"):
        layer = Attention(width, cross_attention_dim=width, heads=heads, dim_head=width // heads)
    else:
        layer = FluxAttention(width, heads, width // heads, added_kv_proj_dim=width)
    columns = torch.rand(1, tokens, 2)
    with torch.no_grad():
        for reading in (False, read):
            with (
                looking(torch.nn.ModuleList([layer]), [{}], [columns], 1, (1, side, side)) if reading else nullcontext()
            ):
                layer(places, words)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory() -> str:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as workers:
        rows = []
        for name in LAYERS:
            plain, reading = (workers.submit(peak, name, read=read).result() for read in (False, True))
            rows.append([name, f"{plain / 2**20:.0f} MiB", f"{(reading - plain) / 2**20:.0f} MiB"])
    return lines([["layer", "peak of the process", "more, reading attention"], *rows])


def lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def measured(pipe: Any, way: Callable[[], AbstractContextManager[None]], count: int) -> float:
    with way():
        start = time.process_time()
        draw(pipe, count)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    given = parser.parse_args()
    if given.memory:
        publish(memory(), given.markdown)
        return
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
    publish(lines([head, *([n, *r] for n, r in ratios.items())]), given.markdown)


if __name__ == "__main__":
    main()
