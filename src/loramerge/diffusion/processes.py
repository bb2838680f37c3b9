"""Learn one merge in several processes: each draws its own data, and gradients are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import needed


@dataclass(frozen=True)
class Team:
    """The processes that ``accelerate launch`` or ``torchrun`` started."""

    state: Any
    """accelerate's PartialState."""

    @property
    def writes(self) -> bool:
        """True in the process that writes results and prints."""
        return bool(self.state.is_main_process)

    @property
    def shard(self) -> int:
        """Return this process's number, from 0, by which `ziplora` and `calibrate` choose its data."""
        return int(self.state.process_index)

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return int(self.state.num_processes)

    @property
    def device(self) -> torch.device:
        """Return this process's device."""
        return torch.device(self.state.device)

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            torch.distributed.all_reduce(shared)
            tensor.copy_(shared / self.size)

    def own(self, path: Path) -> Path:
        """Return this process's file: ``path`` itself in the first, ``state.1.safetensors`` next to it in the second."""
        return path.with_name(f"{path.stem}.{self.shard}{path.suffix}") if self.shard else path

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.state.wait_for_everyone()


def team(*, cpu: bool = False) -> Team:
    """Join the processes that were started together; without a launcher it is this one alone.

    Args:
        cpu: Whether to compute on the CPU even if there are GPUs.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    with needed("Learning on a model"):
        from accelerate import PartialState
    return Team(PartialState(cpu=cpu))
