"""Measure ZipLoRA's cost: our factored layer and dense ones, closed forms, and steps on a real-size UNet.

    python benchmarks/ziplora.py                              every case, some minutes on a CPU
    python benchmarks/ziplora.py --markdown results/ziplora-cpu.md

The steps on SDXL's UNet (random weights) need CUDA; without it they are reported as not run.  The step on the CPU is of a
UNet with SDXL's widths and fewer layers, on small pictures, beside that UNet's own forward and backward.
Exit code 1 if a goal is missed.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.lora import LoRA
from loramerge.layers import LowRank, low_rank
from loramerge.learned.attach import Site
from loramerge.learned.columns import Step, settings, ziplora
from loramerge.learned.least_squares import core_solution
from loramerge.learned.problems import Problem
from loramerge.testing import random_lora
from processes import Watch
from report import GOAL_HEAD, Goal, machine, table, text


@dataclass(frozen=True)
class Shape:
    """An attention projection of SDXL and the tokens of one image that it sees."""

    out: int
    columns: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out} ← {self.columns}, {self.tokens} tokens"


SHAPES = (Shape(1280, 1280, 1024), Shape(640, 640, 4096), Shape(1280, 2048, 77))
RANKS = (8, 64, 128)
WANTED = {(1280, 1280, 8): 1 / 8, (1280, 1280, 64): 1 / 3}
"""Our time / the dense layer's; 1 elsewhere: never slower."""


class Dense(nn.Module):
    """m₁ ∘ ΔW₁ + m₂ ∘ ΔW₂ with whole matrices, as ZipLoRA's equation 2 is usually programmed."""

    def __init__(self, layers: Sequence[LowRank]) -> None:
        super().__init__()
        factors = [layer.factors() for layer in layers]
        self.deltas = [torch.as_tensor(up @ down) for up, down in factors]
        self.mergers = nn.ParameterList([nn.Parameter(torch.ones(delta.shape[1])) for delta in self.deltas])

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        weight = sum(m * delta for m, delta in zip(self.mergers, self.deltas, strict=True))
        return F.linear(x, weight if base is None else base + weight)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.deltas, *self.mergers))


class Factored(nn.Module):
    """The same, by `loramerge.learned.attach.Site`."""

    def __init__(self, layers: Sequence[LowRank]) -> None:
        super().__init__()
        rows, columns = layers[0].shape
        factors = {
            i: (torch.as_tensor(up), torch.as_tensor(down)) for i, (up, down) in enumerate(x.factors() for x in layers)
        }
        self.site = Site(factors, nn.Linear(columns, rows), torch.float32)
        self.m = nn.Parameter(torch.ones(len(layers), columns))

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        added = self.site(x, self.site.down * self.m[self.site.owner])
        return added if base is None else F.linear(x, base) + added

    @property
    def bytes(self) -> int:
        return self.site.up.nbytes + self.site.down.nbytes + self.m.nbytes


@dataclass(frozen=True)
class Row:
    name: str
    ours: float
    dense: float
    ratio: float
    """Median over rounds of the ratio within a round."""
    whole: float
    """The same with the projection that the LoRAs change; a dense layer adds its matrices to that weight."""
    our_bytes: int
    dense_bytes: int
    difference: float
    """Relative error of the gradients of the coefficients."""

    @property
    def cells(self) -> list[str]:
        times = [f"{1e3 * seconds:.1f}" for seconds in (self.ours, self.dense)]
        sizes = [f"{size / 1e6:.2f}" for size in (self.our_bytes, self.dense_bytes)]
        return [self.name, *times, f"{self.ratio:.3f}", f"{self.whole:.2f}", *sizes, f"{self.difference:.0e}"]


def layers_of(shape: Shape, rank: int) -> list[LowRank]:
    torch.manual_seed(rank)

    def layer() -> LowRank:
        up, down = torch.randn(shape.out, rank), torch.randn(rank, shape.columns) / shape.columns**0.5
        return low_rank(up.numpy(), down.numpy(), (shape.out, shape.columns))

    return [layer(), layer()]


def layer_case(shape: Shape, rank: int, rounds: int) -> Row:
    layers = layers_of(shape, rank)
    ours, dense = Factored(layers), Dense(layers)
    # The input has a gradient too: below it lies the rest of the network.
    x = torch.randn(1, shape.tokens, shape.columns, requires_grad=True)
    grad = torch.randn(1, shape.tokens, shape.out)

    base = torch.randn(shape.out, shape.columns)

    def run(layer: nn.Module, base: Tensor | None = None) -> float:
        layer.zero_grad()
        x.grad = None
        began = time.perf_counter()
        layer(x, base).backward(grad)
        return time.perf_counter() - began

    run(ours), run(dense)
    wanted = torch.stack([m.grad for m in dense.mergers])
    difference = float((ours.m.grad - wanted).norm() / wanted.norm())
    times = [(run(ours), run(dense), run(ours, base), run(dense, base)) for _ in range(rounds)]
    middle = [median(column) for column in list(zip(*times, strict=True))[:2]]
    ratio, whole = median(a / b for a, b, _, _ in times), median(a / b for _, _, a, b in times)
    return Row(f"{shape}, rank {rank}", *middle, ratio, whole, ours.bytes, dense.bytes, difference)


