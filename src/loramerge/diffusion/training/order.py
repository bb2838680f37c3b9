"""The order of a run's examples: the n-th depends on the seed and n alone.

So a resumed run sees the same examples as an uninterrupted one, and processes, batches and accumulated
passes divide the same sequence among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...learned.batches import Batch
from ..examples import Images, weight

PICTURES, NOISE = 0, 1


@dataclass(frozen=True)
class Drawn:
    """One example."""

    picture: int
    mirrored: int
    noise: Tensor
    """Same shape as the picture's latents."""
    timestep: Tensor
    """Shape ``()``."""


@dataclass(frozen=True)
class Order:
    """The sequence of examples: each epoch has every picture once, with random flip, timestep and noise."""

    images: Images
    seed: int

    def batch(self, folder: int, numbers: Sequence[int]) -> tuple[Batch, Tensor]:
        """Return the examples with these numbers as a batch.

        Args:
            folder: Index of the folder.
            numbers: From 0.

        Returns:
            A batch, and what the model should predict of it, ``(count, …)``.
        """
        held, schedule = self.images.latents[folder], self.images.schedule
        drawn = [self.drawn(folder, number) for number in numbers]
        chosen = torch.tensor([one.picture for one in drawn])
        latents = held[chosen, torch.tensor([one.mirrored for one in drawn])]
        noise, timesteps = (torch.stack(values) for values in zip(*((d.noise, d.timestep) for d in drawn), strict=True))
        sample = schedule.noised(latents, noise, timesteps)
        batch = self.images.conditions[folder].batch(sample, timesteps, chosen)
        return batch | weight(schedule, timesteps, self.images.snr_gamma), schedule.target(latents, noise, timesteps)

    def drawn(self, folder: int, number: int) -> Drawn:
        """Return the example with this number."""
        held = self.images.latents[folder]
        epoch, place = divmod(number, len(held))
        order = np.random.default_rng([self.seed, folder, PICTURES, epoch]).permutation(len(held))
        state = np.random.SeedSequence([self.seed, folder, NOISE, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        mirrored = int(torch.randint(2, (), generator=generator)) * int(self.images.flip)
        noise = torch.randn(held.shape[2:], generator=generator)
        return Drawn(int(order[place]), mirrored, noise, self.images.schedule.timesteps(1, generator)[0])
