"""One of several processes that learn together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loramerge.learned.columns import settings, ziplora
from toy import Batch, draw, lora_for, predict, toy

STEPS = 3


def stored(process: int, step: int, lora: int) -> Batch:
    """The data of one process at one step."""
    return draw(lora, torch.Generator().manual_seed(1000 * process + 10 * step + lora), 2)


def learn(rank: int, processes: int, folder: str) -> None:
    """Learn with gradients averaged over the processes, and leave the coefficients in a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)

    def average(gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= processes

    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, seed=2, rank=3)]
    calls = iter(range(10**6))
    found = ziplora(
        predict(model),
        {"unet": model},
        loras,
        lambda lora, generator, count: stored(rank, next(calls) // 2, lora),
        settings(steps=STEPS, batch_size=2, init="ones", loss="mse", lr=0.05),
        reduce=average,
        shard=rank,
    )
    found.coefficients.save(Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()
