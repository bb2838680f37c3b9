"""Several processes that learn together."""

from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as processes

from loramerge.learned.columns import join, settings, ziplora
from loramerge.merging.coefficients import Coefficients
from together import STEPS, learn, stored
from toy import draw, lora_for, predict, toy


def test_two_processes_learn_what_one_learns_from_the_data_of_both(tmp_path: Path) -> None:
    processes.spawn(learn, (2, str(tmp_path)), nprocs=2)
    first, second = (Coefficients.read(tmp_path / f"{rank}.safetensors").columns for rank in (0, 1))
    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, seed=2, rank=3)]
    calls = iter(range(10**6))

    def both(lora: int, generator: torch.Generator, count: int) -> dict[str, torch.Tensor]:
        step = next(calls) // 2
        return join([stored(0, step, lora), stored(1, step, lora)])

    chosen = settings(steps=STEPS, batch_size=4, init="ones", loss="mse", lr=0.05)
    alone = ziplora(predict(model), {"unet": model}, loras, both, chosen).coefficients.columns

    for module, tensor in alone.items():
        assert np.array_equal(first[module].read(), second[module].read())
        assert np.abs(first[module].read() - tensor.read()).max() <= 1e-4
        assert np.abs(tensor.read() - 1).max() >= 0.05


def test_processes_begin_alike_and_draw_their_own_data() -> None:
    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, seed=2, rank=3)]

    def run(shard: int, steps: int) -> object:
        chosen = settings(steps=steps, calibration=2)
        return ziplora(predict(model), {"unet": model}, loras, draw, chosen, shard=shard)

    begun, other = (run(shard, 0).coefficients.columns for shard in (0, 1))

    assert all(np.array_equal(begun[m].read(), other[m].read()) for m in begun)
    assert run(0, 1).history != run(1, 1).history
