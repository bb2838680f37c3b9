"""Several processes that learn together, on a small model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loramerge import LoRA
from loramerge.diffusion import Team, team
from loramerge.errors import OptionError
from loramerge.layers import low_rank
from loramerge.learned.batches import Batch
from loramerge.learned.calibration import Draw, calibrate, seeded
from loramerge.learned.columns import Learned, join, settings, ziplora

MODULES = ("unet.first", "unet.second")
SUM: dict[str, Any] = {"init": "ones", "loss": "mse"}
"""Settings with which learning looks at no data before its first step."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


UNET = Small()


def predict(batch: Batch) -> torch.Tensor:
    return UNET(batch["x"])  # type: ignore[no-any-return]


def loras() -> list[LoRA]:
    rng = np.random.default_rng(0)

    def layer() -> Any:
        up, down = rng.standard_normal((2, 6, 2)).astype("f4")
        return low_rank(up, down.T, (6, 6))

    return [LoRA(name=name, architecture=None, dialect="other", layouts={m: layer() for m in MODULES}) for name in "ab"]


def draw(lora: int, generator: torch.Generator, count: int) -> Batch:
    return {"x": torch.randn(count, 6, generator=generator) + 2 * lora}


def learn(given: Draw, shared: dict[str, Any], checkpoint: Path | None = None, **changes: Any) -> Learned:
    chosen = settings(**{"steps": 4, "calibration": 3, **changes})
    return ziplora(predict, {"unet": UNET}, loras(), given, chosen, checkpoint=checkpoint, **shared)


def downs(learned: Learned) -> dict[str, np.ndarray]:
    return {module: np.asarray(learned.lora[module].factors()[1]) for module in MODULES}


def one_of_several(rank: int, folder: Path) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    # Met at a file: a port that is free now may be taken a moment later.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    together = team(cpu=True)
    shared: dict[str, Any] = {"reduce": together.reduce, "shard": together.shard}
    kept = together.own(folder / "state.safetensors")
    np.savez(folder / f"{rank}.npz", **downs(learn(draw, shared)))
    np.savez(folder / f"sum-{rank}.npz", **downs(learn(draw, shared, **SUM)))
    learn(draw, shared, kept, steps=2)
    np.savez(folder / f"resumed-{rank}.npz", **downs(learn(draw, shared, kept)))
    (folder / f"{rank}.txt").write_text(refused(rank, folder / "other.safetensors", shared, together))
    moments = calibrate(predict, {"unet": UNET}, loras(), draw, kind="gram", batches=2, shard=together.shard)
    together.reduce(moments.tensors())
    np.savez(folder / f"moments-{rank}.npz", **{m: moments.modules[m].core.numpy() for m in MODULES})
    together.wait()
    os._exit(0)  # taking gloo's threads down aborts now and then


def refused(rank: int, path: Path, shared: dict[str, Any], together: Team) -> str:
    """What is said when the second process has lost its checkpoint."""
    learn(draw, shared, together.own(path), steps=2)
    if rank:
        together.own(path).unlink()
    try:
        learn(draw, shared, together.own(path))
    except OptionError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_several, (folder,), nprocs=2)
    return folder


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


def test_two_processes_end_at_the_same_bits(left: Path) -> None:
    first, second = read(left / "0.npz"), read(left / "1.npz")

    assert all(np.array_equal(first[module], second[module]) for module in MODULES)


def test_two_processes_learn_what_one_does_with_the_data_of_both(left: Path) -> None:
    shards = [seeded(0, shard) for shard in range(2)]

    def of_both(lora: int, generator: torch.Generator, count: int) -> Batch:
        return join([draw(lora, shard, 1) for shard in shards])

    alone = downs(learn(of_both, {}, batch_size=2, **SUM))
    found, other = read(left / "sum-0.npz"), read(left / "sum-1.npz")
    begun = downs(learn(of_both, {}, steps=0, **SUM))

    for module in MODULES:
        assert np.array_equal(found[module], other[module])
        assert np.abs(found[module] - alone[module]).max() < 1e-5
        assert np.abs(found[module] - begun[module]).max() > 1e-2


def test_processes_go_on_from_checkpoints_of_their_own_to_the_same_bits(left: Path) -> None:
    straight = read(left / "0.npz")

    assert {path.name for path in left.glob("state*")} == {"state.safetensors", "state.1.safetensors"}
    for rank in range(2):
        resumed = read(left / f"resumed-{rank}.npz")
        assert all(np.array_equal(resumed[module], straight[module]) for module in MODULES)


def test_a_process_that_lost_its_checkpoint_stops_all(left: Path) -> None:
    assert "goes on from step 2, others don't" in (left / "0.txt").read_text()
    assert "goes on from step 0, others don't" in (left / "1.txt").read_text()


def test_moments_of_two_processes_are_the_mean(left: Path) -> None:
    first, second = read(left / "moments-0.npz"), read(left / "moments-1.npz")
    apart = [calibrate(predict, {"unet": UNET}, loras(), draw, batches=2, shard=shard) for shard in range(2)]

    for module in MODULES:
        one, other = (moments.modules[module].core.numpy() for moments in apart)
        assert np.array_equal(first[module], second[module])
        assert np.abs(first[module] - (one + other) / 2).max() < 1e-9
        assert np.abs(one - other).max() > 1e-2


def test_one_process_is_the_first_and_only() -> None:
    together = team(cpu=True)
    assert together.writes
    assert (together.shard, together.size) == (0, 1)
    assert together.own(Path("state.safetensors")) == Path("state.safetensors")