def layer_goals(shape: Shape, rank: int, row: Row) -> list[Goal]:
    wanted = WANTED.get((shape.out, shape.columns, rank), 1.0)
    return [Goal(f"{row.name}: time / dense", row.ratio, wanted)]


def attention() -> list[tuple[int, ...]]:
    """Return the weight shapes of the 560 attention projections of SDXL's UNet."""
    shapes = ARCHITECTURES["sdxl"].shapes
    return [s for module, s in shapes.items() if module.startswith("unet.") and "attn" in module and len(s) == 2]


def memory(rank: int) -> tuple[float, float]:
    """Count the bytes of two LoRAs and their coefficients in all attention modules: ours, dense."""
    ours = sum(4 * (2 * rank * (rows + columns) + 2 * columns) for rows, columns in attention())
    dense = sum(4 * (2 * rows * columns + 2 * columns) for rows, columns in attention())
    return ours, dense


def closed_form(rank: int) -> float:
    """Measure CPU seconds for ``core`` in all 560 attention modules of SDXL, from moments of size R × R."""
    whole = 2 * rank
    slices = (slice(0, rank), slice(rank, whole))
    problems = {}
    for out, columns in set(attention()):
        seen = torch.randn(2, 4 * whole, whole, dtype=torch.float64)
        up, down = torch.randn(out, whole, dtype=torch.float64), torch.randn(whole, columns, dtype=torch.float64)
        problems[out, columns] = Problem(up, down, slices, seen.mT @ seen / (4 * whole), None, None)
    began = time.process_time()
    for shape in attention():
        core_solution(problems[shape], 0.01, "sum")
    return time.process_time() - began


@dataclass(frozen=True)
class Steps:
    """Seconds and memory of a step on SDXL's UNet."""

    name: str
    seconds: float | None = None
    memory: float | None = None

    @property
    def cells(self) -> list[str]:
        if self.seconds is None or self.memory is None:
            return [self.name, "not run", "not run"]
        return [self.name, f"{self.seconds:.2f}", f"{self.memory / 2**30:.1f}"]


CASES = [(count, checkpointing) for count in (2, 3, 4) for checkpointing in (False, True)]


def steps_on_cuda() -> Iterator[Steps]:
    """Run ZipLoRA on a real-size SDXL UNet with random weights, at 1024 × 1024, in bf16; attention LoRAs of rank 64."""
    unet = None
    if torch.cuda.is_available():
        with torch.device("cuda"):
            unet = sdxl_unet().to(torch.bfloat16)
    for count, checkpointing in CASES:
        name = f"{count} LoRAs, {'with' if checkpointing else 'without'} gradient checkpointing"
        yield Steps(name) if unet is None else timed_steps(unet, name, count, checkpointing)


def step_on_cpu(rounds: int = 3, rank: int = 64) -> tuple[float, float]:
    """Measure a step of ZipLoRA on a UNet with SDXL's widths, float32, two LoRAs, one picture of 256 × 256 of each.

    Returns:
        Median CPU seconds of a step, and of what the UNet alone needs for one: a forward without gradients for the
        LoRAs alone, a forward and a backward for the merge.
    """
    unet = sdxl_unet(layers=(1, 2, 2)).requires_grad_(False)
    loras = _loras(unet, rank, 2)
    alone = [_passes(unet) for _ in range(rounds)]
    ends: list[float] = []
    ziplora(
        partial(_predict, unet),
        {"unet": unet},
        loras,
        partial(examples, size=32),
        settings(steps=rounds + 1, init="ones", loss="mse"),
        on_step=lambda step: ends.append(time.process_time()),
    )
    alone += [_passes(unet) for _ in range(rounds)]
    return median(b - a for a, b in pairwise(ends)), median(alone)


def _loras(unet: nn.Module, rank: int, count: int) -> list[LoRA]:
    """Make LoRAs of a UNet's attention, at a strength at which numbers stay finite in random weights."""
    places = dict(unet.named_modules())

    def only(module: str, shape: tuple[int, ...]) -> bool:
        return "attn" in module and len(shape) == 2 and module.removeprefix("unet.") in places

    loras = [random_lora("sdxl", rank=rank, seed=i, only=only, dialect="diffusers-peft") for i in range(count)]
    return [faint(lora) for lora in loras]


