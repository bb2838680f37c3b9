"""Denoisers that predict a flow: how prompts become their inputs, and how they are called.

What differs between them is in the table of families, see `loramerge.files.architectures.calls`; the rest is read off
the signatures of the pipeline and of the denoiser.
"""

import inspect
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..files.architectures.calls import FlowCall

STEPS = 1000
"""Timesteps of σ = 1."""

LENGTH = "length"
"""The condition that says how many tokens each text has, for a denoiser that takes a list of texts."""


def encode(flow: FlowCall, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Encode prompts as the pipeline does.

    Returns:
        The denoiser's arguments, ``(prompts, …)``; texts are padded at their end to the longest.
    """
    found = pipe.encode_prompt(**_options(pipe, prompts), device=device)
    given: dict[str, Tensor] = {}
    for name, value in zip(flow.text, found, strict=False):
        if name:
            given |= _batched(name, value, len(prompts))
    for name in flow.text:  # a pipeline leaves out a mask that would hide nothing
        if name.endswith("mask") and name not in given:
            text = next(iter(given.values()))
            given[name] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    return given


def _options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the arguments that the pipeline's own call gives ``encode_prompt`` without guidance."""
    takes = inspect.signature(pipe.encode_prompt).parameters
    own = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {}
    for name, parameter in takes.items():
        if name in ("prompt", "prompt_2", "prompt_3"):
            options[name] = list(prompts)  # some pipelines write into the list
        elif name == "do_classifier_free_guidance":
            options[name] = False
        elif name in own and parameter.default is not inspect.Parameter.empty:
            options[name] = own[name].default
    return options


def _batched(name: str, value: Any, count: int) -> dict[str, Tensor]:
    """Bring what a pipeline returns into tensors with one row per prompt."""
    if value is None:
        return {}
    if isinstance(value, list):
        lengths = torch.tensor([len(text) for text in value], device=value[0].device)
        return {name: pad_sequence(value, batch_first=True), LENGTH: lengths}
    return {name: value.expand(count, *value.shape) if value.ndim == 2 and name.endswith("_ids") else value}


def call(flow: FlowCall, pipe: Any, sample: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Call the denoiser as the pipeline does.

    Args:
        flow: The family's entry.
        pipe: The pipeline.
        sample: The noised latents, in the family's form, ``(batch, …)``.
        timestep: ``(batch,)`` in [0, 1000].  Wan 5B's pipeline gives one per token, which are all the same without a picture.
        given: The result of `encode`.

    Returns:
        The velocity from data to noise, of the shape of ``sample``.
    """
    model = pipe.transformer
    inputs = {flow.sample: list(sample) if flow.latents == "list" else sample, **_text(given)}
    inputs[flow.time] = _time(flow, timestep)
    for name in inspect.signature(model.forward).parameters:
        if name == "guidance" and model.config.guidance_embeds:
            inputs[name] = torch.full((len(sample),), pipe_guidance(pipe), device=sample.device)
        elif name == "img_ids":
            inputs[name] = _places(sample, len(model.config.axes_dims_rope))
        elif name == "img_shapes":
            inputs[name] = [[(1, isqrt(sample.shape[1]), isqrt(sample.shape[1]))]] * len(sample)
    found = model(**inputs, return_dict=False)[0]
    velocity: Tensor = torch.stack(list(found)) if flow.latents == "list" else found
    return -velocity if flow.reversed else velocity


def pipe_guidance(pipe: Any) -> float:
    """Return the guidance that a pipeline gives its denoiser as an input unless it is told another."""
    return float(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)


def _text(given: Mapping[str, Tensor]) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(given)
    lengths = inputs.pop(LENGTH, None)
    for name, value in inputs.items():
        if lengths is not None:
            inputs[name] = [text[:length] for text, length in zip(value, lengths.tolist(), strict=True)]
        elif name.endswith("_ids"):
            inputs[name] = value[0]
    return inputs


def _time(flow: FlowCall, timestep: Tensor) -> Tensor:
    if flow.clock == "sigma":
        return timestep / STEPS
    if flow.clock == "signal":
        return (STEPS - timestep) / STEPS
    return timestep


def _places(sample: Tensor, axes: int) -> Tensor:
    """Return the row and the column of each token of a square picture, on the second and the third axis of places."""
    side = isqrt(sample.shape[1])
    places = torch.zeros(side, side, axes, device=sample.device)
    places[..., 1] = torch.arange(side)[:, None]
    places[..., 2] = torch.arange(side)[None, :]
    return places.reshape(-1, axes)


def shape(flow: FlowCall, channels: int, side: int) -> tuple[int, ...]:
    """Return the shape of one picture's latents.

    Args:
        flow: The family's entry.
        channels: The denoiser's channels.
        side: Rows of latents.
    """
    if flow.latents == "tokens":
        return ((side // flow.patch) ** 2, channels)
    return (channels, side, side) if flow.latents == "image" else (channels, 1, side, side)


def arranged(flow: FlowCall, latents: Tensor) -> Tensor:
    """Bring latents of pictures, ``(count, channels, side, side)``, into the denoiser's form."""
    if flow.latents == "image":
        return latents
    if flow.latents != "tokens":
        return latents[:, :, None]
    count, channels, side, _ = latents.shape
    n, p = side // flow.patch, flow.patch
    parts = latents.reshape(count, channels, n, p, n, p).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(count, n * n, channels * p * p)
