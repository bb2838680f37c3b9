"""Compositions by time: each LoRA at its own steps."""

import torch
from torch import Tensor

from ...errors import OptionError
from ...merging.methods.options import Count
from .base import Call, composition


@composition("schedule", source="keyframes, as ComfyUI's hooks have them; diffusers#11599 asks for it", passes="1")
def schedule(call: Call) -> Tensor:
    """Run all LoRAs in one pass, at weights that follow their curves."""
    if not any(use.curve for use in call.uses):
        raise OptionError(
            "The composition schedule needs a curve of some LoRA: curve=[(0, 1), (0.5, 0)], --curve 0:1,0.5:0."
        )
    return call.together()


@composition(
    "switch", source="Zhong et al., 2024, Multi-LoRA Composition, https://arxiv.org/abs/2402.16843", passes="1"
)
def switch(call: Call, *, every: Count = 5) -> Tensor:
    """Run one LoRA at a time, the next one after some steps.

    Args:
        call: One call of the denoiser.
        every: Steps after which the next LoRA takes over.
    """
    active = torch.zeros_like(call.weights)
    calls = getattr(call.pipe.scheduler, "order", 1)  # schedulers such as Heun's call the denoiser twice per step
    active[call.drawing.step // calls // every % call.count] = 1.0
    return call.together(active * call.weights)
