"""Several processes that learn one merge together: each draws data of its own, gradients are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingExtraError
from ...learned.calibration import Batch, Draw


@dataclass(frozen=True)
class Team:
    """The processes that ``accelerate launch`` or ``torchrun`` started."""

    state: Any
    """accelerate's PartialState."""

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return bool(self.state.is_main_process)

    @property
    def device(self) -> torch.device:
        """This process's own device."""
        return torch.device(self.state.device)

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes, in place."""
        if self.state.num_processes == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            torch.distributed.all_reduce(shared)
            tensor.copy_(shared / self.state.num_processes)

    def share(self, draw: Draw) -> Draw:
        """Data of this process's own.

        The generator goes on alike in all processes, so that one state of it is enough to go on from.
        """
        if self.state.num_processes == 1:
            return draw
        rank = int(self.state.process_index)

        def own(lora: int, generator: torch.Generator, count: int) -> Batch:
            seed = int(torch.randint(2**62, (), generator=generator)) + rank
            return draw(lora, torch.Generator().manual_seed(seed), count)

        return own

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
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtraError("Learning on a model needs accelerate: pip install 'loramerge[diffusers]'.") from None
    return Team(PartialState(cpu=cpu))
