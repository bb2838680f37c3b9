"""Several processes that learn together, on a small model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loramerge import LoRA
from loramerge.adapters.diffusers import team
from loramerge.layers import low_rank
from loramerge.learned.calibration import Batch, Draw
from loramerge.learned.ziplora import Learned, join, settings, ziplora

MODULES = ("unet.first", "unet.second")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def loras() -> list[LoRA]:
    rng = np.random.default_rng(0)

    def layer() -> Any:
        up, down = rng.standard_normal((2, 6, 2)).astype("f4")
        return low_rank(up, down.T, (6, 6))

    return [LoRA(name=name, architecture=None, dialect="other", layouts={m: layer() for m in MODULES}) for name in "ab"]


def draw(lora: int, generator: torch.Generator, count: int) -> Batch:
    return {"x": torch.randn(count, 6, generator=generator) + 2 * lora}


def learn(given: Draw, batch_size: int, checkpoint: Path | None = None, **shared: Any) -> Learned:
    unet = Small()
    chosen = settings(steps=4, calibration=3, batch_size=batch_size)
    predict = lambda batch: unet(batch["x"])  # noqa: E731
    return ziplora(predict, {"unet": unet}, loras(), given, chosen, checkpoint=checkpoint, every=4, **shared)


def downs(learned: Learned) -> dict[str, np.ndarray]:
    return {module: np.asarray(learned.lora[module].factors()[1]) for module in MODULES}


def one_of_several(rank: int, folder: Path) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    together = team(cpu=True)
    learned = learn(
        together.share(draw),
        1,
        folder / f"state-{rank}.safetensors",
        reduce=together.reduce,
        writes=together.writes,
    )
    np.savez(folder / f"{rank}.npz", **downs(learned))
    together.wait()
    torch.distributed.destroy_process_group()


def of_both(lora: int, generator: torch.Generator, count: int) -> Batch:
    """What the two processes draw, below each other."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return join([draw(lora, torch.Generator().manual_seed(seed + rank), count // 2) for rank in range(2)])


def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    torch.multiprocessing.spawn(one_of_several, (tmp_path,), nprocs=2)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    alone = downs(learn(of_both, 2))

    for module in MODULES:
        assert np.array_equal(first[module], second[module])
        assert np.abs(first[module] - alone[module]).max() < 1e-5
    assert (tmp_path / "state-0.safetensors").exists()
    assert not (tmp_path / "state-1.safetensors").exists()


def test_one_process_draws_what_it_would_alone() -> None:
    together = team(cpu=True)
    assert together.writes
    assert together.share(draw) is draw