def _predict(unet: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    return unet(given["x"], given["t"], given["prompt"], added_cond_kwargs=added, return_dict=False)[0]


def _passes(unet: nn.Module) -> float:
    """Return the CPU seconds of a forward without gradients, a forward with them, and a backward, on two pictures."""
    batch = examples(0, torch.Generator().manual_seed(0), 2, size=32)
    began = time.process_time()
    with torch.no_grad():
        _predict(unet, batch)
    _predict(unet, {**batch, "x": batch["x"].requires_grad_()}).sum().backward()
    return time.process_time() - began


def sdxl_unet(layers: tuple[int, int, int] = (1, 2, 10)) -> nn.Module:
    """Return a UNet with SDXL's widths and random weights; 1, 2 and 10 transformer layers per block are SDXL's own."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=layers,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ).eval()


def timed_steps(unet: nn.Module, name: str, count: int, checkpointing: bool, steps: int = 5) -> Steps:
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()

    loras = _loras(unet, 64, count)
    ends: list[float] = []

    def on_step(step: Step) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    def predict(batch: dict[str, Tensor]) -> Tensor:
        given = {key: value.cuda() for key, value in batch.items()}
        given = {key: v.to(torch.bfloat16) if v.is_floating_point() else v for key, v in given.items()}
        return _predict(unet, given)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        ziplora(
            predict,
            {"unet": unet},
            loras,
            examples,
            settings(steps=steps + 1, init="ones", loss="mse"),
            on_step=on_step,
        )
    except torch.OutOfMemoryError:
        return Steps(f"{name}: out of memory")
    return Steps(name, (ends[-1] - ends[0]) / steps, torch.cuda.max_memory_allocated())


def examples(lora: int, generator: torch.Generator, count: int, size: int = 128) -> dict[str, Tensor]:
    """Return noise in the shape of SDXL's inputs; the picture has 8 times the size."""

    def random(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    return {
        "x": random(4, size, size),
        "t": torch.randint(1000, (count,), generator=generator),
        "prompt": random(77, 2048),
        "pooled": random(1280),
        "time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * count),
    }


def faint(lora: LoRA) -> LoRA:
    """Return the LoRA at a small strength."""
    layouts = {m: replace(layer, alpha=0.1) for m, layer in lora.layouts.items() if isinstance(layer, LowRank)}
    return replace(lora, layouts=layouts)


LAYER_HEAD = ["", "ours ms", "dense ms", "ratio", "with projection", "ours MB", "dense MB", "gradients differ"]
STEP_HEAD = ["", "s a step", "peak GiB"]

LEGEND = """*ratio* is the median over rounds of the ratio within a round, in which both layers ran in turn: forward \
and backward of one projection with two LoRAs and one coefficient a column, one image, float32, gradients of the \
input and of the coefficients. *dense* is m₁ ∘ ΔW₁ + m₂ ∘ ΔW₂ with whole matrices, typed in from the formula. MB are \
what a layer keeps: coefficients and weights of the LoRAs (LoRAs of rank r each, two of them). The projection that the LoRAs change is left out there; *with projection* is the ratio with it, where the dense layer has its matrices added to W and so needs no product of its own; above 1 that would be faster, at the price of its memory."""


def markdown(
    goals: Sequence[Goal], rows: Sequence[Row], solved: dict[int, float], steps: Sequence[Steps], others: float
) -> str:
    forms = [[f"rank {rank} each", f"{seconds:.2f}"] for rank, seconds in solved.items()]
    parts = [
        "# ZipLoRA: time and memory",
        *machine(others),
        "One thread. Times were taken while other programs ran, so that the ratios count and not the milliseconds.",
        table(GOAL_HEAD, [goal.cells for goal in goals]),
        LEGEND,
        "## One layer, forward and backward",
        table(LAYER_HEAD, [row.cells for row in rows]),
        "## Closed form `core`, two LoRAs, the 560 attention modules of SDXL's UNet",
        table(["", "CPU s"], forms),
        "## A step on SDXL's UNet (random weights, 1024 × 1024, bf16, rank 64, one image of each LoRA)",
        table(STEP_HEAD, [step.cells for step in steps]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    given = _arguments()
    torch.set_num_threads(1)
    watch = Watch()
    rows, goals = [], []
    for shape in SHAPES:
        for rank in RANKS:
            row = layer_case(shape, rank, given.rounds)
            print("  ".join(row.cells), flush=True)
            rows.append(row)
            goals += layer_goals(shape, rank, row)
    solved = {rank: closed_form(rank) for rank in (8, 64)}
    goals += [Goal(f"core, 560 modules, rank {rank}: CPU seconds", seconds, 1.0) for rank, seconds in solved.items()]
    ours, dense = memory(8)
    note = f"{ours / 1e6:.0f} MB, {dense / 1e6:.0f} MB"
    goals.append(Goal("560 modules, rank 8: memory / dense", ours / dense, 1 / 40, note=note))
    step, alone = step_on_cpu()
    note = f"{step:.1f} s, {alone:.1f} s; a UNet of SDXL's widths, fewer layers, 256 × 256, two LoRAs of rank 64"
    goals.append(Goal("a step on the CPU / the UNet's own passes", step / alone, 1.5, note=note))
    steps = list(steps_on_cuda())
    for step in steps:
        print("  ".join(step.cells))
    print("\n" + text(goals))
    if given.markdown:
        given.markdown.write_text(markdown(goals, rows, solved, steps, watch.others()))
    sys.exit(any(goal.met is False for goal in goals))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each layer (default 9)")
    parser.add_argument("--markdown", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
