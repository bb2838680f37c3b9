"""Several processes that learn one merge together: each draws data of its own, gradients are averaged."""

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
        """Whether this process is the one that writes results and speaks."""
        return bool(self.state.is_main_process)

    @property
    def shard(self) -> int:
        """This process's number, from 0: what `ziplora` and `calibrate` take other data by."""
        return int(self.state.process_index)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.state.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's own device."""
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
        """This process's own file: the path itself in the first, ``state.1.safetensors`` beside it in the second."""
        return path.with_name(f"{path.stem}.{self.shard}{path.suffix}") if self.shard else path

    def wait(self) -> None:
        """Go on once all processes are here."""
        self.state.wait_for_everyone()


def team(*, cpu: bool = False) -> Team:
    """The processes that were started together; one where nothing started several.

    Args:
        cpu: Whether to compute on the CPU even if there are GPUs.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    with needed("Learning on a model"):
        from accelerate import PartialState
    return Team(PartialState(cpu=cpu))
