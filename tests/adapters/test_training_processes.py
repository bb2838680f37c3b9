"""Two processes that train one LoRA together."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from loramerge import LoRA
from loramerge.diffusion import TrainSettings, load, train_lora
from loramerge.errors import OptionError


def trained(folder: Path, state: Path | None = None, *, steps: int = 3, batch_size: int = 1) -> LoRA:
    settings = TrainSettings(rank=2, steps=steps, batch_size=batch_size, learning_rate=1e-2, snr_gamma=5.0)
    return train_lora(load(tiny.pipeline("sdxl"), device="cpu"), folder / "photos", settings=settings, checkpoint=state)


def factors(lora: LoRA) -> dict[str, np.ndarray]:
    pairs = {module: lora[module].factors() for module in lora}
    return {f"{m}/{i}": np.asarray(factor) for m, pair in pairs.items() for i, factor in enumerate(pair)}


def one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    # Met at a file: a port that is free now may be taken a moment later.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state = folder / "state.safetensors"
    np.savez(folder / f"{rank}.npz", **factors(trained(folder)))
    trained(folder, state, steps=2)
    torch.distributed.barrier()
    np.savez(folder / f"resumed-{rank}.npz", **factors(trained(folder, state)))
    try:
        trained(folder, state if rank else folder / "nowhere.safetensors")
    except OptionError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    torch.distributed.barrier()
    os._exit(0)  # taking gloo's threads down aborts now and then


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    tiny.images(folder / "photos", tiny.PROMPTS[0], count=3)
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return folder


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


def test_two_processes_hold_the_same_bits(left: Path) -> None:
    first, second = read(left / "0.npz"), read(left / "1.npz")

    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_two_processes_learn_what_one_does_with_twice_the_batch(left: Path) -> None:
    found, alone = read(left / "0.npz"), factors(trained(left, batch_size=2))
    other = factors(trained(left))

    assert found.keys() == alone.keys()
    assert max(np.abs(found[name] - alone[name]).max() for name in found) < 1e-4
    assert max(np.abs(found[name] - other[name]).max() for name in found) > 1e-3


def test_two_processes_go_on_from_one_state_to_the_same_bits(left: Path) -> None:
    straight = read(left / "0.npz")

    assert [path.name for path in left.glob("state*")] == ["state.safetensors"]
    for rank in range(2):
        resumed = read(left / f"resumed-{rank}.npz")
        assert all(np.array_equal(resumed[name], straight[name]) for name in straight)


def test_a_process_that_does_not_see_the_state_stops_all(left: Path) -> None:
    assert "goes on from step 0, others don't" in (left / "0.txt").read_text()
    assert "goes on from step 3, others don't" in (left / "1.txt").read_text()
