"""Teach the text encoders to tell what a caption says, before the UNet is trained with them.

Both learn to predict the attributes of the picture from its caption alone, through linear heads that are then dropped.
The UNet so gets a useful condition from its first step on.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from . import model, muon
from .judge import ATTRIBUTES, new_heads
from .rendering import label_numbers
from .world import caption, labels, sample

BATCH = 128


def fit(
    pipeline: StableDiffusionXLPipeline,
    *,
    steps: int,
    captions: int = 40_000,
    seed: int = 0,
    rate: float = 0.02,
    device: str = "cpu",
) -> float:
    """Train both text encoders; return the mean cross-entropy over the last steps.

    Args:
        pipeline: Its text encoders are trained.
        steps: Of 128 captions.
        captions: To write.
        seed: Of captions and their order.
        rate: Muon's learning rate.
        device: Where to train.
    """
    random = np.random.default_rng([seed, 4])
    pictures = [sample(random) for _ in range(captions)]
    ids = torch.stack(model.token_ids(pipeline, [caption(picture, random) for picture in pictures]), 1).to(device)
    wanted = torch.tensor([label_numbers(labels(picture), ATTRIBUTES) for picture in pictures]).to(device)
    torch.manual_seed(seed)
    reader = Reader(pipeline.text_encoder, pipeline.text_encoder_2).to(device).train()
    optimizer = muon.Muon(muon.groups(reader, rate=rate, adam_rate=rate / 10, ends=("heads",)))
    errors: list[float] = []
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = group["usual"] * factor
        chosen = torch.randint(captions, (BATCH,))
        error = reader(ids[chosen], wanted[chosen])
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
        if (step + 1) % 50 == 0:
            print(f"text step {step + 1}  loss {np.mean(errors[-50:]):.4f}", flush=True)
    return float(np.mean(errors[-50:]))


class Reader(nn.Module):
    """Both text encoders with heads on what the UNet gets from each of them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.heads = nn.ModuleList([new_heads(network.config.hidden_size) for network in (first, second)])

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean cross-entropy; ids of shape ``(n, 2, length)``, labels ``(n, attributes)``, -1 where unseen."""
        states, projection = model.encode(self.first, self.second, ids[:, 0], ids[:, 1])
        width = self.first.config.hidden_size
        errors = [
            F.cross_entropy(head(told), wanted[:, i], ignore_index=-1)
            for heads, told in zip(self.heads, (states[:, :, :width].mean(1), projection), strict=True)
            for i, head in enumerate(heads.values())
        ]
        return torch.stack(errors).mean()
